"""Depth-wise convolution of packed cells, which sees zeros in place of what is masked or outside.

    out[b, v, p, c] = bias[c] + sum_ij weight[c, i, j] * in[b, n, q, c]

Axes: b batch; v visible cells; p = (y, x) positions of a cell, S1 x S2 of them; c channels; i, j
taps, K1 x K2 of them. Position (y + i - K1 // 2, x + j - K2 // 2) relative to cell v lies at q in
the cell n of its window, by `neighbors` (-1: masked or outside). "Lies in the window of" is
symmetric, so the gradient of the input is the same convolution with the filter turned around. The
input is read from memory about once, its halos from the caches; the output is written once. The
gradient of the filter is summed in a fixed order: partial sums over some cells each, then those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import dtype_obstacle, is_opaque, takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._register import on_device, power_of_2_from, register

if TYPE_CHECKING:
    import triton.language as tl


def packed_depthwise_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    """Convolve packed cells, by kernel or reference.

    Args:
        cells: [batch, visible, positions, channels].
        weight: [channels, 1, height, width], odd sizes.
        bias: [channels], or `None`.
        neighbors: [batch, visible, window], int32: slots of the cells around each, -1 for none.
        cell: Positions per axis of a cell.

    Returns:
        What has the shape and the dtype of `cells`.
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
    """Find what the outputs of every cell see.

    Returns:
        [batch * visible, halo height, halo width]: rows of the packed positions of the whole batch;
        the row after the last one stands for all that is masked or outside.
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

    Autograd would scatter the gradient of the input, and take a CPU's own backward of depth-wise
    convolution; both are slower than what is written here. All parts are differentiable again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cells: Tensor, weight: Tensor, bias: Tensor | None, halo: Tensor, cell: Sequence[int]
    ) -> Tensor:
        # Channels stay last in memory: the view is what a convolution likes best on a CPU.
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
    """Multiply what every tap saw with the gradient of what it was used for, and add up.

    A matrix product for each channel pairs all positions of halos with all of cells; a tap is the
    sum of the pairs that lie its offset apart. That is more products than are asked for, and two to
    three times as fast as these alone, tap after tap (two threads, cells of 4 x 4 and 2 x 2).
    """
    height, width = cell
    channels = cells.shape[-1]
    kernel = halo.shape[1] - height + 1, halo.shape[2] - width + 1
    dtype = torch.promote_types(cells.dtype, torch.float32)
    rows = _rows(cells).t().to(dtype).contiguous()
    seen = rows.index_select(1, halo.flatten()).view(channels, *halo.flatten(1).shape)
    used = grad.reshape(-1, height * width, channels).permute(2, 0, 1).to(dtype).contiguous()
    # Meta tensors know no autocast of their own.
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
    """Line up the packed positions, with zeros behind the last one."""
    channels = cells.shape[-1]
    return torch.cat([cells.reshape(-1, channels), cells.new_zeros(1, channels)])


def _take(rows: Tensor, halo: Tensor) -> Tensor:
    """Take rows of the packed positions, laid out as the places are."""
    return rows.index_select(0, halo.flatten()).view(*halo.shape, rows.shape[1])


# Kernels


@jit
def _seen(
    cells: tl.tensor,
    neighbors: tl.tensor,
    slot: tl.tensor,
    visible: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    channel: tl.tensor,
    channels: tl.tensor,
    S1: tl.constexpr,
    S2: tl.constexpr,
    REACH: tl.constexpr,
) -> tl.tensor:
    """Load the channels of positions that lie `row`, `column` away from a cell's first one."""
    # Counted from the first cell of the window, nothing is negative.
    y = row + REACH * S1
    x = column + REACH * S2
    window = y // S1 * (2 * REACH + 1) + x // S2
    around = neighbors + slot * ((2 * REACH + 1) * (2 * REACH + 1))
    neighbor = tl.load(around + window, mask=inside, other=-1)
    place = (neighbor * S1 + y % S1) * S2 + x % S2
    sample = cells + slot // visible * visible * (S1 * S2) * channels
    present = tl.expand_dims(neighbor >= 0, -1) & (channel < channels)
    source = sample + tl.expand_dims(place, -1) * channels + channel
    return tl.load(source, mask=present, other=0.0).to(tl.float32)


