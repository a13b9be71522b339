"""Block-wise masks: rectangles at random until exactly so many tokens are masked.

Axes: batch (or the samples of it that are not finished yet); height, width (of the grid).
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, random_words

_ATTEMPT, _TOP_UP = 2, 3  # numbers of the two streams in the public format
_PATIENCE = 32  # rejected blocks in a row after which single tokens are masked instead
_MAX_ATTEMPTS = 1 << 16  # blocks of four words that the format has for one sample
_ASPECT_BINS = 256
_ROUND = 16  # attempts between two looks at who is finished


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
    grid. On an axis that is too short for any block, blocks are cut to fit.

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
    largest = max(count, 1) if max_block is None else max_block
    if not min_block >= 1 or (max_block is not None and max_block < min_block):
        raise ValueError(
            f"block areas must satisfy 1 <= min_block <= max_block; got {min_block} and {max_block}"
        )
    low, high = aspect
    if not 0 < low <= high < math.inf:
        raise ValueError(f"aspect must be two positive ratios, smallest first; got {aspect}")
    height, width = (1, *grid)[-2:]
    is_masked = torch.ops.mimkit.blockwise_sample(
        key.sample_ids,
        key.seed_and_epoch,
        key.view_index,
        height,
        width,
        count,
        min(min_block, MAX_TOKENS),
        min(largest, MAX_TOKENS),
        math.log(low),
        math.log(high),
    )
    return Mask._from_flat(is_masked, grid, count)


# One opaque operator: how often its loop runs depends on the draws, which a graph cannot hold.
@torch.library.custom_op("mimkit::blockwise_sample", mutates_args=())
def blockwise_sample(
    sample_ids: Tensor,
    seed_and_epoch: Tensor,
    view_index: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    max_block: int,
    log_low: float,
    log_high: float,
) -> Tensor:
    """Draw blocks until every sample is finished, sixteen attempts a round."""
    key = Key(sample_ids, seed_and_epoch, view_index)
    shapes = BlockShapes(height, width, min_block, max_block, log_low, log_high, key.device)
    is_masked = sample_ids.new_zeros((len(sample_ids), height, width), dtype=torch.bool)
    left = torch.full_like(sample_ids, num_masked)
    rejected = torch.zeros_like(sample_ids)
    for first in range(0, _MAX_ATTEMPTS, _ROUND):
        rows = ((left > 0) & (rejected < _PATIENCE)).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        state = is_masked[rows], left[rows], rejected[rows]
        words = random_words(
            Key(sample_ids[rows], seed_and_epoch, view_index),
            4 * _ROUND,
            sampler=_ATTEMPT,
            first_block=first,
        )
        for attempt in words.unflatten(1, (_ROUND, 4)).unbind(1):
            state = _attempt(shapes, attempt, *state)
        is_masked[rows], left[rows], rejected[rows] = state
    return _top_up(key, is_masked.flatten(1), left)


@blockwise_sample.register_fake
def _(
    sample_ids: Tensor, seed_and_epoch: Tensor, view_index: int, height: int, width: int,
    num_masked: int, min_block: int, max_block: int, log_low: float, log_high: float,
) -> Tensor:  # fmt: skip
    return sample_ids.new_empty((sample_ids.shape[0], height * width), dtype=torch.bool)


class BlockShapes:
    """Heights and widths of blocks by area and aspect bin, in integers alone.

    The height `round(sqrt(area * aspect))` is a product of two roots in fixed point, one from a
    table of areas and one from a table of aspect bins; the width likewise.
    """

    def __init__(
        self,
        height: int,
        width: int,
        min_block: int,
        max_block: int,
        log_low: float,
        log_high: float,
        device: torch.device,
    ) -> None:
        self.grid = (height, width)
        self.min_block, self.max_block = min_block, max_block
        areas, tall, flat = _root_tables(max(min_block, max_block), log_low, log_high)
        self.areas, self.tall, self.flat = (t.to(device) for t in (areas, tall, flat))
        # A block spans no axis; where even the smallest one would, it is cut instead.
        self.limits = tuple(max(size - 1, 1) for size in self.grid)
        smallest = [int(_product(areas[min_block], roots.min())) for roots in (tall, flat)]
        self.cut = [size > limit for size, limit in zip(smallest, self.limits, strict=True)]

    def sides(
        self, area: Int64[Tensor, " batch"], aspect_bin: Int64[Tensor, " batch"]
    ) -> list[Int64[Tensor, " batch"]]:
        """Return height and width of each block."""
        root = self.areas[area]
        sides = [_product(root, roots[aspect_bin]) for roots in (self.tall, self.flat)]
        return [
            side.clamp(1, limit if cut else None)
            for side, limit, cut in zip(sides, self.limits, self.cut, strict=True)
        ]


@lru_cache(maxsize=16)
def _root_tables(max_area: int, log_low: float, log_high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of all areas, and of all aspect ratios and their inverses, times 2**16."""
    areas = torch.tensor([math.isqrt(area << 32) for area in range(max_area + 1)])
    step = (log_high - log_low) / _ASPECT_BINS
    halves = [(log_low + (i + 0.5) * step) / 2 for i in range(_ASPECT_BINS)]
    tall = torch.tensor([round(math.exp(half) * 65536) for half in halves])
    flat = torch.tensor([round(math.exp(-half) * 65536) for half in halves])
    return areas, tall, flat


