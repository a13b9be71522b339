"""Inverse block masks: everything is masked but blocks at random."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from mimkit._grids import Grid, as_sizes, count_tokens, per_axis
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, random_words

_BLOCKS, _LAST = 4, 5  # numbers of the two streams in the public format


def inverse_block(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    block: int | Sequence[int] = 3,
) -> Mask:
    """Keep blocks at random positions visible, the same number of tokens in every sample.

    Blocks come one after the other, each around another token, and are cut at the border. The one
    that would show too much shows some of its tokens, at random. So every token can be the middle
    of a block, and counts are exact without a loop. Border tokens lie in fewer blocks, and are
    masked a little more often.

    Args:
        key: What the mask is a function of.
        grid: Tokens per axis; at most 65536 in all.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).
        block: Tokens per axis of a block; 1 is uniform masking.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: Both or neither of `ratio` and `num_masked`, a count that does not fit, or too
            many tokens.

    Source:
        data2vec 2.0, arXiv:2212.07525, section 3.3 "inverse block masking"; facebookresearch/
        fairseq `compute_block_mask_2d` draws all blocks at once, then hides or shows single tokens
        all over the image until the count is right.

    Example:
        >>> from mimkit import masking
        >>> inverse_block(masking.key([7, 8], seed=0), (14, 14), 0.8)
        Mask(batch_size=2, grid=(14, 14), num_visible=39, num_masked=157, device='cpu')
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    sides = per_axis("block", block, len(grid))
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} can be ranked")
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    token = torch.arange(num_tokens, device=key.device)
    ranks = (random_words(key, num_tokens, sampler=_BLOCKS) << 16) | token
    # Place of the block around each token in the order in which blocks are shown.
    turn = torch.empty_like(ranks).scatter(1, ranks.argsort(dim=1), token.expand_as(ranks))
    first = _lowest_around(turn.view(-1, *grid), sides).flatten(1)
    within = random_words(key, num_tokens, sampler=_LAST)
    order = ((first << 32) | within).argsort(dim=1, stable=True)
    return Mask.from_visible_ids(order[:, : num_tokens - count], grid)


def _lowest_around(values: Int64[Tensor, "batch *grid"], sides: Grid) -> Tensor:
    """Take the minimum over the block around every token, axis by axis."""
    for axis, side in enumerate(sides, 1):
        padding = [0, 0] * (values.ndim - 1 - axis) + [side // 2, (side - 1) // 2]
        values = F.pad(values, padding, value=MAX_TOKENS)
        covered = 1  # positions that a minimum is over; it doubles until it is the side
        while covered < side:
            step = min(covered, side - covered)
            length = values.shape[axis] - step
            values = torch.minimum(
                values.narrow(axis, 0, length), values.narrow(axis, step, length)
            )
            covered += step
    return values
