"""Depth-wise convolution of packed cells; masked positions and padding count as zeros.

    out[b, v, p, c] = bias[c] + sum_ij weight[c, i, j] * in[b, n, q, c]

Axes: b batch; v visible cells; p = (y, x) positions of a cell, S1 x S2; c channels; i, j taps,
K1 x K2. Position (y + i - K1 // 2, x + j - K2 // 2) relative to cell v is position q of cell n,
which `neighbors` lists for the window around v (-1: masked or outside). If n is in the window of v,
then v is in the window of n. So the gradient of the input is the same convolution with the filter
flipped. The input is read from memory about once, halos from the caches; the output is written
once. The gradient of the filter is summed in a fixed order: partial sums over groups of cells, then
over the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import is_opaque, takes_kernel
from mimkit_kernels._dtypes import dtype_obstacle
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import on_device, power_of_2_from
from mimkit_kernels._register import register

if TYPE_CHECKING:
    import triton.language as tl


def packed_depthwise_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    """Convolve packed cells, by kernel or reference.

    Args:
        cells: [batch, visible, positions, channels].
        weight: [channels, 1, height, width], with odd height and width.
        bias: [channels], or `None`.
        neighbors: [batch, visible, window], int32: indices of the cells around each, -1 for none.
        cell: Positions per axis of a cell.

    Returns:
        A tensor of the shape and dtype of `cells`.
    """
    arguments = (cells, weight, bias, neighbors, list(cell))
    if takes_kernel(
        "packed_depthwise_conv", cells, lambda: _obstacle(cells, weight, bias, cell)
    ) or is_opaque(cells):
        out: Tensor = packed_depthwise_conv_op(*arguments)
        return out
    return packed_depthwise_conv_reference(*arguments)


def packed_depthwise_conv_reference(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    """Compute `packed_depthwise_conv` in plain PyTorch."""
    halo = halo_positions(neighbors, cell, weight.shape[2:])
    out: Tensor = _ByHalo.apply(cells, weight, bias, halo, cell)  # type: ignore[no-untyped-call]
    return out


def halo_positions(neighbors: Tensor, cell: Sequence[int], kernel: Sequence[int]) -> Tensor:
    """Return the packed positions of every cell and its halo.

    Returns:
        [batch * visible, halo height, halo width]: indices of packed positions, counted over the
        whole batch. One index past the end marks positions that are masked or outside.
    """
    batch, visible, window = neighbors.shape
    side = math.isqrt(window)
    halo_y, halo_x = (
        torch.arange(-(k // 2), size + k // 2, device=neighbors.device) + side // 2 * size
        for k, size in zip(kernel, cell, strict=True)
    )
    row, y = torch.div(halo_y, cell[0], rounding_mode="floor").unsqueeze(1), halo_y % cell[0]
    column, x = torch.div(halo_x, cell[1], rounding_mode="floor"), halo_x % cell[1]
    around = neighbors.view(-1, side, side)[:, row, column].long()
    sample = torch.arange(batch, device=neighbors.device).repeat_interleave(visible)
    positions = cell[0] * cell[1]
    places = (sample.view(-1, 1, 1) * visible + around) * positions
    places = places + y.unsqueeze(1) * cell[1] + x
    return places.masked_fill(around < 0, batch * visible * positions)


class _ByHalo(torch.autograd.Function):
    """Gather each cell with its halo, and convolve without padding.

    Autograd would scatter the gradient of the input, and call PyTorch's backward of depth-wise
    convolution on the CPU; both are slower. Each part can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cells: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor, cell: Sequence[int]
    ) -> Tensor:
        # The view has channels last in memory, the fastest format for a convolution on a CPU.
        seen = _take(_rows(cells), halo).permute(0, 3, 1, 2)
        out = F.conv2d(seen, weight, bias, groups=cells.shape[-1])
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
            grad_cells = _ByHalo.apply(  # type: ignore[no-untyped-call]
                grad, weight.flip(2, 3), None, halo, ctx.cell
            )
        if needs_weight:
            grad_weight = _weight_gradient(cells, grad, halo, ctx.cell)
        if needs_bias and ctx.has_bias:
            grad_bias = grad.sum((0, 1, 2))
        return grad_cells, grad_weight, grad_bias, None, None


