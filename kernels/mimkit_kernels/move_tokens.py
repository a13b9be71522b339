"""Move tokens: take those of some positions out of sequences, and put them back among others.

    gather:   taken[b, p]          = tokens[b, p]                       p < P: prefix tokens
              taken[b, P + n]      = tokens[b, P + ids[b, n]]
    restore:  tokens[b, p]         = visible[b, p] + positions[p]
              tokens[b, P + l]     = row slots[b, l] of (visible, then fill) + positions[P + l]
    scatter:  restore with zeros for the fill
    sum:      total                = sum over b, n of tokens[b, P + ids[b, n]]

Axes: b batch; P prefix tokens; l positions of the grid; n taken positions. `slots` says where each
position stands among the visible, then the masked ones (a mask's `restore_ids`), so one program per
row writes the whole result: no zero-fill, no atomics. Gather and scatter are each other's
gradient; the gradient of one fill vector is a sum in two stages of fixed order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import dtype_obstacle, takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._register import on_device, power_of_2_from, register

if TYPE_CHECKING:
    import triton.language as tl


def gather_tokens(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    """Take the prefix tokens and the tokens `ids` (distinct within a row), by kernel or reference.

    Args:
        tokens: [batch, prefix + positions, dim].
        ids: [batch, taken], int64.
        prefix: Tokens in front of the positions.

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
    """Put tokens back into grid order and fill the other positions, by kernel or reference.

    Args:
        visible: [batch, prefix + visible, dim].
        fill: [dim] for all masked positions, or [batch, masked, dim].
        visible_ids: [batch, visible], int64.
        masked_ids: [batch, masked], int64; all other positions.
        positions: [prefix + visible + masked, dim] to add, or `None`.
        prefix: Tokens in front of the positions.

    Returns:
        [batch, prefix + visible + masked, dim], in the promoted type.
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
    return take_rows(tokens, _behind_prefix(ids, prefix))


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
        # A single fill vector stands behind the visible tokens once, and is taken many times.
        fill = fill.expand(visible.shape[0], 1, -1)
        slots = slots.clamp(max=visible_ids.shape[1])
    source = torch.cat([visible.to(dtype), fill.to(dtype)], dim=1)
    tokens = take_rows(source, _behind_prefix(slots, prefix))
    return tokens if positions is None else tokens + positions


def take_rows(tokens: Tensor, ids: Tensor) -> Tensor:
    """Take the rows `ids` of each sample."""
    # One flat index_select: its backward adds whole rows, where that of `gather` adds elements.
    batch, length, dim = tokens.shape
    starts = torch.arange(batch, device=ids.device).unsqueeze(1) * length
    taken = tokens.reshape(-1, dim).index_select(0, (ids + starts).flatten())
    return taken.view(batch, ids.shape[1], dim)


def restore_slots(visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
    """Return where each position stands among the visible, then the masked ones."""
    order = torch.cat([visible_ids, masked_ids], dim=1)
    return slots_of(order, order.shape[1])


def slots_of(ids: Tensor, length: int) -> Tensor:
    """Return where each of `length` positions stands in `ids`; behind all if it does not."""
    batch, taken = ids.shape
    numbers = torch.arange(taken, device=ids.device).expand(batch, -1)
    return ids.new_full((batch, length), taken).scatter(1, ids, numbers)


def _behind_prefix(ids: Tensor, prefix: int) -> Tensor:
    """Shift ids by the prefix, and put the prefix's own ids in front."""
    if prefix == 0:
        return ids
    own = torch.arange(prefix, device=ids.device).expand(ids.shape[0], -1)
    return torch.cat([own, ids + prefix], dim=1)


# Kernels


