"""Packed cells: the positions of a fine feature map inside the visible tokens of a coarse mask.

Axes: batch; channels; height, width (of the feature map); visible (cells, one per visible token);
cell (positions inside a cell, row-major); window (a cell and the cells around it, row-major).
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import Count, checked
from mimkit._checks import cell_of, check_even
from mimkit._grids import per_axis
from mimkit._settings import settings
from mimkit.masking import Mask
from mimkit.patches._patchify import gather_patches, unpatchify
from mimkit.patches._tokens import restore


@checked
def pack_cells(
    feature_map: Float[Tensor, "batch channels height width"], mask: Mask
) -> Float[Tensor, "batch visible cell channels"]:
    """Gather the visible cells of a feature map that is finer than the mask.

    Packed order is cell by cell, not the ascending order of `mask.refine(k).visible_ids`.

    Args:
        feature_map: Its size is a multiple of the mask's grid.
        mask: Which cells are visible.

    Returns:
        The visible cells, with their positions in row-major order.

    Raises:
        ValueError: If the mask's grid does not divide the size, or the batch sizes differ.

    Source:
        mimkit's own; ConvMAE computes all positions of the feature map.

    Example:
        >>> mask = Mask.from_visible_ids(torch.tensor([[1]]), (1, 2))
        >>> pack_cells(torch.arange(8.0).view(1, 1, 2, 4), mask).flatten().tolist()
        [2.0, 3.0, 6.0, 7.0]
    """
    cell = cell_of(feature_map, mask)
    patches = gather_patches(feature_map, mask, cell)
    return rearrange(patches, "b v (p c) -> b v p c", c=feature_map.shape[1])


@checked
def unpack_cells(
    cells: Float[Tensor, "batch visible cell channels"],
    mask: Mask,
    *,
    cell: int | Sequence[int] | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """Put packed cells back into a feature map that is zero at masked positions.

    Args:
        cells: As `pack_cells` returns them.
        mask: The mask that they were packed with.
        cell: Positions per axis of a cell; square cells if `None`.

    Returns:
        A feature map of `cell` positions per token of the mask.

    Raises:
        ValueError: If the cells do not fit the mask, or do not have the size `cell`.

    Source:
        mimkit's own, the inverse of `pack_cells`.

    Example:
        >>> mask = Mask.from_visible_ids(torch.tensor([[1]]), (1, 2))
        >>> unpack_cells(torch.tensor([[[[2.0], [3.0], [6.0], [7.0]]]]), mask)
        tensor([[[[0., 0., 2., 3.],
                  [0., 0., 6., 7.]]]])
    """
    positions = cells.shape[2]
    size = per_axis("cell", math.isqrt(positions) if cell is None else cell, _axes(mask))
    if math.prod(size) != positions:
        raise ValueError(
            f"cells must hold {math.prod(size)} positions for cell={size}; got {positions}"
        )
    patches = cells.flatten(2)
    tokens = restore(patches, mask, patches.new_zeros(patches.shape[2]))
    return unpatchify(tokens, mask.grid, size)


@checked
def neighbors(mask: Mask, *, reach: Count = 1) -> Int32[Tensor, "batch visible window"]:
    """Find the visible cells around every visible cell.

    Args:
        mask: Which cells are visible.
        reach: Number of cells to include on every side.

    Returns:
        Index of each cell of the window in `mask.visible_ids`; -1 if masked or outside the grid.

    Raises:
        ValueError: If the grid does not have two axes, or the reach is negative.

    Source:
        mimkit's own.

    Example:
        >>> neighbors(Mask.from_bool(torch.tensor([[[True, False, False]]])))
        tensor([[[-1, -1, -1, -1,  0,  1, -1, -1, -1],
                 [-1, -1, -1,  0,  1, -1, -1, -1, -1]]], dtype=torch.int32)
    """
    _axes(mask)
    if settings.check:
        mask.validate()
    if reach < 0:
        raise ValueError(f"reach must not be negative; got {reach}")
    height, width = mask.grid
    slots = mask.restore_ids
    slots = slots.masked_fill(slots >= mask.num_visible, -1).view(-1, height, width)
    padded = F.pad(slots, (reach, reach, reach, reach), value=-1)
    row_length = width + 2 * reach
    # In the padded grid, the window of token (y, x) begins at (y, x).
    ids = mask.visible_ids
    first = torch.div(ids, width, rounding_mode="floor") * row_length + ids % width
    step = torch.arange(2 * reach + 1, device=mask.device)
    window = (step.unsqueeze(1) * row_length + step).flatten()
    places = rearrange(first.unsqueeze(2) + window, "b v w -> b (v w)")
    found = padded.flatten(1).gather(1, places)
    return found.view(*ids.shape, len(window)).int()


def _axes(mask: Mask) -> int:
    check_even(mask)
    if len(mask.grid) != 2:
        raise ValueError(f"packed cells need a mask of two axes; got grid {mask.grid}")
    return 2
