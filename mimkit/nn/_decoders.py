"""Decoders and heads: from latents to predictions for the masked positions.

Axes: batch; prefix; visible; masked; tokens (of the whole grid); dim (decoder's), in_dim
(encoder's); patch (the values of one patch).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._grids import as_sizes, count_tokens
from mimkit.masking import Mask
from mimkit.nn._layers import NORM_EPS, TransformerBlock, xavier_linear
from mimkit.nn._vit import position_table
from mimkit.patches._patchify import check_mask


class MAEDecoder(nn.Module):
    """Self-attention decoder over visible and mask tokens that returns the masked positions.

    Args:
        grid: Tokens per axis.
        in_dim: Width of the latents.
        dim: Width of the decoder.
        depth: Number of blocks.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of each MLP over `dim`.
        num_prefix: Prefix tokens of the latents, which take part as they are.

    Source:
        MAE, arXiv:2111.06377, section 3 "MAE decoder"; facebookresearch/mae `forward_decoder`.
        There tokens are put back in grid order and every position is predicted. Blocks do not care
        about order, so here the masked tokens stay behind the visible ones and no token moves; what
        the visible ones would become is left out from the last attention on. Numbers are the same.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.75)
        >>> decoder = MAEDecoder(grid=(4, 4), in_dim=64, dim=32, depth=1, heads=4)
        >>> decoder(torch.randn(1, 1 + 4, 64), mask).shape
        torch.Size([1, 12, 32])
    """

    def __init__(
        self,
        *,
        grid: Sequence[int],
        in_dim: int,
        dim: int = 512,
        depth: int = 8,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        num_prefix: int = 1,
    ) -> None:
        super().__init__()
        self.grid = as_sizes("grid", grid)
        self.num_prefix = num_prefix
        self.embed = xavier_linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(
            position_table(dim, self.grid, num_prefix=num_prefix), requires_grad=False
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(dim=dim, heads=heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(
        self, latent: Float[Tensor, "batch prefix_and_visible in_dim"], mask: Mask
    ) -> Float[Tensor, "batch masked dim"]:
        """Decode the masked positions.

        Args:
            latent: Prefix tokens, then visible tokens in ascending order of position.
            mask: The mask that they were encoded under.

        Returns:
            One token per masked position, ascending, after the last norm.

        Raises:
            ValueError: A mask of another grid, or latents that do not fit it.
        """
        check_mask(mask, self.grid, latent)
        if latent.shape[1] != self.num_prefix + mask.num_visible:
            raise ValueError(
                f"latent must hold {self.num_prefix} prefix and {mask.num_visible} visible tokens; "
                f"got {tuple(latent.shape)}"
            )
        prefix_position, positions = self.pos_embed[0].tensor_split([self.num_prefix])
        order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
        positions = F.embedding(order, positions)
        prefix_position = prefix_position.expand(latent.shape[0], -1, -1)
        mask_tokens = self.mask_token.expand(latent.shape[0], mask.num_masked, -1)
        tokens = torch.cat([self.embed(latent), mask_tokens], dim=1)
        tokens = tokens + torch.cat([prefix_position, positions], dim=1)
        for index, block in enumerate(self.blocks, 1):
            tokens = block(tokens, mask.num_masked if index == len(self.blocks) else None)
        decoded: Tensor = self.norm(tokens[:, tokens.shape[1] - mask.num_masked :])
        return decoded


class PixelHead(nn.Linear):
    """Linear head from tokens to the pixels of their patches, in `patchify`'s order.

    Args:
        dim: Width of a token.
        patch_size: Pixels per patch, per spatial axis.
        in_channels: Channels of the images.

    Example:
        >>> PixelHead(dim=32, patch_size=(8, 8), in_channels=3)(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 192])
    """

    def __init__(self, *, dim: int, patch_size: Sequence[int], in_channels: int) -> None:
        super().__init__(dim, in_channels * count_tokens(as_sizes("patch_size", patch_size)))
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)