@jit
def _gather_kernel(
    taken: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    stride_batch: tl.tensor,
    stride_row: tl.tensor,
    num_ids: tl.tensor,
    prefix: tl.tensor,
    dim: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: a block of one row of the result."""
    place = tl.program_id(0).to(tl.int64)
    sample, row = place // (prefix + num_ids), place % (prefix + num_ids)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = sample * num_ids + row - prefix
    token = tl.load(ids + number, mask=row >= prefix, other=0)
    source = tl.where(row >= prefix, prefix + token, row)
    start = sample * stride_batch + source * stride_row
    values = tl.load(tokens + start + column, mask=column < dim)
    tl.store(taken + place * dim + column, values, mask=column < dim)


@jit
def _restore_kernel(
    tokens: tl.tensor,
    visible: tl.tensor,
    fill: tl.tensor,
    slots: tl.tensor,
    positions: tl.tensor,
    stride_batch: tl.tensor,
    stride_row: tl.tensor,
    num_visible: tl.tensor,
    num_masked: tl.tensor,
    length: tl.tensor,
    prefix: tl.tensor,
    dim: tl.tensor,
    FILL_EACH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: a block of one row of the result."""
    place = tl.program_id(0).to(tl.int64)
    sample, row = place // (prefix + length), place % (prefix + length)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    number = sample * length + row - prefix
    slot = tl.load(slots + number, mask=row >= prefix, other=0)
    source = tl.where(row >= prefix, prefix + slot, row)
    seen = source < prefix + num_visible
    start = sample * stride_batch + source * stride_row
    # No column is inside where the row is not of that kind.
    inside = column < tl.where(seen, dim, 0)
    values = tl.load(visible + start + column, mask=inside, other=0.0).to(tl.float32)
    if fill is not None:
        outside = column < tl.where(seen, 0, dim)
        first = (sample * num_masked + slot - num_visible) * dim if FILL_EACH else 0
        values += tl.load(fill + first + column, mask=outside, other=0.0).to(tl.float32)
    if positions is not None:
        added = tl.load(positions + row * dim + column, mask=column < dim, other=0.0)
        values += added.to(tl.float32)
    tl.store(tokens + place * dim + column, values.to(tokens.dtype.element_ty), mask=column < dim)


@jit
def _sum_kernel(
    partial: tl.tensor,
    tokens: tl.tensor,
    ids: tl.tensor,
    stride_batch: tl.tensor,
    stride_row: tl.tensor,
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
        start = number // num_ids * stride_batch + (prefix + token) * stride_row
        inside = (number < total)[:, None] & (column < dim)[None, :]
        values = tl.load(tokens + start[:, None] + column[None, :], mask=inside, other=0.0)
        sums += values.to(tl.float32)
    tl.store(partial + part * dim + column, tl.sum(sums, axis=0), mask=column < dim)


# Launchers

_MAX_BLOCK = 1024
_SUM_ROWS, _SUM_BLOCK, _SUM_PARTS = 8, 128, 256


def _blocks(dim: int) -> tuple[int, int]:
    block = min(power_of_2_from(dim), _MAX_BLOCK)
    return block, -(-dim // block)


def _rows_in_a_row(tokens: Tensor) -> Tensor:
    """Return the tensor with its values of a token side by side."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def _launch_gather(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    batch, _, dim = tokens.shape
    rows = prefix + ids.shape[1]
    taken = torch.empty((batch, rows, dim), dtype=tokens.dtype, device=tokens.device)
    block, blocks = _blocks(dim)
    tokens = _rows_in_a_row(tokens)
    if taken.numel():
        with on_device(tokens):
            _gather_kernel[batch * rows, blocks](
                taken,
                tokens,
                ids.contiguous(),
                tokens.stride(0),
                tokens.stride(1),
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
    fill: Tensor | None,
    slots: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    batch, seen, dim = visible.shape
    length = slots.shape[1]
    dtype = result_dtype(visible, fill, positions)
    tokens = torch.empty((batch, prefix + length, dim), dtype=dtype, device=visible.device)
    block, blocks = _blocks(dim)
    visible = _rows_in_a_row(visible)
    if tokens.numel():
        with on_device(visible):
            _restore_kernel[batch * (prefix + length), blocks](
                tokens,
                visible,
                None if fill is None else fill.contiguous(),
                slots,
                None if positions is None else positions.contiguous(),
                visible.stride(0),
                visible.stride(1),
                seen - prefix,
                length - (seen - prefix),
                length,
                prefix,
                dim,
                FILL_EACH=fill is not None and fill.ndim == 3,
                BLOCK=block,
                num_warps=1,
                enable_fp_fusion=True,
            )
    return tokens


def _launch_restore_masked(
    visible: Tensor,
    fill: Tensor,
    visible_ids: Tensor,
    masked_ids: Tensor,
    positions: Tensor | None,
    prefix: int,
) -> Tensor:
    slots = restore_slots(visible_ids, masked_ids)
    return _launch_restore(visible, fill, slots, positions, prefix)


def _launch_scatter(taken: Tensor, ids: Tensor, length: int, prefix: int) -> Tensor:
    return _launch_restore(taken, None, slots_of(ids, length), None, prefix)


def _launch_sum(tokens: Tensor, ids: Tensor, prefix: int) -> Tensor:
    dim = tokens.shape[2]
    total = ids.numel()
    rows = -(-total // _SUM_PARTS) if total else 1
    rows = -(-rows // _SUM_ROWS) * _SUM_ROWS
    parts = -(-total // rows)
    partial = torch.empty((parts, dim), dtype=torch.float32, device=tokens.device)
    tokens = _rows_in_a_row(tokens)
    if partial.numel():
        with on_device(tokens):
            _sum_kernel[parts, -(-dim // _SUM_BLOCK)](
                partial,
                tokens,
                ids.contiguous(),
                tokens.stride(0),
                tokens.stride(1),
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


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the promoted type of the tensors that are there."""
    first, *others = (tensor.dtype for tensor in tensors if tensor is not None)
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first


def _scatter_reference(taken: Tensor, ids: Tensor, length: int, prefix: int) -> Tensor:
    tokens = taken.new_zeros(taken.shape[0], prefix + length, taken.shape[2])
    places = _behind_prefix(ids, prefix).unsqueeze(2).expand_as(taken)
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
    dtype = result_dtype(visible, fill, positions)
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
        # Masked tokens lie behind the prefix, which `narrow` leaves out.
        behind = grad.narrow(1, ctx.prefix, grad.shape[1] - ctx.prefix)
        grad_fill = gather_tokens_op(behind, masked_ids, 0).to(of_fill)
    elif ctx.needs_input_grad[1]:
        grad_fill = sum_tokens_op(grad, masked_ids, ctx.prefix).to(of_fill)
    if ctx.needs_input_grad[4]:
        grad_positions = grad.sum(dim=0, dtype=torch.float32).to(of_positions)
    return grad_visible, grad_fill, None, None, grad_positions, None


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
    launch=_launch_restore_masked,
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
)
