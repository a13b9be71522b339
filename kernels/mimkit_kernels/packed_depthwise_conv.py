"""Depth-wise convolution of packed cells; masked positions and padding count as zeros.

    out[b, v, p, c] = bias[c] + sum_ij weight[c, i, j] * in[b, n, q, c]

Axes: b batch; v visible cells; p = (y, x) positions of a cell, S1 x S2; c channels; i, j taps,
K1 x K2. Position (y + i - K1 // 2, x + j - K2 // 2) relative to cell v is position q of cell n,
which `neighbors` lists for the window around v (-1: masked or outside). If n is in the window of v,
then v is in the window of n. So the gradient of the input is the same convolution with the filter
flipped. The input is read from memory about once, halos from the caches; the output is written
once. Masked cells of a halo cost nothing. The gradients of filter and bias are summed in one pass,
in a fixed order: partial sums over groups of cells, then over the groups.
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
        "packed_depthwise_conv", cells, lambda: _obstacle(cells, weight, bias)
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
    side = _side(window)
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


def _side(window: int) -> int:
    """Return the side of a square window; `torch.compile` cannot trace `math.isqrt` of a size."""
    side = 1
    while side * side < window:
        side += 2
    return side


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
#
# A program keeps the sums of one tile in registers, each of its threads those of a few channels. A
# position of the halo is loaded once and added to every sum that it reaches; which ones is known
# when the kernel is compiled. All loops but that over tiles are unrolled.


class Geometry(NamedTuple):
    """Constants of the kernels.

    Fields only: Triton passes them on to helper functions, but not properties.

    Attributes:
        C: Channels.
        S1: Height of a cell.
        S2: Width of a cell.
        T1: Height of a tile, the part of a cell that is computed at once. It divides `S1`.
        T2: Width of a tile.
        K1: Height of the filter.
        K2: Width of the filter.
        REACH: Cells from the center of a window to its edge.
    """

    C: int
    S1: int
    S2: int
    T1: int
    T2: int
    K1: int
    K2: int
    REACH: int


class Cells(NamedTuple):
    """Packed cells, as the kernels take them.

    Attributes:
        data: [batch, visible, positions, channels].
        neighbors: [batch, visible, window].
        visible: Visible cells per sample.
        tiles: Tiles of the batch.
    """

    data: Tensor
    neighbors: Tensor
    visible: int
    tiles: int


@jit
def _block_of_channels(G: tl.constexpr, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the channels of a program, and which of them exist.

    Those past the last one are replaced by it, so that loads need no mask.
    """
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < G.C
    if G.C % BLOCK:
        channel = tl.minimum(channel, G.C - 1)
    return channel, inside


