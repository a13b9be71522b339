"""Choose the path of a call: the operator with its Triton kernel, or the PyTorch reference."""

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backend = Literal["auto", "reference", "triton"]

# Triton reads the variable when it is imported, so a later change has no effect.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None


class Settings:
    """What `mimkit.use` sets."""

    def __init__(self) -> None:
        self.backend: Backend = "auto"


# An object: what PyTorch 2.11 compiles does not notice when an attribute of a class changes.
settings = Settings()


def takes_kernel(name: str, tensor: Tensor, find_obstacle: Callable[[], str | None]) -> bool:
    """Return whether a call uses the kernel.

    With `mimkit.use("auto")` it does if `tensor` is on a GPU, Triton is installed and there is no
    obstacle. Operators do not support `torch.func` transforms or forward-mode derivatives, so these
    use the reference.

    Args:
        name: Name of the operator, for messages.
        tensor: The tensor whose device decides.
        find_obstacle: Returns why the kernel does not support this call; `None` if it does.

    Raises:
        ValueError: `mimkit.use("triton")` requires the kernel, which does not support the call.
    """
    if settings.backend == "reference" or (settings.backend == "auto" and not tensor.is_cuda):
        return False
    obstacle = find_obstacle()
    if is_transformed():
        obstacle = obstacle or "torch.func transforms and forward-mode derivatives"
    if settings.backend == "auto":
        if not HAS_TRITON and not torch.compiler.is_compiling():
            _warn_without_triton()
        return HAS_TRITON and obstacle is None
    if not (HAS_TRITON and (tensor.is_cuda or INTERPRETED)):
        needed = "tensors on a GPU" if HAS_TRITON else "Triton, which is not installed"
        obstacle = obstacle or f"tensors on {tensor.device}: it needs {needed}"
    if obstacle is not None:
        raise ValueError(
            f"the Triton kernel of {name} does not take {obstacle}; "
            'mimkit.use("auto") uses the PyTorch path instead'
        )
    return True


def is_opaque(tensor: Tensor) -> bool:
    """Return whether `torch.compile` on a CPU calls the operator instead of tracing its reference.

    For references with so many steps that Inductor compiles for minutes and runs more slowly. ONNX
    has no such operators, and gets the reference.
    """
    is_traced = torch.compiler.is_compiling() and tensor.device.type == "cpu"
    is_traced = is_traced and not torch.onnx.is_in_onnx_export()
    return is_traced and settings.backend == "auto" and not is_transformed()


def is_transformed() -> bool:
    """Return whether a `torch.func` transform or a forward-mode derivative is active."""
    # Both are private, but torch.compile can trace them; a test fails if that changes.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@cache
def _warn_without_triton() -> None:
    warnings.warn(
        "Triton is not installed, so mimkit runs its plain PyTorch path on the GPU; "
        "`pip install triton` enables the kernels",
        stacklevel=2,
    )
