"""Positions of tokens in lists of ids, and ids of visible and masked tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mimkit_kernels._jit import jit

if TYPE_CHECKING:
    import triton.language as tl


def slots_of(ids: Tensor, length: int) -> Tensor:
    """Invert lists of ids: [batch, length], the index in `ids` of each position.

    Positions that are not in `ids` get the number of ids.
    """
    batch, taken = ids.shape
    numbers = torch.arange(taken, device=ids.device).expand(batch, -1)
    return ids.new_full((batch, length), taken).scatter(1, ids, numbers)


def restore_slots(visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
    """Return the index of each position in the list of visible, then masked ids."""
    order = torch.cat([visible_ids, masked_ids], dim=1)
    return slots_of(order, order.shape[1])


def split_positions(is_masked: Tensor, num_visible: int) -> tuple[Tensor, Tensor]:
    """Return the ids of visible and of masked tokens, ascending; every row has `num_visible`."""
    token = torch.arange(is_masked.shape[1], device=is_masked.device).expand_as(is_masked)
    # Cumulative counts give the place of each token; this is faster than sorting.
    seen = (~is_masked).cumsum(dim=1)
    slot = torch.where(is_masked, num_visible + token - seen, seen - 1)
    order = torch.empty_like(slot).scatter(1, slot, token)
    return order[:, :num_visible].contiguous(), order[:, num_visible:].contiguous()


@jit
def store_split(
    visible: tl.tensor,
    masked: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    is_visible: tl.tensor,
    num_tokens: tl.tensor,
    num_visible: tl.tensor,
    num_masked: tl.tensor,
) -> None:
    """Store the ids of visible and of masked tokens of one sample, ascending."""
    seen = tl.cumsum(is_visible.to(tl.int32), axis=0)
    tl.store(visible + (row * num_visible + seen - 1), token.to(tl.int64), mask=is_visible)
    is_masked = token < tl.where(is_visible, 0, num_tokens)
    tl.store(masked + (row * num_masked + token - seen), token.to(tl.int64), mask=is_masked)
