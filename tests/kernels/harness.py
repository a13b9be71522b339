"""Helpers of the kernel tests: device, guard bands, poisoned outputs, layouts, comparisons."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import mimkit
from mimkit_kernels._dispatch import HAS_TRITON, INTERPRETED

ON_GPU = torch.cuda.is_available() and not INTERPRETED
CAN_LAUNCH = ON_GPU or INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

launches = pytest.mark.launches
needs_gpu = pytest.mark.skipif(
    not ON_GPU, reason="needs a GPU: torch.cuda.is_available() is False, or the interpreter is on"
)
compiles = pytest.mark.skipif(
    INTERPRETED or not HAS_TRITON,
    reason="ahead-of-time compilation needs Triton, and fails in a process with the interpreter",
)
# Ten examples of a property in the quick tier, or five: the interpreter needs 0.1 s per program.
few = settings(max_examples=max(settings.default.max_examples * 2 // 5, 1))
very_few = settings(max_examples=max(settings.default.max_examples // 5, 1))
# Tests that the quick tier leaves out, but not on a GPU, where they are fast.
long_tier = () if ON_GPU else pytest.mark.full

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Relative to the largest value. The interpreter truncates to bfloat16, so it errs by a whole unit.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
GUARD = 64  # elements; keeps 16-byte alignment

# For tests of operators that take seconds per dtype.
DTYPES = (torch.float32, *(pytest.param(dtype, marks=long_tier) for dtype in FLOATS[1:]))
float_dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(["contiguous", "contiguous", "unaligned", "strided", "transposed"])


def poison(dtype: torch.dtype) -> float | int:
    """Return a value that makes every result it enters wrong."""
    if dtype.is_floating_point:
        return float("nan")
    return {torch.uint8: 171, torch.bool: 1}.get(dtype, torch.iinfo(dtype).min // 2 + 171)


def guarded_buffer(numel: int, dtype: torch.dtype, device: torch.device, offset: int = 0) -> Any:
    """Return a poisoned buffer and its part between two guard bands."""
    size = 2 * GUARD + numel + offset
    buffer = torch.full((size,), poison(dtype), dtype=dtype, device=device)
    return buffer, buffer[GUARD + offset : GUARD + offset + numel]


def laid_out(tensor: Tensor, layout: str = "contiguous", device: torch.device = DEVICE) -> Tensor:
    """Copy a tensor to the device under test, into the given layout, between guard bands."""
    shape = tensor.shape
    if layout == "transposed" and tensor.ndim >= 2:
        return laid_out(tensor.transpose(-1, -2), device=device).transpose(-1, -2)
    if layout == "strided" and tensor.ndim:
        _, inner = guarded_buffer(2 * tensor.numel(), tensor.dtype, device)
        view = inner.view(*shape[:-1], 2 * shape[-1])[..., ::2]
    else:
        offset = 1 if layout == "unaligned" else 0
        _, inner = guarded_buffer(tensor.numel(), tensor.dtype, device, offset)
        view = inner.view(shape)
    return view.copy_(tensor)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Replace `torch.empty` in launchers by poisoned memory between guard bands.

    On exit, check that the guard bands are unchanged and no output value is still poisoned.
    """
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    real = torch.empty

    def empty(size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "meta":
            return real(size, dtype=dtype, device=device)
        shape = torch.Size(size)
        buffer, inner = guarded_buffer(shape.numel(), dtype, device)
        # A tensor on the same memory that is not a view, which autograd does not accept.
        output = real(0, dtype=dtype, device=device)
        output.set_(buffer.untyped_storage(), GUARD, shape)
        made.append((buffer, inner, output))
        return output

    with mock.patch.object(torch, "empty", empty):
        yield
    for buffer, inner, _ in made:
        n = inner.numel()
        for band in (buffer[:GUARD], buffer[GUARD + n :]):
            assert bool(is_poison(band).all()), "a kernel wrote outside its output"
        if inner.dtype not in (torch.uint8, torch.bool):
            assert not bool(is_poison(inner).any()), "a kernel did not write all of its output"


def is_poison(values: Tensor) -> Tensor:
    """Return which values still equal `poison`."""
    if values.dtype.is_floating_point:
        return values.isnan()
    return values == poison(values.dtype)


def assert_near(
    result: Tensor, expected: Tensor, dtype: torch.dtype, *, least: float = 1e-3
) -> None:
    """Assert equality within the rounding of `dtype`, relative to the largest expected value.

    If all expected values are below `least`, errors are relative to `least` instead.
    """
    assert result.shape == expected.shape
    assert bool(result.isfinite().all() if result.is_floating_point() else True)
    if not expected.numel():
        return
    error = (result.double() - expected.double()).abs().max().item()
    bound = TOLERANCE[dtype] * max(expected.double().abs().max().item(), least)
    assert error <= bound, f"error {error:.3g}, tolerance {bound:.3g}"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a meta tensor, for recording launches."""
    return torch.empty(shape, dtype=dtype, device="meta")


def random(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw normal values in float64 on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_reference(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function with the plain PyTorch path."""

    def reference(*inputs: Any) -> Tensor:
        with mimkit.use("reference"):
            return function(*inputs)

    return reference


def gradients(call: Callable[..., Tensor], *leaves: Tensor, seed: int = 0) -> list[Tensor]:
    """Return the gradients of a fixed random projection of `call(*leaves)`."""
    output = call(*leaves)
    generator = torch.Generator().manual_seed(seed)
    # Eighths are exact in every dtype: the reference in float64 gets the same ones.
    upstream = torch.randint(-16, 17, output.shape, generator=generator).to(output) / 8
    return list(torch.autograd.grad(output, leaves, upstream))
