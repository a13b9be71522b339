"""Split the tokens of each sample at random, from its key alone.

    word[b, l]  = output l % 4 of Philox4x32-10 (key seed, counter (stream | l // 4, epoch, sample))
    rank[b, l]  = (word[b, l] << 16) | l
    visible[b]  = the tokens with the `num_visible` lowest ranks, ascending; masked[b]: the others

Axes: b batch; l tokens. Integers only, no two ranks alike: the same bits on every device. One
program draws, sorts and writes one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._philox import sample_words
from mimkit_kernels._register import on_device, power_of_2_from, register

if TYPE_CHECKING:
    import triton.language as tl

MAX_TOKENS = 4096  # in the kernel: a sample is sorted in the registers of one program


def uniform_sample(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_tokens: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Split tokens at random, by kernel or reference.

    Args:
        sample_ids: [batch], int64.
        seed_and_epoch: [2], int64.
        stream: Which of 65536 independent draws of these samples.
        num_tokens: At most 65536.
        num_visible: Tokens that stay visible.

    Returns:
        Ids of the visible and of the masked tokens, each ascending: [batch, number], int64.
    """
    arguments = (sample_ids, seed_and_epoch, stream, num_tokens, num_visible)

    def find_obstacle() -> str | None:
        return None if num_tokens <= MAX_TOKENS else f"{num_tokens} tokens"

    if takes_kernel("uniform_sample", sample_ids, find_obstacle):
        visible, masked = uniform_sample_op(*arguments)
        return visible, masked
    return uniform_sample_reference(*arguments)


def uniform_sample_reference(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_tokens: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Compute `uniform_sample` in plain PyTorch."""
    token = torch.arange(num_tokens, device=sample_ids.device)
    ranks = (sample_words(sample_ids, seed_and_epoch, stream, num_tokens) << 16) | token
    return split_positions(ranks > kth_lowest(ranks, num_visible), num_visible)


def kth_lowest(values: Tensor, k: int) -> Tensor:
    """Return the `k`-th lowest value of each row, counting from 1; below all values for `k` = 0."""
    if k == 0:
        return values.new_full((1, 1), -1)
    return values.kthvalue(k, dim=1, keepdim=True).values


def split_positions(is_masked: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Return the positions of visible and of masked tokens, where their numbers are known."""
    token = torch.arange(is_masked.shape[1], device=is_masked.device).expand_as(is_masked)
    # Running counts say where each token goes, in ascending order; that beats sorting.
    seen = (~is_masked).cumsum(dim=1)
    slot = torch.where(is_masked, num_visible + token - seen, seen - 1)
    order = torch.empty_like(slot).scatter(1, slot, token)
    return order[:, :num_visible].contiguous(), order[:, num_visible:].contiguous()


# Kernel


@jit
def _sample_kernel(
    visible: tl.tensor,
    masked: tl.tensor,
    sample_ids: tl.tensor,
    seed_and_epoch: tl.tensor,
    first_counter: tl.tensor,
    num_tokens: tl.tensor,
    num_visible: tl.tensor,
    TOKENS: tl.constexpr,
) -> None:
    """One program: one sample."""
    row = tl.program_id(0).to(tl.int64)
    sample = tl.load(sample_ids + row)
    seed, epoch = tl.load(seed_and_epoch), tl.load(seed_and_epoch + 1)
    counter = (tl.arange(0, TOKENS // 4) + first_counter).to(tl.uint32)
    # Every word must be one of 32 unsigned bits before it meets another.
    zeros = counter ^ counter
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, counter, zeros + epoch.to(tl.uint32), zeros + low, zeros + high
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    token = tl.arange(0, TOKENS)
    ranks = (words.to(tl.int64) << 16) | token
    ranks = tl.where(token < num_tokens, ranks, 0x7FFFFFFFFFFFFFFF)
    in_order = tl.sort(ranks)
    last = tl.sum(tl.where(token == num_visible - 1, in_order, 0), axis=0)
    is_visible = ranks <= tl.where(num_visible > 0, last, -1)
    seen = tl.cumsum(is_visible.to(tl.int32), axis=0)
    place = row * num_visible + seen - 1
    tl.store(visible + place, token.to(tl.int64), mask=is_visible)
    place = row * (num_tokens - num_visible) + token - seen
    is_masked = token < tl.where(is_visible, 0, num_tokens)
    tl.store(masked + place, token.to(tl.int64), mask=is_masked)


# Launcher: 1 warp sorts up to 256 tokens without shared memory; threads then hold 16 at most.

_NUM_WARPS = {512: 2, 1024: 4, 2048: 4, 4096: 8}


def _launch(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_tokens: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    batch, device = sample_ids.shape[0], sample_ids.device
    visible = torch.empty((batch, num_visible), dtype=torch.int64, device=device)
    masked = torch.empty((batch, num_tokens - num_visible), dtype=torch.int64, device=device)
    tokens = max(power_of_2_from(num_tokens), 4)
    if batch:
        with on_device(sample_ids):
            _sample_kernel[(batch,)](
                visible,
                masked,
                sample_ids.contiguous(),
                seed_and_epoch.contiguous(),
                stream << 16,  # a multiple of 16 for every stream: no stream compiles anew
                num_tokens,
                num_visible,
                TOKENS=tokens,
                num_warps=_NUM_WARPS.get(tokens, 1),
                enable_fp_fusion=True,
            )
    return visible, masked


# Registration


def _fake(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_tokens: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    batch = sample_ids.shape[0]
    visible = sample_ids.new_empty((batch, num_visible))
    return visible, sample_ids.new_empty((batch, num_tokens - num_visible))


uniform_sample_op = register(
    "uniform_sample(Tensor sample_ids, Tensor seed_and_epoch, SymInt stream, SymInt num_tokens, "
    "SymInt num_visible) -> (Tensor, Tensor)",
    launch=_launch,
    reference=uniform_sample_reference,
    fake=_fake,
)
