"""CAE's latent contextual regressor and its decoder.

Axes: batch; queries (masked positions); visible; dim.
"""

from jaxtyping import Float
from torch import Tensor, nn

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
from mimkit_kernels import regressor_inputs


class RegressorBlock(nn.Module):
    """Cross-attention of queries to visible latents and to the queries themselves, then an MLP.

    Args:
        dim: Width of a token.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        layer_scale: First value of the factors of both residual branches; `None` for none.
        drop_path: Fraction of samples whose residual branches are left out in training.
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
        queries: Float[Tensor, "batch queries dim"],
        visible: Float[Tensor, "batch visible dim"],
        query_positions: Float[Tensor, "batch queries dim"],
        visible_positions: Float[Tensor, "batch visible dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Bring the queries one step on.

        Args:
            queries: One token per masked position.
            visible: Latents of the visible positions.
            query_positions: Position embeddings of the queries.
            visible_positions: Position embeddings of the visible tokens.
        """
        norms = (self.norm_q, self.norm_k, self.norm_v)
        parameters = [parameter for norm in norms for parameter in (norm.weight, norm.bias)]
        # Positions say where to look, not what is found there: values have none.
        query, key, value = regressor_inputs(
            visible, queries, visible_positions, query_positions, parameters, NORM_EPS
        )
        mixed = self.cross_attn(query, key, value)
        queries = queries + self.drop_path(scale(mixed, self.gamma_1))
        queries = self.norm2(queries)  # published so: the norm is part of the residual stream
        out: Tensor = queries + self.drop_path(scale(self.mlp(queries), self.gamma_2))
        return out


class ContextRegressor(nn.Module):
    """Predict the latents of masked positions from those of the visible ones.

    Args:
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of each MLP over `dim`.
        layer_scale: First value of the factors of every residual branch; `None` for none.
        drop_path: Fraction of samples whose residual branches the last block leaves out in
            training; the other blocks less, linearly from 0.

    Source:
        CAE, arXiv:2202.03026, section 3.2 "latent contextual regressor"; Atten4Vis/CAE
        `VisionTransformerRegressor`. The visible latents stay as they are; the queries change from
        block to block, and stand among keys and values as they are then.

    Example:
        >>> import torch
        >>> regressor = ContextRegressor(dim=32, depth=2, heads=4)
        >>> visible, positions = torch.randn(2, 7, 32), torch.randn(2, 12, 32)
        >>> queries = torch.zeros(2, 5, 32)
        >>> regressor(queries, visible, positions[:, 7:], positions[:, :7]).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 4,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            RegressorBlock(
                dim=dim, heads=heads, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        visible: Float[Tensor, "batch visible dim"],
        query_positions: Float[Tensor, "batch queries dim"],
        visible_positions: Float[Tensor, "batch visible dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Turn queries into predicted latents.

        Args:
            queries: What stands for the masked positions at first: a mask token for each.
            visible: Latents of the visible positions, without prefix tokens.
            query_positions: Position embeddings of the queries.
            visible_positions: Position embeddings of the visible tokens.

        Returns:
            One latent per query, after the last norm.

        Raises:
            ValueError: Positions of other shapes than their tokens.
        """
        for name, tokens, table in (
            ("query", queries, query_positions),
            ("visible", visible, visible_positions),
        ):
            if tokens.shape != table.shape:
                raise ValueError(
                    f"{name} positions must have the shape of their tokens, {tuple(tokens.shape)}; "
                    f"got {tuple(table.shape)}"
                )
        for block in self.blocks:
            queries = block(queries, visible, query_positions, visible_positions)
        predicted: Tensor = self.norm(queries)
        return predicted


class CAEDecoder(nn.Module):
    """Self-attention among the predicted latents of the masked positions, and nothing else.

    Args:
        dim: Width of a token.
        depth: Number of blocks; with 0, only the last norm is left.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of each MLP over `dim`.
        layer_scale: First value of the factors of every residual branch; `None` for none.
        drop_path: Fraction of samples whose residual branches the last block leaves out in
            training; the other blocks less, linearly from 0.

    Source:
        CAE, arXiv:2202.03026, section 3.2 "decoder"; Atten4Vis/CAE `VisionTransformerDecoder`.

    Example:
        >>> import torch
        >>> decoder = CAEDecoder(dim=32, depth=1, heads=4)
        >>> decoder(torch.randn(2, 5, 32), torch.zeros(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        *,
        dim: int = 768,
        depth: int = 4,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
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

    def forward(
        self,
        latent: Float[Tensor, "batch queries dim"],
        positions: Float[Tensor, "batch queries dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Decode latents, whose position embeddings are added first."""
        tokens = latent + positions
        for block in self.blocks:
            tokens = block(tokens)
        decoded: Tensor = self.norm(tokens)
        return decoded
