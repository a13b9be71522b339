"""Block-wise masks: rectangles at random until exactly so many tokens are masked."""

import math
from collections.abc import Sequence
from fractions import Fraction

from mimkit._grids import as_integer, as_sizes, count_tokens
from mimkit.masking._counts import Rounding, check_interval, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, stream_of
from mimkit_kernels import blockwise_sample

_ATTEMPT, _TOP_UP = 2, 3  # numbers of the two streams in the public format
_PATIENCE = 32  # rejected blocks in a row after which single tokens are masked instead


def blockwise(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: int = 16,
    max_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Mask:
    """Mask rectangular blocks at random positions, the same number of tokens in every sample.

    An attempt draws an area, an aspect ratio and a position. A block is rejected if it spans the
    grid on an axis or would mask nothing new or too much; after 32 rejected ones in a row, or once
    65536 are drawn, the tokens that are still missing are masked singly. So drawing ends on every
    grid. On an axis that is too short for any block, blocks are cut to fit. On a grid hardly larger
    than the smallest block its middle may be masked in every draw; a smaller `min_block` helps.

    The middle of the grid is masked more often than its border. Shares of 2000 masks at ratio 0.5
    on a 14 x 14 grid, every other row and column of its upper left quarter:

        .06  .18  .25  .28
        .18  .45  .59  .64
        .26  .61  .76  .80
        .28  .65  .81  .86

    Args:
        key: What the mask is a function of.
        grid: Tokens on one or two axes; at most 65536 in all.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).
        min_block: Smallest area of a block, in tokens.
        max_block: Largest number of tokens that a block may newly mask; all of them if `None`.
        aspect: Smallest and largest ratio of a block's height to its width.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: Both or neither of `ratio` and `num_masked`, a count that does not fit, a grid
            of three axes or too many tokens, or bounds that are out of order.

    Source:
        BEiT, arXiv:2106.08254, algorithm 1; Atten4Vis/CAE `MaskingGenerator`, whose counts are
        exact, too, but which does not end on a grid where no block fits. There areas are real
        numbers; here they are whole ones, and aspect ratios are 256 steps, so that a mask has the
        same bits everywhere. `compat.cae` and `compat.beit` are the published algorithms.

    Example:
        >>> from mimkit import masking
        >>> blockwise(masking.key([7, 8], seed=0), (14, 14), 0.5)
        Mask(batch_size=2, grid=(14, 14), num_visible=98, num_masked=98, device='cpu')
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    if len(grid) > 2:
        raise ValueError(f"blocks have two axes, but grid {grid} has {len(grid)}")
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} can be ranked")
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    min_block = as_integer("min_block", min_block)
    max_block = None if max_block is None else as_integer("max_block", max_block)
    largest = max(count, 1) if max_block is None else max_block
    if not min_block >= 1 or (max_block is not None and max_block < min_block):
        raise ValueError(
            f"block areas must satisfy 1 <= min_block <= max_block; got {min_block} and {max_block}"
        )
    check_interval("aspect", aspect)
    height, width = (1, *grid)[-2:]
    visible, masked = blockwise_sample(
        key.sample_ids,
        key.seed_and_epoch,
        (stream_of(key, _ATTEMPT), stream_of(key, _TOP_UP)),
        (height, width),
        count,
        (min(min_block, MAX_TOKENS), min(largest, MAX_TOKENS)),
        (math.log(aspect[0]), math.log(aspect[1])),
        _PATIENCE,
    )
    return Mask(visible, masked, grid)
