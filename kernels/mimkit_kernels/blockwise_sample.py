"""Mask rectangles of tokens at random until exactly so many tokens of each sample are masked.

    attempt n  = the four words of Philox block n of one stream: area, aspect bin, top, left
    area       = least + word * (most - least + 1) >> 32: from the smallest block to what is left
    height     = (root of the area * root of the aspect ratio), from tables of roots * 2**16
    accepted   if it spans no axis and newly masks at least one token and not more than is left
    top-up     after many rejected attempts: the tokens of lowest rank (see uniform_sample) of those
               that are not masked, drawn from another stream

Axes: b batch; l tokens, row-major over height and width. Integers only: the same bits on every
device. One program draws one sample, whose mask it keeps in registers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._philox import sample_words
from mimkit_kernels._register import on_device, power_of_2_from, register
from mimkit_kernels.uniform_sample import split_positions

if TYPE_CHECKING:
    import triton.language as tl

MAX_TOKENS = 1024  # in the kernel: a sample is sorted in the registers of one program
MAX_ATTEMPTS = 1 << 16  # blocks of four words that a stream has for one sample
ASPECT_BINS = 256
_UNCUT = 1 << 20  # longer than any side
_ROUND = 16  # attempts of the reference between two looks at who is finished
_COLUMNS = 16  # tokens of a row that the reference keeps as the bits of one number


def blockwise_sample(
    sample_ids: Tensor,
    seed_and_epoch: Tensor,
    streams: tuple[int, int],
    grid: tuple[int, int],
    num_masked: int,
    blocks: tuple[int, int],
    log_aspect: tuple[float, float],
    patience: int,
) -> tuple[Tensor, Tensor]:
    """Draw block-wise masks, by kernel or by reference.

    Args:
        sample_ids: [batch], int64.
        seed_and_epoch: [2], int64.
        streams: Of the attempts, and of the top-up.
        grid: Height and width; at most 65536 tokens.
        num_masked: Tokens to mask.
        blocks: Smallest area, and largest number of tokens that a block may newly mask.
        log_aspect: Logarithms of the smallest and the largest ratio of height to width.
        patience: Rejected attempts in a row after which single tokens are masked.

    Returns:
        Ids of the visible and of the masked tokens, each ascending: [batch, number], int64.
    """
    height, width = grid

    def find_obstacle() -> str | None:
        return None if height * width <= MAX_TOKENS else f"{height * width} tokens"

    by_kernel = takes_kernel("blockwise_sample", sample_ids, find_obstacle)
    # How often the reference's loop runs depends on the draws, which no graph can hold: it is an
    # operator, too.
    draw = blockwise_sample_op if by_kernel else blockwise_reference_op
    visible, masked = draw(
        sample_ids, seed_and_epoch, *streams, height, width, num_masked, *blocks, *log_aspect,
        patience,
    )  # fmt: skip
    return visible, masked


@lru_cache(maxsize=16)
def root_tables(
    max_area: int, log_low: float, log_high: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the roots of all areas, of the aspect ratios and of their inverses, times 2**16."""
    areas = torch.tensor([math.isqrt(area << 32) for area in range(max_area + 1)])
    tall, flat = (torch.tensor(roots) for roots in aspect_roots(log_low, log_high))
    return areas.to(device), tall.to(device), flat.to(device)


@lru_cache(maxsize=16)
def aspect_roots(log_low: float, log_high: float) -> tuple[list[int], list[int]]:
    """Return the roots of the aspect ratios and of their inverses, times 2**16."""
    step = (log_high - log_low) / ASPECT_BINS
    halves = [(log_low + (i + 0.5) * step) / 2 for i in range(ASPECT_BINS)]
    tall, flat = ([round(math.exp(sign * half) * 65536) for half in halves] for sign in (1, -1))
    return tall, flat


def cut_sides(
    height: int, width: int, min_block: int, log_low: float, log_high: float
) -> tuple[int, int]:
    """Return to what height and width blocks are cut: only where even the smallest is too large."""
    root = math.isqrt(min_block << 32)
    cuts = []
    for size, roots in zip((height, width), aspect_roots(log_low, log_high), strict=True):
        limit, smallest = max(size - 1, 1), (root * min(roots) + (1 << 31)) >> 32
        cuts.append(limit if smallest > limit else _UNCUT)
    return cuts[0], cuts[1]


