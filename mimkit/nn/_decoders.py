"""Decoders and the pixel head: from latents to predictions for the masked positions.

Axes: batch; prefix; visible; masked; tokens (of the whole grid); dim (decoder's), in_dim
(encoder's); patch (the values of one patch). With a `RaggedMask`: rows (of all samples,
concatenated).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

import mimkit_kernels as kernels
from mimkit._arguments import Count, Depth, NotNegative, Ratio, Size, checked
from mimkit._checks import check_mask, check_rows
from mimkit._grids import Grid, as_sizes, count_tokens, sides_of
from mimkit.masking import Mask, RaggedMask
from mimkit.nn._layers import (
    NORM_EPS,
    Activation,
    CrossAttention,
    Mlp,
    TransformerBlock,
    xavier_linear,
)
from mimkit.nn._packing import (
    interleave,
    inverse_order,
    order_by_length,
    pack,
    positions_at,
    reorder,
)
from mimkit.patches import sincos_positions


class MAEDecoder(nn.Module):
    """Self-attention decoder over visible and mask tokens; returns the masked positions.

    Args:
        grid: Tokens per axis.
        in_dim: Width of the latents.
        dim: Width of the decoder.
        depth: Number of blocks.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        num_prefix: Prefix tokens of the latents; the blocks attend to them too.
        norm_eps: Epsilon of every LayerNorm.
        act: Activation of the MLPs: "gelu", or "gelu_tanh" for its approximation by tanh.

    Raises:
        ValueError: If `heads` does not divide `dim`, or `dim` is no multiple of twice the number of
            the grid's axes.

    Source:
        MAE, arXiv:2111.06377, section 3 "MAE decoder"; facebookresearch/mae `forward_decoder`.
        The authors restore grid order and predict every position. Transformer blocks do not depend
        on token order, so here the mask tokens follow the visible ones and nothing is reordered.
        The last block computes queries and MLP for the masked tokens only. The numbers are the
        same.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.75)
        >>> decoder = MAEDecoder(grid=(4, 4), in_dim=64, dim=32, depth=1, heads=4)
        >>> decoder(torch.randn(1, 1 + 4, 64), mask).shape
        torch.Size([1, 12, 32])
    """

    @checked
    def __init__(
        self,
        *,
        grid: Sequence[int],
        in_dim: Size,
        dim: Size = 512,
        depth: Depth = 8,
        heads: Size = 16,
        mlp_ratio: Ratio = 4.0,
        num_prefix: Count = 1,
        norm_eps: NotNegative = NORM_EPS,
        act: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.grid = as_sizes("grid", grid)
        self.num_prefix = num_prefix
        self.axis_sizes = {"in_dim": in_dim}
        self.embed = xavier_linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(
            sincos_positions(dim, self.grid, num_prefix=num_prefix)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio, norm_eps=norm_eps, act=act)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    @checked
    def forward(
        self,
        latent: Float[Tensor, "batch prefix_and_visible in_dim"] | Float[Tensor, "rows in_dim"],
        mask: Mask | RaggedMask,
        query_ids: Int64[Tensor, "batch queries"] | None = None,
    ) -> Float[Tensor, "batch queries dim"] | Float[Tensor, "rows_of_masked dim"]:
        """Decode the masked positions, or the positions in `query_ids`.

        Args:
            latent: Prefix tokens, then visible tokens in ascending order of position. With a
                `RaggedMask`, latents and result are packed.
            mask: The mask that was used to encode; a `RaggedMask` may have any grids.
            query_ids: Positions to return, masked or visible; `None` for the masked ones.

        Returns:
            One token per masked position in ascending order, or one per query, after the last norm.

        Raises:
            ValueError: If the mask has another grid, if the latents do not fit the mask, or if
                `query_ids` is given with a `RaggedMask`.
        """
        if isinstance(mask, RaggedMask):
            if query_ids is not None:
                raise ValueError("query_ids need a Mask; got a RaggedMask")
            return self._decode_packed(latent, mask)
        check_latent(latent, mask, self.grid, self.num_prefix)
        prefix_position, positions = self.pos_embed[0].tensor_split([self.num_prefix])
        order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
        positions = F.embedding(order, positions)
        prefix_position = prefix_position.expand(latent.shape[0], -1, -1)
        mask_tokens = self.mask_token.expand(latent.shape[0], mask.num_masked, -1)
        tokens = torch.cat([self.embed(latent), mask_tokens], dim=1)
        tokens = tokens + torch.cat([prefix_position, positions], dim=1)
        num_queries = mask.num_masked if query_ids is None else None
        for index, block in enumerate(self.blocks, 1):
            tokens = block(tokens, num_queries if index == len(self.blocks) else None)
        if query_ids is None:
            tokens = tokens[:, tokens.shape[1] - mask.num_masked :]
        else:
            places = mask.restore_ids.gather(1, query_ids) + self.num_prefix
            tokens = kernels.gather_tokens(tokens, places, 0)
        decoded: Tensor = self.norm(tokens)
        return decoded

    def _decode_packed(self, latent: Tensor, mask: RaggedMask) -> Tensor:
        num_latents = [self.num_prefix + count for count in mask.num_visible]
        check_rows("latent", latent, mask, sum(num_latents), self.embed.in_features)
        order = order_by_length(mask)
        latent, mask = reorder(latent, num_latents, order), mask[order]
        prefix_position = self.pos_embed[0, : self.num_prefix]
        visible_positions, masked_positions = (
            positions_at(ids, counts, mask.grids, self._positions_on)
            for ids, counts in (
                (mask.visible_ids, mask.num_visible),
                (mask.masked_ids, mask.num_masked),
            )
        )
        visible = self.embed(latent) + interleave(
            [prefix_position] * mask.batch_size, mask.split_visible(visible_positions)
        )
        masked = self.mask_token[0] + masked_positions
        tokens = interleave(
            mask.split_visible(visible, num_prefix=self.num_prefix), mask.split_masked(masked)
        ).unsqueeze(0)
        lengths = [self.num_prefix + count for count in mask.num_tokens]
        all_tokens = pack(lengths, tokens.device)
        only_masked = pack(lengths, tokens.device, num_queries=mask.num_masked)
        for index, block in enumerate(self.blocks, 1):
            tokens = block(tokens, packing=only_masked if index == len(self.blocks) else all_tokens)
        if not self.blocks:
            tokens = only_masked.last(tokens)
        return reorder(self.norm(tokens)[0], mask.num_masked, inverse_order(order))

    def _positions_on(self, grid: Grid) -> Float[Tensor, "tokens dim"]:
        table = self.pos_embed[0, self.num_prefix :]
        if grid == self.grid:
            return table
        return sincos_positions(table.shape[1], grid).to(table)


class CrossDecoder(nn.Module):
    """Cross-attention decoder: queries attend to the visible tokens, not to each other.

    Without self-attention, a prediction does not depend on which other positions are decoded.
    Training can therefore decode a random subset of the masked positions, at proportional cost.

    Args:
        grid: Tokens per axis.
        in_dim: Width of the latents.
        dim: Width of the decoder.
        depth: Number of blocks.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        num_prefix: Prefix tokens of the latents; queries attend to them too.

    Raises:
        ValueError: If `heads` does not divide `dim`, or `dim` is no multiple of twice the number of
            the grid's axes.

    Source:
        CrossMAE, arXiv:2401.14391, section 3. In the paper each block attends to its own learned
        combination of all encoder layers; here all blocks attend to the encoder's output.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.75)
        >>> decoder = CrossDecoder(grid=(4, 4), in_dim=64, dim=32, depth=1, heads=4)
        >>> latent = torch.randn(1, 1 + 4, 64)
        >>> decoder(latent, mask).shape, decoder(latent, mask, mask.masked_ids[:, :3]).shape
        (torch.Size([1, 12, 32]), torch.Size([1, 3, 32]))
    """

    @checked
    def __init__(
        self,
        *,
        grid: Sequence[int],
        in_dim: Size,
        dim: Size = 512,
        depth: Depth = 12,
        heads: Size = 16,
        mlp_ratio: Ratio = 4.0,
        num_prefix: Count = 1,
    ) -> None:
        super().__init__()
        self.grid = as_sizes("grid", grid)
        self.num_prefix = num_prefix
        self.axis_sizes = {"in_dim": in_dim}
        self.embed = xavier_linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            CrossBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @checked
    def forward(
        self,
        latent: Float[Tensor, "batch prefix_and_visible in_dim"],
        mask: Mask,
        query_ids: Int64[Tensor, "batch queries"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Decode the masked positions, or the positions in `query_ids`, as in `MAEDecoder`.

        Args:
            latent: Prefix tokens, then visible tokens in ascending order of position.
            mask: The mask that was used to encode.
            query_ids: Positions to return, masked or visible; `None` for the masked ones.

        Returns:
            One token per masked position in ascending order, or one per query, after the last
            norm.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the mask has another grid, or the latents do not fit the mask.
        """
        check_latent(latent, mask, self.grid, self.num_prefix)
        query_ids = mask.masked_ids if query_ids is None else query_ids
        queries = self.mask_token + F.embedding(query_ids, self.pos_embed[0])
        context = self.embed(latent)
        for block in self.blocks:
            queries = block(queries, context)
        decoded: Tensor = self.norm(queries)
        return decoded


