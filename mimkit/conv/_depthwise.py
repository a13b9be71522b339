"""Depth-wise convolution in which masked positions count as zeros: dense, and packed.

    out[c, y, x] = bias[c] + sum_ij weight[c, i, j] * visible[y + i - r, x + j - r]
                                                    * in[c, y + i - r, x + j - r]

Axes: batch; channels; height, width; visible (cells); cell (positions of a cell, row-major);
window (a cell and the cells around it).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import checked, uses_autocast
from mimkit._checks import cell_of
from mimkit._grids import Grid, per_axis, reach_of
from mimkit._settings import settings
from mimkit.masking import Mask
from mimkit_kernels import packed_depthwise_conv


@checked
def masked_depthwise_conv2d(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kernel_height kernel_width"],
    bias: Float[Tensor, " channels"] | None,
    mask: Mask,
) -> Float[Tensor, "batch channels height width"]:
    """Convolve a feature map whose masked positions count as zeros (the reference definition).

    Args:
        x: Feature map; its size is a multiple of the mask's grid.
        weight: One odd-sized filter per channel.
        bias: One value per channel, added at all positions.
        mask: Which positions of `x` count as zeros. The output is computed at all positions.

    Returns:
        The feature map, convolved, in the same size.

    Raises:
        ValueError: If a kernel size is even, or the shapes do not fit.

    Source:
        ConvMAE, arXiv:2205.03892, section 3.2 "masked convolution"; Alpha-VL/ConvMAE `CBlock`,
        which multiplies by the mask.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> x = torch.tensor([[[[5.0, 7.0]]]])
        >>> masked_depthwise_conv2d(x, torch.ones(1, 1, 1, 3), None, mask)
        tensor([[[[7., 7.]]]])
    """
    radius = _radius("x", x, weight, bias, x.shape[1])
    is_masked = mask.refine(cell_of(x, mask, "x")).is_masked.unsqueeze(1)
    return F.conv2d(x.masked_fill(is_masked, 0), weight, bias, padding=radius, groups=x.shape[1])


@checked
def packed_depthwise_conv2d(
    cells: Float[Tensor, "batch visible cell channels"],
    weight: Float[Tensor, "channels 1 kernel_height kernel_width"],
    bias: Float[Tensor, " channels"] | None,
    neighbors: Int32[Tensor, "batch visible window"],
    *,
    cell: int | Sequence[int],
) -> Float[Tensor, "batch visible cell channels"]:
    """Convolve packed cells: `masked_depthwise_conv2d` computed at the visible positions only.

    Args:
        cells: Visible cells, as `patches.pack_cells` returns them.
        weight: One odd-sized filter per channel.
        bias: One value per channel.
        neighbors: As `patches.neighbors` returns them, with a reach that covers the filter.
        cell: Positions per axis of a cell.

    Returns:
        The cells, convolved.

    Raises:
        ValueError: If a kernel size is even, the reach of `neighbors` is smaller than the kernel
            needs, or the shapes do not fit.

    Source:
        mimkit's own way to compute ConvMAE's "masked convolution" (arXiv:2205.03892, section 3.2).
        The authors convolve all positions, then drop the masked ones.

    Example:
        >>> from mimkit.patches import neighbors
        >>> around = neighbors(Mask.from_bool(torch.tensor([[[True, False, False]]])))
        >>> cells = torch.tensor([[[[5.0]], [[7.0]]]])
        >>> packed_depthwise_conv2d(cells, torch.ones(1, 1, 1, 3), None, around, cell=1).flatten()
        tensor([12., 12.])
    """
    size = per_axis("cell", cell, 2)
    radius = _radius("cells", cells, weight, bias, cells.shape[3])
    if cells.shape[2] != math.prod(size):
        raise ValueError(f"cells of {size} hold {math.prod(size)} positions; got {cells.shape[2]}")
    if neighbors.shape[:2] != cells.shape[:2]:
        raise ValueError(
            f"neighbors {tuple(neighbors.shape)} and cells {tuple(cells.shape)} must have the same "
            "batch size and number of visible cells"
        )
    reach = reach_of(radius, size)
    while (2 * reach + 1) ** 2 < neighbors.shape[2]:  # torch.compile cannot trace `math.isqrt`
        reach += 1
    if (2 * reach + 1) ** 2 != neighbors.shape[2]:
        raise ValueError(
            f"a kernel of radius {radius} on cells of {size} needs neighbors with "
            f"reach={reach_of(radius, size)}; got a window of {neighbors.shape[2]} cells"
        )
    if settings.check and neighbors.numel():
        low, high = int(neighbors.min()), int(neighbors.max())
        if low < -1 or high >= cells.shape[1]:
            raise ValueError(f"neighbors must be in [-1, {cells.shape[1]}); got {low} to {high}")
    cells, weight, bias = _autocast(cells, weight, bias)
    return packed_depthwise_conv(cells, weight, bias, neighbors.contiguous(), size)


def _radius(of: str, x: Tensor, weight: Tensor, bias: Tensor | None, channels: int) -> Grid:
    """Check the filters, and return their radius on each axis."""
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"weight must be [{channels}, 1, height, width], one filter per channel; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}] or None; got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not uses_autocast(x):
            raise TypeError(f"{name} must be {x.dtype}, as {of} is; got {tensor.dtype}")
    kernel = tuple(weight.shape[2:])
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"weight must have odd sizes, so that it has a center; got {kernel}")
    return tuple(size // 2 for size in kernel)


def _autocast(
    cells: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the inputs as autocast casts those of a convolution."""
    if not uses_autocast(cells):
        return cells, weight, bias
    dtype = torch.get_autocast_dtype(cells.device.type)
    return cells.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
