"""ConvMAE: Masked Convolution Meets Masked Autoencoders (Gao et al., arXiv:2205.03892).

    python recipes/convmae.py                                         # a few minutes on a CPU
    python recipes/convmae.py --preset convmae_base --data /path/to/imagenet --precision bf16
    python recipes/convmae.py --preset fastconvmae_base --data /path/to/imagenet --precision bf16

Two stages of convolutions and one of transformer blocks see the visible quarter of an image; the
decoder is MAE's. A mask is drawn for the last stage and holds for the finer ones, whose
convolutions see zeros in place of what is hidden, and do no work there. The full presets are the
authors' pre-training (AdamW 1.5e-4 per 256 images, betas .9 and .95, weight decay .05, 40 epochs of
warm-up, 1600 epochs, batch 3072, random crops and flips); FastConvMAE deals every image to four
masks (50 epochs, 6e-4 per 256 images, batch 512, 10 epochs of warm-up). Published on ImageNet-1K,
top-1 after fine-tuning and linear probing: ConvMAE-B 85.0 / 70.9, FastConvMAE-B 84.4 after 50
epochs.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

from jaxtyping import Float, Float32
from torch import Tensor, nn

from mimkit import container, masking
from mimkit.masking import Key, Mask
from mimkit.nn import ConvViT, MAEDecoder, PixelHead
from mimkit.patches import gather_patches, unpatchify
from recipes.engine import Preset, Recipe, Training, fields, run, targets
from recipes.engine.masks import Masks, join

Conv = Literal["masked", "plain"]
Decoder = Literal["multi-scale", "single-scale"]
Stage = Literal["blockwise", "per-stage"]

# Tokens of the first stage per axis and token of the last one, in every preset.
REFINEMENT = 4


@dataclass(frozen=True)
class ConvMAEConfig:
    """Shape of the model; the defaults are the paper's base model.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        patch_sizes: Strides of the three stages; a masked patch covers their product.
        in_channels: Channels of the images.
        dim: Width of each stage.
        depth: Blocks of each stage.
        heads: Attention heads of the last stage.
        mlp_ratio: Hidden width of each stage's MLPs over its width; the decoder has the first one.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        normalize_pixels: Whether each target patch is brought to zero mean and unit variance.
        conv: "masked", or "plain" for convolutions that see what the mask hides.
        decoder: "multi-scale", or "single-scale" for one that gets the last stage's output alone.
        drop_path: Fraction of samples whose residual branches the last encoder block leaves out.
    """

    image_size: fields.Pixels | tuple[fields.Pixels, fields.Pixels]
    patch_sizes: tuple[fields.Pixels, fields.Pixels, fields.Pixels] = (4, 2, 2)
    in_channels: fields.PositiveInt = 3
    dim: tuple[fields.Width, fields.Width, fields.Width] = (256, 384, 768)
    depth: tuple[fields.Depth, fields.Depth, fields.Depth] = (2, 2, 11)
    heads: fields.PositiveInt = 12
    mlp_ratio: tuple[fields.PositiveFloat, fields.PositiveFloat, fields.PositiveFloat] = (
        4.0,
        4.0,
        4.0,
    )
    decoder_dim: fields.Width = 512
    decoder_depth: fields.Depth = 8
    decoder_heads: fields.PositiveInt = 16
    normalize_pixels: bool = True
    conv: Conv = "masked"
    decoder: Decoder = "multi-scale"
    drop_path: fields.Fraction = 0.0

    def __post_init__(self) -> None:
        fields.check_fields(self)


@container
class ConvMAEOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Mean squared error over the masked patches.
        prediction: Predicted (normalised) pixels of the masked patches, in `patchify`'s order.
        latent: The encoder's output: visible patches.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked patch"]
    latent: Float[Tensor, "samples visible dim"]


class ConvMAE(nn.Module):
    """Masked autoencoder with a hybrid encoder; given complementary masks, FastConvMAE.

    Example:
        >>> import torch
        >>> model = ConvMAE(ConvMAEConfig(image_size=32, patch_sizes=(2, 2, 2), dim=(8, 16, 32),
        ...                               depth=(1, 1, 2), heads=4, decoder_dim=32,
        ...                               decoder_depth=1, decoder_heads=4))
        >>> key = masking.key([0, 1], seed=0)
        >>> mask = masking.uniform(key, model.encoder.grid, 0.75)
        >>> model(torch.rand(2, 3, 32, 32), mask).prediction.shape
        torch.Size([2, 12, 192])
        >>> masks = masking.complementary(key, model.encoder.grid, parts=4)
        >>> model(torch.rand(2, 3, 32, 32), masks).latent.shape
        torch.Size([8, 4, 32])
    """

    def __init__(self, config: ConvMAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvViT(
            image_size=config.image_size,
            patch_sizes=config.patch_sizes,
            in_channels=config.in_channels,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            drop_path=config.drop_path,
            multi_scale=config.decoder == "multi-scale",
            masked_conv=config.conv == "masked",
        )
        self.decoder = MAEDecoder(
            grid=self.encoder.grid,
            in_dim=config.dim[-1],
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio[0],
            num_prefix=self.encoder.num_prefix_tokens,
        )
        self.patch_size = self.encoder.patch_size
        self.head = PixelHead(
            dim=config.decoder_dim, patch_size=self.patch_size, in_channels=config.in_channels
        )
        self.target = targets.PixelTarget(
            self.patch_size, config.in_channels, normalize=config.normalize_pixels
        )

    def forward(
        self, images: Float[Tensor, "images channels height width"], mask: Mask | Sequence[Mask]
    ) -> ConvMAEOutput:
        """Predict the masked patches of `images` and score the prediction."""
        mask, images = join(mask, images)
        latent = self.encoder(images, mask)
        if mask.grid == self.encoder.grid:
            prediction = self.head(self.decoder(latent, mask))
        else:
            prediction = self._predict_parts(latent, mask)
        return ConvMAEOutput(self.target.loss(prediction, images, mask), prediction, latent)

    def _predict_parts(self, latent: Tensor, mask: Mask) -> Tensor:
        """Predict whole patches from all tokens, and take the parts that the first stage hides."""
        grid = self.encoder.grid
        nothing = Mask.from_noise(latent.new_zeros(latent.shape[:2]), grid, num_masked=0)
        patches = self.head(self.decoder(latent, nothing, nothing.visible_ids))
        image = unpatchify(patches, grid, self.patch_size)
        part = [size // n for size, n in zip(self.encoder.image_size, mask.grid, strict=True)]
        return gather_patches(image, mask.complement(), part)


@dataclass(frozen=True)
class ConvMAEMasking:
    """Which patches of a batch are masked.

    Attributes:
        mask_ratio: Fraction of patches to mask, in (0, 1); None for .75 or, with several parts, for
            what they leave.
        parts: Complementary masks an image (FastConvMAE), each of which shows 1/parts of it; 1 for
            a single mask.
        mask: "blockwise" masks tokens of the last stage; "per-stage" tokens of the first, so that
            each later token is partly visible, and all are encoded.
    """

    mask_ratio: fields.OpenFraction | None = None
    parts: fields.PositiveInt = 1
    mask: Stage = "blockwise"

    def __post_init__(self) -> None:
        fields.check_fields(self)
        left = 1 - 1 / self.parts
        if self.parts > 1 and self.mask_ratio and abs(self.mask_ratio - left) > 5e-3:
            raise ValueError(
                f"--parts {self.parts} shows 1/{self.parts} of an image in each mask: "
                f"--mask-ratio {self.mask_ratio} does not fit, {left:.3f} would"
            )

    def draw(self, key: Key, grid: tuple[int, ...]) -> Masks:
        """Draw the masks of a batch; a list where each image gets several."""
        if self.mask == "per-stage":
            grid = tuple(REFINEMENT * size for size in grid)
        if self.parts > 1:
            if math.prod(grid) % self.parts:
                raise ValueError(
                    f"--parts {self.parts} does not divide the {math.prod(grid)} patches of the "
                    f"grid {grid} into equal parts"
                )
            return masking.complementary(key, grid, self.parts)
        return masking.uniform(key, grid, self.mask_ratio or 0.75)


PAPER = Training(epochs=1600, batch_size=3072, base_lr=1.5e-4, warmup_epochs=40)
FAST = Training(epochs=50, batch_size=512, base_lr=6e-4, warmup_epochs=10)

PRESETS = {
    # Some minutes on two CPU cores; with 8 epochs k-NN gains 9 points instead of 12.
    "tiny": Preset(
        ConvMAEConfig(
            image_size=32,
            patch_sizes=(2, 2, 2),
            dim=(32, 64, 128),
            depth=(2, 2, 4),
            heads=4,
            decoder_dim=128,
            decoder_depth=1,
            decoder_heads=4,
        ),
        Training(
            epochs=10,
            batch_size=64,
            base_lr=4e-3,
            warmup_epochs=0.3,
            clip_grad=1.0,
        ),
        ConvMAEMasking(),
    ),
    "convmae_small": Preset(
        ConvMAEConfig(image_size=224, dim=(128, 256, 384), heads=6), PAPER, ConvMAEMasking()
    ),
    "convmae_base": Preset(ConvMAEConfig(image_size=224), PAPER, ConvMAEMasking()),
    "convmae_large": Preset(
        ConvMAEConfig(
            image_size=224,
            dim=(384, 768, 1024),
            depth=(2, 2, 23),
            heads=16,
            mlp_ratio=(8.0, 8.0, 4.0),
        ),
        PAPER,
        ConvMAEMasking(),
    ),
    "convmae_huge": Preset(
        ConvMAEConfig(
            image_size=224,
            dim=(768, 1024, 1280),
            depth=(2, 2, 31),
            heads=16,
            mlp_ratio=(8.0, 8.0, 4.0),
        ),
        PAPER,
        ConvMAEMasking(),
    ),
    "fastconvmae_base": Preset(ConvMAEConfig(image_size=224), FAST, ConvMAEMasking(parts=4)),
}

RECIPE = Recipe(
    name="convmae",
    presets=PRESETS,
    build=ConvMAE,
    flags=(
        "parts",
        "mask",
        "conv",
        "decoder",
        "normalize_pixels",
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
    ),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
