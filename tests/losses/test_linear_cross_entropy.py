"""Cross-entropy over a large vocabulary, in chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mimkit.losses import linear_cross_entropy
from mimkit_kernels.linear_cross_entropy import _CHUNK_VALUES
from tests.strategies import generators

sizes = st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 17))


@pytest.fixture(
    params=[1, 40, 1 << 21], ids=["one row per chunk", "several rows per chunk", "one chunk"]
)
def _chunk(request, monkeypatch):
    monkeypatch.setitem(_CHUNK_VALUES, "cpu", request.param)


def inputs(rows, width, words, generator, dtype=torch.float64):
    x, weight = (
        torch.randn(size, width, generator=generator, dtype=dtype).requires_grad_()
        for size in (rows, words)
    )
    bias = torch.randn(words, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, bias, torch.randint(words, (rows,), generator=generator)


def plain(x, weight, bias, target):
    return F.cross_entropy(F.linear(x, weight, bias).float(), target)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("has_bias", [True, False])
def test_loss_and_gradients_match_those_without_chunks(has_bias):
    @given(sizes, generators())
    def check(size, generator):
        x, weight, bias, target = inputs(*size, generator, torch.float32)
        bias = bias if has_bias else None
        leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
        ours = linear_cross_entropy(x, weight, bias, target)
        theirs = plain(x, weight, bias, target)
        torch.testing.assert_close(ours, theirs)
        grads = torch.autograd.grad(3 * ours, leaves)
        expected = torch.autograd.grad(3 * theirs, leaves)
        for grad, right in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, right, rtol=1e-4, atol=1e-6)

    check()


class Cut(torch.autograd.Function):
    """Return the value unchanged, with no gradient."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_without_an_incoming_gradient_there_is_none():
    x, weight, bias, target = inputs(3, 2, 5, torch.Generator().manual_seed(0))
    Cut.apply(linear_cross_entropy(x, weight, bias, target)).backward()
    assert all(leaf.grad is None for leaf in (x, weight, bias))


@given(sizes, generators())
def test_accuracy_is_the_fraction_of_correct_rows(size, generator):
    x, weight, bias, target = inputs(*size, generator)
    loss, accuracy = linear_cross_entropy(x, weight, bias, target, return_accuracy=True)
    hits = F.linear(x, weight, bias).argmax(dim=1) == target
    assert accuracy.item() == pytest.approx(hits.float().mean().item())
    assert not accuracy.requires_grad
    assert torch.equal(loss, linear_cross_entropy(x, weight, bias, target))


def test_gradients_agree_with_finite_differences():
    x, weight, bias, target = inputs(5, 3, 7, torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(
        lambda *leaves: 1.0 * linear_cross_entropy(*leaves, target),
        (x, weight, bias),
        eps=1e-3,
        atol=1e-3,
    )


def test_no_rows_give_zero_with_zero_gradient():
    x, weight, bias, target = inputs(0, 3, 7, torch.Generator().manual_seed(0), torch.float32)
    loss, accuracy = linear_cross_entropy(x, weight, bias, target, return_accuracy=True)
    assert loss == 0
    assert accuracy == 0
    for grad in torch.autograd.grad(loss, (x, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_many_rows_in_half_precision(dtype):
    """A gradient divided by 25088 rows would underflow in float16."""
    rows = 25088
    x = torch.ones(rows, 2, dtype=dtype, requires_grad=True)
    weight = torch.zeros(16, 2, dtype=dtype, requires_grad=True)
    target = torch.zeros(rows, dtype=torch.int64)
    loss = linear_cross_entropy(x, weight, None, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(torch.tensor(16.0).log().item(), rel=1e-3)
    _, grad = torch.autograd.grad(loss, (x, weight))
    assert grad[0, 0].item() == pytest.approx(1 / 16 - 1, rel=1e-2)
    assert grad[1, 0].item() == pytest.approx(1 / 16, rel=1e-2)


def test_autocast_casts_as_the_linear_layer_does():
    x, weight, bias, target = inputs(9, 16, 33, torch.Generator().manual_seed(0), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_cross_entropy(x, weight, bias, target)
        theirs = plain(x, weight, bias, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    grads = torch.autograd.grad(ours, (x, weight, bias))
    for grad, right in zip(grads, torch.autograd.grad(theirs, (x, weight, bias)), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, right, rtol=5e-2, atol=2e-3)


@pytest.mark.full
@pytest.mark.untyped
def test_it_compiles_into_one_graph():
    x, weight, bias, target = inputs(9, 4, 33, torch.Generator().manual_seed(0), torch.float32)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    loss = linear_cross_entropy(x, weight, bias, target)
    again = compiled(x, weight, bias, target)
    torch.testing.assert_close(again, loss)
    grads = torch.autograd.grad(again, (x, weight, bias))
    for grad, right in zip(grads, torch.autograd.grad(loss, (x, weight, bias)), strict=True):
        torch.testing.assert_close(grad, right)


def test_rows_may_have_any_number_of_axes():
    x, weight, bias, target = inputs(12, 4, 7, torch.Generator().manual_seed(0))
    expected = linear_cross_entropy(x, weight, bias, target)
    shaped = linear_cross_entropy(x.view(3, 4, 4), weight, bias, target.view(3, 4))
    assert torch.equal(shaped, expected)


def test_function_transforms_match_autograd():
    x, weight, _, target = inputs(3, 2, 5, torch.Generator().manual_seed(0))
    grad = torch.func.grad(lambda x: linear_cross_entropy(x, weight, None, target))(x)
    (expected,) = torch.autograd.grad(linear_cross_entropy(x, weight, None, target), x)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    _, tangent = torch.func.jvp(
        lambda x: linear_cross_entropy(x, weight, None, target), (x,), (torch.ones_like(x),)
    )
    torch.testing.assert_close(tangent.double(), expected.sum(), rtol=1e-5, atol=1e-7)


def test_a_second_derivative_raises():
    x, weight, bias, target = inputs(3, 2, 5, torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad(
        linear_cross_entropy(x, weight, bias, target), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no derivative on the kernel path"):
        grad.sum().backward()


X, WEIGHT, BIAS, TARGET = torch.randn(3, 2), torch.randn(5, 2), torch.randn(5), torch.arange(3)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, WEIGHT, BIAS, TARGET.int()), TypeError, "int64; got torch.int32"),
        ((X[:, :1], WEIGHT, BIAS, TARGET), ValueError, r"x \(3, 1\); got \(5, 2\)"),
        ((X, WEIGHT, BIAS[:1], TARGET), ValueError, r"bias must have words = 5.*got \(1,\)"),
        (
            (X, WEIGHT, BIAS, TARGET[:1]),
            ValueError,
            r"\(3,\), one word for each row of x; got \(1,\)",
        ),
        ((X, WEIGHT.to("meta"), BIAS, TARGET), ValueError, r"one device; got \['cpu', 'meta'\]"),
    ],
)
def test_errors_repeat_what_was_passed(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments)


def test_targets_out_of_range_raise_on_a_cpu():
    with pytest.raises(ValueError, match=r"targets must be in \[0, 5\); got 0 to 7"):
        linear_cross_entropy(X, WEIGHT, BIAS, torch.tensor([0, 7, 1]))
