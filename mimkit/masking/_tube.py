"""Tube masks: constant along some axes, such as the time axis of a video."""

from collections.abc import Sequence
from fractions import Fraction

from mimkit._arguments import checked
from mimkit._grids import as_integer, as_sizes
from mimkit.masking._counts import Rounding
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._samplers import uniform


@checked
def tube(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
    shared_axes: int | Sequence[int] = 0,
) -> Mask:
    """Mask tubes uniformly at random: whole lines, or planes, of tokens along the shared axes.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 tubes.
        ratio: Fraction of tubes to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`; a multiple of the tokens in a tube.
        rounding: How `ratio` becomes a count (see `num_masked`).
        shared_axes: Axes along which the mask is constant; 0 is the time of a video's (time,
            height, width). Negative axes count from the last.

    Returns:
        A mask on the device of `key`, equal to `uniform` with a unit that spans the shared axes.

    Raises:
        ValueError: If an axis is out of range or repeated; also what `uniform` raises, such as for
            a ratio with a single tube.

    Source:
        VideoMAE, arXiv:2203.12602, section 3.3 "tube masking".

    Example:
        >>> from mimkit import masking
        >>> tube(masking.key([0], seed=0), (3, 2, 2), 0.5).is_masked.flatten(2)
        tensor([[[False,  True,  True, False],
                 [False,  True,  True, False],
                 [False,  True,  True, False]]])
    """
    grid = as_sizes("grid", grid)
    axes = list(shared_axes) if isinstance(shared_axes, Sequence) else [shared_axes]
    axes = [as_integer("shared_axes", axis) for axis in axes]
    shared = {axis % len(grid) for axis in axes if -len(grid) <= axis < len(grid)}
    if len(shared) != len(axes):
        raise ValueError(f"shared_axes must be different axes of grid {grid}; got {shared_axes}")
    unit = [size if axis in shared else 1 for axis, size in enumerate(grid)]
    return uniform(key, grid, ratio, num_masked=num_masked, rounding=rounding, unit=unit)
