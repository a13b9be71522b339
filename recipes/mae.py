"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv:2111.06377).

    python recipes/mae.py                                             # a few minutes on a CPU
    python recipes/mae.py --preset vit_base --data /path/to/imagenet --precision bf16

An encoder sees the visible quarter of an image's patches; a light decoder predicts the pixels of
the others. The full presets are the authors' pre-training (AdamW 1.5e-4 per 256 images, betas .9
and .95, weight decay .05, 40 epochs of warm-up, 800 epochs, batch 4096, random crops of scale .2-1
and flips, no color jitter). Published for 1600 epochs on ImageNet-1K, top-1 after fine-tuning and
linear probing: ViT-B 83.6 / 68.0, ViT-L 85.9 / 75.8, ViT-H 86.9 / 76.6.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # Threads that spin for long while they wait bring a busy machine to a crawl.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch loads
    if not __package__:  # a script: the same as `python -m recipes.mae` from the root
        sys.path[0] = str(Path(__file__).resolve().parents[1])

from jaxtyping import Float, Float32
from torch import Tensor, nn

from mimkit import losses, targets, viz
from mimkit._containers import container
from mimkit.masking import Mask
from mimkit.nn import MAEDecoder, PixelHead, ViT
from recipes.engine import Masking, Preset, Recipe, Training, run


@dataclass(frozen=True)
class MAEConfig:
    """Shape of the model; the defaults are the paper's ViT-B/16.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        patch_size: Pixels per patch; one integer, or one per axis.
        in_channels: Channels of the images.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        mlp_ratio: Hidden width of every MLP over its input's.
        decoder_dim: Width of the decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of the decoder.
        normalize_pixels: Whether each target patch is brought to zero mean and unit variance.
        drop_path: Fraction of samples whose residual branches the last encoder block leaves out.
    """

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

    @property
    def normalize(self) -> Literal["patch"] | None:
        """What `masked_pixel_loss` calls the target."""
        return "patch" if self.normalize_pixels else None


@container
class MAEOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Mean squared error over the masked patches.
        prediction: Predicted (normalised) pixels of the masked patches, in `patchify`'s order.
        latent: The encoder's output: class token, then visible patches.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked patch"]
    latent: Float[Tensor, "samples prefix_and_visible dim"]


class MAE(nn.Module):
    """Masked autoencoder.

    Example:
        >>> import torch
        >>> from mimkit import masking
        >>> model = MAE(MAEConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=4,
        ...                       decoder_dim=32, decoder_depth=1, decoder_heads=4))
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), model.encoder.grid, 0.75)
        >>> output = model(torch.rand(2, 3, 32, 32), mask)
        >>> output.prediction.shape, output.latent.shape
        (torch.Size([2, 12, 192]), torch.Size([2, 5, 64]))
    """

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
        """Predict the masked patches of `images` and score the prediction."""
        if not isinstance(mask, Mask):
            images = images.repeat(len(mask), *[1] * (images.ndim - 1))
            mask = Mask.cat(mask)
        latent = self.encoder(images, mask)
        prediction = self.head(self.decoder(latent, mask))
        loss = losses.masked_pixel_loss(
            prediction, images, mask, self.patch_size, normalize=self.config.normalize
        )
        return MAEOutput(loss, prediction, latent)


def reconstruct(
    model: MAE, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> Float[Tensor, "batch channels *spatial"]:
    """Fill in the masked patches; normalised ones with the true patches' statistics."""
    target_type = targets.NormalizedPixels if model.config.normalize_pixels else targets.Pixels
    prediction = model(images, mask).prediction.float()
    patches = target_type(model.patch_size).invert(prediction, images, mask)
    return viz.fill_masked(images, mask, patches, model.patch_size)


def baselines(
    config: MAEConfig, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> dict[str, Float32[Tensor, ""]]:
    """Score trivial predictors under the model's loss."""
    return losses.baselines(images, mask, config.patch_size, normalize=config.normalize)


PAPER = Training(epochs=800, batch_size=4096, base_lr=1.5e-4, warmup_epochs=40)
MASKING = Masking(mask_ratio=0.75)

PRESETS = {
    # Two to four minutes on two CPU cores, probes included.
    "tiny": Preset(
        MAEConfig(
            image_size=32,
            patch_size=4,
            dim=128,
            depth=4,
            heads=4,
            decoder_dim=64,
            decoder_depth=1,
            decoder_heads=4,
        ),
        Training(
            epochs=6,
            batch_size=32,
            base_lr=8e-3,
            warmup_epochs=0.3,
            clip_grad=1.0,
        ),
        MASKING,
    ),
    "vit_base": Preset(MAEConfig(image_size=224), PAPER, MASKING),
    "vit_large": Preset(MAEConfig(image_size=224, dim=1024, depth=24, heads=16), PAPER, MASKING),
    "vit_huge": Preset(
        MAEConfig(image_size=224, patch_size=14, dim=1280, depth=32, heads=16),
        PAPER,
        MASKING,
    ),
}

RECIPE = Recipe(
    name="mae",
    presets=PRESETS,
    build=MAE,
    baselines=baselines,
    reconstruct=reconstruct,
    note="Predicted patches are normalised; here they have the ground truth's patch statistics.",
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