@jit
def _place_of_tile(tile: tl.tensor, G: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the cell of a tile, and row and column of the tile in it, counted in tiles."""
    N1: tl.constexpr = G.S1 // G.T1
    N2: tl.constexpr = G.S2 // G.T2
    return tile // (N1 * N2), tile // N2 % N1, tile % N2


@jit
def _tile_offset(slot: tl.tensor, row: tl.tensor, column: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """Return the offset of a tile's first value; `slot` is its cell."""
    first = (slot * G.S1 + row * G.T1) * G.S2 + column * G.T2
    return first * G.C


@jit
def _add_position(
    sums: tl.tensor,
    source: tl.tensor,
    factors: tl.tensor,
    Y: tl.constexpr,
    X: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
) -> tl.tensor:
    """Add the position (Y, X) of a halo, times factor (Y - r1, X - r2), to each sum (r1, r2)."""
    value = tl.load(source).to(tl.float32)
    added = ()
    for r in tl.static_range(R1 * R2):
        if Y - r // R2 >= 0 and Y - r // R2 < F1 and X - r % R2 >= 0 and X - r % R2 < F2:
            factor = factors[(Y - r // R2) * F2 + X - r % R2]
            added = added + (tl.fma(value, factor, sums[r]),)  # type: ignore[assignment]
        else:
            added = added + (sums[r],)  # type: ignore[assignment]
    return added


@jit
def _add_tile(
    sums: tl.tensor,
    source: tl.tensor,
    factors: tl.tensor,
    Y: tl.constexpr,
    X: tl.constexpr,
    G: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
) -> tl.tensor:
    """Add the positions of one tile; its first one is at (Y, X) of the halo."""
    T1: tl.constexpr = G.T1  # Triton 3.6 does not take a field as the end of a range
    T2: tl.constexpr = G.T2
    for y in tl.static_range(T1):
        for x in tl.static_range(T2):
            # Positions outside of the halo reach no sum, so they are not loaded.
            if Y + y >= 0 and Y + y < R1 + F1 - 1 and X + x >= 0 and X + x < R2 + F2 - 1:
                place = source + (y * G.S2 + x) * G.C
                sums = _add_position(sums, place, factors, Y + y, X + x, R1, R2, F1, F2)
    return sums


@jit
def _add_halo(
    sums: tl.tensor,
    factors: tl.tensor,
    cells: Cells,
    tile: tl.tensor,
    channel: tl.tensor,
    G: tl.constexpr,
    R1: tl.constexpr,
    R2: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
) -> tl.tensor:
    """Add a tile and the visible ones around it, to a grid of R1 x R2 sums.

    For the convolution the sums are the positions of the tile and the factors the taps; for the
    filter's gradient it is the other way round.
    """
    N1: tl.constexpr = G.S1 // G.T1
    N2: tl.constexpr = G.S2 // G.T2
    WINDOW: tl.constexpr = 2 * G.REACH + 1
    # Tiles that the filter reaches.
    REACH1: tl.constexpr = (G.K1 // 2 + G.T1 - 1) // G.T1
    REACH2: tl.constexpr = (G.K2 // 2 + G.T2 - 1) // G.T2
    slot, row, column = _place_of_tile(tile, G)
    around = cells.neighbors + slot.to(tl.int64) * (WINDOW * WINDOW)
    first_slot = (slot // cells.visible * cells.visible).to(tl.int64)
    sample = cells.data + first_slot * (G.S1 * G.S2 * G.C) + channel
    for dy in tl.static_range(-REACH1, REACH1 + 1):
        for dx in tl.static_range(-REACH2, REACH2 + 1):
            # Counted in tiles from the first cell of the window, so not negative.
            y = row + dy + G.REACH * N1
            x = column + dx + G.REACH * N2
            neighbor = tl.load(around + y // N1 * WINDOW + x // N2)
            if neighbor >= 0:
                source = sample + _tile_offset(neighbor, y % N1, x % N2, G)
                sums = _add_tile(
                    sums, source, factors,
                    dy * G.T1 + G.K1 // 2, dx * G.T2 + G.K2 // 2, G, R1, R2, F1, F2,
                )  # fmt: skip
    return sums


@jit
def _conv_kernel(
    out: tl.tensor,
    cells: Cells,
    taps: tl.tensor,
    bias: tl.tensor,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """One program: a block of channels of `TILES` tiles, with the taps in registers."""
    channel, inside = _block_of_channels(G, BLOCK)
    factors = ()
    for k in tl.static_range(G.K1 * G.K2):
        factors = factors + (tl.load(taps + k * G.C + channel),)  # type: ignore[assignment]
    start = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        start += tl.load(bias + channel).to(tl.float32)
    first = tl.program_id(0) * TILES
    for step in range(tl.minimum(cells.tiles - first, TILES)):
        tile = first + step
        sums = (start,) * (G.T1 * G.T2)
        sums = _add_halo(sums, factors, cells, tile, channel, G, G.T1, G.T2, G.K1, G.K2)
        slot, row, column = _place_of_tile(tile, G)
        target = out + _tile_offset(slot.to(tl.int64), row, column, G) + channel
        for p in tl.static_range(G.T1 * G.T2):
            place = target + (p // G.T2 * G.S2 + p % G.T2) * G.C
            tl.store(place, sums[p].to(out.dtype.element_ty), mask=inside)


@jit
def _weight_gradient_kernel(
    partial: tl.tensor,
    cells: Cells,
    grad: tl.tensor,
    tiles: tl.tensor,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: all taps and the bias of a block of channels, summed over `tiles` tiles."""
    channel, inside = _block_of_channels(G, BLOCK)
    first = tl.program_id(0) * tiles
    sums = (tl.zeros((BLOCK,), tl.float32),) * (G.K1 * G.K2)
    bias = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.minimum(cells.tiles - first, tiles)):
        tile = first + step
        slot, row, column = _place_of_tile(tile, G)
        source = grad + _tile_offset(slot.to(tl.int64), row, column, G) + channel
        upstream = ()
        for p in tl.static_range(G.T1 * G.T2):
            place = source + (p // G.T2 * G.S2 + p % G.T2) * G.C
            upstream = upstream + (tl.load(place).to(tl.float32),)  # type: ignore[assignment]
            bias += upstream[p]
        sums = _add_halo(sums, upstream, cells, tile, channel, G, G.K1, G.K2, G.T1, G.T2)
    target = partial + tl.program_id(0).to(tl.int64) * ((G.K1 * G.K2 + 1) * G.C) + channel
    for k in tl.static_range(G.K1 * G.K2):
        tl.store(target + k * G.C, sums[k], mask=inside)
    tl.store(target + G.K1 * G.K2 * G.C, bias, mask=inside)


# Launchers

MAX_TAPS = 49  # each is in a register; larger filters use the reference
_MAX_SIDE = 4  # of a tile
_TILES = 8  # of a program of the convolution
_PROGRAMS = 1024  # of the filter's gradient; each writes a row of partial sums per tap and one more


def _tile_side(size: int) -> int:
    """Return the largest side of a tile that divides a cell's side."""
    return max(side for side in range(1, _MAX_SIDE + 1) if size % side == 0)


def _block(channels: int) -> dict[str, Any]:
    """Return the constants of a launch: two channels a thread, and no block that is partly idle."""
    whole = math.gcd(channels, 128)
    block = whole if whole >= 32 else min(power_of_2_from(channels), 128)
    return {"BLOCK": block, "num_warps": max(block // 64, 1), "enable_fp_fusion": True}


def _describe(
    cells: Tensor, neighbors: Tensor, cell: Sequence[int], kernel: Sequence[int]
) -> tuple[Cells, Geometry]:
    batch, visible, positions, channels = cells.shape
    reach = _side(neighbors.shape[2]) // 2
    tile = _tile_side(cell[0]), _tile_side(cell[1])
    tiles = batch * visible * positions // (tile[0] * tile[1])
    packed = Cells(cells.contiguous(), neighbors.contiguous(), visible, tiles)
    return packed, Geometry(channels, cell[0], cell[1], *tile, kernel[0], kernel[1], reach)


def _launch_conv(
    cells: Tensor, weight: Tensor, bias: Tensor | None, neighbors: Tensor, cell: Sequence[int]
) -> Tensor:
    out = torch.empty(cells.shape, dtype=cells.dtype, device=cells.device)
    if out.numel():
        packed, geometry = _describe(cells, neighbors, cell, weight.shape[2:])
        taps = torch.empty(
            (weight[0].numel(), len(weight)), dtype=torch.float32, device=weight.device
        ).copy_(weight.flatten(1).t())
        constants = _block(geometry.C)
        with on_device(cells):
            _conv_kernel[-(-packed.tiles // _TILES), -(-geometry.C // constants["BLOCK"])](
                out,
                packed,
                taps,
                None if bias is None else bias.contiguous(),
                G=geometry,
                TILES=_TILES,
                **constants,
            )
    return out


def _launch_weight_gradient(
    cells: Tensor,
    grad: Tensor,
    neighbors: Tensor,
    cell: Sequence[int],
    kernel: Sequence[int],
) -> tuple[Tensor, Tensor]:
    packed, geometry = _describe(cells, neighbors, cell, kernel)
    constants = _block(geometry.C)
    blocks = -(-geometry.C // constants["BLOCK"])
    tiles = max(-(-packed.tiles * blocks // _PROGRAMS), 1)
    parts = -(-packed.tiles // tiles)
    rows = math.prod(kernel) + 1  # the last one is the bias
    partial = torch.empty((parts, rows, geometry.C), dtype=torch.float32, device=cells.device)
    if partial.numel():
        with on_device(cells):
            _weight_gradient_kernel[parts, blocks](
                partial, packed, grad.contiguous(), tiles, G=geometry, **constants
            )
    summed = partial.sum(0)
    taps = summed[:-1].unflatten(0, kernel).permute(2, 0, 1).unsqueeze(1)
    grad_weight, grad_bias = (
        # A copy: results of an operator share no memory.
        part.to(cells.dtype, copy=True, memory_format=torch.contiguous_format)
        for part in (taps, summed[-1])
    )
    return grad_weight, grad_bias


# Registration


def _obstacle(cells: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why the kernels do not support a call; `None` if they do."""
    if math.prod(weight.shape[2:]) > MAX_TAPS:
        return f"a filter of {tuple(weight.shape[2:])} taps: {MAX_TAPS} at most"
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
) -> tuple[Tensor, Tensor]:
    filter_ = _weight_gradient(cells, grad, halo_positions(neighbors, cell, kernel), cell)
    return filter_, grad.sum((0, 1, 2))


def _fake_weight_gradient(
    cells: Tensor,
    grad: Tensor,
    neighbors: Tensor,
    cell: Sequence[int],
    kernel: Sequence[int],
) -> tuple[Tensor, Tensor]:
    channels = cells.shape[-1]
    return cells.new_empty((channels, 1, *kernel)), cells.new_empty((channels,))


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
        grad_weight, grad_bias = weight_gradient_op(cells, grad, neighbors, ctx.cell, kernel)
    if not (needs_bias and ctx.has_bias):
        grad_bias = None
    elif grad_bias is None:
        grad_bias = grad.sum((0, 1, 2))
    return grad_cells, grad_weight, grad_bias, None, None


def _setup_weight_gradient(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    cells, grad, neighbors, ctx.cell, _ = inputs
    ctx.save_for_backward(cells, grad, neighbors)


def _weight_gradient_backward(
    ctx: Any, upstream: Tensor, of_bias: Tensor
) -> tuple[Tensor | None, ...]:
    cells, grad, neighbors = ctx.saved_tensors
    grad_cells = packed_depthwise_conv_op(grad, upstream.flip(2, 3), None, neighbors, ctx.cell)
    grad_grad = packed_depthwise_conv_op(cells, upstream, of_bias, neighbors, ctx.cell)
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
    "SymInt[] cell, SymInt[] kernel) -> (Tensor, Tensor)",
    launch=_launch_weight_gradient,
    reference=_weight_gradient_reference,
    fake=_fake_weight_gradient,
    backward=_weight_gradient_backward,
    setup_context=_setup_weight_gradient,
)
