"""Helpers of the launchers: device, block sizes, strides."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `tensor`, which may not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_2_from(n: int) -> int:
    """Return the smallest power of 2 that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


class Rows(NamedTuple):
    """Rows of a [batch, rows, dim] tensor, as kernels address them; kernels take it whole.

    Attributes:
        data: The tensor. Values of one row are contiguous.
        batch: Stride from one sample to the next.
        row: Stride from one row to the next.
    """

    data: Tensor
    batch: int
    row: int


def rows_in_place(tensor: Tensor) -> Rows:
    """Describe the rows of a tensor, copied only if the values of a row are not contiguous."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return Rows(tensor, tensor.stride(0), tensor.stride(1))
