"""Split the tokens of each sample at random, as a function of its key.

    word[b, l]  = output l % 4 of Philox4x32-10 (key seed, counter (stream | l // 4, epoch, sample))
    rank[b, l]  = (word[b, l] << 16) | l
    visible[b]  = the tokens with the `num_visible` lowest ranks, ascending; masked[b]: the others

Axes: b batch; l tokens. All arithmetic is on integers and no two ranks are equal, so every device
gives the same masks. One program draws, selects and writes one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import on_device, power_of_2_from
from mimkit_kernels._philox import counter_start, kth_lowest_rank, sample_words, token_ranks
from mimkit_kernels._register import register
from mimkit_kernels._slots import split_positions, store_split

if TYPE_CHECKING:
    import triton.language as tl

MAX_TOKENS = 4096  # of the kernel: one program keeps a sample in its registers


def uniform_sample(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_tokens: int, num_visible: int
) -> tuple[Tensor, Tensor]:
    """Split tokens at random, by kernel or reference.

    Args:
        sample_ids: [batch], int64.
        seed_and_epoch: [2], int64.
        stream: Index of one of 65536 independent draws for these samples.
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
    """Return the `k`-th lowest value of each row, counted from 1; -1, below all values, for 0."""
    if k == 0:
        return values.new_full((1, 1), -1)
    return values.kthvalue(k, dim=1, keepdim=True).values


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
    token = tl.arange(0, TOKENS)
    ranks = token_ranks(seed, epoch, sample, first_counter, TOKENS)
    ranks = tl.where(token < num_tokens, ranks, 0x7FFFFFFFFFFFFFFF)
    is_visible = ranks <= kth_lowest_rank(ranks, num_visible)
    num_masked = num_tokens - num_visible
    store_split(visible, masked, row, token, is_visible, num_tokens, num_visible, num_masked)


# Launcher: one warp counts up to 256 tokens without shared memory. With more tokens, more warps
# keep the tokens of a thread few. With two warps for 512 tokens, Triton 3.6 spills for sm_80.

_NUM_WARPS = {512: 4, 1024: 4, 2048: 4, 4096: 8}


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
                counter_start(stream),
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
