"""Helpers of the launchers: device, block sizes, strides, constant tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Made = TypeVar("Made")


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


def constant(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep the constant tensors that a function makes, for each of its last 64 arguments.

    A copy from the host synchronizes with a GPU and cannot be captured in a CUDA graph, so it is
    made once. With `torch.compile(mode="reduce-overhead")`, what the first call makes belongs to
    the memory of its graph and is not kept. So the fake functions of the operators call
    `prepare(...)`: it makes the tensors while the call is traced, in ordinary memory.
    """

    @lru_cache(maxsize=64)
    def kept(*arguments: Any) -> Made:
        with _disable_current_modes():  # no fake tensors
            return make(*arguments)

    return kept


def prepare(device: torch.device, make: Callable[[], Any]) -> None:
    """Call `make`, which makes constants of a device, if there is such a device."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        make()
