"""What a loss owes to gradient accumulation and to data parallelism."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimkit import masking
from mimkit.masking import Mask, RaggedMask, key, uniform

Loss = Callable[[Tensor, Tensor, Any], Tensor]
Inputs = Callable[[Any], tuple[Tensor, Tensor]]

_GRID, _NUM_MASKED = (3, 4), 7
# Samples of each part, the smallest example first; equal parts are processes, too.
_SPLITS = [(1, 1), (1, 2), (1, 1, 1), (3, 3), (2, 2, 2), (1, 5), (1, 2, 3)]
_TOLERANCE = 1e-5  # relative: sums in float32, in another order


def assert_reduction_exact(
    loss: Loss, *, inputs: Inputs | None = None, ragged: bool = False
) -> None:
    """Check that a mean loss is the same for a whole batch as for its parts together.

    Parts are the micro-batches of gradient accumulation, weighted by their samples, or the equal
    shares of processes, whose gradients are averaged. Checked are the value and the gradient of a
    weight that all samples share; and that a mask which hides nothing gives 0 and no gradient.

    Args:
        loss: Called as `loss(prediction, target, mask)`, returns a scalar.
        inputs: Makes prediction (floating-point) and target for a mask, one row per sample; random
            numbers of [batch, masked, 5] if `None`.
        ragged: Whether masks are a `RaggedMask`, with one row per masked token ([masked of all
            samples, 5] if `inputs` is `None`) and samples that count the same.

    Raises:
        AssertionError: The first promise broken, for the smallest batch that breaks it.

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
        for what, expected, seen in zip(
            ("value", "gradient"), whole, _together(parts, split), strict=True
        ):
            _assert_same(what, expected, seen, split)
    mask = draw(2, 0)
    for what, seen in zip(("value", "gradient"), _run(loss, *make(mask), mask), strict=True):
        if not bool((seen == 0).all()):  # also catches nan
            raise AssertionError(
                f"expected a {what} of 0 where nothing is masked; got {_largest(seen)}"
            )


def _mask(batch_size: int, num_masked: int) -> Mask:
    return uniform(key(range(batch_size), seed=0), _GRID, num_masked=num_masked)


def _ragged_mask(batch_size: int, num_masked: int) -> RaggedMask:
    """Mask up to `num_masked` tokens: a sample with fewer for each one in front of it."""
    counts = [max(num_masked - 2 * sample, 0) for sample in range(batch_size)]
    return masking.ragged(uniform, key(range(batch_size), seed=0), _GRID, num_masked=counts)


def _take(values: Tensor, mask: Mask | RaggedMask, samples: Tensor) -> Tensor:
    if isinstance(mask, Mask):
        return values[samples]
    rows = mask.split_masked(values)
    return torch.cat([rows[sample] for sample in samples.tolist()])


def _random_inputs(mask: Mask | RaggedMask) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Samples of different size, so that a loss that weighs them wrongly shows.
    size = torch.arange(1, mask.batch_size + 1)
    if isinstance(mask, Mask):
        shape: tuple[int, ...] = (mask.batch_size, mask.num_masked, 5)
        size = size.view(-1, 1, 1)
    else:
        shape = (len(mask.masked_ids), 5)
        size = size.repeat_interleave(mask.cu_masked.diff()).view(-1, 1)
    return torch.randn(shape, generator=generator) * size, torch.randn(shape, generator=generator)


def _run(
    loss: Loss, prediction: Tensor, target: Tensor, mask: Mask | RaggedMask
) -> tuple[Tensor, Tensor]:
    """Return the value, and the gradient of a weight that multiplies the last axis."""
    weight = torch.ones(prediction.shape[-1]).to(prediction).requires_grad_()
    value = loss(prediction * weight, target, mask)
    if value.ndim:
        raise AssertionError(f"expected a scalar loss; got shape {tuple(value.shape)}")
    (grad,) = torch.autograd.grad(value, weight)
    return value.detach().double(), grad.double()


def _together(
    parts: Sequence[tuple[Tensor, Tensor]], split: Sequence[int]
) -> tuple[Tensor, Tensor]:
    shares = [size / sum(split) for size in split]
    values, grads = (
        torch.stack([share * part[i] for share, part in zip(shares, parts, strict=True)]).sum(dim=0)
        for i in (0, 1)
    )
    return values, grads


def _assert_same(what: str, expected: Tensor, seen: Tensor, split: Sequence[int]) -> None:
    bound = _TOLERANCE * float(expected.abs().max())
    if bool(((seen - expected).abs() <= bound).all()):
        return
    kind = "micro-batches or processes" if len(set(split)) == 1 else "micro-batches"
    raise AssertionError(
        f"expected the {what} of {sum(split)} samples, {_largest(expected)}, from parts of "
        f"{tuple(split)} samples ({kind}); got {_largest(seen)}"
    )


def _largest(values: Tensor) -> str:
    largest = values.flatten()[values.abs().argmax()] if values.numel() else values.sum()
    return f"{float(largest):.6g}" + (" (its largest entry)" if values.ndim else "")