@jit
def _conv_kernel(
    out: tl.tensor,
    cells: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    neighbors: tl.tensor,
    visible: tl.tensor,
    channels: tl.tensor,
    S1: tl.constexpr,
    S2: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    REACH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: some channels of one cell. A row of the halo is used by all rows it reaches."""
    slot = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.arange(0, ROWS)
    x = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS, BLOCK), tl.float32)
    for step in range((S1 + K1 - 1) * K2):
        row = step // K2
        j = step % K2
        seen = _seen(
            cells,
            neighbors,
            slot,
            visible,
            row - K1 // 2,
            x + j - K2 // 2,
            x < S2,
            channel[None, :],
            channels,
            S1,
            S2,
            REACH,
        )
        i = row - y
        used = ((i >= 0) & (i < K1))[:, None] & (channel < channels)[None, :]
        tap = tl.load(taps + (i * K2 + j)[:, None] * channels + channel, mask=used, other=0.0)
        total += tap[:, None, :] * seen[None, :, :]
    if bias is not None:
        total += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    place = y[:, None, None] * S2 + x[None, :, None]
    inside = (y < S1)[:, None, None] & (x < S2)[None, :, None] & (channel < channels)
    target = out + slot * (S1 * S2) * channels
    tl.store(target + place * channels + channel, total.to(out.dtype.element_ty), mask=inside)


@jit
def _weight_gradient_kernel(
    partial: tl.tensor,
    cells: tl.tensor,
    grad: tl.tensor,
    neighbors: tl.tensor,
    slots: tl.tensor,
    visible: tl.tensor,
    channels: tl.tensor,
    S1: tl.constexpr,
    S2: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    REACH: tl.constexpr,
    TAPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CELLS: tl.constexpr,
) -> None:
    """One program: one row of taps, some channels, some cells."""
    i = tl.program_id(0)
    chunk = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    j = tl.arange(0, TAPS)[:, None]
    x = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((TAPS, COLUMNS, BLOCK), tl.float32)
    for step in range(tl.minimum(slots - chunk * CELLS, CELLS) * S1):
        slot = chunk * CELLS + step // S1
        y = step % S1
        within = x < S2
        upstream = tl.load(
            grad + slot * (S1 * S2) * channels + (y * S2 + x)[:, :, None] * channels + channel,
            mask=within[:, :, None] & (channel < channels),
            other=0.0,
        ).to(tl.float32)
        seen = _seen(
            cells,
            neighbors,
            slot,
            visible,
            y + i - K1 // 2,
            x + j - K2 // 2,
            within & (j < K2),
            channel[None, None, :],
            channels,
            S1,
            S2,
            REACH,
        )
        total += seen * upstream
    sums = tl.sum(total, axis=1)
    tap = (chunk * K1 + i) * K2 + j
    tl.store(partial + tap * channels + channel, sums, mask=(j < K2) & (channel < channels))


# Launchers

MAX_POSITIONS = 256
MAX_KERNEL = 64
TILE = 2048  # sums of a program
MAX_BLOCK = 256
CELLS_PER_PROGRAM = 32


def _block(channels: int, rows: int) -> int:
    """Return the channels of a program whose sums have `rows` rows: lanes side by side."""
    return min(power_of_2_from(channels), max(TILE // rows, 16), MAX_BLOCK)


def _constants(neighbors: Tensor, cell: Sequence[int], kernel: Sequence[int]) -> dict[str, int]:
    reach = math.isqrt(neighbors.shape[2]) // 2
    return {"S1": cell[0], "S2": cell[1], "K1": kernel[0], "K2": kernel[1], "REACH": reach}


def _launch_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    batch, visible, _, channels = cells.shape
    out = torch.empty(cells.shape, dtype=cells.dtype, device=cells.device)
    rows, columns = (power_of_2_from(size) for size in cell)
    block = _block(channels, rows * columns)
    if out.numel():
        with on_device(cells):
            _conv_kernel[batch * visible, -(-channels // block)](
                out,
                cells.contiguous(),
                weight.flatten(1).t().float().contiguous(),  # channels side by side
                bias,
                neighbors.contiguous(),
                visible,
                channels,
                **_constants(neighbors, cell, weight.shape[2:]),
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
    taps, columns = power_of_2_from(kernel[1]), power_of_2_from(cell[1])
    block = _block(channels, taps * columns)
    if partial.numel():
        with on_device(cells):
            _weight_gradient_kernel[kernel[0], chunks, -(-channels // block)](
                partial,
                cells.contiguous(),
                grad.contiguous(),
                neighbors.contiguous(),
                slots,
                visible,
                channels,
                **_constants(neighbors, cell, kernel),
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
    """Say why the kernels cannot take a call, if they cannot."""
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
        turned = weight.flip(2, 3)
        grad_cells = packed_depthwise_conv_op(grad, turned, None, neighbors, ctx.cell)
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
