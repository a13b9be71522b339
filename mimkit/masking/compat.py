"""Masks as the published code draws them, bug for bug: counts may differ within a batch.

Every sampler loops over samples in Python. A mask depends on seed, epoch and sample id only; a mask
of `ijepa` depends on all sample ids of the batch.
"""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mimkit._arguments import Count, Size, checked
from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import Rounding, check_interval, resolve_count
from mimkit.masking._key import Key

__all__ = ["beit", "cae", "ijepa", "ijepa_targets", "mmpretrain"]

_ATTEMPTS = 10  # per block, as published
_PATIENCE = 10_000  # unsuccessful blocks in a row after which the loop counts as endless


@checked
def beit(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: Size = 16,
    max_block: Size | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Tensor, "batch *grid"]:
    """Draw BEiT's block-wise masks, which may mask fewer tokens than asked for.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens on two axes.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask at most, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).
        min_block: Smallest area that is drawn.
        max_block: Largest number of tokens that a block may newly mask; all of them if `None`.
        aspect: Smallest and largest ratio of a block's height to its width.

    Returns:
        True = masked.

    Raises:
        ValueError: If the grid does not have two axes, or the count does not fit.

    Source:
        BEiT, arXiv:2106.08254, algorithm 1; microsoft/unilm `beit/masking_generator.py`. With
        75 tokens on a 14 x 14 grid, a third of its masks miss one or more.

    Example:
        >>> from mimkit import masking
        >>> is_masked = masking.compat.beit(masking.key(range(4), seed=0), (14, 14), num_masked=75)
        >>> is_masked.shape, bool((is_masked.sum((1, 2)) <= 75).all())
        (torch.Size([4, 14, 14]), True)
    """
    count = resolve_count(count_tokens(as_sizes("grid", grid)), ratio, num_masked, rounding)
    limits = (min_block, count if max_block is None else max_block)
    return _per_sample(
        key, grid, lambda rng, size: draw_blocks(rng, size, count, limits, aspect, exact=False)
    )


@checked
def cae(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: Size = 16,
    max_block: Size | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Tensor, "batch *grid"]:
    """Draw CAE's block-wise masks, whose counts are exact.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: As in `beit`.
        ratio: As in `beit`.
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: As in `beit`.
        min_block: As in `beit`.
        max_block: As in `beit`.
        aspect: As in `beit`.

    Returns:
        True = masked.

    Raises:
        ValueError: If the grid does not have two axes, the count does not fit, or no block fits on
            the grid, where the published loop never ends.

    Source:
        CAE, arXiv:2202.03026; Atten4Vis/CAE `MaskingGenerator`.

    Example:
        >>> from mimkit import masking
        >>> is_masked = masking.compat.cae(masking.key(range(4), seed=0), (14, 14), 0.5)
        >>> is_masked.sum((1, 2)).tolist()
        [98, 98, 98, 98]
    """
    count = resolve_count(count_tokens(as_sizes("grid", grid)), ratio, num_masked, rounding)
    limits = (min_block, count if max_block is None else max_block)
    return _per_sample(
        key, grid, lambda rng, size: draw_blocks(rng, size, count, limits, aspect, exact=True)
    )


@checked
def mmpretrain(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: Size = 16,
    max_block: Size | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Tensor, "batch *grid"]:
    """Draw mmpretrain's block-wise masks, which never touch the last row and column.

    Counts are exact.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: As in `beit`.
        ratio: As in `beit`.
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: As in `beit`.
        min_block: As in `beit`.
        max_block: As in `beit`.
        aspect: As in `beit`.

    Returns:
        True = masked.

    Raises:
        ValueError: If the grid does not have two axes, the count does not fit, or it is above the
            number of tokens that can be masked, where the published loop never ends.

    Source:
        open-mmlab/mmpretrain `BEiTMaskGenerator`, in its configurations of BEiT, BEiT v2, CAE and
        MaskFeat; corners come from numpy's `randint(0, height - h)`, which excludes its end.

    Example:
        >>> from mimkit import masking
        >>> is_masked = masking.compat.mmpretrain(masking.key(range(9), seed=0), (14, 14), 0.4)
        >>> is_masked[:, -1].any(), is_masked[:, :, -1].any(), is_masked.sum((1, 2)).unique()
        (tensor(False), tensor(False), tensor([78]))
    """
    count = resolve_count(count_tokens(as_sizes("grid", grid)), ratio, num_masked, rounding)
    limits = (min_block, count if max_block is None else max_block)

    def draw(rng: random.Random, size: tuple[int, int]) -> np.ndarray:
        return draw_blocks(rng, size, count, limits, aspect, exact=True, skip_last=True)

    return _per_sample(key, grid, draw)


