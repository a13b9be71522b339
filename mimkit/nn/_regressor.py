"""CAE's latent contextual regressor and its decoder.

Axes: batch; queries (masked positions); visible; tokens (all positions of the grid); dim.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimkit._arguments import Depth, DropRate, Ratio, Size, checked
from mimkit._checks import check_even
from mimkit.masking import Mask
from mimkit.nn._layers import (
    NORM_EPS,
    CrossAttention,
    DropPath,
    Mlp,
    TransformerBlock,
    drop_path_rates,
    make_layer_scale,
    scale,
)
from mimkit.patches import gather_masked, gather_visible
from mimkit_kernels import regressor_inputs


class RegressorBlock(nn.Module):
    """Block of the regressor: queries attend to visible latents and queries, then an MLP.

    Args:
        dim: Width of a token.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        layer_scale: Initial value of layer scale; `None` for no layer scale.
        drop_path: Stochastic depth rate, in [0, 1).
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_v = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim=dim, heads=heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))
        self.gamma_1 = make_layer_scale(dim, layer_scale)
        self.gamma_2 = make_layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"] | Float[Tensor, " dim"],
        visible: Float[Tensor, "batch visible dim"],
        query_positions: Float[Tensor, "batch queries dim"] | Float[Tensor, "tokens dim"],
        visible_positions: Float[Tensor, "batch visible dim"],
        mask: Mask | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Apply the block: cross-attention, then an MLP.

        Args:
            queries: One token per masked position; with `mask`, one mask token for all of them.
            visible: Latents of the visible positions.
            query_positions: Position embeddings of the queries; with `mask`, of the whole grid.
            visible_positions: Position embeddings of the visible tokens.
            mask: Which positions are masked, if `queries` is a single mask token.
        """
        attend = self._attend if mask is None else partial(self._attend_from_mask_token, mask)
        attended = attend(queries, visible, query_positions, visible_positions)
        queries = queries + self.drop_path(scale(attended, self.gamma_1))
        queries = self.norm2(queries)  # as released: the norm is part of the residual stream
        out: Tensor = queries + self.drop_path(scale(self.mlp(queries), self.gamma_2))
        return out

    def _attend(
        self, queries: Tensor, visible: Tensor, query_positions: Tensor, visible_positions: Tensor
    ) -> Tensor:
        norms = (self.norm_q, self.norm_k, self.norm_v)
        parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
        # Position embeddings are added to queries and keys, not to values.
        query, key, value = regressor_inputs(
            visible, queries, visible_positions, query_positions, parameters, NORM_EPS
        )
        attended: Tensor = self.cross_attn(query, key, value)
        return attended

    def _attend_from_mask_token(
        self,
        mask: Mask,
        mask_token: Tensor,
        visible: Tensor,
        positions: Tensor,
        visible_positions: Tensor,
    ) -> Tensor:
        """Compute `_attend` for queries that are all the mask token, with fewer matrix products.

        The query and key projections of a masked position depend only on the position, so they are
        computed once for all images. The value projection is the same for all masked positions.
        """
        attention, tokens = self.cross_attn, mask_token + positions
        query, key = (
            gather_masked(projected.expand(visible.shape[0], -1, -1), mask)
            for projected in (attention.q(self.norm_q(tokens)), attention.k(self.norm_k(tokens)))
        )
        value = attention.v(self.norm_v(mask_token)).expand_as(query)
        key = torch.cat([attention.k(self.norm_k(visible + visible_positions)), key], dim=1)
        value = torch.cat([attention.v(self.norm_v(visible)), value], dim=1)
        return attention.attend_projected(query, key, value)


class ContextRegressor(nn.Module):
    """Predict the latents of masked positions from those of the visible ones.

    Args:
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        layer_scale: Initial value of layer scale; `None` for no layer scale.
        drop_path: Stochastic depth rate of the last block, in [0, 1). Rates rise linearly from 0.

    Raises:
        ValueError: If `heads` does not divide `dim`.

    Source:
        CAE, arXiv:2202.03026, section 3.2 "latent contextual regressor"; Atten4Vis/CAE
        `VisionTransformerRegressor`. Every block updates the queries and leaves the visible latents
        unchanged. Keys and values are the visible latents and the current queries.

    Example:
        >>> import torch
        >>> regressor = ContextRegressor(dim=32, depth=2, heads=4)
        >>> visible, positions = torch.randn(2, 7, 32), torch.randn(2, 12, 32)
        >>> queries = torch.zeros(2, 5, 32)
        >>> regressor(queries, visible, positions[:, 7:], positions[:, :7]).shape
        torch.Size([2, 5, 32])
    """

    @checked
    def __init__(
        self,
        *,
        dim: Size = 768,
        depth: Depth = 4,
        heads: Size = 12,
        mlp_ratio: Ratio = 4.0,
        layer_scale: float | None = 0.1,
        drop_path: DropRate = 0.0,
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        self.blocks = nn.ModuleList(
            RegressorBlock(
                dim=dim, heads=heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @checked
    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        visible: Float[Tensor, "batch visible dim"],
        query_positions: Float[Tensor, "batch queries dim"],
        visible_positions: Float[Tensor, "batch visible dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Predict the latents of the queries.

        Args:
            queries: Initial tokens of the masked positions, usually copies of a mask token.
            visible: Latents of the visible positions, without prefix tokens.
            query_positions: Position embeddings of the queries.
            visible_positions: Position embeddings of the visible tokens.

        Returns:
            One latent per query, after the last norm.

        Raises:
            ValueError: If position embeddings and their tokens differ in shape.
        """
        for block in self.blocks:
            queries = block(queries, visible, query_positions, visible_positions)
        predicted: Tensor = self.norm(queries)
        return predicted

    @checked
    def from_mask_token(
        self,
        mask_token: Float[Tensor, " dim"],
        visible: Float[Tensor, "batch visible dim"],
        positions: Float[Tensor, "tokens dim"],
        mask: Mask,
    ) -> Float[Tensor, "batch queries dim"]:
        """Predict all masked latents from one mask token, with fewer matrix products.

        Equals `forward` with a copy of the mask token for every query, up to rounding. This is not
        `forward`, so hooks on the regressor do not run (hooks on its blocks do). If FSDP2 shards
        the regressor as a unit of its own, call `register_fsdp_forward_method` for this method.

        Args:
            mask_token: Initial token of every masked position.
            visible: Latents of the visible positions, without prefix tokens.
            positions: Position embeddings of the whole grid.
            mask: Which positions are masked.

        Returns:
            One latent per masked position, after the last norm.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If visible latents or positions do not fit the mask.

        Example:
            >>> import torch
            >>> from mimkit import masking
            >>> mask = masking.uniform(masking.key([0, 1], seed=0), (3, 4), 0.5)
            >>> regressor = ContextRegressor(dim=32, depth=2, heads=4)
            >>> visible, positions = torch.randn(2, 6, 32), torch.randn(12, 32)
            >>> regressor.from_mask_token(torch.zeros(32), visible, positions, mask).shape
            torch.Size([2, 6, 32])
        """
        check_even(mask)
        if len(positions) != mask.num_tokens:
            raise ValueError(
                f"positions must be [{mask.num_tokens}, dim] for grid {mask.grid}; got "
                f"{tuple(positions.shape)}"
            )
        table = positions.expand(visible.shape[0], -1, -1)
        query_positions, visible_positions = gather_masked(table, mask), gather_visible(table, mask)
        queries = mask_token.expand_as(query_positions)
        for block in self.blocks[:1]:
            queries = block(mask_token, visible, positions, visible_positions, mask)
        for block in self.blocks[1:]:
            queries = block(queries, visible, query_positions, visible_positions)
        predicted: Tensor = self.norm(queries)
        return predicted


