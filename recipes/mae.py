"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv:2111.06377)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from mimkit._containers import container
from mimkit.losses import masked_pixel_loss
from mimkit.masking import Mask
from mimkit.nn import MAEDecoder, PixelHead, ViT


@dataclass(frozen=True)
class MAEConfig:
    """Shape of the model; the defaults are the paper's ViT-B/16."""

    image_size: int | tuple[int, ...]
    patch_size: int | tuple[int, ...] = 16
    in_channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    normalize_pixels: bool = True
    drop_path: float = 0.0


@container
class MAEOutput:
    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "batch masked patch"]
    latent: Float[Tensor, "batch prefix_and_visible dim"]


class MAE(nn.Module):
    """Masked autoencoder."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ViT(
            image_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path=config.drop_path,
        )
        self.decoder = MAEDecoder(
            grid=self.encoder.grid,
            in_dim=config.dim,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            num_prefix=self.encoder.num_prefix_tokens,
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        self.head = PixelHead(
            dim=config.decoder_dim, patch_size=self.patch_size, in_channels=config.in_channels
        )

    def forward(
        self, images: Float[Tensor, "images channels *spatial"], mask: Mask | Sequence[Mask]
    ) -> MAEOutput:
        if not isinstance(mask, Mask):
            images = images.repeat(len(mask), *[1] * (images.ndim - 1))
            mask = Mask.cat(mask)
        latent = self.encoder(images, mask)
        prediction = self.head(self.decoder(latent, mask))
        loss = masked_pixel_loss(
            prediction,
            images,
            mask,
            self.patch_size,
            normalize="patch" if self.config.normalize_pixels else None,
        )
        return MAEOutput(loss, prediction, latent)
