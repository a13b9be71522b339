"""Fixed position embeddings, and interpolation of position tables to other grids."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import Count, Positive, Size, checked
from mimkit._grids import as_sizes, count_tokens


@checked
def sincos_positions(
    dim: Size,
    grid: Sequence[int],
    *,
    temperature: Positive = 10000.0,
    first_axis: Literal["column", "row"] = "column",
    num_prefix: Count = 0,
) -> Float32[Tensor, "prefix_and_tokens dim"]:
    """Compute fixed sine-cosine position embeddings, for any grid of one to three axes.

    Every axis gets an equal share of the width: the sines, then the cosines, of its coordinate
    times `temperature ** (-k / n)` for k = 0 .. n-1.

    Args:
        dim: Width; a multiple of twice the number of axes. On three axes, any even number of 6 or
            more: what is left of it, as of ViT-B's decoder, is 0.
        grid: Tokens per axis, not necessarily square.
        temperature: Base of the wavelengths.
        first_axis: Which axis comes first in the width: "column" (the last axis; MAE, ConvMAE) or
            "row" (the first axis; CAE).
        num_prefix: Rows of zeros in front, for prefix tokens.

    Returns:
        One row per token, row-major, computed in float64 and rounded once.

    Raises:
        ValueError: If the width cannot be split evenly among the axes, the first axis is unknown,
            or the temperature is not positive.

    Source:
        MAE, facebookresearch/mae `get_2d_sincos_pos_embed`; CAE, Atten4Vis/CAE
        `build_2d_sincos_position_embedding`, whose positions are in the wrong order where height
        and width differ. Here they are right on every grid.

    Example:
        >>> sincos_positions(4, (1, 2))
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0000, 1.0000]])
    """
    grid = as_sizes("grid", grid)
    least = 2 * len(grid)
    if dim < least or dim % (2 if len(grid) == 3 else least):
        fits = "even, and 6 or more," if len(grid) == 3 else f"a multiple of {least}"
        raise ValueError(f"dim must be {fits} on grid {grid}; got {dim}")
    if first_axis not in ("column", "row"):
        raise ValueError(f'first_axis must be "column" or "row"; got {first_axis!r}')
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive; got {temperature}")
    num_waves = dim // (2 * len(grid))
    waves = temperature ** (-torch.arange(num_waves, dtype=torch.float64) / num_waves)
    tables = []
    for axis, size in enumerate(grid):
        angles = torch.arange(size, dtype=torch.float64).outer(waves)
        table = torch.cat([angles.sin(), angles.cos()], dim=1).float()
        along_axis = [size if other == axis else 1 for other in range(len(grid))]
        tables.append(table.view(*along_axis, -1).expand(*grid, -1))
    if first_axis == "column":
        tables.reverse()
    table = torch.cat(tables, dim=-1).flatten(0, -2)
    table = F.pad(table, (0, dim - table.shape[1]))  # what three axes leave
    return torch.cat([table.new_zeros(num_prefix, dim), table])


@checked
def interpolate_positions(
    table: Float[Tensor, "prefix_and_tokens dim"],
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    num_prefix: Count = 0,
) -> Float[Tensor, "prefix_and_new_tokens dim"]:
    """Resample a table of position embeddings to another grid, with bicubic interpolation.

    Args:
        table: One row per prefix token, then one per token of `old_grid`.
        old_grid: The grid that the table is for.
        new_grid: The grid to resample to, with the same number of axes.
        num_prefix: Rows in front that are not resampled.

    Returns:
        The table of the new grid.

    Raises:
        ValueError: If the table does not fit `old_grid`, or the grids have different numbers of
            axes.

    Source:
        MAE, facebookresearch/mae `interpolate_pos_embed` (square grids only there). Bicubic
        interpolation is separable, so each axis is resampled in turn.

    Example:
        >>> interpolate_positions(torch.randn(1 + 16, 8), (4, 4), (6, 5), num_prefix=1).shape
        torch.Size([31, 8])
    """
    old_grid, new_grid = as_sizes("old_grid", old_grid), as_sizes("new_grid", new_grid)
    if len(old_grid) != len(new_grid):
        raise ValueError(
            f"old_grid and new_grid, {old_grid} and {new_grid}, have different numbers of axes"
        )
    if table.ndim != 2 or table.shape[0] != num_prefix + count_tokens(old_grid):
        raise ValueError(
            f"table must be [{num_prefix + count_tokens(old_grid)}, dim] for grid {old_grid} "
            f"after {num_prefix} prefix rows (num_prefix); got {tuple(table.shape)}"
        )
    prefix, tokens = table[:num_prefix], table[num_prefix:]
    if old_grid == new_grid:
        return table.clone()
    resampled = tokens.float().view(*old_grid, -1)
    for axis, size in enumerate(new_grid):
        lines = resampled.movedim(axis, -1)
        flat = lines.reshape(1, 1, -1, lines.shape[-1])
        flat = F.interpolate(flat, size=(flat.shape[2], size), mode="bicubic", align_corners=False)
        resampled = flat.view(*lines.shape[:-1], size).movedim(-1, axis)
    return torch.cat([prefix, resampled.reshape(count_tokens(new_grid), -1).to(table.dtype)])