@checked
def ijepa(
    key: Key,
    grid: Sequence[int],
    *,
    num_targets: Size = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: Count = 10,
) -> Bool[Tensor, "batch *grid"]:
    """Draw the tokens that I-JEPA hides from its context encoder.

    All samples of a batch share their block sizes. The context tokens of every sample are cut, in
    row-major order, to the smallest number in the batch. So a mask depends on the rest of its
    batch, and the bottom of the image is rarely visible, the more rarely the larger the batch. The
    last row and column are never visible.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`); a mask depends on all of the ids.
        grid: Tokens on two axes.
        num_targets: Target blocks of each sample.
        target_scale: Smallest and largest area of a target, as fractions of the grid.
        aspect: Smallest and largest ratio of a target's height to its width. One random number
            determines both area and ratio.
        context_scale: Smallest and largest area of the context block, as fractions of the grid.
        min_keep: A block must have more tokens than this. If the context has fewer, it ignores the
            targets one by one.

    Returns:
        True = not in the context; counts are equal within a batch. `ijepa_targets` draws the
        targets of the same masks.

    Raises:
        ValueError: If the grid does not have two axes of two tokens or more, or no block on it has
            more than `min_keep` tokens, where the published loop never ends.

    Source:
        I-JEPA, arXiv:2301.08243; facebookresearch/ijepa `src/masks/multiblock.py`, with the options
        of its configurations.

    Example:
        >>> from mimkit import masking
        >>> is_masked = masking.compat.ijepa(masking.key(range(8), seed=0), (14, 14))
        >>> bool(is_masked[:, -1].all()), len(is_masked.sum((1, 2)).unique())
        (True, 1)
    """
    options = (num_targets, target_scale, aspect, context_scale, min_keep)
    return ~_draw_ijepa(key, grid, *options)[0]


@checked
def ijepa_targets(
    key: Key,
    grid: Sequence[int],
    *,
    num_targets: Size = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    aspect: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_keep: Count = 10,
) -> Bool[Tensor, "batch targets *grid"]:
    """Draw the target blocks (True = in the target) of the masks that `ijepa` draws.

    Args:
        key: As in `ijepa`.
        grid: As in `ijepa`.
        num_targets: As in `ijepa`.
        target_scale: As in `ijepa`.
        aspect: As in `ijepa`.
        context_scale: As in `ijepa`.
        min_keep: As in `ijepa`.

    Returns:
        True = in the target.

    Raises:
        ValueError: As in `ijepa`.

    Source:
        As in `ijepa`.

    Example:
        >>> from mimkit import masking
        >>> masking.compat.ijepa_targets(masking.key(range(8), seed=0), (14, 14)).shape
        torch.Size([8, 4, 14, 14])
    """
    options = (num_targets, target_scale, aspect, context_scale, min_keep)
    return _draw_ijepa(key, grid, *options)[1]


def _draw_ijepa(
    key: Key,
    grid: Sequence[int],
    num_targets: int,
    target_scale: tuple[float, float],
    aspect: tuple[float, float],
    context_scale: tuple[float, float],
    min_keep: int,
) -> tuple[Bool[Tensor, "batch *grid"], Bool[Tensor, "batch targets *grid"]]:
    """Return context and targets as booleans, True = inside."""
    height, width = _two_axes(grid)
    check_interval("aspect", aspect)
    for name, scale in (("target_scale", target_scale), ("context_scale", context_scale)):
        check_interval(name, scale, highest=1)
    if min(height, width) < 2:
        raise ValueError(f"ijepa needs a grid of at least two rows and columns; got {grid}")
    _check_has_values(key)
    state = (*key.seed_and_epoch.tolist(), key.view_index)
    of_batch = random.Random(repr((*state, key.sample_ids.tolist())))
    target_size = _block_size(of_batch, (height, width), target_scale, aspect)
    context_size = _block_size(of_batch, (height, width), context_scale, (1.0, 1.0))
    contexts, targets = [], []
    for sample_id in key.sample_ids.tolist():
        rng = random.Random(repr((*state, sample_id)))
        blocks = [
            _place_block(rng, (height, width), target_size, [], min_keep)
            for _ in range(num_targets)
        ]
        contexts.append(_place_block(rng, (height, width), context_size, blocks, min_keep))
        targets.append(np.stack(blocks))
    kept = min((int(context.sum()) for context in contexts), default=0)
    inside = np.array(contexts, dtype=bool).reshape(-1, height, width)
    order = inside.reshape(-1, height * width).cumsum(axis=1).reshape(inside.shape)
    of_targets = np.array(targets, dtype=bool).reshape(-1, num_targets, height, width)
    return (
        torch.from_numpy(inside & (order <= kept)).to(key.device),
        torch.from_numpy(of_targets).to(key.device),
    )


