"""What losses over classes check of their targets."""

import torch
from jaxtyping import Integer
from torch import Tensor

from mimkit._settings import Settings


def check_classes(name: str, target: Integer[Tensor, "..."], num_classes: int) -> None:
    """Check that a target names classes that exist.

    Values are looked at where that costs nothing, on a CPU, or on demand: `mimkit.use(check=True)`.

    Raises:
        TypeError: Not integers.
        ValueError: A class out of range.
    """
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {target.dtype}")
    at_hand = target.device.type == "cpu" and not torch.compiler.is_compiling()
    if (at_hand or Settings.check) and target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must be in [0, {num_classes}); got {low} to {high}")