def _product(root: Tensor, other: Tensor) -> Tensor:
    """Multiply two numbers of sixteen binary digits behind the point, rounded to an integer."""
    return (root * other + (1 << 31)) >> 32


def _attempt(
    shapes: BlockShapes,
    words: Int64[Tensor, "batch 4"],
    is_masked: Bool[Tensor, "batch height width"],
    left: Int64[Tensor, " batch"],
    rejected: Int64[Tensor, " batch"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one block a sample, and mask it where it is accepted.

    Args:
        shapes: The possible blocks.
        words: Random words for area, aspect ratio, top and left.
        is_masked: What is masked so far.
        left: Tokens still to mask.
        rejected: Blocks rejected in a row.

    Returns:
        The last three, updated.
    """
    height, width = shapes.grid
    area_word, aspect_word, top_word, left_word = words.unbind(1)
    most = left.clamp(max=shapes.max_block)
    # While fewer than `min_block` are left, areas lie between the two all the same.
    least, largest = most.clamp(max=shapes.min_block), most.clamp(min=shapes.min_block)
    area = least + (area_word * (largest - least + 1) >> 32)
    block_height, block_width = shapes.sides(area, aspect_word * _ASPECT_BINS >> 32)
    fits = (block_height <= shapes.limits[0]) & (block_width <= shapes.limits[1])
    top = top_word * (height - block_height + 1).clamp(min=1) >> 32
    start = left_word * (width - block_width + 1).clamp(min=1) >> 32
    inside = _between(top, block_height, height).unsqueeze(2) & _between(
        start, block_width, width
    ).unsqueeze(1)
    new = (inside & ~is_masked).flatten(1).sum(dim=1)
    accepted = fits & (new > 0) & (new <= most) & (rejected < _PATIENCE)
    is_masked = is_masked | (inside & accepted.view(-1, 1, 1))
    left = left - new * accepted
    waiting = (left > 0) & ~accepted
    return is_masked, left, torch.where(accepted, 0, rejected + waiting)


def _between(start: Tensor, length: Tensor, size: int) -> Bool[Tensor, "batch size"]:
    position = torch.arange(size, device=start.device)
    offset = position - start.unsqueeze(1)
    return (offset >= 0) & (offset < length.unsqueeze(1))


def _top_up(
    key: Key, is_masked: Bool[Tensor, "batch tokens"], left: Int64[Tensor, " batch"]
) -> Bool[Tensor, "batch tokens"]:
    """Mask the visible tokens of lowest rank where tokens are still missing."""
    rows = left.nonzero().squeeze(1)
    if len(rows) == 0:
        return is_masked
    some = Key(key.sample_ids[rows], key.seed_and_epoch, key.view_index)
    num_tokens = is_masked.shape[1]
    token = torch.arange(num_tokens, device=key.device)
    ranks = (random_words(some, num_tokens, sampler=_TOP_UP) << 16) | token
    ranks = ranks.masked_fill(is_masked[rows], 1 << 48)
    threshold = ranks.sort(dim=1).values.gather(1, left[rows].unsqueeze(1) - 1)
    is_masked[rows] = is_masked[rows] | (ranks <= threshold)
    return is_masked
