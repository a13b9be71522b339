"""The kernels that make the three layer-normed inputs of a regressor block."""

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
from tests.kernels.harness import (
    DEVICE,
    FLOATS,
    assert_near,
    by_reference,
    few,
    float_dtypes,
    gradients,
    laid_out,
    launches,
    layouts,
    meta,
    needs_gpu,
    poisoned_outputs,
    random,
)
from tests.strategies import generators

EPS = 1e-6


def at_cae(dtype: torch.dtype, width: int, *, needs_positions: bool = False) -> None:
    """Latents and positions come in float32 under autocast; what is made has the type."""
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
    """Draw tokens, positions and norms; nothing visible and nothing masked among them."""
    visible = draw(st.integers(0, 5))
    masked = draw(st.integers(0 if visible else 1, 5))
    # Of fewer than some values, the gradients of a norm are rounding alone; of 1, they are 0.
    batch, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 7, 16, 37, 64, 130]))
    dtype, weight_dtype, layout = draw(float_dtypes), draw(float_dtypes), draw(layouts)
    generator, positions_learn = draw(generators()), draw(st.booleans())
    shapes = [(batch, visible, width), (batch, masked, width)]
    tokens = [laid_out(random(generator, *shape).to(dtype), layout) for shape in shapes]
    positions = [laid_out(random(generator, *shape).float(), layout) for shape in shapes]
    parameters = [laid_out(random(generator, width).to(weight_dtype)) for _ in range(6)]
    for leaf in (*tokens, *parameters, *(positions if positions_learn else ())):
        leaf.requires_grad_()
    return [*tokens, *positions, *parameters]


def make_all(*tensors: Tensor) -> Tensor:
    """Return query, key and value, one behind the other."""
    return torch.cat(kernels.regressor_inputs(*tensors[:4], tensors[4:], EPS), dim=1)


def differentiate(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return what is made of some tensors, and the gradients of those that learn."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return make_all(*tensors), gradients(lambda *_: make_all(*tensors), *leaves)


@launches
@few
@given(regressors())
def test_the_three_inputs_and_all_gradients_are_the_references(tensors):
    with mimkit.use("triton"), poisoned_outputs():
        result, grads = differentiate(tensors)
    with mimkit.use("reference"):
        assert make_all(*tensors).dtype == result.dtype
        expected, expected_grads = differentiate(
            [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
        )
    assert_near(result, expected, result.dtype)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    for grad, right, leaf in zip(grads, expected_grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, right, max((leaf.dtype, result.dtype), key=lambda d: torch.finfo(d).eps))


@launches
def test_many_rows_are_summed_in_two_stages_the_same_way_each_time(monkeypatch):
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
def test_one_mask_token_for_all_is_read_where_it_lies():
    token = torch.randn(1, 1, 24, device=DEVICE, requires_grad=True)
    visible, visible_positions = torch.randn(2, 3, 4, 24, device=DEVICE)
    table = torch.randn(5, 24, device=DEVICE)
    parameters = [torch.randn(24, device=DEVICE) for _ in range(6)]

    def make(token: Tensor) -> Tensor:
        queries, positions = token.expand(3, 5, -1), table.expand(3, -1, -1)
        return make_all(visible, queries, visible_positions, positions, *parameters)

    with mimkit.use("triton"), poisoned_outputs():
        result, (grad,) = make(token), gradients(make, token)
    with mimkit.use("reference"):
        assert_near(result, make(token), torch.float32)
        (expected,) = gradients(make, token)
    assert_near(grad, expected, torch.float32)


@launches
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_three_inputs_keep_what_training_needs(dtype):
    tensors = [torch.randn(2, n, 12, device=DEVICE).to(dtype) for n in (3, 4, 3, 4)]
    tensors += [torch.randn(12, device=DEVICE).to(dtype) for _ in range(6)]
    with mimkit.use("triton"):
        assert_op_correct(
            make_all, by_reference(make_all), [tensor.requires_grad_() for tensor in tensors]
        )


@launches
@pytest.mark.parametrize("starts_from_a_token", [False, True])
def test_a_regressor_is_the_same_with_the_kernel(starts_from_a_token):
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
def test_rows_that_are_too_wide_are_refused_in_words():
    tensors = [torch.randn(1, 1, MAX_WIDTH + 1, device=DEVICE) for _ in range(4)]
    tensors += [torch.randn(MAX_WIDTH + 1, device=DEVICE) for _ in range(6)]
    with (
        mimkit.use("triton"),
        pytest.raises(ValueError, match="tokens of width 2049: 2048 at most"),
    ):
        make_all(*tensors)
    tensors = [tensor[..., :8].double() for tensor in tensors]
    with mimkit.use("triton"), pytest.raises(ValueError, match="visible of torch.float64"):
        make_all(*tensors)


@needs_gpu
def test_a_captured_block_replays():
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


@pytest.mark.parametrize("positions_learn", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_registrations_hold(dtype, positions_learn):
    tokens = [torch.randn(2, n, 8).to(dtype).requires_grad_() for n in (3, 4)]
    positions = [torch.randn(2, n, 8).requires_grad_(positions_learn) for n in (3, 4)]
    parameters = [torch.randn(8).to(dtype).requires_grad_() for _ in range(6)]
    inputs = (*tokens, *positions, *parameters, EPS, dtype)
    torch.library.opcheck(regressor_inputs_op, inputs)
    tensors = [tensor.detach() for tensor in (*tokens, *positions, *parameters)]
    *made, statistics = regressor_inputs_op(*tensors, EPS, dtype)
    torch.library.opcheck(
        regressor_inputs_backward_op,
        (*made, *tensors[:4], *tensors[4::2], statistics, positions_learn),
    )


def test_the_operators_reference_has_the_gradients_of_the_formula():
    """The registered pair on a CPU, which opcheck compares with itself only."""
    tensors = [torch.randn(2, n, 8, requires_grad=True) for n in (3, 4, 3, 4)]
    tensors += [torch.randn(8, requires_grad=True) for _ in range(6)]

    def by_operator(*tensors: Tensor) -> Tensor:
        return torch.cat(regressor_inputs_op(*tensors, EPS, torch.float32)[:3], dim=1)

    with mimkit.use("reference"):
        expected = gradients(make_all, *tensors)
    for grad, right in zip(gradients(by_operator, *tensors), expected, strict=True):
        assert_near(grad, right, torch.float32)
