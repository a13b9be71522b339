"""The blocks of timm's ViTs on visible tokens only: their rotary and relative positions gathered.

Axes: batch; heads; tokens (prefix tokens, then the patches of the grid); rows (prefix tokens, then
visible patches).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimkit.masking import Mask

# A block, and what it takes beside the tokens.
Run = tuple[nn.Module, dict[str, Any]]
Bias = Float[Tensor, "one_or_batch heads rows rows"]


def blocks_of(model: Any, rope: Tensor | None, mask: Mask | None) -> list[Run]:
    """Return every block of a model, as it runs under a mask.

    Args:
        model: A timm `VisionTransformer`, `Eva`, `Beit` or `VisionTransformerRelPos`.
        rope: Its rotary table: [patches, dim], or [depth, heads, patches, dim].
        mask: Which patches are visible; `None` for all.
    """
    blocks: list[nn.Module] = list(model.blocks)
    if rope is not None:
        return [(block, {"rope": _at(rope, index, mask)}) for index, block in enumerate(blocks)]

    def gathered(bias: Tensor) -> Bias:
        return bias if mask is None else _gather_bias(bias, mask, int(model.num_prefix_tokens))

    if getattr(model, "rel_pos_bias", None) is not None:  # BEiT's, shared by all blocks
        shared = {"shared_rel_pos_bias": gathered(model.rel_pos_bias())}
    elif getattr(model, "shared_rel_pos", None) is not None:
        shared = {"shared_rel_pos": gathered(model.shared_rel_pos.get_bias())}
    else:
        shared = {}
    return [(block if mask is None else _under(block, gathered), shared) for block in blocks]


def _at(rope: Tensor, block: int, mask: Mask | None) -> Tensor:
    """Return the rotary table of a block for the visible patches of each sample."""
    table = rope[block] if rope.ndim == 4 else rope  # one for each block and head
    if mask is None:
        return table
    visible = table[..., mask.visible_ids, :]  # [batch, visible, dim], after heads if there are any
    return visible.movedim(0, 1) if table.ndim == 3 else visible.unsqueeze(1)


def _gather_bias(bias: Tensor, mask: Mask, num_prefix: int) -> Bias:
    prefix = torch.arange(num_prefix, device=mask.device).expand(mask.batch_size, -1)
    rows = torch.cat([prefix, mask.visible_ids + num_prefix], dim=1)
    of_heads = bias.flatten(0, -3)  # BEiT's shared table has no axis for the batch
    return of_heads[:, rows[:, :, None], rows[:, None, :]].movedim(1, 0)


def _under(block: nn.Module, gathered: Callable[[Tensor], Bias]) -> nn.Module:
    """Return a block whose attention has the bias of visible tokens; it shares its weights."""
    attention: Any = getattr(block, "attn", None)  # blocks of several have none
    if getattr(attention, "relative_position_bias_table", None) is not None:
        bias = gathered(attention._get_rel_pos_bias())
        return _with(block, "attn", _with(attention, "_get_rel_pos_bias", lambda: bias))
    if getattr(attention, "rel_pos", None) is not None:
        bias = gathered(attention.rel_pos.get_bias())
        relative = _with(attention.rel_pos, "get_bias", lambda: bias)
        return _with(block, "attn", _with(attention, "rel_pos", relative))
    return block


def _with(module: nn.Module, name: str, value: Any) -> nn.Module:
    """Copy a module, not what it holds, with another child or method."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    setattr(copied, name, value)
    return copied
