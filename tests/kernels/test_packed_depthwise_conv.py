"""Depth-wise convolution of packed cells, and the gradient of the filter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.conv import packed_depthwise_conv2d
from mimkit.masking import Mask
from mimkit.patches import neighbors
from mimkit.testing import assert_op_correct
from mimkit_kernels.packed_depthwise_conv import (
    _launch_conv,
    _launch_weight_gradient,
    packed_depthwise_conv_op,
    weight_gradient_op,
)
from tests.kernels.aot import compile_launch, record
from tests.kernels.figures import check_case, compiled_cases
from tests.kernels.harness import (
    DEVICE,
    FLOATS,
    assert_near,
    by_reference,
    compiles,
    gradients,
    laid_out,
    launches,
    layouts,
    long_tier,
    meta,
    poisoned_outputs,
    random,
    very_few,
)
from tests.strategies import generators

NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}
STAGES = {"stage 1": (256, 4), "stage 2": (384, 2)}  # of ConvMAE-B: channels, side of a cell


def convolution(dtype: torch.dtype, channels: int, side: int, taps: int = 5) -> None:
    cells, weight = meta(256, 49, side**2, channels, dtype=dtype), meta(channels, 1, taps, taps)
    bias, around = meta(channels, dtype=dtype), meta(256, 49, 9, dtype=torch.int32)
    _launch_conv(cells, weight.to(dtype), bias, around, (side, side))


def filter_gradient(dtype: torch.dtype, channels: int, side: int, taps: int = 5) -> None:
    cells, around = meta(256, 49, side**2, channels, dtype=dtype), meta(256, 49, 9)
    _launch_weight_gradient(cells, cells, around.to(torch.int32), (side, side), (taps, taps))


LAUNCHES = {
    f"{prefix}{stage}, {NAMES[dtype]}": lambda call=call, dtype=dtype, shape=shape: call(
        dtype, *shape
    )
    for prefix, call in (("", convolution), ("filter's gradient, ", filter_gradient))
    for stage, shape in STAGES.items()
    for dtype in (torch.float32, torch.bfloat16)  # float16 compiles to the code of bfloat16
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[int, int]]:
    """Draw cells, a filter, a bias, neighbors and a cell size."""
    generator = draw(generators())
    grid = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
    cell = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4, 5, 8])] * 2))
    kernel = draw(st.tuples(*[st.sampled_from([1, 3, 5])] * 2))
    channels, batch = draw(st.sampled_from([1, 3, 17, 32])), draw(st.integers(1, 2))
    num_tokens = grid[0] * grid[1]
    noise = torch.rand(batch, num_tokens, generator=generator)
    mask = Mask.from_noise(noise, grid, draw(st.integers(0, num_tokens - 1)))
    reach = max(-(-(k // 2) // size) for k, size in zip(kernel, cell, strict=True))
    around = neighbors(mask, reach=reach + draw(st.integers(0, 1)))
    cells = random(generator, batch, mask.num_visible, cell[0] * cell[1], channels)
    weight = random(generator, channels, 1, *kernel)
    bias = random(generator, channels) if draw(st.booleans()) else None
    return cells, weight, bias, around, cell


@launches
@very_few  # the test of gradients launches the same kernel twice per example
@given(cases(), st.sampled_from(FLOATS), layouts)
def test_convolution_matches_the_reference(case, dtype, layout):
    cells, weight, bias, around, cell = case
    cells, weight = laid_out(cells.to(dtype), layout), laid_out(weight.to(dtype), layout)
    bias, around = None if bias is None else laid_out(bias.to(dtype), layout), laid_out(around)
    with mimkit.use("triton"), poisoned_outputs():
        result = kernels.packed_depthwise_conv(cells, weight, bias, around, cell)
    wide = (x if x is None else x.double() for x in (cells, weight, bias))
    with mimkit.use("reference"):
        expected = kernels.packed_depthwise_conv(*wide, around, cell)
    assert result.dtype == dtype
    assert_near(result, expected, dtype)


@launches
@very_few
@given(cases(), st.sampled_from(FLOATS))
def test_gradients_match_the_reference(case, dtype):
    cells, weight, bias, around, cell = case
    leaves = [laid_out(x.to(dtype)) for x in (cells, weight, bias) if x is not None]
    around = laid_out(around)

    def convolve(cells: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return kernels.packed_depthwise_conv(cells, weight, bias, around, cell)

    with mimkit.use("triton"), poisoned_outputs():
        results = gradients(convolve, *(leaf.clone().requires_grad_() for leaf in leaves))
    with mimkit.use("reference"):
        expected = gradients(convolve, *(leaf.double().requires_grad_() for leaf in leaves))
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == dtype
        assert_near(result, right, dtype)


@launches
def test_sums_over_many_cells_are_deterministic():
    mask = masking.uniform(masking.key([0, 1], seed=0), (5, 4), num_masked=2).to(DEVICE)
    cells = torch.randn(2, mask.num_visible, 2, 5, device=DEVICE)
    grad, around = torch.randn_like(cells), neighbors(mask)
    with mimkit.use("triton"), poisoned_outputs():
        first, again = (
            _launch_weight_gradient(cells, grad, around, (1, 2), (1, 3)) for _ in range(2)
        )
    expected = weight_gradient_op(cells.double(), grad.double(), around, [1, 2], [1, 3])
    for result, same, right in zip(first, again, expected, strict=True):
        assert torch.equal(result, same)
        assert_near(result, right, torch.float32)


@launches
def test_gradients_of_filter_and_bias_share_no_memory():
    cells, around = torch.randn(1, 1, 2, 1, device=DEVICE), torch.zeros(1, 1, 1, device=DEVICE)
    with mimkit.use("triton"):
        made = _launch_weight_gradient(cells, cells, around.to(torch.int32), (1, 2), (1, 1))
    first, second = (part.untyped_storage().data_ptr() for part in made)
    assert first != second


@launches
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=long_tier) for dtype in FLOATS[1:])],
    ids=str,
)
def test_operator_works_in_training(dtype):
    mask = masking.uniform(masking.key([0], seed=0), (1, 3), num_masked=1).to(DEVICE)
    around = neighbors(mask)
    leaves = [
        torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
        for shape in ((1, 2, 4, 6), (6, 1, 3, 3), (6,))
    ]

    def convolve(cells: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return packed_depthwise_conv2d(cells, weight, bias, around, cell=2)

    with mimkit.use("triton"):
        assert_op_correct(convolve, by_reference(convolve), leaves)


@launches
def test_second_derivatives_match_the_reference():
    mask = masking.uniform(masking.key([0], seed=0), (1, 2), num_masked=0).to(DEVICE)
    around = neighbors(mask)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        random(generator, *shape).float().to(DEVICE).requires_grad_()
        for shape in ((1, 2, 4, 2), (2, 1, 3, 3), (2,))
    ]

    def second(backend: str) -> list[Tensor]:
        with mimkit.use(backend):
            out = packed_depthwise_conv2d(*leaves, around, cell=2)
            grads = torch.autograd.grad(out.pow(3).sum(), leaves, create_graph=True)
            scalar = sum(grad.square().sum() for grad in grads)
            return list(torch.autograd.grad(scalar, leaves))

    for ours, theirs in zip(second("triton"), second("reference"), strict=True):
        assert_near(ours, theirs, torch.float32)


@pytest.mark.parametrize("with_bias", [True, False])
def test_operators_pass_opcheck(with_bias):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    cells = torch.randn(2, 3, 2, 4, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, requires_grad=True)
    bias = torch.randn(4, requires_grad=True) if with_bias else None
    around = neighbors(mask, reach=1)
    torch.library.opcheck(packed_depthwise_conv_op, (cells, weight, bias, around, [1, 2]))
    grad = torch.randn(2, 3, 2, 4, requires_grad=True)
    torch.library.opcheck(weight_gradient_op, (cells, grad, around, [1, 2], [3, 3]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cells": torch.float64}, "float64"),
        ({"cells": torch.bfloat16}, "bfloat16 with a filter of torch.float32"),
    ],
)
def test_error_names_unsupported_dtypes(change, message):
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), 0.5)
    cells = torch.randn(1, 2, 4, 3).to(change["cells"])
    weight = torch.randn(3, 1, 3, 3)
    weight = weight.double() if cells.dtype == torch.float64 else weight
    with mimkit.use("triton"), pytest.raises(ValueError, match=message):
        kernels.packed_depthwise_conv(cells, weight, None, neighbors(mask), (2, 2))


def test_error_names_a_filter_with_too_many_taps():
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), 0.5)
    cells, weight = torch.randn(1, 2, 16, 3), torch.randn(3, 1, 7, 9)
    arguments = (cells, weight, None, neighbors(mask), (4, 4))
    with mimkit.use("triton"), pytest.raises(ValueError, match=r"\(7, 9\) taps: 49 at most"):
        kernels.packed_depthwise_conv(*arguments)
    assert kernels.packed_depthwise_conv(*arguments).shape == cells.shape


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("packed_depthwise_conv", case, target)


@compiles
@pytest.mark.full
@pytest.mark.parametrize("launch", [convolution, filter_gradient])
def test_the_largest_filter_fits_into_registers(launch):
    # Cells of more than one tile, and idle lanes.
    for compiled in record(lambda: launch(torch.bfloat16, 100, 8, taps=7)):
        assert compile_launch(compiled, "sm_90").local == 0
