"""Kernels with a fault, each beside its correct form, for the tests of the checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mimkit_kernels._jit import jit

if TYPE_CHECKING:
    import triton.language as tl


@jit
def late_load_kernel(
    logits: tl.tensor, target: tl.tensor, losses: tl.tensor, words: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """`linear_cross_entropy` as it was: the target's logit is loaded after the last barrier."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    line = logits + row * words
    right = tl.load(target + row)
    largest = -float("inf")
    total = 0.0
    for start in range(0, words, BLOCK):
        inside = start + word < words
        z = tl.load(line + start + word, mask=inside, other=-float("inf")).to(tl.float32)
        above = tl.maximum(largest, tl.max(z, axis=0))
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(z - above), axis=0)
        largest = above
    log_total = largest + tl.log(total)
    target_logit = tl.load(line + right).to(tl.float32)
    tl.store(losses + row, log_total - target_logit)
    for start in range(0, words, BLOCK):
        inside = start + word < words
        z = tl.load(line + start + word, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(z - log_total) - tl.where(start + word == right, 1.0, 0.0)
        tl.store(line + start + word, gradient.to(logits.dtype.element_ty), mask=inside)


@jit
def two_writes_kernel(out: tl.tensor, BLOCK: tl.constexpr, BARRIER: tl.constexpr) -> None:
    """Two warps write the same address."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + BLOCK - 1 - i, i)


@jit
def scratch_kernel(
    out: tl.tensor, scratch: tl.tensor, BLOCK: tl.constexpr, BARRIER: tl.constexpr
) -> None:
    """One warp reads from a buffer what another has written."""
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + BLOCK - 1 - i))


@jit
def loop_kernel(
    out: tl.tensor,
    buffer: tl.tensor,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BARRIER: tl.constexpr,
) -> None:
    """One warp overwrites what another reads one step earlier or later."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for step in range(0, STEPS):
        total += tl.load(buffer + (i + BLOCK // 2) % BLOCK)
        if BARRIER:
            tl.debug_barrier()
        tl.store(buffer + i, total + step)
        if BARRIER:
            tl.debug_barrier()
    tl.store(out + i, total)


@jit
def centered_kernel(
    out: tl.tensor,
    buffer: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BARRIER: tl.constexpr,
) -> None:
    """The barriers of a sum over two axes precede a store; another layout reads what it wrote."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = row[:, None] * COLUMNS + column[None, :]
    values = tl.load(buffer + place)
    tl.store(buffer + place, values - tl.sum(tl.sum(values, axis=1), axis=0))
    if BARRIER:
        tl.debug_barrier()
    turned = column[:, None] * ROWS + row[None, :]
    tl.store(out + turned, tl.load(buffer + ROWS * COLUMNS - 1 - turned))


@jit
def shifted_kernel(
    out: tl.tensor, scratch: tl.tensor, flag: tl.tensor, BLOCK: tl.constexpr, SHIFT: tl.constexpr
) -> None:
    """If the flag is set, reads what the thread itself has written, or another warp."""
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, i)
    if tl.load(flag) > 0:
        tl.store(out + i, tl.load(scratch + (i + SHIFT) % BLOCK))


@jit
def modulo_kernel(out: tl.tensor, BLOCK: tl.constexpr, LENGTH: tl.constexpr) -> None:
    """Programs that begin again at the start of their output after `LENGTH` values."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i % LENGTH, i * 0)


@jit
def atomic_kernel(out: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Adds to what other programs add to."""
    tl.atomic_add(out + tl.arange(0, BLOCK), 1.0)


@jit
def pipelined_kernel(out: tl.tensor, x: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Writes to a tensor while asynchronous copies read it, two steps ahead."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, n, BLOCK, num_stages=3):
        total += tl.load(x + start + i)
        tl.store(x + start + BLOCK - 1 - i, total)
    tl.store(out + i, total)


@jit
def halves_kernel(words: tl.tensor, halves: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Writes words, and reads the upper halves of the next program's words."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(words + i, tl.load(halves + 2 * (i + BLOCK) + 1).to(tl.int32))


@jit
def neighbors_kernel(
    out: tl.tensor, data: tl.tensor, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
) -> None:
    """Programs whose blocks overlap by `OVERLAP` values; with the same tensor twice, in place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(data + i + OVERLAP))


@jit
def overlap_kernel(out: tl.tensor, BLOCK: tl.constexpr, STEP: tl.constexpr) -> None:
    """Programs that write `BLOCK` values each, `STEP` apart."""
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * STEP + i, i)


@jit
def outside_kernel(out: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Writes beyond the end of its tensor."""
    tl.store(out + tl.arange(0, BLOCK), 1.0)


@jit
def misaligned_kernel(out: tl.tensor, offset: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Claims that the address at an offset is aligned."""
    start = tl.multiple_of(out + offset, 16)
    tl.store(start + tl.arange(0, BLOCK), 1.0)


@jit
def narrow_kernel(out: tl.tensor, x: tl.tensor, BLOCK: tl.constexpr, KIND: tl.constexpr) -> None:
    """Computes in the dtype of `x`, unless KIND is "float32"."""
    values = tl.load(x + tl.arange(0, BLOCK))
    if KIND == "float32":
        values = values.to(tl.float32)
    if KIND == "product":
        values = values * values
    tl.store(out + tl.arange(0, BLOCK), values.to(out.dtype.element_ty))
    if KIND == "sum" or KIND == "float32":
        tl.store(out, tl.sum(values, axis=0).to(out.dtype.element_ty))
