"""Property test: an operator with a hand-written kernel equals its plain PyTorch reference."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Tensor]

# Relative to the reference's largest value; by the least precise dtype of inputs and output.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}


def assert_op_correct(op: Function, reference: Function, inputs: Sequence[Any]) -> None:
    """Check an operator against a reference: values, gradients, compilation, checkpoints, autocast.

    Both are called as `f(*inputs)` and return one tensor. The reference runs in float64. The value
    and the gradients of all floating-point inputs that require one must agree: in eager mode, with
    `torch.compile(fullgraph=True)` and with activation checkpointing. Under autocast, both must
    return the same dtype.

    Args:
        op: The function to check.
        reference: The correct function; must be differentiable and run in float64.
        inputs: Arguments; tensors of any floating-point dtype up to float64.

    Raises:
        AssertionError: At the first difference larger than rounding.

    Source:
        mimkit's own; `torch.library.opcheck` and `torch.autograd.gradcheck` check other properties.

    Example:
        >>> x = torch.randn(3, 5, requires_grad=True)
        >>> assert_op_correct(torch.sigmoid, lambda x: 1 / (1 + torch.exp(-x)), [x])
        >>> assert_op_correct(lambda x: x.detach().exp() + 0 * x, torch.exp, [x])
        Traceback (most recent call last):
        AssertionError: the gradient of input 0 is off by ...: expected ..., got ...
    """
    expected = _run(reference, [_widened(value) for value in inputs])
    tolerance = max(
        (_TOLERANCE.get(v.dtype, 0.0) for v in (*inputs, op(*inputs)) if isinstance(v, Tensor)),
        default=0.0,
    )
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for name, function in (
        ("", op),
        (" under torch.compile", compiled),
        (" under checkpoint", lambda *inputs: checkpoint(op, *inputs, use_reentrant=False)),
    ):
        for (what, result), (_, right) in zip(_run(function, inputs), expected, strict=True):
            _assert_close(what + name, result, right, tolerance)
    device = next(value.device.type for value in inputs if isinstance(value, Tensor))
    is_half = any(isinstance(v, Tensor) and v.dtype == torch.float16 for v in inputs)
    low = torch.float16 if is_half else torch.bfloat16  # PyTorch cannot promote one to the other
    with torch.autocast(device, dtype=low), torch.no_grad():
        ours, theirs = op(*inputs).dtype, reference(*inputs).dtype
    if ours != theirs:
        raise AssertionError(
            f"expected {theirs}, the reference's dtype, under autocast; got {ours}"
        )


def _widened(value: Any) -> Any:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def _run(function: Function, inputs: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """Return the value, and the input gradients of a fixed random projection of it."""
    value = function(*inputs)
    results = [("the value", value.detach())]
    leaves = [(i, v) for i, v in enumerate(inputs) if isinstance(v, Tensor) and v.requires_grad]
    if leaves:
        generator = torch.Generator().manual_seed(0)
        upstream = torch.randn(value.shape, generator=generator).to(value)
        if not value.requires_grad:
            raise AssertionError("the value has no gradient, though an input requires one")
        tensors = [leaf for _, leaf in leaves]
        grads = torch.autograd.grad(value, tensors, upstream, allow_unused=True)
        for (i, leaf), grad in zip(leaves, grads, strict=True):
            # An unused input has a gradient of zero.
            grad = torch.zeros_like(leaf) if grad is None else grad
            results.append((f"the gradient of input {i}", grad))
    return results


def _assert_close(what: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    if result.shape != expected.shape:
        raise AssertionError(
            f"{what} has shape {tuple(result.shape)}; expected {tuple(expected.shape)}"
        )
    if not expected.numel():
        return
    errors = (result.double() - expected.double()).abs()
    bound = tolerance * max(float(expected.abs().max()), 1e-3)
    wrong = ~(errors <= bound)  # also catches nan
    if bool(wrong.any()):
        worst = int(errors.nan_to_num(nan=torch.inf).argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), errors.shape)]
        raise AssertionError(
            f"{what} is off by {float(errors.flatten()[worst]):.2g} at {place}: expected "
            f"{float(expected.flatten()[worst]):.6g}, got {float(result.flatten()[worst]):.6g}; "
            f"at most {bound:.2g} is rounding ({int(wrong.sum())} of {wrong.numel()} values "
            "are off)"
        )
