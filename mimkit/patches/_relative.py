"""Tables of relative position biases, resampled to another window or grid.

Axes: positions (offsets from key to query, row-major, then extra rows); heads.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from mimkit._arguments import Count, checked
from mimkit._grids import as_sizes, count_tokens

_LOWEST_GROWTH, _HIGHEST_GROWTH = 1.01, 1.5
_SEARCH_STEPS = 20  # bisection steps: growth to within 1e-6, as in the authors' code


@checked
def interpolate_relative_positions(
    table: Float[Tensor, "positions heads"],
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    num_extra: Count = 0,
) -> Float[Tensor, "new_positions heads"]:
    """Resample a table of relative position biases, with cubic splines on a geometric grid.

    The old offsets are placed at geometrically growing distances: small offsets keep about their
    place, and the largest old offset is placed at the largest new one.

    Args:
        table: One row per offset on `old_grid`, then `num_extra` rows.
        old_grid: Tokens per axis of the window or the grid that the table is for.
        new_grid: Tokens per axis to resample to, with the same number of axes.
        num_extra: Rows at the end that are not resampled (3 for a class token).

    Returns:
        The table of the new grid.

    Raises:
        ValueError: If the table does not fit `old_grid`, or the grids have different numbers of
            axes.

    Source:
        BEiT, microsoft/unilm; microsoft/SimMIM `utils.py` `remap_pretrained_keys_swin`, with
        SciPy's `interp2d(kind="cubic")` on square grids: a "not-a-knot" cubic spline, constant
        beyond its ends. It is separable, so each axis is resampled in turn.

    Example:
        >>> interpolate_relative_positions(torch.randn(49, 2), (4, 4), (6, 5)).shape
        torch.Size([99, 2])
    """
    old_grid, new_grid = as_sizes("old_grid", old_grid), as_sizes("new_grid", new_grid)
    old_sizes, new_sizes = ([2 * n - 1 for n in grid] for grid in (old_grid, new_grid))
    if len(old_grid) != len(new_grid):
        raise ValueError(
            f"old_grid and new_grid, {old_grid} and {new_grid}, have different numbers of axes"
        )
    if table.ndim != 2 or table.shape[0] != count_tokens(old_sizes) + num_extra:
        raise ValueError(
            f"table must be [{count_tokens(old_sizes) + num_extra}, heads] for grid {old_grid} "
            f"and {num_extra} extra rows; got {tuple(table.shape)}"
        )
    rows, extra = table[: count_tokens(old_sizes)], table[count_tokens(old_sizes) :]
    resampled = rows.double().view(*old_sizes, -1)
    for axis, (old, new) in enumerate(zip(old_sizes, new_sizes, strict=True)):
        if old != new:
            weights = _spline_weights(_geometric_offsets(old, new), _plain_offsets(new))
            resampled = torch.tensordot(weights.to(table.device), resampled, ([1], [axis]))
            resampled = resampled.movedim(0, axis)
    return torch.cat([resampled.reshape(count_tokens(new_sizes), -1).to(table.dtype), extra])


def _plain_offsets(size: int) -> Float64[Tensor, " size"]:
    return torch.arange(size, dtype=torch.float64) - size // 2


def _geometric_offsets(old: int, new: int) -> Float64[Tensor, " old"]:
    """Place the old offsets at growing distances, the largest one at the largest new offset."""
    low, high = _LOWEST_GROWTH, _HIGHEST_GROWTH
    for _ in range(_SEARCH_STEPS):
        growth = (low + high) / 2
        reach = (1 - growth ** (old // 2)) / (1 - growth)
        low, high = (low, growth) if reach > new // 2 else (growth, high)
    steps = growth ** torch.arange(old // 2, dtype=torch.float64)
    positive = steps.cumsum(dim=0)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])


def _spline_weights(
    at: Float64[Tensor, " old"], wanted: Float64[Tensor, " new"]
) -> Float64[Tensor, "new old"]:
    """Return the weight of each old value in the spline at each new position."""
    wanted = wanted.clamp(at[0], at[-1])
    if len(at) < 4:  # too few points for a cubic: the polynomial through all of them
        powers = torch.arange(len(at), dtype=torch.float64)
        return _solve(at[:, None] ** powers, wanted[:, None] ** powers)
    # Basis of a cubic spline: four powers, and a truncated cube for every inner knot. The first and
    # last inner points are not knots.
    knots = at[2:-2]

    def basis(x: Tensor) -> Tensor:
        cubes = (x[:, None] - knots).clamp(min=0) ** 3
        return torch.cat([x[:, None] ** torch.arange(4, dtype=torch.float64), cubes], dim=1)

    return _solve(basis(at), basis(wanted))


def _solve(known: Tensor, wanted: Tensor) -> Tensor:
    """Solve `weights @ known = wanted` for the weights."""
    weights: Tensor = torch.linalg.solve(known, wanted, left=False)
    return weights
