"""Gather tokens at some positions of sequences, and restore full sequences from them.

    gather:   taken[b, p]          = tokens[b, p]                       p < P: prefix tokens
              taken[b, P + n]      = tokens[b, P + ids[b, n]]
    restore:  tokens[b, p]         = visible[b, p] + positions[p]
              tokens[b, P + id]    = visible[b, P + n] + positions[P + id]    id = visible_ids[b, n]
              tokens[b, P + id]    = fill[b, n] + positions[P + id]           id = masked_ids[b, n]
    scatter:  restore of visible tokens alone, between zeros
    sum:      total                = sum over b, n of tokens[b, P + ids[b, n]]

Axes: b batch; P prefix tokens; n taken positions. Ids are distinct, and each position is visible or
masked, so one program per row of input writes whole rows to their places, without atomics and
without inverting the ids. Gather and scatter are each other's gradient. The gradient of a shared
fill vector is a sum in two stages of fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._dtypes import dtype_obstacle, promoted_dtype
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import Rows, on_device, power_of_2_from, rows_in_place
from mimkit_kernels._register import register
from mimkit_kernels._slots import restore_slots

if TYPE_CHECKING:
    import triton.language as tl


def gather_tokens(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    """Gather the prefix tokens and the tokens `ids`, by kernel or reference.

    Args:
        tokens: [batch, prefix + positions, dim].
        ids: [batch, taken], int64, distinct within a row.
        prefix: Number of prefix tokens.

    Returns:
        [batch, prefix + taken, dim].
    """
    if takes_kernel("gather_tokens", tokens, lambda: dtype_obstacle(tokens=tokens.dtype)):
        taken: Tensor = gather_tokens_op(tokens, ids, prefix)
        return taken
    return gather_tokens_reference(tokens, ids, prefix)


def restore_tokens(
    visible: Tensor,
    fill: Tensor,
    visible_ids: Tensor,
    masked_ids: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    """Restore grid order and fill the masked positions, by kernel or reference.

    Args:
        visible: [batch, prefix + visible, dim].
        fill: [dim] for all masked positions, or [batch, masked, dim].
        visible_ids: [batch, visible], int64.
        masked_ids: [batch, masked], int64; all positions that are not visible.
        positions: [prefix + visible + masked, dim], position embeddings to add, or `None`.
        prefix: Number of prefix tokens.

    Returns:
        [batch, prefix + visible + masked, dim], in the promoted dtype.
    """
    arguments = (visible, fill, visible_ids, masked_ids, positions, prefix)

    def find_obstacle() -> str | None:
        added = visible.dtype if positions is None else positions.dtype
        return dtype_obstacle(visible=visible.dtype, fill=fill.dtype, positions=added)

    if takes_kernel("restore_tokens", visible, find_obstacle):
        tokens: Tensor = restore_tokens_op(*arguments)
        return tokens
    return restore_tokens_reference(*arguments)


def gather_tokens_reference(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    """Compute `gather_tokens` in plain PyTorch."""
    return take_rows(tokens, _after_prefix(ids, prefix))


def restore_tokens_reference(
    visible: Tensor,
    fill: Tensor,
    visible_ids: Tensor,
    masked_ids: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    """Compute `restore_tokens` in plain PyTorch."""
    dtype = torch.promote_types(visible.dtype, fill.dtype)
    slots = restore_slots(visible_ids, masked_ids)
    if fill.ndim == 1:
        # The shared fill vector is appended to the visible tokens once, and taken many times.
        fill = fill.expand(visible.shape[0], 1, -1)
        slots = slots.clamp(max=visible_ids.shape[1])
    source = torch.cat([visible.to(dtype), fill.to(dtype)], dim=1)
    tokens = take_rows(source, _after_prefix(slots, prefix))
    return tokens if positions is None else tokens + positions


def take_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Take the rows `ids` of each sample."""
    # One flat index_select: its backward adds whole rows, that of `gather` single elements.
    batch, length, dim = tokens.shape
    starts = torch.arange(batch, device=ids.device).unsqueeze(1) * length
    taken = tokens.reshape(-1, dim).index_select(0, (ids + starts).flatten())
    return taken.view(batch, ids.shape[1], dim)