def blockwise_sample_reference(
    sample_ids: Tensor,
    seed_and_epoch: Tensor,
    stream: int,
    top_up_stream: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    max_block: int,
    log_low: float,
    log_high: float,
    patience: int,
) -> tuple[Tensor, Tensor]:
    """Compute `blockwise_sample` in plain PyTorch, all samples at once.

    Tokens are bits, so that of some hundred samples the tensors of an attempt are too small for
    PyTorch to share among threads: a second one gains nothing here, and all would wait for it while
    its core is busy.
    """
    bits = sample_ids.new_zeros((len(sample_ids), height, -(-width // _COLUMNS)))
    left = torch.full_like(sample_ids, num_masked)
    rejected = torch.zeros_like(sample_ids)
    tables = root_tables(max(min_block, max_block), log_low, log_high, sample_ids.device)
    cuts = cut_sides(height, width, min_block, log_low, log_high)
    shapes = BlockShapes((height, width), (min_block, max_block), cuts, tables)
    for first in range(0, MAX_ATTEMPTS, _ROUND):
        rows = ((left > 0) & (rejected < patience)).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        state = bits[rows], left[rows], rejected[rows]
        words = sample_words(
            sample_ids[rows], seed_and_epoch, stream, 4 * _ROUND, first_block=first
        )
        for attempt in words.unflatten(1, (_ROUND, 4)).unbind(1):
            state = _attempt(shapes, patience, attempt, *state)
        bits[rows], left[rows], rejected[rows] = state
    is_masked = _unpack(bits, width).flatten(1)
    rows = left.nonzero().squeeze(1)
    if len(rows):
        token = torch.arange(height * width, device=sample_ids.device)
        words = sample_words(sample_ids[rows], seed_and_epoch, top_up_stream, height * width)
        ranks = ((words << 16) | token).masked_fill(is_masked[rows], 1 << 48)
        last = ranks.sort(dim=1).values.gather(1, left[rows].unsqueeze(1) - 1)
        is_masked[rows] = is_masked[rows] | (ranks <= last)
    return split_positions(is_masked, height * width - num_masked)


class BlockShapes(NamedTuple):
    """Which blocks there are on a grid.

    Attributes:
        grid: Height and width.
        blocks: Smallest area, and largest number of newly masked tokens.
        cuts: Height and width that blocks are cut to.
        tables: Roots of areas, of aspect ratios and of their inverses.
    """

    grid: tuple[int, int]
    blocks: tuple[int, int]
    cuts: tuple[int, int]
    tables: tuple[Tensor, Tensor, Tensor]

    def sides(self, area: Tensor, aspect_bin: Tensor) -> list[Tensor]:
        """Return height and width of each block."""
        areas, *aspects = self.tables
        sides = (_product(areas[area], roots[aspect_bin]) for roots in aspects)
        return [side.clamp(1, cut) for side, cut in zip(sides, self.cuts, strict=True)]


def _product(root: Tensor, other: Tensor) -> Tensor:
    """Multiply two numbers of sixteen binary digits behind the point, rounded to an integer."""
    return (root * other + (1 << 31)) >> 32


def _attempt(
    shapes: BlockShapes,
    patience: int,
    words: Tensor,
    bits: Tensor,
    left: Tensor,
    rejected: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one block a sample, and mask it where it is accepted.

    Args:
        shapes: The possible blocks.
        patience: Rejected attempts after which a sample draws no more.
        words: Random words for area, aspect ratio, top and left: [batch, 4].
        bits: What is masked so far: [batch, height, numbers of `_COLUMNS` bits].
        left: Tokens still to mask: [batch].
        rejected: Attempts rejected in a row: [batch].

    Returns:
        The last three, updated.
    """
    height, width = shapes.grid
    area_word, aspect_word, top_word, left_word = words.unbind(1)
    min_block, max_block = shapes.blocks
    most = left.clamp(max=max_block)
    # While fewer than `min_block` are left, areas lie between the two all the same.
    least, largest = most.clamp(max=min_block), most.clamp(min=min_block)
    area = least + (area_word * (largest - least + 1) >> 32)
    block_height, block_width = shapes.sides(area, aspect_word * ASPECT_BINS >> 32)
    # A block spans no axis but one of a single token.
    fits = (block_height <= max(height - 1, 1)) & (block_width <= max(width - 1, 1))
    top = top_word * (height - block_height + 1).clamp(min=1) >> 32
    start = left_word * (width - block_width + 1).clamp(min=1) >> 32
    rows, columns = _between(top, block_height, height), _span(start, block_width, bits.shape[2])
    inside = rows.unsqueeze(2) * columns.unsqueeze(1)
    new = bit_counts(bits.device)[inside & ~bits].sum(dim=(1, 2))
    accepted = fits & (new > 0) & (new <= most) & (rejected < patience)
    bits = bits | (inside * accepted.view(-1, 1, 1))
    left = left - new * accepted
    waiting = (left > 0) & ~accepted
    return bits, left, torch.where(accepted, 0, rejected + waiting)


def _between(start: Tensor, length: Tensor, size: int) -> Tensor:
    position = torch.arange(size, device=start.device)
    offset = position - start.unsqueeze(1)
    return (offset >= 0) & (offset < length.unsqueeze(1))


def _span(start: Tensor, length: Tensor, numbers: int) -> Tensor:
    """As `_between`, as bits."""
    first = start.unsqueeze(1) - torch.arange(numbers, device=start.device) * _COLUMNS
    last = first + length.unsqueeze(1)
    return (1 << last.clamp(0, _COLUMNS)) - (1 << first.clamp(0, _COLUMNS))


def _unpack(bits: Tensor, width: int) -> Tensor:
    """Return bits as booleans: [batch, height, width]."""
    column = torch.arange(_COLUMNS, device=bits.device)
    is_set = (bits.unsqueeze(3) >> column) & 1
    return is_set.flatten(2)[:, :, :width].bool()


@lru_cache(maxsize=16)
def bit_counts(device: torch.device) -> Tensor:
    """Return how many bits are set in each number of `_COLUMNS` bits."""
    counts = torch.zeros(1, dtype=torch.uint8, device=device)
    for _ in range(_COLUMNS):
        counts = torch.cat([counts, counts + 1])
    return counts


# Kernel


@jit
def _blockwise_kernel(
    visible: tl.tensor,
    masked: tl.tensor,
    sample_ids: tl.tensor,
    seed_and_epoch: tl.tensor,
    areas: tl.tensor,
    tall: tl.tensor,
    flat: tl.tensor,
    first_counter: tl.tensor,
    top_up_counter: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    num_masked: tl.tensor,
    min_block: tl.tensor,
    max_block: tl.tensor,
    tall_cut: tl.tensor,
    flat_cut: tl.tensor,
    patience: tl.tensor,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    ATTEMPTS: tl.constexpr,
) -> None:
    """One program: one sample."""
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ids + row)
    seed, epoch = tl.load(seed_and_epoch), tl.load(seed_and_epoch + 1)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    num_tokens = height * width
    token = tl.arange(0, TOKENS)
    token_row, token_column = token // width, token % width

    # 1 where masked; what lies behind the grid is in no block.
    hidden = tl.zeros((TOKENS,), tl.int32)
    left = num_masked + 0
    rejected = 0
    attempt = 0
    while (left > 0) & (rejected < patience) & (attempt < ATTEMPTS):
        counter = (first_counter + attempt).to(tl.uint32)
        zero = counter ^ counter
        w0, w1, w2, w3 = tl.philox(
            seed, counter, zero + epoch.to(tl.uint32), zero + low, zero + high
        )
        most = tl.minimum(left, max_block)
        least, largest = tl.minimum(most, min_block), tl.maximum(most, min_block)
        area = least + ((w0.to(tl.int64) * (largest - least + 1)) >> 32).to(tl.int32)
        aspect = ((w1.to(tl.int64) * BINS) >> 32).to(tl.int32)
        root = tl.load(areas + area)
        half = 1 << 31
        down = ((root * tl.load(tall + aspect) + half) >> 32).to(tl.int32)
        across = ((root * tl.load(flat + aspect) + half) >> 32).to(tl.int32)
        down = tl.maximum(tl.minimum(down, tall_cut), 1)
        across = tl.maximum(tl.minimum(across, flat_cut), 1)
        room_down, room_across = tl.maximum(height - down, 0), tl.maximum(width - across, 0)
        top = ((w2.to(tl.int64) * (room_down + 1)) >> 32).to(tl.int32)
        start = ((w3.to(tl.int64) * (room_across + 1)) >> 32).to(tl.int32)
        inside = (token_row >= top) & (token_row < top + down)
        inside = inside & (token_column >= start) & (token_column < start + across)
        inside = inside & (token < num_tokens)
        new = tl.sum(tl.where(inside, 1 - hidden, 0), axis=0)
        fits = (down <= tl.maximum(height - 1, 1)) & (across <= tl.maximum(width - 1, 1))
        accepted = fits & (new > 0) & (new <= most)
        hidden = tl.where(inside, tl.where(accepted, 1, hidden), hidden)
        left -= tl.where(accepted, new, 0)
        rejected = tl.where(accepted, 0, rejected + 1)
        attempt += 1

    counters = (tl.arange(0, TOKENS // 4) + top_up_counter).to(tl.uint32)
    zeros = counters ^ counters
    w0, w1, w2, w3 = tl.philox(
        seed, counters, zeros + epoch.to(tl.uint32), zeros + low, zeros + high
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    ranks = (words.to(tl.int64) << 16) | token
    is_free = token < tl.where(hidden == 0, num_tokens, 0)
    ranks = tl.where(is_free, ranks, 0x7FFFFFFFFFFFFFFF)
    in_order = tl.sort(ranks)
    last = tl.sum(tl.where(token == left - 1, in_order, 0), axis=0)
    last = tl.where(left > 0, last, -1)
    is_visible = is_free & (ranks > last)

    num_visible = num_tokens - num_masked
    seen = tl.cumsum(is_visible.to(tl.int32), axis=0)
    tl.store(visible + (row * num_visible + seen - 1), token.to(tl.int64), mask=is_visible)
    is_masked = token < tl.where(is_visible, 0, num_tokens)
    tl.store(masked + (row * num_masked + token - seen), token.to(tl.int64), mask=is_masked)


# Launcher: as uniform_sample, whose sort holds the most registers here, too.

_NUM_WARPS = {512: 2, 1024: 8}  # with 4, Triton 3.6 spills for sm_80


def _launch(
    sample_ids: Tensor,
    seed_and_epoch: Tensor,
    stream: int,
    top_up_stream: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    max_block: int,
    log_low: float,
    log_high: float,
    patience: int,
) -> tuple[Tensor, Tensor]:
    batch, device, num_tokens = sample_ids.shape[0], sample_ids.device, height * width
    visible = torch.empty((batch, num_tokens - num_masked), dtype=torch.int64, device=device)
    masked = torch.empty((batch, num_masked), dtype=torch.int64, device=device)
    tokens = max(power_of_2_from(num_tokens), 4)
    areas, tall, flat = root_tables(max(min_block, max_block), log_low, log_high, device)
    if batch:
        with on_device(sample_ids):
            _blockwise_kernel[(batch,)](
                visible,
                masked,
                sample_ids.contiguous(),
                seed_and_epoch.contiguous(),
                areas,
                tall,
                flat,
                stream << 16,  # a multiple of 16 for every stream: no stream compiles anew
                top_up_stream << 16,
                height,
                width,
                num_masked,
                min_block,
                max_block,
                *cut_sides(height, width, min_block, log_low, log_high),
                patience,
                TOKENS=tokens,
                BINS=ASPECT_BINS,
                ATTEMPTS=MAX_ATTEMPTS,
                num_warps=_NUM_WARPS.get(tokens, 1),
                enable_fp_fusion=True,
            )
    return visible, masked


# Registration


def _fake(
    sample_ids: Tensor,
    seed_and_epoch: Tensor,
    stream: int,
    top_up_stream: int,
    height: int,
    width: int,
    num_masked: int,
    min_block: int,
    max_block: int,
    log_low: float,
    log_high: float,
    patience: int,
) -> tuple[Tensor, Tensor]:
    batch = sample_ids.shape[0]
    visible = sample_ids.new_empty((batch, height * width - num_masked))
    return visible, sample_ids.new_empty((batch, num_masked))


_SCHEMA = (
    "(Tensor sample_ids, Tensor seed_and_epoch, SymInt stream, SymInt top_up_stream, "
    "SymInt height, SymInt width, SymInt num_masked, SymInt min_block, SymInt max_block, "
    "float log_low, float log_high, SymInt patience) -> (Tensor, Tensor)"
)
blockwise_sample_op = register(
    f"blockwise_sample{_SCHEMA}",
    launch=_launch,
    reference=blockwise_sample_reference,
    fake=_fake,
)
blockwise_reference_op = register(
    f"blockwise_reference{_SCHEMA}",
    launch=blockwise_sample_reference,
    reference=blockwise_sample_reference,
    fake=_fake,
)
