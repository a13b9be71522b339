"""Property test: a mean loss is exact under gradient accumulation and data parallelism."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimkit import masking
from mimkit.masking import Mask, RaggedMask, key, uniform

Loss = Callable[[Tensor, Tensor, Any], Tensor]
Inputs = Callable[[Any], tuple[Tensor, Tensor]]

_GRID, _NUM_MASKED = (3, 4), 7
# Samples in each part of a batch, smallest batch first. Equal parts also stand for processes.
_SPLITS = [(1, 1), (1, 2), (1, 1, 1), (3, 3), (2, 2, 2), (1, 5), (1, 2, 3)]
_TOLERANCE = 1e-5  # relative; float32 sums in another order


def assert_reduction_exact(
    loss: Loss, *, inputs: Inputs | None = None, ragged: bool = False
) -> None:
    """Check that the mean loss of a batch equals the mean over its parts.

    Parts are micro-batches of gradient accumulation, weighted by their number of samples, or the
    equal parts of data-parallel processes, whose gradients are averaged. The value and the gradient
    of a shared weight are compared. A mask without masked tokens must give a loss of 0 and a zero
    gradient.

    Args:
        loss: Called as `loss(prediction, target, mask)`; returns a scalar.
        inputs: Function from a mask to prediction (floating-point) and target, one row per sample;
            `None` for random values of shape [batch, masked, 5].
        ragged: Whether to use a `RaggedMask`, with one row per masked token ([masked of all
            samples, 5] if `inputs` is `None`). Every sample must have the same weight in the mean.

    Raises:
        AssertionError: At the first property that fails, for the smallest batch that shows it.

    Source:
        mimkit's own.

    Example:
        >>> from mimkit import losses
        >>> assert_reduction_exact(losses.masked_mse)
        >>> assert_reduction_exact(lambda p, t, mask: (p - t).square().sum())
        Traceback (most recent call last):
        AssertionError: expected the value of 2 samples, ...
        >>> assert_reduction_exact(losses.masked_mse, ragged=True)
        >>> assert_reduction_exact(lambda p, t, mask: (p - t).square().mean(), ragged=True)
        Traceback (most recent call last):
        AssertionError: expected the value of 2 samples, ...
    """
    make = _random_inputs if inputs is None else inputs
    draw = _ragged_mask if ragged else _mask
    for split in _SPLITS:
        mask = draw(sum(split), _NUM_MASKED)
        prediction, target = make(mask)
        whole = _run(loss, prediction, target, mask)
        rows = torch.arange(sum(split)).split(list(split))
        parts = [
            _run(loss, _take(prediction, mask, i), _take(target, mask, i), mask[i]) for i in rows
        ]
        for what, expected, actual in zip(
            ("value", "gradient"), whole, _weighted_mean(parts, split), strict=True
        ):
            _assert_same(what, expected, actual, split)
    mask = draw(2, 0)
    for what, actual in zip(("value", "gradient"), _run(loss, *make(mask), mask), strict=True):
        if not bool((actual == 0).all()):  # also catches nan
            raise AssertionError(
                f"expected a {what} of 0 where nothing is masked; got {_largest(actual)}"
            )


def _mask(batch_size: int, num_masked: int) -> Mask:
    return uniform(key(range(batch_size), seed=0), _GRID, num_masked=num_masked)


def _ragged_mask(batch_size: int, num_masked: int) -> RaggedMask:
    """Make a ragged mask: each sample masks two tokens fewer than the one before."""
    counts = [max(num_masked - 2 * sample, 0) for sample in range(batch_size)]
    return masking.ragged(uniform, key(range(batch_size), seed=0), _GRID, num_masked=counts)


def _take(values: Tensor, mask: Mask | RaggedMask, samples: Tensor) -> Tensor:
    if isinstance(mask, Mask):
        return values[samples]
    rows = mask.split_masked(values)
    return torch.cat([rows[sample] for sample in samples.tolist()])


def _random_inputs(mask: Mask | RaggedMask) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Another scale for each sample, so that wrong weights of samples change the mean.
    scale = torch.arange(1, mask.batch_size + 1)
    if isinstance(mask, Mask):
        shape: tuple[int, ...] = (mask.batch_size, mask.num_masked, 5)
        scale = scale.view(-1, 1, 1)
    else:
        shape = (len(mask.masked_ids), 5)
        scale = scale.repeat_interleave(mask.cu_masked.diff()).view(-1, 1)
    return torch.randn(shape, generator=generator) * scale, torch.randn(shape, generator=generator)


def _run(
    loss: Loss, prediction: Tensor, target: Tensor, mask: Mask | RaggedMask
) -> tuple[Tensor, Tensor]:
    """Return the loss, and its gradient with respect to a weight on the last axis."""
    weight = torch.ones(prediction.shape[-1]).to(prediction).requires_grad_()
    value = loss(prediction * weight, target, mask)
    if value.ndim:
        raise AssertionError(f"expected a scalar loss; got shape {tuple(value.shape)}")
    (grad,) = torch.autograd.grad(value, weight)
    return value.detach().double(), grad.double()


def _weighted_mean(
    parts: Sequence[tuple[Tensor, Tensor]], split: Sequence[int]
) -> tuple[Tensor, Tensor]:
    shares = [size / sum(split) for size in split]
    values, grads = (
        torch.stack([share * part[i] for share, part in zip(shares, parts, strict=True)]).sum(dim=0)
        for i in (0, 1)
    )
    return values, grads


def _assert_same(what: str, expected: Tensor, actual: Tensor, split: Sequence[int]) -> None:
    bound = _TOLERANCE * float(expected.abs().max())
    if bool(((actual - expected).abs() <= bound).all()):
        return
    kind = "micro-batches or processes" if len(set(split)) == 1 else "micro-batches"
    raise AssertionError(
        f"expected the {what} of {sum(split)} samples, {_largest(expected)}, as the mean over "
        f"parts of {tuple(split)} samples ({kind}); got {_largest(actual)}"
    )


def _largest(values: Tensor) -> str:
    largest = values.flatten()[values.abs().argmax()] if values.numel() else values.sum()
    return f"{float(largest):.6g}" + (" (its largest entry)" if values.ndim else "")
