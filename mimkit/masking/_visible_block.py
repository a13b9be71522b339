"""Masks of everything except one block, whose place may wrap around the borders."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch

from mimkit._arguments import checked
from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import Rounding, check_interval, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._multiblock import block_sides
from mimkit.masking._philox import MAX_TOKENS, random_words

_BLOCK = 10  # stream number in the public format


@checked
def visible_block(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    aspect: tuple[float, float] = (0.5, 2.0),
    roll: bool = True,
) -> Mask:
    """Keep one block visible, the same number of tokens in every sample.

    The block is the smallest of its height that holds the visible tokens; where it holds more, the
    end of its last rows is masked. With `roll`, every place is as likely, also those across a
    border, so that every token is masked equally often. Without, the block lies inside of the grid,
    and its border is masked more often than its middle.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens on one or two axes; at most 65536 in all.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).
        aspect: Smallest and largest ratio of the block's height to its width.
        roll: Whether the block may go on at the opposite border.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If both or neither of `ratio` and `num_masked` are given, the count does not
            fit, the grid has three axes or too many tokens, or the bounds of `aspect` are wrong.

    Source:
        CAPI, arXiv:2502.08769, "inverse block masking" with random roll; facebookresearch/capi
        `InverseBlockMasking`, which draws real aspect ratios, rounds both sides up, and places the
        block before it rolls. Here aspect ratios have 256 steps, so that every device draws the
        same mask.

    Example:
        >>> from mimkit import masking
        >>> visible_block(masking.key([7, 8], seed=0), (14, 14), 0.65)
        Mask(batch_size=2, grid=(14, 14), num_visible=69, num_masked=127, device='cpu')
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    if len(grid) > 2:
        raise ValueError(f"visible_block needs a grid of one or two axes; got {grid}")
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} are supported")
    check_interval("aspect", aspect)
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    area, (height, width) = num_tokens - count, (1, *grid)[-2:]
    low, high = map(math.log, aspect)
    heights, widths = block_sides(area, (height, width), low, high, key.device)
    aspect_word, top_word, left_word = random_words(key, 3, sampler=_BLOCK).unbind(1)
    bins = aspect_word * len(heights) >> 32
    h, w = heights[bins], widths[bins]
    # word * n >> 32 is uniform on [0, n), in integers.
    top = top_word * (height if roll else height - h + 1) >> 32
    left = left_word * (width if roll else width - w + 1) >> 32
    row = (torch.arange(height, device=key.device) - top[:, None]) % height
    column = (torch.arange(width, device=key.device) - left[:, None]) % width
    place = row[:, :, None] * w[:, None, None] + column[:, None]
    is_visible = (column[:, None] < w[:, None, None]) & (place < area)
    return Mask._from_flat(~is_visible.flatten(1), grid, count)
