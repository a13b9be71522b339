"""Data types that the kernels accept, and those in which they compute."""

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_obstacle(**dtypes: torch.dtype) -> str | None:
    """Name the first tensor whose dtype the kernels do not accept; `None` if they accept all."""
    for name, dtype in dtypes.items():
        if dtype not in KERNEL_DTYPES:
            return f"{name} of {dtype}"
    return None


def linear_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype in which `F.linear(x, weight)` computes, under autocast too."""
    device = x.device.type
    can_autocast = x.dtype != torch.float64 and device != "meta"
    if can_autocast and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(x.dtype, weight.dtype)


def promoted_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the promoted dtype of all tensors that are not `None`."""
    first, *others = (tensor.dtype for tensor in tensors if tensor is not None)
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first
