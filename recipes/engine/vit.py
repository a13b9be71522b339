"""Shape of the ViT that several recipes train."""

from dataclasses import dataclass
from typing import Any

from mimkit.nn import ViT
from recipes.engine import fields


@dataclass(frozen=True)
class ViTConfig:
    """Fields of a recipe's configuration that shape its ViT; the defaults are ViT-B/16's.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        patch_size: Pixels per patch; one integer, or one per axis. With a stem, positions of its
            feature map.
        in_channels: Channels of the images.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        mlp_ratio: Hidden width of every MLP over its input's.
        drop_path: Fraction of samples whose residual branches the last block leaves out.
    """

    image_size: fields.Pixels | tuple[fields.Pixels, ...]
    patch_size: fields.Pixels | tuple[fields.Pixels, ...] = 16
    in_channels: fields.PositiveInt = 3
    dim: fields.Width = 768
    depth: fields.Depth = 12
    heads: fields.PositiveInt = 12
    mlp_ratio: fields.PositiveFloat = 4.0
    drop_path: fields.Fraction = 0.0

    def __post_init__(self) -> None:
        fields.check_fields(self)

    def build_vit(self, **options: Any) -> ViT:
        """Build the ViT, with further options of its constructor."""
        return ViT(
            image_size=self.image_size,
            patch_size=self.patch_size,
            in_channels=self.in_channels,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            drop_path=self.drop_path,
            **options,
        )
