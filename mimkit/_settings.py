"""Process-wide options, set with `mimkit.use`."""

from types import TracebackType
from typing import get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from mimkit_kernels import Backend
from mimkit_kernels import settings as kernel_settings


class Settings:
    """What `use` sets in this package."""

    def __init__(self) -> None:
        self.check: bool = False


# An object: what PyTorch 2.11 compiles does not notice when an attribute of a class changes.
settings = Settings()


def can_read_values(tensor: Tensor) -> bool:
    """Return whether values are there, and cost no synchronisation and no break of a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


class use:
    """Set options: permanently when called, for one block in a `with` statement.

    Shapes, dtypes and devices are always checked. Values (ids in range, ascending, a partition of
    the grid) are checked where a mask is made on a CPU; `check=True` checks them in every
    operation too, which synchronises a GPU.

    Args:
        backend: "auto" runs a Triton kernel where the tensors are on a GPU and the kernel supports
            them, and plain PyTorch elsewhere. "reference" always runs plain PyTorch. "triton"
            always runs the kernels, and raises for inputs that they do not support. `None` keeps
            the current backend.
        check: Whether every operation validates its masks. `None` keeps the current setting.

    Raises:
        ValueError: An unknown backend.

    Source:
        mimkit's own.

    Example:
        >>> import mimkit
        >>> with mimkit.use(check=True):
        ...     pass  # every gather, restore and loss in here validates its mask
        >>> with mimkit.use("reference"):
        ...     pass  # no Triton kernel runs in here
    """

    def __init__(self, backend: Backend | None = None, *, check: bool | None = None) -> None:
        if backend is not None and backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {get_args(Backend)}; got {backend!r}")
        self._before = (kernel_settings.backend, settings.check)
        if backend is not None:
            kernel_settings.backend = backend
        if check is not None:
            settings.check = check

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        kernel_settings.backend, settings.check = self._before