def _weight_gradient(cells: Tensor, grad: Tensor, halo: Tensor, cell: Sequence[int]) -> Tensor:
    """Return the gradient of the filter.

    One matrix product per channel multiplies all halo positions with all gradient positions. The
    gradient of a tap is the sum of the products at its offset. This computes more products than
    needed, but is two to three times as fast as computing tap by tap (two threads, cells of 4 x 4
    and 2 x 2).
    """
    height, width = cell
    channels = cells.shape[-1]
    kernel = halo.shape[1] - height + 1, halo.shape[2] - width + 1
    dtype = torch.promote_types(cells.dtype, torch.float32)
    rows = _rows(cells).t().to(dtype).contiguous()
    seen = rows.index_select(1, halo.flatten()).view(channels, *halo.flatten(1).shape)
    used = grad.reshape(-1, height * width, channels).permute(2, 0, 1).to(dtype).contiguous()
    # There is no autocast for meta tensors.
    device = "cpu" if cells.device.type == "meta" else cells.device.type
    with torch.autocast(device, enabled=False):
        pairs = seen.transpose(1, 2) @ used
    pairs = pairs.view(channels, *halo.shape[1:], height, width)
    taps = [
        pairs[:, y : y + kernel[0], x : x + kernel[1], y, x]
        for y in range(height)
        for x in range(width)
    ]
    return torch.stack(taps).sum(0).unsqueeze(1).to(cells.dtype)


def _rows(cells: Tensor) -> Tensor:
    """Return the packed positions of the batch as rows, with a row of zeros at the end."""
    channels = cells.shape[-1]
    return torch.cat([cells.reshape(-1, channels), cells.new_zeros(1, channels)])


def _take(rows: Tensor, halo: Tensor) -> Tensor:
    """Gather rows of packed positions: [*halo, channels]."""
    return rows.index_select(0, halo.flatten()).view(*halo.shape, rows.shape[1])


# Kernels


class Geometry(NamedTuple):
    """Constants of the kernels.

    Attributes:
        S1: Height of a cell.
        S2: Width of a cell.
        K1: Height of the filter.
        K2: Width of the filter.
        REACH: Cells from the center of a window to its edge.
    """

    S1: int
    S2: int
    K1: int
    K2: int
    REACH: int


class Cells(NamedTuple):
    """Packed cells, as the kernels take them.

    Attributes:
        data: [batch, visible, positions, channels].
        neighbors: [batch, visible, window].
        visible: Visible cells per sample.
        channels: Number of channels.
    """

    data: Tensor
    neighbors: Tensor
    visible: int
    channels: int


@jit
def _load_around(
    cells: Cells,
    slot: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    channel: tl.tensor,
    G: tl.constexpr,
) -> tl.tensor:
    """Load the channels of the positions at (`row`, `column`) relative to a cell's first one."""
    # Offsets from the first cell of the window are not negative.
    y = row + G.REACH * G.S1
    x = column + G.REACH * G.S2
    window = y // G.S1 * (2 * G.REACH + 1) + x // G.S2
    around = cells.neighbors + slot * ((2 * G.REACH + 1) * (2 * G.REACH + 1))
    neighbor = tl.load(around + window, mask=inside, other=-1)
    place = (neighbor * G.S1 + y % G.S1) * G.S2 + x % G.S2
    sample = cells.data + slot // cells.visible * cells.visible * (G.S1 * G.S2) * cells.channels
    present = tl.expand_dims(neighbor >= 0, -1) & (channel < cells.channels)
    source = sample + tl.expand_dims(place, -1) * cells.channels + channel
    return tl.load(source, mask=present, other=0.0).to(tl.float32)


