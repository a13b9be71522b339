"""Weighted masks: tokens of larger weight are masked more often."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from mimkit._arguments import checked
from mimkit._grids import as_sizes, count_tokens
from mimkit._settings import can_read_values
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, random_words

_WEIGHTED = 6  # stream number in the public format


@checked
def weighted(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    weights: Float[Tensor, "batch tokens"],
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
) -> Mask:
    """Mask tokens in proportion to weights, the same number in every sample.

    Masked tokens are drawn one after the other without replacement, each with a probability
    proportional to its weight. This needs no loop: exponential random numbers whose rates are the
    weights, sorted, have that order (the Gumbel top-k trick). Tokens of weight 0 are masked only
    after all others, uniformly at random.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 in all.
        ratio: Fraction of tokens to mask, in [0, 1].
        weights: One per token, not negative, of any scale; equal weights give uniform masking.
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).

    Returns:
        A mask on the device of `key`. It depends on a logarithm: every run on one device gives the
        same mask, but devices may differ.

    Raises:
        ValueError: If both or neither of `ratio` and `num_masked` are given, the count does not
            fit, there are too many tokens, the weights have the wrong shape, or (on a CPU) a weight
            is negative or not finite.

    Source:
        Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.

    Example:
        >>> from mimkit import masking
        >>> weights = torch.tensor([[1.0, 0.0, 5.0, 0.0]])
        >>> weighted(masking.key([0], seed=0), (2, 2), 0.5, weights=weights).masked_ids
        tensor([[0, 2]])
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} are supported")
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    if tuple(weights.shape) != (key.batch_size, num_tokens):
        raise ValueError(
            f"weights must be [{key.batch_size}, {num_tokens}] for this key and grid {grid}; "
            f"got {tuple(weights.shape)}"
        )
    if can_read_values(weights):
        _check_weights(weights)
    words = random_words(key, num_tokens, sampler=_WEIGHTED)
    exponential = -torch.log((words.double() + 0.5) / 2**32)
    # Weights of 0 give infinite times. The stable second sort keeps these ties in random order.
    first = exponential.argsort(dim=1, stable=True)
    times = (exponential / weights.detach().double()).gather(1, first)
    order = first.gather(1, times.argsort(dim=1, stable=True))
    return Mask.from_visible_ids(order[:, count:], grid)


def _check_weights(weights: Tensor) -> None:
    wrong = ~((weights >= 0) & weights.isfinite())
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"weights must be finite and not negative; sample {row} has "
            f"{weights[row, token].item()} at token {token}"
        )
