"""Mask random rectangles of tokens until the exact number of tokens is masked in each sample.

    attempt n  = the four words of Philox block n of one stream: area, aspect bin, top, left
    area       = least + word * (most - least + 1) >> 32, uniform between the two limits
    height     = (root of the area * root of the aspect ratio), from tables of roots * 2**16
    accepted   if it is smaller than both axes and newly masks at least one token and at most `most`
    top-up     after `patience` rejections in a row: the tokens of lowest rank (see uniform_sample)
               of those that are not masked, drawn from another stream

Axes: b batch; l tokens, row-major over height and width. `most` is the number of tokens left to
mask, `max_block` at most. All arithmetic is on integers, so every device gives the same masks. One
program draws one sample and keeps its mask in registers.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import constant, on_device, power_of_2_from, prepare
from mimkit_kernels._philox import (
    counter_start,
    draw_words,
    kth_lowest_rank,
    sample_words,
    token_ranks,
)
from mimkit_kernels._register import register
from mimkit_kernels._slots import split_positions, store_split

if TYPE_CHECKING:
    import triton.language as tl

MAX_TOKENS = 1024  # of the kernel: one program keeps a sample in its registers
MAX_ATTEMPTS = 1 << 16  # a stream has that many blocks of four words for one sample
ASPECT_BINS = 256
_UNLIMITED = 1 << 20  # longer than any side
_ROUND = 16  # attempts of the reference between two checks for finished samples
_COLUMNS = 16  # tokens of a row that the reference packs into one integer


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
    """Draw block-wise masks, by kernel or reference.

    Args:
        sample_ids: [batch], int64.
        seed_and_epoch: [2], int64.
        streams: Stream of the attempts, and of the top-up.
        grid: Height and width; at most 65536 tokens.
        num_masked: Tokens to mask.
        blocks: Smallest area of a block, and the most tokens that a block may newly mask.
        log_aspect: Logarithms of the smallest and the largest ratio of height to width.
        patience: Rejections in a row after which single tokens are masked.

    Returns:
        Ids of the visible and of the masked tokens, each ascending: [batch, number], int64.
    """
    height, width = grid

    def find_obstacle() -> str | None:
        return None if height * width <= MAX_TOKENS else f"{height * width} tokens"

    by_kernel = takes_kernel("blockwise_sample", sample_ids, find_obstacle)
    # The reference is an operator too: the length of its loop depends on the draws, which
    # `torch.compile` cannot trace.
    draw = blockwise_sample_op if by_kernel else blockwise_reference_op
    options = Options(*streams, height, width, num_masked, *blocks, *log_aspect, patience)
    visible, masked = draw(sample_ids, seed_and_epoch, *options)
    return visible, masked


class Options(NamedTuple):
    """Options of `blockwise_sample`, in the order of the operators' arguments.

    Attributes:
        stream: Stream of the attempts.
        top_up_stream: Stream of the top-up.
        height: Height of the grid.
        width: Width of the grid.
        num_masked: Tokens to mask.
        min_block: Smallest area of a block.
        max_block: Most tokens that a block may newly mask.
        log_low: Logarithm of the smallest ratio of height to width.
        log_high: Logarithm of the largest ratio.
        patience: Rejections in a row after which single tokens are masked.
    """

    stream: int
    top_up_stream: int
    height: int
    width: int
    num_masked: int
    min_block: int
    max_block: int
    log_low: float
    log_high: float
    patience: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the grid."""
        return self.height * self.width

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the roots of areas, of aspect ratios and of their inverses, times 2**16."""
        largest = max(self.min_block, self.max_block)
        return root_tables(largest, self.log_low, self.log_high, device)

    def side_limits(self) -> tuple[int, int]:
        """Return the largest height and width of blocks.

        Sides are limited only if even the smallest block would be too long; else no limit applies.
        """
        root = math.isqrt(self.min_block << 32)
        limits = []
        tall, flat = aspect_roots(self.log_low, self.log_high)  # ascending, descending
        for size, aspect in ((self.height, tall[0]), (self.width, flat[-1])):
            limit, smallest = max(size - 1, 1), (root * aspect + (1 << 31)) >> 32
            limits.append(limit if smallest > limit else _UNLIMITED)
        return limits[0], limits[1]


@constant
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


def blockwise_sample_reference(
    sample_ids: Tensor, seed_and_epoch: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """Compute `blockwise_sample` in plain PyTorch, for all samples at once.

    Masks are packed into integers, 16 tokens each. Then PyTorch does not split the tensors of a few
    hundred samples among threads: threads gain nothing here, and would wait for each other on a
    busy machine.
    """
    how = Options(*options)
    height, width, num_masked = how.height, how.width, how.num_masked
    bits = sample_ids.new_zeros((len(sample_ids), height, -(-width // _COLUMNS)))
    left = torch.full_like(sample_ids, num_masked)
    rejected = torch.zeros_like(sample_ids)
    tables, limits = how.tables(sample_ids.device), how.side_limits()
    for first in range(0, MAX_ATTEMPTS, _ROUND):
        rows = ((left > 0) & (rejected < how.patience)).nonzero().squeeze(1)
        if len(rows) == 0:
            break
        state = bits[rows], left[rows], rejected[rows]
        words = sample_words(
            sample_ids[rows], seed_and_epoch, how.stream, 4 * _ROUND, first_block=first
        )
        for attempt in words.unflatten(1, (_ROUND, 4)).unbind(1):
            state = _attempt(how, tables, limits, attempt, *state)
        bits[rows], left[rows], rejected[rows] = state
    is_masked = _unpack(bits, width).flatten(1)
    rows = left.nonzero().squeeze(1)
    if len(rows):
        token = torch.arange(how.num_tokens, device=sample_ids.device)
        words = sample_words(sample_ids[rows], seed_and_epoch, how.top_up_stream, how.num_tokens)
        ranks = ((words << 16) | token).masked_fill(is_masked[rows], 1 << 48)
        last = ranks.sort(dim=1).values.gather(1, left[rows].unsqueeze(1) - 1)
        is_masked[rows] = is_masked[rows] | (ranks <= last)
    return split_positions(is_masked, how.num_tokens - num_masked)


def _attempt(
    how: Options,
    tables: tuple[Tensor, Tensor, Tensor],
    limits: tuple[int, int],
    words: Tensor,
    bits: Tensor,
    left: Tensor,
    rejected: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one block per sample, and mask it if it is accepted.

    Args:
        how: Options of the sampler.
        tables: Its `Options.tables`.
        limits: Its `Options.side_limits`.
        words: Random words for area, aspect ratio, top and left: [batch, 4].
        bits: Masked tokens so far, packed: [batch, height, integers of `_COLUMNS` bits].
        left: Tokens still to mask: [batch].
        rejected: Attempts rejected in a row: [batch].

    Returns:
        The last three, updated.
    """
    area_word, aspect_word, top_word, left_word = words.unbind(1)
    most = left.clamp(max=how.max_block)
    # If fewer than `min_block` tokens are left, areas still reach up to `min_block`.
    least, largest = most.clamp(max=how.min_block), most.clamp(min=how.min_block)
    area = least + (area_word * (largest - least + 1) >> 32)
    areas, *aspects = tables
    aspect = aspect_word * ASPECT_BINS >> 32
    block_height, block_width = (
        _product(areas[area], roots[aspect]).clamp(1, limit)
        for roots, limit in zip(aspects, limits, strict=True)
    )
    # A block must be smaller than both axes, except an axis of one token.
    fits = (block_height <= max(how.height - 1, 1)) & (block_width <= max(how.width - 1, 1))
    top = top_word * (how.height - block_height + 1).clamp(min=1) >> 32
    start = left_word * (how.width - block_width + 1).clamp(min=1) >> 32
    rows = _between(top, block_height, how.height)
    columns = _pack_range(start, block_width, bits.shape[2])
    inside = rows.unsqueeze(2) * columns.unsqueeze(1)
    new = bit_counts(bits.device)[inside & ~bits].sum(dim=(1, 2))
    accepted = fits & (new > 0) & (new <= most) & (rejected < how.patience)
    bits = bits | (inside * accepted.view(-1, 1, 1))
    left = left - new * accepted
    is_rejected = (left > 0) & ~accepted
    return bits, left, torch.where(accepted, 0, rejected + is_rejected)


