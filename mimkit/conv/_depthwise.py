"""Depth-wise convolution that sees zeros in place of what is masked: dense, and packed.

    out[c, y, x] = bias[c] + sum_ij weight[c, i, j] * visible[y + i - r, x + j - r]
                                                    * in[c, y + i - r, x + j - r]

Axes: batch; channels; height, width; visible (cells); cell (positions of a cell, row-major);
window (cells around a cell); halo (positions that the outputs of a cell see, row-major).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from torch.nn import functional as F

from mimkit._grids import Grid, per_axis
from mimkit.masking import Mask
from mimkit.patches._cells import cell_of


def masked_depthwise_conv2d(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 kernel_height kernel_width"],
    bias: Float[Tensor, " channels"] | None,
    mask: Mask,
) -> Float[Tensor, "batch channels height width"]:
    """Convolve a feature map whose masked positions count as zeros: the plain definition.

    Args:
        x: Feature map, as fine as the mask or finer.
        weight: One odd-sized filter per channel.
        bias: One value per channel, added everywhere.
        mask: What does not count; the output has values there as well.

    Raises:
        ValueError: An even kernel, or shapes that do not fit.

    Source:
        ConvMAE, arXiv:2205.03892, section 3.2 "masked convolution"; Alpha-VL/ConvMAE `CBlock`,
        which multiplies by the mask.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> x = torch.tensor([[[[5.0, 7.0]]]])
        >>> masked_depthwise_conv2d(x, torch.ones(1, 1, 1, 3), None, mask)
        tensor([[[[7., 7.]]]])
    """
    radius = _radius(weight, bias, x.shape[1])
    is_masked = mask.refine(cell_of(x, mask)).is_masked.unsqueeze(1)
    return F.conv2d(x.masked_fill(is_masked, 0), weight, bias, padding=radius, groups=x.shape[1])


def packed_depthwise_conv2d(
    cells: Float[Tensor, "batch visible cell channels"],
    weight: Float[Tensor, "channels 1 kernel_height kernel_width"],
    bias: Float[Tensor, " channels"] | None,
    neighbors: Int32[Tensor, "batch visible window"],
    *,
    cell: int | Sequence[int],
) -> Float[Tensor, "batch visible cell channels"]:
    """Convolve packed cells: `masked_depthwise_conv2d` at the visible positions, no work elsewhere.

    Args:
        cells: Visible cells, as `patches.pack_cells` takes them.
        weight: One odd-sized filter per channel.
        bias: One value per channel.
        neighbors: What `patches.neighbors` found, with a reach that covers the filter's radius.
        cell: Positions per axis of a cell.

    Raises:
        ValueError: An even kernel, neighbors that do not reach as far as the kernel, or shapes that
            do not fit.

    Example:
        >>> from mimkit.patches import neighbors
        >>> around = neighbors(Mask.from_bool(torch.tensor([[[True, False, False]]])))
        >>> cells = torch.tensor([[[[5.0]], [[7.0]]]])
        >>> packed_depthwise_conv2d(cells, torch.ones(1, 1, 1, 3), None, around, cell=1).flatten()
        tensor([12., 12.])
    """
    size = per_axis("cell", cell, 2)
    radius = _radius(weight, bias, cells.shape[3])
    if cells.shape[2] != math.prod(size):
        raise ValueError(f"cells of {size} hold {math.prod(size)} positions; got {cells.shape[2]}")
    if neighbors.shape[:2] != cells.shape[:2]:
        raise ValueError(
            f"neighbors are of {tuple(neighbors.shape[:2])} cells, but there are "
            f"{tuple(cells.shape[:2])}"
        )
    halo = halo_positions(neighbors, size, radius)
    cells, weight, bias = _autocast(cells, weight, bias)
    out: Tensor = _PackedDepthwiseConv.apply(  # type: ignore[no-untyped-call]
        cells, weight, bias, halo, size
    )
    return out


def reach_of(radius: Sequence[int], cell: Sequence[int]) -> int:
    """Return how many cells away the outputs of a cell look."""
    return max(-(-r // size) for r, size in zip(radius, cell, strict=True))


def halo_positions(
    neighbors: Int32[Tensor, "batch visible window"], cell: Grid, radius: Sequence[int]
) -> Int64[Tensor, "cells halo_height halo_width"]:
    """Find what the outputs of every cell see.

    Returns:
        Rows of the packed positions of the whole batch; the row after the last one stands for all
        that is masked or outside.
    """
    batch, visible, window = neighbors.shape
    reach = (math.isqrt(window) - 1) // 2
    if (2 * reach + 1) ** 2 != window or reach < reach_of(radius, cell):
        raise ValueError(
            f"a kernel of radius {tuple(radius)} on cells of {cell} needs neighbors with "
            f"reach={reach_of(radius, cell)}; got a window of {window} cells"
        )
    # Along each axis: which cell of the window, and which position in it.
    steps = [
        torch.arange(-r, size + r, device=neighbors.device)
        for r, size in zip(radius, cell, strict=True)
    ]
    (row, column), (y, x) = zip(
        *(
            (torch.div(step, size, rounding_mode="floor") + reach, step % size)
            for step, size in zip(steps, cell, strict=True)
        ),
        strict=True,
    )
    around = neighbors.view(-1, 2 * reach + 1, 2 * reach + 1)[:, row.unsqueeze(1), column].long()
    sample = torch.arange(batch, device=neighbors.device).repeat_interleave(visible)
    positions = math.prod(cell)
    places: Tensor = (sample.view(-1, 1, 1) * visible + around) * positions
    places = places + y.unsqueeze(1) * cell[1] + x
    filled: Tensor = places.masked_fill(around < 0, batch * visible * positions)
    return filled


class _PackedDepthwiseConv(torch.autograd.Function):
    """Gather each cell with its halo, and convolve without padding.

    "Sees" is symmetric, so the gradient of the input is the same convolution with the filter turned
    around; autograd would scatter it. All parts are differentiable again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cells: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor, cell: Grid
    ) -> Tensor:
        # Channels stay last in memory: the view is what a convolution likes best on a CPU.
        seen = rearrange(_take(cells, halo), "n h w c -> n c h w")
        out: Tensor = F.conv2d(seen, weight, bias, groups=cells.shape[-1])
        return out.permute(0, 2, 3, 1).reshape(cells.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        cells, weight, bias, halo, ctx.cell = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(cells, weight, halo)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cells, weight, halo = ctx.saved_tensors
        needs_cells, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_cells = grad_weight = grad_bias = None
        if needs_cells:
            turned = weight.flip(2, 3)
            grad_cells = _PackedDepthwiseConv.apply(  # type: ignore[no-untyped-call]
                grad, turned, None, halo, ctx.cell
            )
        if needs_weight:
            grad_weight = _weight_gradient(cells, grad, halo, ctx.cell)
        if needs_bias and ctx.has_bias:
            grad_bias = grad.sum((0, 1, 2))
        return grad_cells, grad_weight, grad_bias, None, None


def _weight_gradient(
    cells: Float[Tensor, "batch visible cell channels"],
    grad: Float[Tensor, "batch visible cell channels"],
    halo: Int64[Tensor, "cells halo_height halo_width"],
    cell: Grid,
) -> Float[Tensor, "channels 1 kernel_height kernel_width"]:
    """Multiply what every tap saw with the gradient of what it was used for, and add up.

    Tap by tap, all channels at once: a CPU's own backward of depth-wise convolution is slower.
    """
    (height, width), channels = cell, cells.shape[-1]
    seen, grad = _take(cells, halo), grad.reshape(-1, height, width, channels)
    kernel = halo.shape[1] - height + 1, halo.shape[2] - width + 1
    taps = [
        (seen[:, i : i + height, j : j + width] * grad).sum((0, 1, 2))
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.stack(taps, dim=1).view(channels, 1, *kernel)


def _take(
    cells: Float[Tensor, "batch visible cell channels"],
    halo: Int64[Tensor, "cells halo_height halo_width"],
) -> Float[Tensor, "cells halo_height halo_width channels"]:
    """Take rows of the packed positions, with zeros behind the last one."""
    channels = cells.shape[-1]
    rows = torch.cat([cells.reshape(-1, channels), cells.new_zeros(1, channels)])
    return rows.index_select(0, halo.flatten()).view(*halo.shape, channels)


def _radius(weight: Tensor, bias: Tensor | None, channels: int) -> Grid:
    """Check the filters, and return how far they look on each axis."""
    if weight.ndim != 4 or weight.shape[:2] != (channels, 1):
        raise ValueError(
            f"weight must be [{channels}, 1, height, width], one filter per channel; "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [{channels}] or None; got {tuple(bias.shape)}")
    kernel = tuple(weight.shape[2:])
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"the kernel must have odd sizes, so that it has a center; got {kernel}")
    return tuple(size // 2 for size in kernel)


def _autocast(
    cells: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as autocast casts the inputs of a convolution, whose gradients are its own here."""
    device = cells.device.type
    available = torch.amp.is_autocast_available(device)  # not on the meta device
    if not available or not torch.is_autocast_enabled(device) or cells.dtype == torch.float64:
        return cells, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return cells.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