class CAEDecoder(nn.Module):
    """CAE's decoder: self-attention among the predicted latents of the masked positions.

    Args:
        dim: Width of a token.
        depth: Number of blocks; 0 leaves only the last norm.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        layer_scale: Initial value of layer scale; `None` for no layer scale.
        drop_path: Stochastic depth rate of the last block, in [0, 1). Rates rise linearly from 0.

    Raises:
        ValueError: If `heads` does not divide `dim`.

    Source:
        CAE, arXiv:2202.03026, section 3.2 "decoder"; Atten4Vis/CAE `VisionTransformerDecoder`.

    Example:
        >>> import torch
        >>> decoder = CAEDecoder(dim=32, depth=1, heads=4)
        >>> decoder(torch.randn(2, 5, 32), torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    @checked
    def __init__(
        self,
        *,
        dim: Size = 768,
        depth: Depth = 4,
        heads: Size = 12,
        mlp_ratio: Ratio = 4.0,
        layer_scale: float | None = 0.1,
        drop_path: DropRate = 0.0,
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim=dim,
                heads=heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=layer_scale,
                qkv_bias="qv",
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    @checked
    def forward(
        self,
        latent: Float[Tensor, "batch queries dim"],
        positions: Float[Tensor, "batch queries dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Add position embeddings to the latents, then decode them.

        Args:
            latent: Predicted latents of the masked positions.
            positions: Their position embeddings.

        Returns:
            One token per latent, after the last norm.
        """
        tokens = latent + positions
        for block in self.blocks:
            tokens = block(tokens)
        decoded: Tensor = self.norm(tokens)
        return decoded
