"""Gathering and restoring tokens."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.patches import gather_visible, restore
from mimkit.testing import assert_op_correct
from mimkit_kernels.move_tokens import (
    _launch_gather,
    _launch_restore,
    _launch_scatter,
    _launch_sum,
    gather_tokens_op,
    restore_tokens_op,
    scatter_tokens_op,
    sum_tokens_op,
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
    meta,
    poisoned_outputs,
    random,
)
from tests.strategies import generators


def at_imagenet(dtype: torch.dtype, kind: str) -> None:
    """Gather encoder tokens of width 768, or restore decoder tokens of width 512."""
    ids, masked_ids = (meta(256, n, dtype=torch.int64) for n in (49, 147))
    match kind:
        case "gather":
            _launch_gather(meta(256, 197, 768, dtype=dtype), ids, 1)
        case "scatter":
            _launch_scatter(meta(256, 50, 768, dtype=dtype), ids, 196, 1)
        case "sum":
            _launch_sum(meta(256, 197, 512, dtype=dtype), masked_ids, 1)
        case _:
            fill = meta(256, 147, 512, dtype=dtype) if kind == "restore, own fill" else meta(512)
            positions = meta(197, 512) if kind == "restore, positions" else None
            visible = meta(256, 50, 512, dtype=dtype)
            _launch_restore(visible, fill.to(dtype), ids, masked_ids, positions, 1)


KINDS = ("restore, positions", "restore", "restore, own fill", "gather", "scatter", "sum")
LAUNCHES = {
    f"{kind}, {str(dtype).removeprefix('torch.')}": lambda dtype=dtype, kind=kind: at_imagenet(
        dtype, kind
    )
    for kind in KINDS
    for dtype in reversed(FLOATS)
}


@st.composite
def sequences(draw: st.DrawFn) -> dict[str, Any]:
    """Draw sizes and a split of the positions, which may leave no visible or no masked ones."""
    batch, length, prefix = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 7)),
        draw(st.integers(0, 2)),
    )
    dim = draw(st.sampled_from([1, 3, 16, 37, 128, 130, 1031]))
    generator = draw(generators())
    order = torch.rand(batch, length, generator=generator).argsort(dim=1)
    visible = draw(st.integers(0, length))
    ids = {"visible_ids": order[:, :visible], "masked_ids": order[:, visible:]}
    return {"shape": (batch, length, dim), "prefix": prefix, "generator": generator, **ids}


@launches
@few
@given(sequences(), float_dtypes, layouts)
def test_gathered_tokens_and_gradient_match_the_reference(case, dtype, layout):
    batch, length, dim = case["shape"]
    tokens = random(case["generator"], batch, case["prefix"] + length, dim).to(dtype)
    tokens, ids = laid_out(tokens, layout), laid_out(case["visible_ids"])

    def take(tokens: Tensor) -> Tensor:
        return kernels.gather_tokens(tokens, ids, case["prefix"])

    with mimkit.use("triton"), poisoned_outputs():
        result = take(tokens)
        (grad,) = gradients(take, tokens.requires_grad_())
    with mimkit.use("reference"):
        assert torch.equal(result, take(tokens))
        (expected,) = gradients(take, tokens)
    assert torch.equal(grad, expected)


@launches
@few
@given(sequences(), float_dtypes, float_dtypes, layouts, st.booleans(), st.booleans())
def test_restored_tokens_and_gradients_match_the_reference(
    case, dtype, fill_dtype, layout, fills_each, adds_positions
):
    (batch, _, dim), prefix, generator = case["shape"], case["prefix"], case["generator"]
    visible_ids, masked_ids = laid_out(case["visible_ids"]), laid_out(case["masked_ids"])
    visible = random(generator, batch, prefix + visible_ids.shape[1], dim).to(dtype)
    fill = random(generator, *((batch, masked_ids.shape[1], dim) if fills_each else (dim,)))
    positions = random(generator, prefix + case["shape"][1], dim).float()
    leaves = [laid_out(visible, layout), laid_out(fill.to(fill_dtype))]
    leaves += [laid_out(positions)] if adds_positions else []

    def put_back(visible: Tensor, fill: Tensor, positions: Tensor | None = None) -> Tensor:
        return kernels.restore_tokens(visible, fill, visible_ids, masked_ids, positions, prefix)

    for leaf in leaves:
        leaf.requires_grad_()
    with mimkit.use("triton"), poisoned_outputs():
        result = put_back(*leaves)
        grads = gradients(put_back, *leaves)
    with mimkit.use("reference"):
        expected_dtype = put_back(*leaves).dtype
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        expected = put_back(*wide)
        expected_grads = gradients(put_back, *wide)
    assert result.dtype == expected_dtype
    assert_near(result, expected, result.dtype)
    for grad, right, leaf in zip(grads, expected_grads, leaves, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, right, max((leaf.dtype, result.dtype), key=lambda d: torch.finfo(d).eps))


@launches
def test_sums_in_two_stages_are_deterministic(monkeypatch):
    monkeypatch.setattr("mimkit_kernels.move_tokens._SUM_PARTS", 3)
    tokens = torch.randn(2, 3 + 50, 130, device=DEVICE)
    ids = torch.rand(2, 50, device=DEVICE).argsort(dim=1)[:, :41]
    with poisoned_outputs():
        total = _launch_sum(tokens, ids, 3)
    expected = torch.stack([t[3 + i] for t, i in zip(tokens, ids, strict=True)]).double()
    torch.testing.assert_close(total.double(), expected.sum(dim=(0, 1)), rtol=1e-5, atol=1e-4)
    assert torch.equal(total, _launch_sum(tokens, ids, 3))


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_work_in_training(dtype):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5).to(DEVICE)
    tokens = torch.randn(2, 7, 5, device=DEVICE).to(dtype).requires_grad_()
    fill = torch.randn(5, device=DEVICE).to(dtype).requires_grad_()
    positions = torch.randn(7, 5, device=DEVICE).to(dtype).requires_grad_()

    def there_and_back(tokens: Tensor, fill: Tensor, positions: Tensor) -> Tensor:
        visible = gather_visible(tokens, mask, num_prefix=1)
        return restore(visible, mask, fill, positions=positions, num_prefix=1)

    with mimkit.use("triton"):
        assert_op_correct(there_and_back, by_reference(there_and_back), [tokens, fill, positions])


@launches
def test_second_derivative_of_gather_is_correct():
    tokens = torch.randn(1, 4, 2, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[2, 0]], device=DEVICE)
    with mimkit.use("triton"):
        taken = kernels.gather_tokens(tokens, ids, 1)
        (grad,) = torch.autograd.grad(taken.pow(3).sum(), tokens, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), tokens)
    expected = 6 * tokens.detach()
    expected[:, 2] = 0
    torch.testing.assert_close(second, expected)


@launches
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("fills_each", [False, True])
def test_second_derivatives_of_restore_are_correct(fills_each, prefix):
    """Also of a shared fill vector, whose gradient is a sum."""
    visible_ids, masked_ids = torch.tensor([[2], [0]]), torch.tensor([[1, 0], [1, 2]])
    shapes = ((2, prefix + 1, 3), (2, 2, 3) if fills_each else (3,), (prefix + 3, 3))
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]

    def second(dtype: torch.dtype) -> list[Tensor]:
        inputs = [leaf.to(dtype) for leaf in leaves]
        ids = visible_ids.to(DEVICE), masked_ids.to(DEVICE)
        tokens = kernels.restore_tokens(*inputs[:2], *ids, inputs[2], prefix)
        grads = torch.autograd.grad(tokens.pow(3).sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(grad.pow(2).sum() for grad in grads), leaves))

    with mimkit.use("triton"):
        ours = second(torch.float32)
    with mimkit.use("reference"):
        expected = second(torch.float64)
    for grad, right in zip(ours, expected, strict=True):
        assert_near(grad, right, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_pass_opcheck(dtype):
    visible_ids, masked_ids = torch.tensor([[2, 0], [1, 3]]), torch.tensor([[1, 3], [0, 2]])
    tokens = torch.randn(2, 5, 3).to(dtype).requires_grad_()
    visible = torch.randn(2, 3, 3).to(dtype).requires_grad_()
    positions = torch.randn(5, 3).to(dtype).requires_grad_()
    torch.library.opcheck(gather_tokens_op, (tokens, visible_ids, 1))
    torch.library.opcheck(scatter_tokens_op, (visible, visible_ids, 4, 1))
    torch.library.opcheck(sum_tokens_op, (tokens, visible_ids, 1))
    for fill in (torch.randn(3), torch.randn(2, 2, 3)):
        fill = fill.to(dtype).requires_grad_()
        inputs = (visible, fill, visible_ids, masked_ids, positions, 1)
        torch.library.opcheck(restore_tokens_op, inputs)


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("move_tokens", case, target)
