"""Which path a call takes: the operator with its Triton kernel, or the plain PyTorch reference."""

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

# Triton looks at the variable when it is imported, so it cannot change later.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Settings:
    """The current choice of `mimkit.use`."""

    backend: Backend = "auto"


def takes_kernel(name: str, tensor: Tensor, find_obstacle: Callable[[], str | None]) -> bool:
    """Whether a call takes the kernel.

    By itself it does where `tensor` is on a GPU, Triton is there, and nothing stands in the way.
    Under `torch.func` transforms and forward-mode derivatives, which operators do not support, the
    reference is taken.

    Args:
        name: The operator, for messages.
        tensor: Decides by its device.
        find_obstacle: Returns why the kernel cannot take this call; `None` if it can.

    Raises:
        ValueError: The kernel is asked for (`mimkit.use("triton")`), but cannot take the call.
    """
    if Settings.backend == "reference" or (Settings.backend == "auto" and not tensor.is_cuda):
        return False
    obstacle = find_obstacle()
    if is_transformed():
        obstacle = obstacle or "torch.func transforms and forward-mode derivatives"
    if Settings.backend == "auto":
        if not HAS_TRITON and not torch.compiler.is_compiling():
            _warn_without_triton()
        return HAS_TRITON and obstacle is None
    if not (HAS_TRITON and (tensor.is_cuda or INTERPRETED)):
        needed = "tensors on a GPU" if HAS_TRITON else "Triton, which is not installed"
        obstacle = obstacle or f"tensors on {tensor.device}: it needs {needed}"
    if obstacle is not None:
        raise ValueError(
            f"the Triton kernel of {name} does not take {obstacle}; "
            'mimkit.use("auto") takes the PyTorch path there'
        )
    return True


def is_opaque(tensor: Tensor) -> bool:
    """Whether `torch.compile` on a CPU gets an operator as it is, instead of its reference.

    For references that Inductor would only make slower, and for whose many steps it takes minutes.
    """
    is_traced = torch.compiler.is_compiling() and tensor.device.type == "cpu"
    return is_traced and Settings.backend == "auto" and not is_transformed()


def dtype_obstacle(**dtypes: torch.dtype) -> str | None:
    """Name the first of some tensors whose type kernels do not take."""
    for name, dtype in dtypes.items():
        if dtype not in KERNEL_DTYPES:
            return f"{name} of {dtype}"
    return None


def is_transformed() -> bool:
    """Whether a `torch.func` transform or a forward-mode derivative is under way."""
    # Both are private, but torch.compile traces them; a test notices if that ends.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@cache
def _warn_without_triton() -> None:
    warnings.warn(
        "Triton is not installed, so mimkit runs its plain PyTorch path on the GPU; "
        "`pip install triton` brings the kernels",
        stacklevel=2,
    )
