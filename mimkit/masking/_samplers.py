"""Samplers that return a mask for a key: integers only, no loop over samples, no state."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch

from mimkit._arguments import checked
from mimkit._grids import as_sizes, count_tokens, divide, per_axis
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, SQUARE, UNIFORM, random_words, stream_of
from mimkit_kernels import uniform_sample


@checked
def uniform(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    unit: int | Sequence[int] = 1,
) -> Mask:
    """Mask tokens uniformly at random, the same number in every sample.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 units in all.
        ratio: Fraction of units to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`; a multiple of the tokens in a unit.
        rounding: How `ratio` becomes a count (see `num_masked`).
        unit: Tokens per axis that are masked together: `unit=2` on a 14x14 grid is SimMIM's masking
            of 32-pixel units for 16-pixel patches.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If both or neither of `ratio` and `num_masked` are given, the count does not
            fit, `unit` does not divide the grid, or there are too many units.

    Source:
        MAE, arXiv:2111.06377, section 3 "Masking"; with `unit`, SimMIM, arXiv:2111.09886, section
        3.2. The authors draw from a global generator; here a mask depends on the key only.

    Example:
        >>> from mimkit import masking
        >>> uniform(masking.key([7, 8], seed=0), (14, 14), 0.75)
        Mask(batch_size=2, grid=(14, 14), num_visible=49, num_masked=147, device='cpu')
    """
    grid = as_sizes("grid", grid)
    units = divide("grid", grid, unit, "unit")
    num_units, tokens_per_unit = count_tokens(units), count_tokens(grid) // count_tokens(units)
    if num_units > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_units} units; at most {MAX_TOKENS} are supported")
    if num_masked is not None:
        num_masked = resolve_count(count_tokens(grid), None, num_masked, rounding)
    if num_masked is not None and num_masked % tokens_per_unit:
        raise ValueError(
            f"num_masked={num_masked} is not a multiple of the {tokens_per_unit} tokens in a unit"
        )
    units_masked = None if num_masked is None else num_masked // tokens_per_unit
    count = resolve_count(num_units, ratio, units_masked, rounding)
    stream = stream_of(key, UNIFORM)
    ids = uniform_sample(key.sample_ids, key.seed_and_epoch, stream, num_units, num_units - count)
    mask = Mask(*ids, units)
    return mask if tokens_per_unit == 1 else mask.refine(unit)


@checked
def gridwise(key: Key, grid: Sequence[int], *, keep_every: int | Sequence[int] = 2) -> Mask:
    """Keep every `keep_every`-th token per axis visible, the same tokens in every sample.

    Args:
        key: Gives the batch size and the device; this mask is not random.
        grid: Tokens per axis.
        keep_every: Step between visible tokens: 2 keeps a quarter of a grid of even height and
            width.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If `keep_every` is below 1, or has another number of axes than the grid.

    Source:
        MAE, arXiv:2111.06377, table 1f "grid"; not in the released code.

    Example:
        >>> from mimkit import masking
        >>> gridwise(masking.key([0], seed=0), (2, 4)).visible_ids
        tensor([[0, 2]])
    """
    grid = as_sizes("grid", grid)
    steps = per_axis("keep_every", keep_every, len(grid))
    is_masked = torch.ones(1, *grid, dtype=torch.bool, device=key.device)
    is_masked[(slice(None), *(slice(None, None, step) for step in steps))] = False
    num_visible = count_tokens([-(-size // step) for size, step in zip(grid, steps, strict=True)])
    mask = Mask._from_flat(is_masked.flatten(1), grid, count_tokens(grid) - num_visible)
    return mask.expand(key.batch_size)


@checked
def square(
    key: Key,
    grid: Sequence[int],
    side: int | Sequence[int],
    *,
    position: Literal["center", "random"] = "center",
) -> Mask:
    """Mask one box of `side` tokens per axis.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`), for a random position.
        grid: Tokens per axis.
        side: Side of the box in tokens; one integer, or one per axis.
        position: "center" (rounded towards the origin), or "random": uniform over all places where
            the box fits.

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If the box does not fit in the grid, or the position is unknown.

    Source:
        SimMIM, arXiv:2111.09886, table 1 "square"; not in the released code.

    Example:
        >>> from mimkit import masking
        >>> square(masking.key([0], seed=0), (4, 4), 2).masked_ids
        tensor([[ 5,  6,  9, 10]])
    """
    grid = as_sizes("grid", grid)
    sides = per_axis("side", side, len(grid))
    room = [size - length for size, length in zip(grid, sides, strict=True)]
    if min(room) < 0:
        raise ValueError(f"a box of side {sides} does not fit in grid {grid}")
    if position == "center":
        start = torch.tensor([space // 2 for space in room], device=key.device)
        start = start.expand(key.batch_size, -1)
    elif position == "random":
        words = random_words(key, len(grid), sampler=SQUARE)
        # word * n >> 32 is uniform on [0, n), in integers.
        start = (words * torch.tensor([space + 1 for space in room], device=key.device)) >> 32
    else:
        raise ValueError(f'position must be "center" or "random"; got {position!r}')
    stop = start + torch.tensor(sides, device=key.device)
    boxes = torch.cat([start, stop], dim=1).unsqueeze(1)
    return Mask.from_boxes(boxes, grid, num_masked=count_tokens(sides))
