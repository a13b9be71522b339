"""Masks as the published code draws them, bug for bug: counts may differ within a batch.

Every sampler loops over samples in Python, and is a pure function of its key, too.
"""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key

__all__ = ["beit", "cae"]

_ATTEMPTS = 10  # per block, as published
_PATIENCE = 10_000  # blocks in a row that came to nothing, after which none ever will


def beit(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: int = 16,
    max_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Tensor, "batch *grid"]:
    """Draw BEiT's block-wise masks, which may fall short of the count.

    Args:
        key: What the masks are a function of.
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
        ValueError: A grid without two axes, or a count that does not fit.

    Source:
        BEiT, arXiv:2106.08254, algorithm 1; microsoft/unilm `beit/masking_generator.py`. Of 75
        tokens on a 14 x 14 grid a third of its masks miss one or more.

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


def cae(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    min_block: int = 16,
    max_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Tensor, "batch *grid"]:
    """Draw CAE's block-wise masks, whose counts are exact; arguments as in `beit`.

    Raises:
        ValueError: A grid without two axes, a count that does not fit, or a grid on which no block
            does: there the published loop never ends.

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


def draw_blocks(
    rng: random.Random,
    grid: tuple[int, int],
    count: int,
    limits: tuple[int, int],
    aspect: tuple[float, float],
    *,
    exact: bool,
) -> np.ndarray:
    """Draw one mask: the loop of `MaskingGenerator`, in the published order of random calls.

    Args:
        rng: Source of randomness.
        grid: Height and width.
        count: Tokens to mask.
        limits: Smallest area, and largest number of tokens that a block may newly mask.
        aspect: Smallest and largest aspect ratio.
        exact: Whether to go on after a block that came to nothing, as CAE does and BEiT does not.

    Raises:
        ValueError: The loop would never end.
    """
    (height, width), (min_block, max_block) = grid, limits
    is_masked = np.zeros(grid, dtype=bool)
    masked, fruitless = 0, 0
    while masked < count:
        most = min(count - masked, max_block)
        new = 0
        for _ in range(_ATTEMPTS):
            area = rng.uniform(min_block, most)
            ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w >= width or h >= height:
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            block = is_masked[top : top + h, left : left + w]
            if 0 < h * w - block.sum() <= most:
                new = int(h * w - block.sum())
                block[...] = True
                break
        if new == 0 and not exact:
            break
        fruitless = 0 if new else fruitless + 1
        if fruitless == _PATIENCE:
            raise ValueError(
                f"the published loop does not end on grid {grid}: no block of {min_block} tokens "
                "or more fits what is left"
            )
        masked += new
    return is_masked


def _per_sample(
    key: Key, grid: Sequence[int], draw: Callable[[random.Random, tuple[int, int]], np.ndarray]
) -> Bool[Tensor, "batch *grid"]:
    """Draw a mask for every sample, from a generator that its key seeds."""
    sizes = as_sizes("grid", grid)
    if len(sizes) != 2:
        raise ValueError(f"the published masks have two axes; got grid {sizes}")
    height, width = sizes
    seed_and_epoch = key.seed_and_epoch.tolist()
    masks = [
        draw(random.Random(repr((*seed_and_epoch, key.view_index, sample_id))), (height, width))
        for sample_id in key.sample_ids.tolist()
    ]
    stacked = np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool)
    return torch.from_numpy(stacked).to(key.device)