def _product(root: Tensor, other: Tensor) -> Tensor:
    """Multiply two fixed-point numbers with 16 fractional bits, rounded to an integer."""
    return (root * other + (1 << 31)) >> 32


def _between(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return which of `size` positions are in a range: [batch, size], boolean."""
    position = torch.arange(size, device=start.device)
    offset = position - start.unsqueeze(1)
    return (offset >= 0) & (offset < length.unsqueeze(1))


def _pack_range(start: Tensor, length: Tensor, numbers: int) -> Tensor:
    """Return `_between` packed into integers of `_COLUMNS` bits: [batch, numbers]."""
    first = start.unsqueeze(1) - torch.arange(numbers, device=start.device) * _COLUMNS
    last = first + length.unsqueeze(1)
    return (1 << last.clamp(0, _COLUMNS)) - (1 << first.clamp(0, _COLUMNS))


def _unpack(bits: Tensor, width: int) -> Tensor:
    """Unpack bits to booleans: [batch, height, width]."""
    column = torch.arange(_COLUMNS, device=bits.device)
    is_set = (bits.unsqueeze(3) >> column) & 1
    return is_set.flatten(2)[:, :, :width].bool()


@constant
def bit_counts(device: torch.device) -> Tensor:
    """Return the number of set bits of each integer of `_COLUMNS` bits."""
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
    height_limit: tl.tensor,
    width_limit: tl.tensor,
    patience: tl.tensor,
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,
    ATTEMPTS: tl.constexpr,
) -> None:
    """One program: one sample."""
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ids + row)
    seed, epoch = tl.load(seed_and_epoch), tl.load(seed_and_epoch + 1)
    num_tokens = height * width
    token = tl.arange(0, TOKENS)
    token_row, token_column = token // width, token % width

    # 1 if masked. Positions beyond the last token are in no block.
    hidden = tl.zeros((TOKENS,), tl.int32)
    left = num_masked + 0
    rejected = 0
    attempt = 0
    while (left > 0) & (rejected < patience) & (attempt < ATTEMPTS):
        counter = (first_counter + attempt).to(tl.uint32)
        w0, w1, w2, w3 = draw_words(seed, epoch, sample, counter)
        most = tl.minimum(left, max_block)
        least, largest = tl.minimum(most, min_block), tl.maximum(most, min_block)
        area = least + ((w0.to(tl.int64) * (largest - least + 1)) >> 32).to(tl.int32)
        aspect = ((w1.to(tl.int64) * BINS) >> 32).to(tl.int32)
        root = tl.load(areas + area)
        half = 1 << 31
        down = ((root * tl.load(tall + aspect) + half) >> 32).to(tl.int32)
        across = ((root * tl.load(flat + aspect) + half) >> 32).to(tl.int32)
        down = tl.maximum(tl.minimum(down, height_limit), 1)
        across = tl.maximum(tl.minimum(across, width_limit), 1)
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

    ranks = token_ranks(seed, epoch, sample, top_up_counter, TOKENS)
    is_free = token < tl.where(hidden == 0, num_tokens, 0)
    ranks = tl.where(is_free, ranks, 0x7FFFFFFFFFFFFFFF)
    is_visible = is_free & (ranks > kth_lowest_rank(ranks, left))
    num_visible = num_tokens - num_masked
    store_split(visible, masked, row, token, is_visible, num_tokens, num_visible, num_masked)


# Launcher: one warp counts up to 256 tokens without shared memory, as in uniform_sample.

_NUM_WARPS = {512: 2, 1024: 8}  # with 4, Triton 3.6 spills for sm_80


def _launch(sample_ids: Tensor, seed_and_epoch: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    how = Options(*options)
    batch, device, num_tokens = sample_ids.shape[0], sample_ids.device, how.num_tokens
    visible = torch.empty((batch, num_tokens - how.num_masked), dtype=torch.int64, device=device)
    masked = torch.empty((batch, how.num_masked), dtype=torch.int64, device=device)
    tokens = max(power_of_2_from(num_tokens), 4)
    if batch:
        with on_device(sample_ids):
            _blockwise_kernel[(batch,)](
                visible,
                masked,
                sample_ids.contiguous(),
                seed_and_epoch.contiguous(),
                *how.tables(device),
                counter_start(how.stream),
                counter_start(how.top_up_stream),
                how.height,
                how.width,
                how.num_masked,
                how.min_block,
                how.max_block,
                *how.side_limits(),
                how.patience,
                TOKENS=tokens,
                BINS=ASPECT_BINS,
                ATTEMPTS=MAX_ATTEMPTS,
                num_warps=_NUM_WARPS.get(tokens, 1),
                enable_fp_fusion=True,
            )
    return visible, masked


# Registration


def _fake(sample_ids: Tensor, seed_and_epoch: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    how, device = Options(*options), sample_ids.device
    prepare(device, lambda: (how.tables(device), bit_counts(device)))
    batch = sample_ids.shape[0]
    visible = sample_ids.new_empty((batch, how.num_tokens - how.num_masked))
    return visible, sample_ids.new_empty((batch, how.num_masked))


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
