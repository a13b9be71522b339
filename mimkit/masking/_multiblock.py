"""Multi-block masks: a visible context, and several target blocks to predict from it.

Axes: batch; targets; height, width (of the last two axes of the grid).
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from mimkit._arguments import Share, Size, checked
from mimkit._containers import container
from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import check_interval, num_masked
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, random_words

_TARGETS, _CONTEXT, _ORDER = 7, 8, 9  # stream numbers in the public format
_BINS = 256  # values of the aspect ratio and of the context area


@checked
@container
class MultiBlock:
    """The context and the targets of I-JEPA.

    Attributes:
        context: Its visible tokens are the input of the encoder; none of them is in a target.
        targets: One mask per block; its masked tokens are the block. Blocks may overlap.

    Raises:
        ValueError: If a target has another grid or batch size than the context.

    Source:
        I-JEPA, arXiv:2301.08243, section 3; see `multiblock`.

    Example:
        >>> from mimkit import masking
        >>> blocks = masking.multiblock(masking.key([0, 1], seed=0), (14, 14))
        >>> len(blocks.targets), blocks.targets[0].masked_ids.shape
        (4, torch.Size([2, 34]))
    """

    context: Mask
    targets: list[Mask]

    def __post_init__(self) -> None:
        for target in self.targets:
            if (target.grid, target.batch_size) != (self.context.grid, self.context.batch_size):
                raise ValueError(
                    f"targets must have the grid and the batch size of the context; got {target} "
                    f"for {self.context}"
                )


@checked
def multiblock(
    key: Key,
    grid: Sequence[int],
    *,
    num_targets: Size = 4,
    target_ratio: Share | Fraction = 0.175,
    aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    num_context: int | None = None,
) -> MultiBlock:
    """Draw several target blocks, and a large context block without their tokens.

    All counts depend on the grid and the options only, not on the batch. A target is the smallest
    rectangle of its aspect ratio that has enough tokens; surplus tokens are dropped from one end of
    an outer column. The context has as many tokens as are free of targets in every draw. Where more
    tokens are free, those outside of the context block are dropped first, then others uniformly at
    random. On a grid of three axes, blocks are constant along the first axis.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 in all.
        num_targets: Number of target blocks.
        target_ratio: Fraction of tokens in a target.
        aspect: Smallest and largest ratio of a target's height to its width.
        context_scale: Smallest and largest area of the context block, as a fraction of the grid.
        num_context: Context tokens on the last two axes; if `None`, as many as are free of targets
            in every draw.

    Returns:
        Masks on the device of `key`.

    Raises:
        ValueError: If the targets may leave no context (or less than `num_context`), a lower bound
            is above its upper bound, or there are too many tokens.

    Source:
        I-JEPA, arXiv:2301.08243, section 3, and facebookresearch/ijepa `MaskCollator`, which never
        puts a block on the last row or column, draws one size for a batch, ties aspect ratio to
        area, and cuts the context's row-major ids to the shortest of the batch; that is
        `compat.ijepa`. On three axes: V-JEPA, arXiv:2404.08471.

    Example:
        >>> from mimkit import masking
        >>> blocks = multiblock(masking.key([7, 8], seed=0), (14, 14))
        >>> blocks.context.num_visible, [target.num_masked for target in blocks.targets]
        (60, [34, 34, 34, 34])
    """
    grid = as_sizes("grid", grid)
    if count_tokens(grid) > MAX_TOKENS:
        raise ValueError(f"grid {grid} has more than {MAX_TOKENS} tokens")
    check_interval("aspect", aspect)
    check_interval("context_scale", context_scale, highest=1)
    depth, plane = (grid[0], grid[1:]) if len(grid) == 3 else (1, (1, *grid)[-2:])
    area = num_masked(count_tokens(plane), target_ratio)
    free = count_tokens(plane) - num_targets * area
    kept = free if num_context is None else num_context
    if not 1 <= kept <= free:
        raise ValueError(
            f"{num_targets} targets of {area} of {count_tokens(plane)} tokens may leave only "
            f"{max(free, 0)} for the context, which needs {kept if num_context else 'at least 1'}; "
            "pass fewer or smaller targets"
        )
    low, high = map(math.log, aspect)
    in_target = _draw_targets(key, plane, num_targets, area, low, high)
    context = _draw_context(key, in_target.any(dim=1), kept, context_scale)
    repeated = [
        Mask._from_flat(flat.unsqueeze(1).expand(-1, depth, -1).flatten(1), grid, depth * count)
        for flat, count in (
            *((target.flatten(1), area) for target in in_target.unbind(1)),
            (~context.flatten(1), count_tokens(plane) - kept),
        )
    ]
    return MultiBlock(repeated[-1], repeated[:-1])


def _draw_targets(
    key: Key, plane: Sequence[int], num_targets: int, area: int, log_low: float, log_high: float
) -> Bool[Tensor, "batch targets height width"]:
    """Draw the targets; four words each give aspect ratio, top, left and the corner to cut."""
    height, width = plane
    words = random_words(key, 4 * num_targets, sampler=_TARGETS).unflatten(1, (num_targets, 4))
    aspect_word, top_word, left_word, corner = words.unbind(2)
    heights, widths = block_sides(area, plane, log_low, log_high, key.device)
    bins = aspect_word * _BINS >> 32
    h, w = heights[bins], widths[bins]
    # word * n >> 32 is uniform on [0, n), in integers.
    row = _offsets(top_word * (height - h + 1) >> 32, height)
    column = _offsets(left_word * (width - w + 1) >> 32, width)
    h, w = h[..., None], w[..., None]
    inside = ((row >= 0) & (row < h)).unsqueeze(3) & ((column >= 0) & (column < w)).unsqueeze(2)
    # Number the block's tokens in column-major order from a random corner; the surplus is last.
    up, right = (corner & 1).bool()[..., None], (corner & 2).bool()[..., None]
    row, column = torch.where(up, h - 1 - row, row), torch.where(right, w - 1 - column, column)
    place = column.unsqueeze(2) * h.unsqueeze(3) + row.unsqueeze(3)
    return inside & (place < area)


def block_sides(
    area: int, plane: Sequence[int], log_low: float, log_high: float, device: torch.device
) -> tuple[Int64[Tensor, " bins"], Int64[Tensor, " bins"]]:
    """Return the sides, by aspect bin, of the smallest rectangle of at least `area` tokens."""
    height, width = plane
    step = (log_high - log_low) / _BINS
    ideal = [math.sqrt(area * math.exp(log_low + (i + 0.5) * step)) for i in range(_BINS)]
    heights = [min(max(round(h), -(-area // width), 1), height) for h in ideal]
    widths = [max(-(-area // h), 1) for h in heights]
    return torch.tensor(heights, device=device), torch.tensor(widths, device=device)


def _draw_context(
    key: Key,
    in_target: Bool[Tensor, "batch height width"],
    kept: int,
    scale: tuple[float, float],
) -> Bool[Tensor, "batch height width"]:
    """Keep free tokens, first those inside of a random block, then those outside of it."""
    height, width = in_target.shape[1:]
    step = (scale[1] - scale[0]) / _BINS
    roots = [math.sqrt(scale[0] + (i + 0.5) * step) for i in range(_BINS)]
    heights, widths = (
        torch.tensor([max(round(size * root), 1) for root in roots], device=key.device)
        for size in (height, width)
    )
    scale_word, top_word, left_word = random_words(key, 3, sampler=_CONTEXT).unbind(1)
    bins = scale_word * _BINS >> 32
    h, w = heights[bins], widths[bins]
    row = _offsets(top_word * (height - h + 1) >> 32, height)
    column = _offsets(left_word * (width - w + 1) >> 32, width)
    inside = ((row >= 0) & (row < h[:, None])).unsqueeze(2) & (
        (column >= 0) & (column < w[:, None])
    ).unsqueeze(1)
    token = torch.arange(height * width, device=key.device)
    words = (random_words(key, height * width, sampler=_ORDER) << 16) | token
    group = torch.where(in_target, 2, (~inside).long()).flatten(1)
    first = ((group << 48) | words).argsort(dim=1)[:, :kept]
    return torch.zeros_like(in_target.flatten(1)).scatter(1, first, True).view_as(in_target)


def _offsets(start: Int64[Tensor, "*batch"], size: int) -> Int64[Tensor, "*batch size"]:
    return torch.arange(size, device=start.device) - start.unsqueeze(-1)
