"""Inverse block masks: everything is masked except random blocks."""

from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import checked
from mimkit._grids import Grid, as_sizes, count_tokens, per_axis
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, random_words

_BLOCKS, _LAST = 4, 5  # stream numbers in the public format


@checked
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

    Blocks are added one after the other, each centered on a different random token, and are cut at
    the border. Of the last block, a random part becomes visible, so that the count is exact. Every
    token can be the center of a block, and no loop is needed. Border tokens lie in fewer blocks, so
    they are masked slightly more often.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 in all.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).
        block: Tokens per axis of a block; 1 is uniform masking.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If both or neither of `ratio` and `num_masked` are given, the count does not
            fit, or there are too many tokens.

    Source:
        data2vec 2.0, arXiv:2212.07525, section 3.3 "inverse block masking"; facebookresearch/
        fairseq `compute_block_mask_2d` draws all blocks at once, then masks or unmasks random
        single tokens anywhere until the count is right.

    Example:
        >>> from mimkit import masking
        >>> inverse_block(masking.key([7, 8], seed=0), (14, 14), 0.8)
        Mask(batch_size=2, grid=(14, 14), num_visible=39, num_masked=157, device='cpu')
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    sides = per_axis("block", block, len(grid))
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} are supported")
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    token = torch.arange(num_tokens, device=key.device)
    ranks = (random_words(key, num_tokens, sampler=_BLOCKS) << 16) | token
    # Rank of the block around each token, in the order in which blocks are added.
    rank = torch.empty_like(ranks).scatter(1, ranks.argsort(dim=1), token.expand_as(ranks))
    first = _lowest_around(rank.view(-1, *grid), sides).flatten(1)
    within = random_words(key, num_tokens, sampler=_LAST)
    order = ((first << 32) | within).argsort(dim=1, stable=True)
    return Mask.from_visible_ids(order[:, : num_tokens - count], grid)


def _lowest_around(values: Int64[Tensor, "batch *grid"], sides: Grid) -> Tensor:
    """Take the minimum over the block around every token, axis by axis."""
    for axis, side in enumerate(sides, 1):
        padding = [0, 0] * (values.ndim - 1 - axis) + [side // 2, (side - 1) // 2]
        values = F.pad(values, padding, value=MAX_TOKENS)
        covered = 1  # width of the window minimum; it doubles until it reaches `side`
        while covered < side:
            step = min(covered, side - covered)
            length = values.shape[axis] - step
            values = torch.minimum(
                values.narrow(axis, 0, length), values.narrow(axis, step, length)
            )
            covered += step
    return values
