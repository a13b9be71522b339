"""Depth-wise convolution of visible positions: packed equals dense."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mimkit import masking
from mimkit.conv import masked_depthwise_conv2d, packed_depthwise_conv2d
from mimkit.masking import Mask
from mimkit.patches import neighbors, pack_cells, unpack_cells
from tests.strategies import generators, masked_maps

Case = tuple[Tensor, Mask, tuple[int, int], Tensor, Tensor | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a feature map, a mask, the size of a cell, filters and biases."""
    feature_map, mask, cell = draw(masked_maps())
    kernel = draw(st.tuples(*[st.sampled_from([1, 3, 5, 7, 9])] * 2))
    generator, channels = draw(generators()), feature_map.shape[1]
    weight = torch.randn(channels, 1, *kernel, dtype=torch.float64, generator=generator)
    bias = torch.randn(channels, dtype=torch.float64, generator=generator)
    return feature_map, mask, cell, weight, bias if draw(st.booleans()) else None


def needed_reach(weight: Tensor, cell: tuple[int, int]) -> int:
    return max(-(-(k // 2) // size) for k, size in zip(weight.shape[2:], cell, strict=True))


def packed(
    feature_map: Tensor, mask: Mask, cell: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    around = neighbors(mask, reach=needed_reach(weight, cell))
    return packed_depthwise_conv2d(pack_cells(feature_map, mask), weight, bias, around, cell=cell)


def dense(
    feature_map: Tensor, mask: Mask, cell: tuple[int, int], weight: Tensor, bias: Tensor | None
) -> Tensor:
    return pack_cells(masked_depthwise_conv2d(feature_map, weight, bias, mask), mask)


def gradients(convolve, case: Case) -> list[Tensor]:
    feature_map, mask, cell, weight, bias = case
    leaves = [
        leaf.clone().requires_grad_() for leaf in (feature_map, weight, bias) if leaf is not None
    ]
    out = convolve(leaves[0], mask, cell, leaves[1], leaves[2] if bias is not None else None)
    return list(torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True))


@given(cases())
def test_packed_equals_dense_at_the_visible_positions(case):
    torch.testing.assert_close(packed(*case), dense(*case))


@given(cases())
def test_packed_gradients_equal_dense_ones(case):
    for ours, theirs in zip(gradients(packed, case), gradients(dense, case), strict=True):
        torch.testing.assert_close(ours, theirs)


def case_with(num_visible: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 12, generator=generator)
    mask = Mask.from_noise(noise, (3, 4), 12 - num_visible)
    feature_map = torch.randn(2, 3, 6, 12, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 1, 5, 7, dtype=torch.float64, generator=generator)
    return feature_map, mask, (2, 3), weight, torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("num_visible", [0, 1, 11, 12])
def test_packed_equals_dense_for_extreme_numbers_of_visible_tokens(num_visible):
    case = case_with(num_visible)
    torch.testing.assert_close(packed(*case), dense(*case))
    for ours, theirs in zip(gradients(packed, case), gradients(dense, case), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_masked_positions_it_is_a_plain_convolution():
    feature_map, mask, cell, weight, bias = case_with(12)
    plain = torch.nn.functional.conv2d(feature_map, weight, bias, padding=(2, 3), groups=3)
    torch.testing.assert_close(
        unpack_cells(packed(feature_map, mask, cell, weight, bias), mask, cell=cell), plain
    )


@given(cases(), generators())
def test_masked_positions_do_not_change_the_output(case, generator):
    feature_map, mask, cell, weight, bias = case
    hidden = mask.refine(cell).is_masked.unsqueeze(1)
    noise = torch.randn(feature_map.shape, dtype=torch.float64, generator=generator)
    for value in (noise, torch.full_like(noise, torch.nan)):
        other = torch.where(hidden, value, feature_map)
        for convolve in (packed, dense):
            expected = convolve(feature_map, mask, cell, weight, bias)
            assert torch.equal(convolve(other, mask, cell, weight, bias), expected)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("convolve", [packed, dense])
def test_first_and_second_derivatives_pass_gradcheck(convolve, with_bias):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((2, 2, 4, 3), (2, 1, 3, 3), (2,))
    ]

    def call(feature_map: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolve(feature_map, mask, (2, 1), weight, bias)

    inputs = tuple(leaves if with_bias else leaves[:2])
    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_and_keeps_its_dtype(dtype):
    case = case_with(6)
    low = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in case)
    out = packed(*low)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(out.double(), dense(*case), rtol=tolerance, atol=4 * tolerance)
    for ours, theirs in zip(gradients(packed, low), gradients(dense, case), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= 2 * tolerance * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_casts_as_a_convolution_does(dtype):
    case = tuple(x.to(dtype) if isinstance(x, Tensor) else x for x in case_with(6))
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(*case).dtype == dense(*case).dtype


@pytest.mark.full
@pytest.mark.untyped
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic):
    torch.compiler.reset()
    case = tuple(x.float() if isinstance(x, Tensor) else x for x in case_with(6))
    compiled = torch.compile(packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(compiled(*case), packed(*case))
    for ours, theirs in zip(gradients(compiled, case), gradients(packed, case), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_works_under_vmap():
    feature_map, mask, cell, weight, bias = case_with(6)
    weights = torch.stack([weight, weight.flip(3)])
    both = torch.vmap(lambda w: packed(feature_map, mask, cell, w, bias))(weights)
    one_by_one = [packed(feature_map, mask, cell, w, bias) for w in weights]
    torch.testing.assert_close(both, torch.stack(one_by_one))


def test_forward_mode_raises():
    feature_map, mask, cell, weight, bias = case_with(6)
    with pytest.raises(RuntimeError, match="(?i)forward"):
        torch.func.jvp(
            lambda x: packed(x, mask, cell, weight, bias), (feature_map,), (feature_map,)
        )


FEATURES, MASK, CELL, WEIGHT, BIAS = case_with(6)
CELLS, AROUND = pack_cells(FEATURES, MASK), neighbors(MASK, reach=2)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: packed_depthwise_conv2d(CELLS, WEIGHT[..., :6], BIAS, AROUND, cell=CELL),
            r"odd.*\(5, 6\)",
        ),
        (lambda: masked_depthwise_conv2d(FEATURES, WEIGHT[:, :, :4], BIAS, MASK), r"odd.*\(4, 7\)"),
        (
            lambda: packed_depthwise_conv2d(
                CELLS, WEIGHT, BIAS, neighbors(MASK, reach=0), cell=CELL
            ),
            "reach=1.*window of 1",
        ),
        (
            lambda: packed_depthwise_conv2d(CELLS, WEIGHT, BIAS, AROUND, cell=2),
            r"\(2, 2\) hold 4 positions; got 6",
        ),
        (
            lambda: packed_depthwise_conv2d(CELLS[:1], WEIGHT, BIAS, AROUND, cell=CELL),
            r"neighbors \(2, 6, 25\).*cells \(1, 6, 6, 3\)",
        ),
        (
            lambda: packed_depthwise_conv2d(CELLS, WEIGHT[:2], BIAS, AROUND, cell=CELL),
            r"weight must have channels = 3.*\(2, 1, 5, 7\)",
        ),
        (
            lambda: packed_depthwise_conv2d(CELLS, WEIGHT, BIAS[:2], AROUND, cell=CELL),
            r"bias must have channels = 3.*\(2,\)",
        ),
        (lambda: masked_depthwise_conv2d(FEATURES[:, :, :5], WEIGHT, BIAS, MASK), r"\(5, 12\)"),
        (lambda: masked_depthwise_conv2d(FEATURES[:1], WEIGHT, BIAS, MASK), "2 samples.* has 1"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
