"""A check of class targets."""

import torch
from jaxtyping import Integer
from torch import Tensor

from mimkit._settings import settings


def check_classes(name: str, target: Integer[Tensor, "..."], num_classes: int) -> None:
    """Check that a target holds integers in [0, num_classes).

    Values are checked on a CPU, where that is cheap, and with `mimkit.use(check=True)`.

    Raises:
        TypeError: If the values are not integers.
        ValueError: If a value is out of range.
    """
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {target.dtype}")
    is_cheap = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if (is_cheap or settings.check) and target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must be in [0, {num_classes}); got {low} to {high}")
