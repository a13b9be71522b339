"""Fields that the configurations of several recipes share: the ViT, frozen models."""

from dataclasses import dataclass
from typing import Any

from mimkit._grids import Grid, per_axis, sides_of
from mimkit.nn import ViT
from recipes.engine import fields


@dataclass(frozen=True)
class ViTConfig:
    """Fields of a configuration that shape its ViT; the defaults are ViT-B/16's.

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

    @property
    def patch_sides(self) -> Grid:
        """Pixels per axis of a patch."""
        num_axes = len(sides_of("image_size", self.image_size))
        return per_axis("patch_size", self.patch_size, num_axes)

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


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """Fields of a configuration whose `target` may be computed by a frozen model.

    Attributes:
        tokenizer: With target "tokens", "patches" for k-means codes of normalised patches, fitted
            on the first images; or a file: `tokenizer.safetensors` of `mimkit tokenizer`, or
            DALL-E's encoder.
        teacher: With target "features", the encoder that makes them: an encoder.safetensors with
            its config.yaml, or a checkpoint of the authors' MAE or CAE.
    """

    tokenizer: str = "patches"
    teacher: str | None = None

    def __post_init__(self) -> None:
        fields.check_fields(self)
        target = getattr(self, "target", None)  # a field of the subclass
        if self.teacher is not None and target != "features":
            raise ValueError(f'a teacher is for target "features"; got target {target!r}')