def _after_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Shift ids by the prefix, and prepend the ids of the prefix."""
    if prefix == 0:
        return ids
    own = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([own, ids + prefix], dim=1)


# Kernels


@jit
def _gather_kernel(
    taken: tl.tensor,
    tokens: Rows,
    ids: tl.tensor,
    num_ids: tl.tensor,
    prefix: tl.tensor,
    dim: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: a block of one row of the result."""
    place = tl.program_id(0).to(tl.int64)
    sample, row = place // (prefix + num_ids), place % (prefix + num_ids)
    entry = tl.load(ids + (sample * num_ids + row - prefix), mask=row >= prefix, other=0)
    source = tl.where(row >= prefix, prefix + entry, row)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = sample * tokens.batch + source * tokens.row
    values = tl.load(tokens.data + start + column, mask=column < dim)
    tl.store(taken + place * dim + column, values, mask=column < dim)


@jit
def _restore_kernel(
    tokens: tl.tensor,
    visible: Rows,
    fill: tl.tensor,
    visible_ids: tl.tensor,
    masked_ids: tl.tensor,
    positions: tl.tensor,
    num_visible: tl.tensor,
    num_masked: tl.tensor,
    length: tl.tensor,
    prefix: tl.tensor,
    dim: tl.tensor,
    FILL_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: a block of one visible or filled row, which it writes to its place."""
    number = tl.program_id(0).to(tl.int64)
    rows = prefix + num_visible + num_masked
    sample, source = number // rows, number % rows
    seen, hidden = source - prefix, source - prefix - num_visible  # number in the lists of ids
    is_visible = hidden < 0
    # One of two masks is empty, here and below: a row is either visible or filled.
    entry = tl.load(
        visible_ids + (sample * num_visible + seen), mask=(seen >= 0) & is_visible, other=0
    )
    if fill is not None:
        entry += tl.load(masked_ids + (sample * num_masked + hidden), mask=hidden >= 0, other=0)
    row = tl.where(seen < 0, source, prefix + entry)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = sample * visible.batch + source * visible.row
    inside = column < tl.where(is_visible, dim, 0)
    values = tl.load(visible.data + start + column, mask=inside, other=0.0).to(tl.float32)
    if fill is not None:
        outside = column < tl.where(is_visible, 0, dim)
        first = (sample * num_masked + hidden) * dim if FILL_EACH else 0
        values += tl.load(fill + first + column, mask=outside, other=0.0).to(tl.float32)
    if positions is not None:
        added = tl.load(positions + row * dim + column, mask=column < dim, other=0.0)
        values += added.to(tl.float32)
    place = (sample * (prefix + length) + row) * dim
    tl.store(tokens + place + column, values.to(tokens.dtype.element_ty), mask=column < dim)


@jit
def _sum_kernel(
    partial: tl.tensor,
    tokens: Rows,
    ids: tl.tensor,
    num_ids: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    prefix: tl.tensor,
    dim: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One program: the sum of `rows` taken rows, `ROWS` at a time."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(0, rows, ROWS):
        number = part * rows + step + tl.arange(0, ROWS)
        token = tl.load(ids + number, mask=number < total, other=0)
        start = number // num_ids * tokens.batch + (prefix + token) * tokens.row
        inside = (number < total)[:, None] & (column < dim)[None, :]
        values = tl.load(tokens.data + start[:, None] + column[None, :], mask=inside, other=0.0)
        sums += values.to(tl.float32)
    tl.store(partial + part * dim + column, tl.sum(sums, axis=0), mask=column < dim)


# Launchers

_MAX_BLOCK = 1024
_SUM_ROWS, _SUM_BLOCK, _SUM_PARTS = 8, 128, 256


def _blocks(dim: int) -> tuple[int, int]:
    """Return the values of a block, and the number of blocks in a row."""
    block = min(power_of_2_from(dim), _MAX_BLOCK)
    return block, -(-dim // block)


def _launch_gather(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    batch, _, dim = tokens.shape
    rows = prefix + ids.shape[1]
    taken = torch.empty((batch, rows, dim), dtype=tokens.dtype, device=tokens.device)
    block, blocks = _blocks(dim)
    if taken.numel():
        with on_device(tokens):
            _gather_kernel[batch * rows, blocks](
                taken,
                rows_in_place(tokens),
                ids.contiguous(),
                ids.shape[1],
                prefix,
                dim,
                BLOCK=block,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return taken


def _launch_restore(
    visible: Tensor,
    fill: Tensor,
    visible_ids: Tensor,
    masked_ids: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    batch, _, dim = visible.shape
    length = visible_ids.shape[1] + masked_ids.shape[1]
    dtype = promoted_dtype(visible, fill, positions)
    tokens = torch.empty((batch, prefix + length, dim), dtype=dtype, device=visible.device)
    _write_rows(tokens, visible, fill, visible_ids, masked_ids, positions, prefix)
    return tokens


def _launch_scatter(taken: Tensor, ids: Tensor, length: int, prefix: int) -> Tensor:
    tokens = taken.new_zeros(taken.shape[0], prefix + length, taken.shape[2])
    _write_rows(tokens, taken, None, ids, None, None, prefix)
    return tokens


def _write_rows(
    tokens: Tensor,
    visible: Tensor,
    fill: Tensor | None,
    visible_ids: Tensor,
    masked_ids: Tensor | None,
    positions: Tensor | None,
    prefix: int,
) -> None:
    """Write visible tokens, and fill if there is one, to their places in `tokens`."""
    batch, length, dim = tokens.shape
    num_masked = 0 if masked_ids is None else masked_ids.shape[1]
    rows = batch * (visible.shape[1] + num_masked)
    block, blocks = _blocks(dim)
    if rows * blocks:
        with on_device(visible):
            _restore_kernel[rows, blocks](
                tokens,
                rows_in_place(visible),
                None if fill is None else fill.contiguous(),
                visible_ids.contiguous(),
                None if masked_ids is None else masked_ids.contiguous(),
                None if positions is None else positions.contiguous(),
                visible.shape[1] - prefix,
                num_masked,
                length - prefix,
                prefix,
                dim,
                FILL_EACH=fill is not None and fill.ndim == 3,
                BLOCK=block,
                num_warps=1,
                enable_fp_fusion=True,
            )


def _launch_sum(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    dim = tokens.shape[2]
    total = ids.numel()
    rows = -(-total // _SUM_PARTS) if total else 1
    rows = -(-rows // _SUM_ROWS) * _SUM_ROWS
    parts = -(-total // rows)
    partial = torch.empty((parts, dim), dtype=torch.float32, device=tokens.device)
    if partial.numel():
        with on_device(tokens):
            _sum_kernel[parts, -(-dim // _SUM_BLOCK)](
                partial,
                rows_in_place(tokens),
                ids.contiguous(),
                ids.shape[1],
                total,
                rows,
                prefix,
                dim,
                BLOCK=_SUM_BLOCK,
                ROWS=_SUM_ROWS,
                num_warps=2,
                enable_fp_fusion=True,
            )
    return partial.sum(dim=0)


# Registration


def _scatter_reference(taken: Tensor, ids: Tensor, length: int, prefix: int) -> Tensor:
    tokens = taken.new_zeros(taken.shape[0], prefix + length, taken.shape[2])
    places = _after_prefix(ids, prefix).unsqueeze(2).expand_as(taken)
    return tokens.scatter(1, places, taken)


def _sum_reference(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    return take_rows(tokens, ids + prefix).sum(dim=(0, 1), dtype=torch.float32)


def _fake_gather(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    return tokens.new_empty(tokens.shape[0], prefix + ids.shape[1], tokens.shape[2])


def _fake_scatter(taken: Tensor, ids: Tensor, length: int, prefix: int) -> Tensor:
    return taken.new_empty(taken.shape[0], prefix + length, taken.shape[2])


def _fake_restore(
    visible: Tensor,
    fill: Tensor,
    visible_ids: Tensor,
    masked_ids: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    batch, seen, dim = visible.shape
    dtype = promoted_dtype(visible, fill, positions)
    return visible.new_empty((batch, seen + masked_ids.shape[1], dim), dtype=dtype)


def _fake_sum(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    return tokens.new_empty(tokens.shape[2], dtype=torch.float32)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ids, ctx.prefix = inputs
    ctx.length = tokens.shape[1] - ctx.prefix
    ctx.save_for_backward(ids)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return scatter_tokens_op(grad, ids, ctx.length, ctx.prefix), None, None


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, _, ctx.prefix = inputs
    ctx.save_for_backward(ids)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return gather_tokens_op(grad, ids, ctx.prefix), None, None, None


def _setup_restore(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    visible, fill, visible_ids, masked_ids, positions, ctx.prefix = inputs
    ctx.fills_each = fill.ndim == 3
    ctx.dtypes = [None if t is None else t.dtype for t in (visible, fill, positions)]
    ctx.save_for_backward(visible_ids, masked_ids)


def _restore_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    visible_ids, masked_ids = ctx.saved_tensors
    grad_visible = grad_fill = grad_positions = None
    of_visible, of_fill, of_positions = ctx.dtypes
    if ctx.needs_input_grad[0]:
        grad_visible = gather_tokens_op(grad, visible_ids, ctx.prefix).to(of_visible)
    if ctx.needs_input_grad[1] and ctx.fills_each:
        of_grid = grad.narrow(1, ctx.prefix, grad.shape[1] - ctx.prefix)
        grad_fill = gather_tokens_op(of_grid, masked_ids, 0).to(of_fill)
    elif ctx.needs_input_grad[1]:
        grad_fill = sum_tokens_op(grad, masked_ids, ctx.prefix).to(of_fill)
    if ctx.needs_input_grad[4]:
        grad_positions = grad.sum(dim=0, dtype=torch.float32).to(of_positions)
    return grad_visible, grad_fill, None, None, grad_positions, None


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, ids, ctx.prefix = inputs
    ctx.length, ctx.dtype = tokens.shape[1], tokens.dtype
    ctx.save_for_backward(ids)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    taken = grad.to(ctx.dtype).expand(*ids.shape, -1)
    return scatter_tokens_op(taken, ids + ctx.prefix, ctx.length, 0), None, None


gather_tokens_op = register(
    "gather_tokens(Tensor tokens, Tensor ids, SymInt prefix) -> Tensor",
    launch=_launch_gather,
    reference=gather_tokens_reference,
    fake=_fake_gather,
    backward=_gather_backward,
    setup_context=_setup_gather,
)
scatter_tokens_op = register(
    "scatter_tokens(Tensor taken, Tensor ids, SymInt length, SymInt prefix) -> Tensor",
    launch=_launch_scatter,
    reference=_scatter_reference,
    fake=_fake_scatter,
    backward=_scatter_backward,
    setup_context=_setup_scatter,
)
restore_tokens_op = register(
    "restore_tokens(Tensor visible, Tensor fill, Tensor visible_ids, Tensor masked_ids, "
    "Tensor? positions, SymInt prefix) -> Tensor",
    launch=_launch_restore,
    reference=restore_tokens_reference,
    fake=_fake_restore,
    backward=_restore_backward,
    setup_context=_setup_restore,
)
sum_tokens_op = register(
    "sum_tokens(Tensor tokens, Tensor ids, SymInt prefix) -> Tensor",
    launch=_launch_sum,
    reference=_sum_reference,
    fake=_fake_sum,
    backward=_sum_backward,
    setup_context=_setup_sum,
)
