"""Gather the visible or masked tokens of a sequence, and restore the sequence.

Axes: batch; prefix (class tokens and the like, which are never masked); tokens (of the grid);
visible; masked; dim. With a `RaggedMask`: rows (the tokens of all samples, concatenated; those of
each sample come after its prefix tokens).
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

import mimkit_kernels as kernels
from mimkit._arguments import Count, checked
from mimkit._checks import check_batch, check_rows
from mimkit.masking import Mask, RaggedMask


@checked
def gather_visible(
    tokens: Shaped[Tensor, "batch prefix_and_tokens dim"] | Shaped[Tensor, "rows dim"],
    mask: Mask | RaggedMask,
    *,
    num_prefix: Count = 0,
) -> Shaped[Tensor, "batch prefix_and_visible dim"] | Shaped[Tensor, "rows_of_visible dim"]:
    """Gather the prefix tokens and the visible tokens, in ascending order of position.

    Args:
        tokens: The whole sequence. With a `RaggedMask`, tokens and result are packed rows.
        mask: Which tokens are visible.
        num_prefix: Prefix tokens in front of the grid's tokens.

    Returns:
        The gathered tokens, in the dtype of `tokens`.

    Raises:
        ValueError: If the length or the batch size of the sequence does not fit the mask.

    Source:
        MAE, facebookresearch/mae `random_masking`, which gathers in the order of the noise. CAE's
        `x[~mask].reshape(...)` mixes samples where their counts differ.

    Example:
        >>> import torch
        >>> tokens = torch.arange(4.0).view(1, 4, 1)
        >>> mask = Mask.from_visible_ids(torch.tensor([[3, 1]]), (2, 2))
        >>> gather_visible(tokens, mask).flatten().tolist()
        [1.0, 3.0]
    """
    if isinstance(mask, RaggedMask):
        return _gather_rows(tokens, mask, num_prefix)
    check_batch(mask, tokens, "tokens")
    return _gather(tokens, mask, mask.visible_ids, num_prefix)


@checked
def gather_masked(
    tokens: Shaped[Tensor, "batch prefix_and_tokens dim"] | Shaped[Tensor, "rows dim"],
    mask: Mask | RaggedMask,
    *,
    num_prefix: Count = 0,
) -> Shaped[Tensor, "batch prefix_and_masked dim"] | Shaped[Tensor, "rows_of_masked dim"]:
    """Gather the prefix tokens and the masked tokens, in ascending order of position.

    Args:
        tokens: The whole sequence. With a `RaggedMask`, tokens and result are packed rows.
        mask: Which tokens are masked.
        num_prefix: Prefix tokens in front of the grid's tokens.

    Returns:
        The gathered tokens, in the dtype of `tokens`.

    Raises:
        ValueError: If the length or the batch size of the sequence does not fit the mask.

    Source:
        CAE, Atten4Vis/CAE, whose alignment encoder takes the masked patches by boolean indexing,
        which mixes samples where their counts differ.

    Example:
        >>> import torch
        >>> tokens = torch.arange(4.0).view(1, 4, 1)
        >>> mask = Mask.from_visible_ids(torch.tensor([[3, 1]]), (2, 2))
        >>> gather_masked(tokens, mask).flatten().tolist()
        [0.0, 2.0]
    """
    if isinstance(mask, RaggedMask):
        return _gather_rows(tokens, mask.complement(), num_prefix)
    check_batch(mask, tokens, "tokens")
    return _gather(tokens, mask, mask.masked_ids, num_prefix)


@checked
def restore(
    visible: Float[Tensor, "batch prefix_and_visible dim"] | Float[Tensor, "rows_of_visible dim"],
    mask: Mask | RaggedMask,
    fill: Float[Tensor, " dim"]
    | Float[Tensor, "batch masked dim"]
    | Float[Tensor, "rows_of_masked dim"],
    *,
    positions: Float[Tensor, "prefix_and_tokens dim"] | None = None,
    num_prefix: Count = 0,
) -> Float[Tensor, "batch prefix_and_tokens dim"] | Float[Tensor, "rows dim"]:
    """Put visible tokens back in grid order and fill the masked positions.

    Args:
        visible: Prefix tokens, then visible tokens, as `gather_visible` returns them.
        mask: The mask that they were gathered with.
        fill: One vector for all masked positions (a mask token), or one vector per position.
        positions: Position embeddings to add to all tokens; with a `RaggedMask`, one per row of the
            result.
        num_prefix: Prefix tokens in front of the grid's tokens.

    Returns:
        The whole sequence, in the promoted dtype of the inputs.

    Raises:
        ValueError: If the shapes do not fit the mask.

    Source:
        MAE, facebookresearch/mae `forward_decoder`.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[3, 1]]), (2, 2))
        >>> visible = torch.tensor([[[1.0], [3.0]]])
        >>> restore(visible, mask, torch.zeros(1)).flatten().tolist()
        [0.0, 1.0, 0.0, 3.0]
    """
    if isinstance(mask, RaggedMask):
        return _restore_rows(visible, mask, fill, positions, num_prefix)
    check_batch(mask, visible, "visible")
    length = num_prefix + mask.num_visible
    if visible.ndim != 3 or visible.shape[1] != length:
        raise ValueError(
            f"visible must be [batch, {length}, dim] for {num_prefix} prefix and "
            f"{mask.num_visible} visible tokens of the mask; got {tuple(visible.shape)}"
        )
    batch, _, dim = visible.shape
    if fill.shape not in ((dim,), (batch, mask.num_masked, dim)):
        raise ValueError(
            f"fill must be [{dim}] or [{batch}, {mask.num_masked}, {dim}]; got {tuple(fill.shape)}"
        )
    if positions is not None and positions.shape != (num_prefix + mask.num_tokens, dim):
        raise ValueError(
            f"positions must be [{num_prefix + mask.num_tokens}, {dim}]; "
            f"got {tuple(positions.shape)}"
        )
    for name, tensor in (("fill", fill), ("positions", positions)):
        if tensor is not None and tensor.device != visible.device:
            raise ValueError(f"{name} is on {tensor.device}, but visible is on {visible.device}")
    return kernels.restore_tokens(
        visible, fill, mask.visible_ids, mask.masked_ids, positions, num_prefix
    )


def _gather(tokens: Tensor, mask: Mask, ids: Tensor, num_prefix: int) -> Tensor:
    if tokens.ndim != 3 or tokens.shape[1] != num_prefix + mask.num_tokens:
        raise ValueError(
            f"tokens must be [batch, {num_prefix + mask.num_tokens}, dim] for grid {mask.grid} "
            f"after {num_prefix} prefix tokens (num_prefix); got {tuple(tokens.shape)} and {mask}"
        )
    if not tokens.shape[2]:
        raise ValueError(f"tokens must have at least one value each; got {tuple(tokens.shape)}")
    return kernels.gather_tokens(tokens, ids, num_prefix)


def _gather_rows(tokens: Tensor, mask: RaggedMask, num_prefix: int) -> Tensor:
    whole = _with_prefix(mask, num_prefix)
    check_rows("tokens", tokens, whole, sum(whole.num_tokens))
    return tokens.index_select(0, whole.visible_rows)


def _with_prefix(mask: RaggedMask, num_prefix: int) -> RaggedMask:
    """Add `num_prefix` visible tokens in front of each sample's tokens, on grids of one axis."""
    if num_prefix == 0:
        return mask
    prefix = torch.arange(num_prefix, device=mask.device)
    visible = mask.split_visible(mask.visible_ids + num_prefix)
    return RaggedMask(
        torch.cat([ids for sample in visible for ids in (prefix, sample)]),
        mask.masked_ids + num_prefix,
        mask.cu_visible + num_prefix * torch.arange(mask.batch_size + 1, device=mask.device),
        mask.cu_masked,
        tuple((num_prefix + count,) for count in mask.num_tokens),
        tuple(num_prefix + count for count in mask.num_visible),
    )


def _restore_rows(
    visible: Tensor, mask: RaggedMask, fill: Tensor, positions: Tensor | None, num_prefix: int
) -> Tensor:
    whole, dim = _with_prefix(mask, num_prefix), visible.shape[-1]
    check_rows("visible", visible, whole, len(whole.visible_ids))
    if fill.ndim == 1:
        fill = fill.expand(len(whole.masked_ids), -1)
    check_rows("fill", fill, whole, len(whole.masked_ids), dim)
    order = torch.cat([whole.visible_rows, whole.masked_rows])
    slots = torch.arange(len(order), device=order.device)
    slots = torch.empty_like(order).scatter(0, order, slots)
    tokens = torch.cat([visible, fill]).index_select(0, slots)
    if positions is None:
        return tokens
    check_rows("positions", positions, whole, len(order), dim)
    return tokens + positions
