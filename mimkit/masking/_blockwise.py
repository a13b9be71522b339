"""Block-wise masks: random rectangles until the exact number of tokens is masked."""

import math
from collections.abc import Sequence
from fractions import Fraction

from mimkit._arguments import checked
from mimkit._grids import as_integer, as_sizes, count_tokens
from mimkit.masking._counts import Rounding, check_interval, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, stream_of
from mimkit_kernels import blockwise_sample

_BLOCKS, _SINGLES = 2, 3  # stream numbers in the public format
_PATIENCE = 32  # rejected blocks in a row before single tokens are masked instead


@checked
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

    Each attempt draws an area, an aspect ratio and a position. The block is rejected if it spans a
    whole axis of the grid, masks no new token, or masks too many. After 32 rejected blocks in a
    row, or 65536 blocks in all, the remaining tokens are masked one at a time, so drawing always
    ends. If an axis is too short for any block, blocks are cut to fit. If the grid is hardly larger
    than the smallest block, its middle may be masked in every draw: use a smaller `min_block`.

    The middle of the grid is masked more often than its border. Fraction of 2000 masks that mask a
    token, at ratio 0.5 on a 14 x 14 grid, for every other row and column of the upper left quarter:

        .06  .18  .25  .28
        .18  .45  .59  .64
        .26  .61  .76  .80
        .28  .65  .81  .86

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
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
        ValueError: If both or neither of `ratio` and `num_masked` are given, the count does not
            fit, the grid has three axes or too many tokens, or a lower bound is above its upper
            bound.

    Source:
        BEiT, arXiv:2106.08254, algorithm 1; Atten4Vis/CAE `MaskingGenerator`, whose counts are
        exact too, but which never ends on a grid where no block fits. Its areas are real numbers.
        Here areas are integers and aspect ratios have 256 steps, so that every device draws the
        same mask. `compat.cae` and `compat.beit` are the published algorithms.

    Example:
        >>> from mimkit import masking
        >>> blockwise(masking.key([7, 8], seed=0), (14, 14), 0.5)
        Mask(batch_size=2, grid=(14, 14), num_visible=98, num_masked=98, device='cpu')
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    if len(grid) > 2:
        raise ValueError(f"blockwise needs a grid of one or two axes; got {grid}")
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} are supported")
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    min_block = as_integer("min_block", min_block)
    max_block = None if max_block is None else as_integer("max_block", max_block)
    largest = max(count, 1) if max_block is None else max_block
    if not min_block >= 1 or (max_block is not None and max_block < min_block):
        raise ValueError(
            f"blocks need 1 <= min_block <= max_block; got {min_block} and {max_block}"
        )
    check_interval("aspect", aspect)
    height, width = (1, *grid)[-2:]
    visible, masked = blockwise_sample(
        key.sample_ids,
        key.seed_and_epoch,
        (stream_of(key, _BLOCKS), stream_of(key, _SINGLES)),
        (height, width),
        count,
        (min(min_block, MAX_TOKENS), min(largest, MAX_TOKENS)),
        (math.log(aspect[0]), math.log(aspect[1])),
        _PATIENCE,
    )
    return Mask(visible, masked, grid)