def _block_size(
    rng: random.Random,
    grid: tuple[int, int],
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int]:
    """Draw height and width from a single random number; both are smaller than the grid."""
    share = rng.random()
    area = int(grid[0] * grid[1] * (scale[0] + share * (scale[1] - scale[0])))
    ratio = aspect[0] + share * (aspect[1] - aspect[0])
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(h, grid[0] - 1), min(w, grid[1] - 1)


def _place_block(
    rng: random.Random,
    grid: tuple[int, int],
    size: tuple[int, int],
    taken: Sequence[np.ndarray],
    min_keep: int,
) -> np.ndarray:
    """Draw positions until more than `min_keep` tokens are free; ignore a block per 20 failures."""
    (height, width), (h, w) = grid, size
    for miss in range(_PATIENCE):
        top, left = rng.randrange(height - h), rng.randrange(width - w)
        block = np.zeros(grid, dtype=bool)
        block[top : top + h, left : left + w] = True
        for other in taken[: max(len(taken) - miss // 20, 0)]:
            block &= ~other
        if block.sum() > min_keep:
            return block
    raise ValueError(
        f"the published loop does not end on grid {grid}: no block of {h} x {w} tokens leaves more "
        f"than {min_keep}"
    )


def draw_blocks(
    rng: random.Random,
    grid: tuple[int, int],
    count: int,
    limits: tuple[int, int],
    aspect: tuple[float, float],
    *,
    exact: bool,
    skip_last: bool = False,
) -> np.ndarray:
    """Draw one mask: the loop of `MaskingGenerator`, in the published order of random calls.

    Args:
        rng: Source of randomness.
        grid: Height and width.
        count: Tokens to mask.
        limits: Smallest area, and largest number of tokens that a block may newly mask.
        aspect: Smallest and largest aspect ratio.
        exact: Whether to continue after an unsuccessful block, as CAE does and BEiT does not.
        skip_last: Whether the last row and column are never masked, as in mmpretrain.

    Raises:
        ValueError: If the loop would never end, or the aspect ratios are out of order or range.
    """
    check_interval("aspect", aspect)
    (height, width), (min_block, max_block) = grid, limits
    is_masked = np.zeros(grid, dtype=bool)
    masked, failures = 0, 0
    while masked < count:
        most = min(count - masked, max_block)
        new = 0
        for _ in range(_ATTEMPTS):
            area = rng.uniform(min_block, most)
            ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w >= width or h >= height:
                continue
            top = rng.randint(0, height - h - skip_last)
            left = rng.randint(0, width - w - skip_last)
            block = is_masked[top : top + h, left : left + w]
            if 0 < h * w - block.sum() <= most:
                new = int(h * w - block.sum())
                block[...] = True
                break
        if new == 0 and not exact:
            break
        failures = 0 if new else failures + 1
        if failures == _PATIENCE:
            raise ValueError(
                f"the published loop does not end on grid {grid}: no block of {min_block} tokens "
                "or more fits in the remaining tokens"
            )
        masked += new
    return is_masked


def _per_sample(
    key: Key, grid: Sequence[int], draw: Callable[[random.Random, tuple[int, int]], np.ndarray]
) -> Bool[Tensor, "batch *grid"]:
    """Draw a mask for every sample, from a generator seeded by its part of the key."""
    _check_has_values(key)
    height, width = _two_axes(grid)
    seed_and_epoch = key.seed_and_epoch.tolist()
    masks = [
        draw(random.Random(repr((*seed_and_epoch, key.view_index, sample_id))), (height, width))
        for sample_id in key.sample_ids.tolist()
    ]
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool)
    return torch.from_numpy(stacked).to(key.device)


def _check_has_values(key: Key) -> None:
    if key.device.type == "meta":
        raise ValueError("key must hold values; got one on the meta device")


def _two_axes(grid: Sequence[int]) -> tuple[int, int]:
    sizes = as_sizes("grid", grid)
    if len(sizes) != 2:
        raise ValueError(f"the published samplers need a grid of two axes; got {sizes}")
    return sizes[0], sizes[1]
