"""Linear cross-entropy: the kernel that replaces logits by gradients in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
from mimkit.losses import linear_cross_entropy
from mimkit.testing import assert_op_correct
from mimkit_kernels.linear_cross_entropy import (
    _CHUNK_VALUES,
    _launch,
    _scale,
    linear_cross_entropy_backward_op,
    linear_cross_entropy_op,
    softmax_gradient_reference,
)
from tests.kernels.aot import memory_order, record
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
    laid_out,
    launches,
    meta,
    random,
)
from tests.strategies import generators


def at_cae(dtype: torch.dtype) -> None:
    rows = _CHUNK_VALUES["cuda"] // 8192
    results = meta(rows), meta(rows)
    _launch(meta(rows, 8192, dtype=dtype), meta(rows, dtype=torch.int64), *results)


LAUNCHES = {
    str(dtype).removeprefix("torch."): lambda dtype=dtype: at_cae(dtype)
    for dtype in reversed(FLOATS)
}


@launches
@few
@given(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 17, 64, 97, 4096, 4099, 8192]),
    float_dtypes,
    st.sampled_from([1.0, 30.0]),
    generators(),
)
def test_losses_accuracies_and_gradients_match_the_reference(rows, words, dtype, scale, generator):
    logits = (scale * random(generator, rows, words)).to(dtype)
    target = torch.randint(words, (rows,), generator=generator)
    right = [torch.full((rows,), float("nan"), device=DEVICE) for _ in range(2)]
    spent = logits.to(DEVICE, torch.float32, copy=True)
    expected = softmax_gradient_reference(spent, target.to(DEVICE), *right)
    result, ours = laid_out(logits), [laid_out(torch.zeros(rows)) for _ in range(2)]
    assert _launch(result, laid_out(target), *ours) is result
    assert_near(result, expected, dtype)
    for values, reference in zip(ours, right, strict=True):
        assert_near(values, reference, torch.float32)
    for values in (result, *ours):  # the guard bands
        buffer = torch.empty(0, dtype=values.dtype, device=DEVICE).set_(values.untyped_storage())
        assert buffer[:64].isnan().all()
        assert buffer[-64:].isnan().all()


@launches
def test_first_of_equal_logits_is_the_prediction():
    logits = torch.zeros(2, 8, device=DEVICE)
    losses, hits = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    _launch(logits, torch.tensor([0, 1], device=DEVICE), losses, hits)
    assert hits.tolist() == [1.0, 0.0]


@launches
def test_target_outside_the_vocabulary_gives_nan():
    logits = torch.zeros(2, 8, device=DEVICE)
    losses, hits = torch.zeros(2, device=DEVICE), torch.zeros(2, device=DEVICE)
    _launch(logits, torch.tensor([-1, 8], device=DEVICE), losses, hits)
    assert losses.isnan().all()


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_works_in_training(dtype, monkeypatch):
    monkeypatch.setitem(_CHUNK_VALUES, DEVICE.type, 5 * 37)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        random(generator, *shape).to(DEVICE, dtype).requires_grad_()
        for shape in ((12, 8), (37, 8), (37,))
    )
    target = torch.randint(37, (12,), generator=generator).to(DEVICE)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, bias, target)

    with mimkit.use("triton"):
        assert_op_correct(loss, by_reference(loss), [x, weight, bias])


@compiles
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_target_logit_is_loaded_before_the_row_is_overwritten(target):
    """After the last barrier, only wide loads may follow, those of the second loop.

    There each thread loads and overwrites the same addresses of the row. The narrow load of the
    target's logit would race with the stores of other warps.
    """
    (launch,) = record(LAUNCHES["float32"])
    order = memory_order(launch, target)
    last_barrier = max(i for i, (kind, _) in enumerate(order) if kind == "barrier")
    assert {bits for kind, bits in order[:last_barrier] if kind == "load"} >= {32, 128}
    assert {bits for kind, bits in order[last_barrier:] if kind == "load"} == {128}


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_pass_opcheck(dtype, needs_gradient):
    x, weight = torch.randn(4, 3).to(dtype), torch.randn(7, 3).to(dtype)
    for leaf in (x, weight):
        leaf.requires_grad_(needs_gradient)
    target = torch.tensor([0, 6, 3, 3])
    torch.library.opcheck(
        linear_cross_entropy_op, (x, weight, None, target, dtype, needs_gradient, False)
    )
    inputs = (torch.tensor(2.0), x.detach(), weight.detach(), *(torch.randn(3, 2) for _ in "xwb"))
    torch.library.opcheck(linear_cross_entropy_backward_op, inputs)
    assert torch.equal(_scale(*inputs)[0], 2 * inputs[3])


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("linear_cross_entropy", case, target)