@jit
def _conv_kernel(
    out: tl.tensor,
    cells: Cells,
    taps: tl.tensor,
    bias: tl.tensor,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: a block of channels of one cell.

    A row of the halo that is in registers serves all output rows that it reaches.
    """
    channels = cells.channels
    slot = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS, BLOCK), tl.float32)
    for step in range((G.S1 + G.K1 - 1) * G.K2):
        row = step // G.K2
        j = step % G.K2
        seen = _load_around(
            cells, slot, row - G.K1 // 2, x + j - G.K2 // 2, x < G.S2, channel[None, :], G
        )
        i = row - y
        used = ((i >= 0) & (i < G.K1))[:, None] & (channel < channels)[None, :]
        tap = tl.load(taps + (i * G.K2 + j)[:, None] * channels + channel, mask=used, other=0.0)
        total += tap[:, None, :] * seen[None, :, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    place = y[:, None, None] * G.S2 + x[None, :, None]
    inside = (y < G.S1)[:, None, None] & (x < G.S2)[None, :, None] & (channel < channels)
    target = out + slot * (G.S1 * G.S2) * channels
    tl.store(target + place * channels + channel, total.to(out.dtype.element_ty), mask=inside)


@jit
def _weight_gradient_kernel(
    partial: tl.tensor,
    cells: Cells,
    grad: tl.tensor,
    slots: tl.tensor,
    G: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
) -> None:
    """One program: one row of taps, a block of channels, `CELLS` cells."""
    channels = cells.channels
    i = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, TAPS)[:, None]
    x = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((TAPS, COLUMNS, BLOCK), tl.float32)
    for step in range(tl.minimum(slots - chunk * CELLS, CELLS) * G.S1):
        slot = chunk * CELLS + step // G.S1
        y = step % G.S1
        within = x < G.S2
        upstream = tl.load(
            grad
            + slot * (G.S1 * G.S2) * channels
            + (y * G.S2 + x)[:, :, None] * channels
            + channel,
            mask=within[:, :, None] & (channel < channels),
            other=0.0,
        ).to(tl.float32)
        seen = _load_around(
            cells,
            slot,
            y + i - G.K1 // 2,
            x + j - G.K2 // 2,
            within & (j < G.K2),
            channel[None, None, :],
            G,
        )
        total += seen * upstream
    sums = tl.sum(total, axis=1)
    tap = (chunk * G.K1 + i) * G.K2 + j
    tl.store(partial + tap * channels + channel, sums, mask=(j < G.K2) & (channel < channels))


# Launchers

MAX_POSITIONS = 256
MAX_KERNEL = 64
TILE = 2048  # sums of a program
MAX_BLOCK = 256
CELLS_PER_PROGRAM = 32


def _block(channels: int, rows: int) -> int:
    """Return the channels of a program that keeps `rows` sums per channel."""
    return min(power_of_2_from(channels), max(TILE // rows, 16), MAX_BLOCK)


def _describe(
    cells: Tensor, neighbors: Tensor, cell: Sequence[int], kernel: Sequence[int]
) -> tuple[Cells, Geometry]:
    _, visible, _, channels = cells.shape
    reach = math.isqrt(neighbors.shape[2]) // 2
    packed = Cells(cells.contiguous(), neighbors.contiguous(), visible, channels)
    return packed, Geometry(cell[0], cell[1], kernel[0], kernel[1], reach)


def _launch_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    batch, visible, _, channels = cells.shape
    out = torch.empty(cells.shape, dtype=cells.dtype, device=cells.device)
    packed, geometry = _describe(cells, neighbors, cell, weight.shape[2:])
    rows, columns = (power_of_2_from(size) for size in cell)
    block = _block(channels, rows * columns)
    if out.numel():
        with on_device(cells):
            _conv_kernel[batch * visible, -(-channels // block)](
                out,
                packed,
                weight.flatten(1).t().float().contiguous(),  # [taps, channels]
                bias,
                G=geometry,
                ROWS=rows,
                COLUMNS=columns,
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return out


def _launch_weight_gradient(
    cells: Tensor,
    grad: Tensor,
    neighbors: Tensor,
    cell: Sequence[int],
    kernel: Sequence[int],
) -> Tensor:
    batch, visible, _, channels = cells.shape
    slots = batch * visible
    chunks = -(-slots // CELLS_PER_PROGRAM)
    partial = torch.empty((chunks, *kernel, channels), dtype=torch.float32, device=cells.device)
    packed, geometry = _describe(cells, neighbors, cell, kernel)
    taps, columns = power_of_2_from(kernel[1]), power_of_2_from(cell[1])
    block = _block(channels, taps * columns)
    if partial.numel():
        with on_device(cells):
            _weight_gradient_kernel[kernel[0], chunks, -(-channels // block)](
                partial,
                packed,
                grad.contiguous(),
                slots,
                G=geometry,
                TAPS=taps,
                COLUMNS=columns,
                BLOCK=block,
                CELLS=CELLS_PER_PROGRAM,
                num_warps=4,
                enable_fp_fusion=True,
            )
    summed = partial.sum(0).permute(2, 0, 1).unsqueeze(1)
    return summed.to(cells.dtype).contiguous()


# Registration


def _obstacle(
    cells: Tensor, weight: Tensor, bias: Tensor | None, cell: Sequence[int]
) -> str | None:
    """Return why the kernels do not support a call; `None` if they do."""
    if power_of_2_from(cell[0]) * power_of_2_from(cell[1]) > MAX_POSITIONS:
        return f"cells of {tuple(cell)} positions"
    if max(weight.shape[2:]) > MAX_KERNEL:
        return f"a filter of {tuple(weight.shape[2:])} taps"
    values = cells.shape[1] * cells.shape[2] * cells.shape[3]
    if values >= 1 << 31:
        return f"samples of {values} values"
    if weight.dtype != cells.dtype or (bias is not None and bias.dtype != cells.dtype):
        return f"cells of {cells.dtype} with a filter of {weight.dtype}"
    return dtype_obstacle(cells=cells.dtype)


def _fake_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    return cells.new_empty(cells.shape)


def _weight_gradient_reference(
    cells: Tensor,
    grad: Tensor,
    neighbors: Tensor,
    cell: Sequence[int],
    kernel: Sequence[int],
) -> Tensor:
    return _weight_gradient(cells, grad, halo_positions(neighbors, cell, kernel), cell)


def _fake_weight_gradient(
    cells: Tensor,
    grad: Tensor,
    neighbors: Tensor,
    cell: Sequence[int],
    kernel: Sequence[int],
) -> Tensor:
    return cells.new_empty((cells.shape[-1], 1, *kernel))


def _setup_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cells, weight, bias, neighbors, ctx.cell = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(cells, weight, neighbors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cells, weight, neighbors = ctx.saved_tensors
    needs_cells, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_cells = grad_weight = grad_bias = None
    if needs_cells:
        flipped = weight.flip(2, 3)
        grad_cells = packed_depthwise_conv_op(grad, flipped, None, neighbors, ctx.cell)
    if needs_weight:
        kernel = list(weight.shape[2:])
        grad_weight = weight_gradient_op(cells, grad, neighbors, ctx.cell, kernel)
    if needs_bias and ctx.has_bias:
        grad_bias = grad.sum((0, 1, 2))
    return grad_cells, grad_weight, grad_bias, None, None


def _setup_weight_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cells, grad, neighbors, ctx.cell, _ = inputs
    ctx.save_for_backward(cells, grad, neighbors)


def _weight_gradient_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    cells, grad, neighbors = ctx.saved_tensors
    grad_cells = packed_depthwise_conv_op(grad, upstream.flip(2, 3), None, neighbors, ctx.cell)
    grad_grad = packed_depthwise_conv_op(cells, upstream, None, neighbors, ctx.cell)
    return grad_cells, grad_grad, None, None, None


packed_depthwise_conv_op = register(
    "packed_depthwise_conv(Tensor cells, Tensor weight, Tensor? bias, Tensor neighbors, "
    "SymInt[] cell) -> Tensor",
    launch=_launch_conv,
    reference=packed_depthwise_conv_reference,
    fake=_fake_conv,
    backward=_conv_backward,
    setup_context=_setup_conv,
)
weight_gradient_op = register(
    "packed_depthwise_conv_weight_gradient(Tensor cells, Tensor grad, Tensor neighbors, "
    "SymInt[] cell, SymInt[] kernel) -> Tensor",
    launch=_launch_weight_gradient,
    reference=_weight_gradient_reference,
    fake=_fake_weight_gradient,
    backward=_weight_gradient_backward,
    setup_context=_setup_weight_gradient,
)