class CrossBlock(nn.Module):
    """Pre-norm block of cross-attention and MLP.

    Args:
        dim: Width of a token.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
    """

    def __init__(self, *, dim: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_context = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim=dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Apply the block: cross-attention to the context, then an MLP."""
        context = self.norm_context(context)
        queries = queries + self.cross_attn(self.norm1(queries), context, context)
        out: Tensor = queries + self.mlp(self.norm2(queries))
        return out


def check_latent(
    latent: Float[Tensor, "batch prefix_and_visible in_dim"],
    mask: Mask,
    grid: tuple[int, ...],
    num_prefix: int,
) -> None:
    """Check that the latents' shape fits the mask and the grid.

    Raises:
        ValueError: If the mask has another grid, or the latents another number of tokens.
    """
    check_mask(mask, grid, latent, "latent")
    if latent.shape[1] != num_prefix + mask.num_visible:
        raise ValueError(
            f"latent must have {num_prefix} prefix and {mask.num_visible} visible tokens; "
            f"got {tuple(latent.shape)}"
        )


class PixelHead(nn.Linear):
    """Linear head from tokens to the pixels of their patches, in `patchify`'s order.

    Args:
        dim: Width of a token.
        patch_size: Pixels per patch: an integer means a square patch, a tuple one side per axis.
        in_channels: Channels of the images.

    Source:
        MAE, facebookresearch/mae `decoder_pred`, Xavier-uniform.

    Example:
        >>> PixelHead(dim=32, patch_size=(8, 8), in_channels=3)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 192])
    """

    @checked
    def __init__(self, *, dim: Size, patch_size: int | Sequence[int], in_channels: Size) -> None:
        super().__init__(dim, in_channels * count_tokens(sides_of("patch_size", patch_size)))
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
