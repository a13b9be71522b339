"""Layer-normed inputs of a regressor block, and their gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.nn import ContextRegressor
from mimkit.testing import assert_op_correct
from mimkit_kernels.regressor_inputs import (
    MAX_WIDTH,
    _launch_backward,
    _launch_forward,
    regressor_inputs_backward_op,
    regressor_inputs_op,
)
from tests.kernels.figures import check_case, compiled_cases
from tests.kernels.harness import (
    DEVICE,
    DTYPES,
    FLOATS,
    assert_near,
    by_reference,
    compiles,
    few,
    float_dtypes,
    gradients,
    laid_out,
    launches,
    layouts,
    long_tier,
    meta,
    needs_gpu,
    poisoned_outputs,
    random,
)
from tests.strategies import generators

EPS = 1e-6


def at_cae(dtype: torch.dtype, width: int, *, needs_positions: bool = False) -> None:
    """Launch as under autocast: inputs are float32, outputs have the given dtype."""
    batch, part = 64, (64, 98, width)
    tensors = [meta(*part) for _ in range(4)]
    parameters = [meta(width) for _ in range(6)]
    *made, statistics = _launch_forward(*tensors, *parameters, EPS, dtype)
    assert statistics.shape == (batch, 196, 4)
    _launch_backward(*made, *tensors, *parameters[::2], statistics, needs_positions)


LAUNCHES = {
    f"width {width}, {str(dtype).removeprefix('torch.')}": lambda dtype=dtype, width=width: at_cae(
        dtype, width
    )
    for width in (768, 1024)
    for dtype in FLOATS
} | {
    "width 768, float32, positions": lambda: at_cae(torch.float32, 768, needs_positions=True),
}


@st.composite
def regressors(draw: st.DrawFn) -> list[Tensor]:
    """Draw tokens, positions and norms; there may be no visible tokens or no queries."""
    visible = draw(st.integers(0, 5))
    masked = draw(st.integers(0 if visible else 1, 5))
    # Small widths other than 1 are left out: their gradients of a norm consist of rounding errors.
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 16, 37, 64, 130]))
    dtype, weight_dtype, layout = draw(float_dtypes), draw(float_dtypes), draw(layouts)
    generator, learned_positions = draw(generators()), draw(st.booleans())
    shapes = [(batch, visible, width), (batch, masked, width)]
    tokens = [laid_out(random(generator, *shape).to(dtype), layout) for shape in shapes]
    positions = [laid_out(random(generator, *shape).float(), layout) for shape in shapes]
    parameters = [laid_out(random(generator, width).to(weight_dtype)) for _ in range(6)]
    for leaf in (*tokens, *parameters, *(positions if learned_positions else ())):
        leaf.requires_grad_()
    return [*tokens, *positions, *parameters]


def all_inputs(*tensors: Tensor) -> Tensor:
    """Return query, key and value, concatenated."""
    return torch.cat(kernels.regressor_inputs(*tensors[:4], tensors[4:], EPS), dim=1)


def differentiate(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs, and the gradients of all tensors that require them."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return all_inputs(*tensors), gradients(lambda *_: all_inputs(*tensors), *leaves)


@launches
@few
@given(regressors())
def test_inputs_and_gradients_match_the_reference(tensors):
    with mimkit.use("triton"), poisoned_outputs():
        result, grads = differentiate(tensors)
    with mimkit.use("reference"):
        assert all_inputs(*tensors).dtype == result.dtype
        expected, expected_grads = differentiate(
            [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        )
    assert_near(result, expected, result.dtype)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    # With width 1, gradients of a norm's input are 0 up to rounding errors. These are amplified by
    # the norm's scale, 1 / sqrt(EPS) = 1000, so that is what errors are relative to. (Fused
    # multiply-add, as on a GPU, leaves the most.)
    least = EPS**-0.5 if tensors[0].shape[2] == 1 else 1e-3
    for grad, right, leaf in zip(grads, expected_grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        widest = max((leaf.dtype, result.dtype), key=lambda d: torch.finfo(d).eps)
        assert_near(grad, right, widest, least=least)


@launches
def test_sums_in_two_stages_are_deterministic(monkeypatch):
    monkeypatch.setitem(_launch_backward.__globals__, "_PARTS", 3)
    tensors = [torch.randn(2, 5, 40, device=DEVICE) for _ in range(4)]
    tensors += [torch.randn(40, device=DEVICE).requires_grad_() for _ in range(6)]
    with mimkit.use("triton"), poisoned_outputs():
        _, grads = differentiate(tensors)
        _, again = differentiate(tensors)
    with mimkit.use("reference"):
        _, expected = differentiate(tensors)
    for grad, same, right in zip(grads, again, expected, strict=True):
        assert torch.equal(grad, same)
        assert_near(grad, right, torch.float32)


@launches
def test_expanded_mask_token_and_positions_are_not_copied():
    token = torch.randn(1, 1, 24, device=DEVICE, requires_grad=True)
    visible, visible_positions = torch.randn(2, 3, 4, 24, device=DEVICE)
    table = torch.randn(5, 24, device=DEVICE)
    parameters = [torch.randn(24, device=DEVICE) for _ in range(6)]

    def make(token: Tensor) -> Tensor:
        queries, positions = token.expand(3, 5, -1), table.expand(3, -1, -1)
        return all_inputs(visible, queries, visible_positions, positions, *parameters)

    with mimkit.use("triton"), poisoned_outputs():
        result, (grad,) = make(token), gradients(make, token)
    with mimkit.use("reference"):
        assert_near(result, make(token), torch.float32)
        (expected,) = gradients(make, token)
    assert_near(grad, expected, torch.float32)


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_works_in_training(dtype):
    tensors = [torch.randn(2, n, 12, device=DEVICE).to(dtype) for n in (3, 4, 3, 4)]
    tensors += [torch.randn(12, device=DEVICE).to(dtype) for _ in range(6)]
    with mimkit.use("triton"):
        assert_op_correct(
            all_inputs, by_reference(all_inputs), [tensor.requires_grad_() for tensor in tensors]
        )


@launches
@pytest.mark.parametrize("starts_from_a_token", [pytest.param(False, marks=long_tier), True])
def test_regressor_with_kernel_matches_the_reference(starts_from_a_token):
    regressor = ContextRegressor(dim=24, depth=2, heads=3).to(DEVICE)
    weights = list(regressor.parameters())
    tokens = [torch.randn(2, n, 24, device=DEVICE) for n in (3, 4, 3, 4)]
    token, positions = torch.randn(8, 24, device=DEVICE).tensor_split([1])
    mask = masking.uniform(masking.key([0, 1], seed=0), (7,), num_masked=4).to(DEVICE)

    def regress(*weights: Tensor) -> Tensor:
        if starts_from_a_token:
            return regressor.from_mask_token(token[0], tokens[0], positions, mask)
        return regressor(*tokens)

    with mimkit.use("triton"):
        result, grads = regress(), gradients(regress, *weights)
    with mimkit.use("reference"):
        expected, expected_grads = regress(), gradients(regress, *weights)
    assert_near(result, expected, torch.float32)
    largest = max(grad.abs().max() for grad in expected_grads)
    for grad, right in zip(grads, expected_grads, strict=True):
        assert (grad - right).abs().max() <= 1e-5 * largest


@launches
def test_error_names_wide_rows_and_unsupported_dtypes():
    tensors = [torch.randn(1, 1, MAX_WIDTH + 1, device=DEVICE) for _ in range(4)]
    tensors += [torch.randn(MAX_WIDTH + 1, device=DEVICE) for _ in range(6)]
    with (
        mimkit.use("triton"),
        pytest.raises(ValueError, match="tokens of width 2049: 2048 at most"),
    ):
        all_inputs(*tensors)
    tensors = [tensor[..., :8].double() for tensor in tensors]
    with mimkit.use("triton"), pytest.raises(ValueError, match="visible of torch.float64"):
        all_inputs(*tensors)


@needs_gpu
def test_block_replays_in_a_cuda_graph():
    regressor = ContextRegressor(dim=64, depth=1, heads=4).to(DEVICE)
    tokens = [torch.randn(2, n, 64, device=DEVICE) for n in (3, 4, 3, 4)]

    def step() -> list[Tensor]:
        return gradients(lambda *_: regressor(*tokens), *regressor.parameters())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    upstream = torch.randn(2, 3, 64, device=DEVICE)
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(regressor(*tokens), list(regressor.parameters()), upstream)
    tokens[1].mul_(2)
    graph.replay()
    expected = torch.autograd.grad(regressor(*tokens), list(regressor.parameters()), upstream)
    for result, right in zip(captured, expected, strict=True):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learned_positions", [True, False])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(dtype, marks=long_tier) for dtype in FLOATS[1:])],
    ids=str,
)
def test_operators_pass_opcheck(dtype, learned_positions):
    tokens = [torch.randn(2, n, 8).to(dtype).requires_grad_() for n in (3, 4)]
    positions = [torch.randn(2, n, 8).requires_grad_(learned_positions) for n in (3, 4)]
    parameters = [torch.randn(8).to(dtype).requires_grad_() for _ in range(6)]
    inputs = (*tokens, *positions, *parameters, EPS, dtype)
    torch.library.opcheck(regressor_inputs_op, inputs)
    tensors = [tensor.detach() for tensor in (*tokens, *positions, *parameters)]
    *made, statistics = regressor_inputs_op(*tensors, EPS, dtype)
    torch.library.opcheck(
        regressor_inputs_backward_op,
        (*made, *tensors[:4], *tensors[4::2], statistics, learned_positions),
    )


def test_registered_reference_matches_autograd():
    """opcheck compares the registered forward and backward only with themselves."""
    tensors = [torch.randn(2, n, 8, requires_grad=True) for n in (3, 4, 3, 4)]
    tensors += [torch.randn(8, requires_grad=True) for _ in range(6)]

    def by_operator(*tensors: Tensor) -> Tensor:
        return torch.cat(regressor_inputs_op(*tensors, EPS, torch.float32)[:3], dim=1)

    with mimkit.use("reference"):
        expected = gradients(all_inputs, *tensors)
    for grad, right in zip(gradients(by_operator, *tensors), expected, strict=True):
        assert_near(grad, right, torch.float32)


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("regressor_inputs", case, target)
