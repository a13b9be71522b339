"""MAE: Masked Autoencoders Are Scalable Vision Learners (He et al., arXiv:2111.06377).

    python recipes/mae.py                                             # a few minutes on a CPU
    python recipes/mae.py --preset vit_base --data /path/to/imagenet --precision bf16

An encoder sees the visible quarter of an image's patches; a light decoder predicts the pixels of
the others. The full presets are the authors' pre-training (AdamW 1.5e-4 per 256 images, betas .9
and .95, weight decay .05, 40 epochs of warm-up, 800 epochs, batch 4096, random crops of scale .2-1
and flips, no color jitter). Published for 1600 epochs on ImageNet-1K, top-1 after fine-tuning and
linear probing: ViT-B 83.6 / 68.0, ViT-L 85.9 / 75.8, ViT-H 86.9 / 76.6.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from mimkit import container
from mimkit.masking import Mask, RaggedMask
from mimkit.nn import CrossDecoder, MAEDecoder, PixelHead
from mimkit.patches import gather_masked
from recipes.engine import Masking, Preset, Recipe, Training, fields, run, targets
from recipes.engine.masks import join
from recipes.engine.vit import ViTConfig

Target = Literal["pixels", "pca"]
LossOn = Literal["masked", "all"]
MaskTokens = Literal["decoder", "encoder"]
Decoder = Literal["self", "cross"]


@dataclass(frozen=True)
class MAEConfig(ViTConfig):
    """Shape of the model; the defaults are the paper's ViT-B/16.

    Attributes:
        decoder_dim: Width of the decoder (table 1b).
        decoder_depth: Blocks of the decoder (table 1a).
        decoder_heads: Attention heads of the decoder.
        normalize_pixels: Whether each target patch is brought to zero mean and unit variance (table
            1d).
        target: What is predicted (table 1d): "pixels", or "pca" for the patches' largest principal
            components.
        pca_components: How many components.
        loss_on: "masked" patches, or "all" (section 3: half a point worse).
        mask_tokens: Where mask tokens come in (table 1c): "decoder", or "encoder", which then works
            on all patches.
        decoder: "self" for the paper's, "cross" for CrossMAE's, whose masked tokens attend to the
            visible ones only.
        decode_fraction: Fraction of the masked patches that a training step predicts, in (0, 1];
            less than 1 with `decoder="cross"` only.
        norm_eps: Epsilon of every LayerNorm.
        act: Activation of every MLP: "gelu", or "gelu_tanh" for its approximation by tanh.
    """

    decoder_dim: fields.Width = 512
    decoder_depth: fields.Depth = 8
    decoder_heads: fields.PositiveInt = 16
    normalize_pixels: bool = True
    target: Target = "pixels"
    pca_components: fields.PositiveInt = 96
    loss_on: LossOn = "masked"
    mask_tokens: MaskTokens = "decoder"
    decoder: Decoder = "self"
    decode_fraction: fields.Fraction = 1.0
    norm_eps: fields.PositiveFloat = 1e-6
    act: Literal["gelu", "gelu_tanh"] = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decode_fraction == 0:
            raise ValueError(f"decode_fraction must be in (0, 1]; got {self.decode_fraction}")
        if self.decode_fraction < 1 and (self.decoder, self.loss_on) != ("cross", "masked"):
            raise ValueError('decode_fraction below 1 needs decoder="cross" and loss_on="masked"')
        if self.decoder == "cross" and self.mask_tokens == "encoder":
            raise ValueError('decoder="cross" needs mask_tokens="decoder"')
        if self.decoder == "cross" and (self.norm_eps, self.act) != (1e-6, "gelu"):
            raise ValueError('decoder="cross" needs norm_eps=1e-6 and act="gelu"')


@container
class MAEOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Under a `RaggedMask`, predictions and latents are packed: one sample after the other.

    Attributes:
        loss: Mean squared error over the masked patches.
        prediction: Predicted (normalised) pixels of the masked patches, in `patchify`'s order.
        latent: The encoder's output: class token, then visible patches.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked patch"] | Float[Tensor, "rows_of_masked patch"]
    latent: Float[Tensor, "samples prefix_and_visible dim"] | Float[Tensor, "rows_of_visible dim"]


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

        Images of different sizes, and different shares of them hidden:

        >>> images = [torch.rand(3, 32, 32), torch.rand(3, 16, 40)]
        >>> key = masking.key([0, 1], seed=0)
        >>> mask = masking.ragged(masking.uniform, key, [(4, 4), (2, 5)], [0.75, 0.5])
        >>> [len(rows) for rows in mask.split_masked(model(images, mask).prediction)]
        [12, 5]
    """

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.build_vit(norm_eps=config.norm_eps, act=config.act)
        self.mask_token = None
        if config.mask_tokens == "encoder":
            self.mask_token = nn.Parameter(nn.init.normal_(torch.empty(config.dim), std=0.02))
        make_decoder: Callable[..., nn.Module] = (
            CrossDecoder
            if config.decoder == "cross"
            else partial(MAEDecoder, norm_eps=config.norm_eps, act=config.act)
        )
        self.decoder = make_decoder(
            grid=self.encoder.grid,
            in_dim=config.dim,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            num_prefix=self.encoder.num_prefix_tokens,
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        shape = (self.patch_size, config.in_channels)
        self.target: targets.Target
        if config.target == "pca":
            self.target = targets.PCATarget(*shape, config.pca_components)
            self.head: nn.Module = nn.Linear(config.decoder_dim, config.pca_components)
        else:
            self.target = targets.PixelTarget(*shape, normalize=config.normalize_pixels)
            self.head = PixelHead(
                dim=config.decoder_dim, patch_size=self.patch_size, in_channels=config.in_channels
            )

    def forward(
        self,
        images: Shaped[Tensor, "images channels *spatial"]
        | Sequence[Shaped[Tensor, "channels ..."]],
        mask: Mask | RaggedMask | Sequence[Mask],
    ) -> MAEOutput:
        """Predict the masked patches of `images` and score the prediction."""
        if isinstance(mask, RaggedMask):
            return self._forward_ragged(images, mask)
        if not isinstance(images, Tensor):
            raise TypeError("a list of images needs a RaggedMask")
        mask, images = join(mask, images)
        scored = self._choose_scored(mask)
        if self.mask_token is None:
            latent, seen = self.encoder(images, mask), mask
        else:
            latent = self.encoder(images, mask, mask_token=self.mask_token)
            seen = _with_masked(mask, 0)
        query_ids = None if scored is seen else scored.masked_ids
        prediction = self.head(self.decoder(latent, seen, query_ids))
        loss = self.target.loss(prediction, images, scored)
        if self.config.loss_on == "all":
            prediction = gather_masked(prediction, mask)
        return MAEOutput(loss, prediction, latent)

    def _forward_ragged(self, images: Tensor | Sequence[Tensor], mask: RaggedMask) -> MAEOutput:
        """Run the paper's own model on samples that hide different numbers of patches."""
        self.check_ragged()
        latent = self.encoder(images, mask)
        prediction = self.head(self.decoder(latent, mask))
        assert isinstance(self.target, targets.PixelTarget)
        return MAEOutput(self.target.loss(prediction, images, mask), prediction, latent)

    @property
    def readers(self) -> tuple[nn.Module, nn.Module]:
        """What reads the images: these parts normalise bytes themselves, where both can."""
        return self.encoder.patch_embed, self.target

    def check_ragged(self) -> None:
        """Check that the model takes a `RaggedMask`.

        Raises:
            ValueError: If it is a variant of the paper's own model.
        """
        config = self.config
        choices = (config.target, config.loss_on, config.mask_tokens, config.decoder)
        if (*choices, config.decode_fraction) != ("pixels", "masked", "decoder", "self", 1.0):
            raise ValueError(
                'a RaggedMask needs target="pixels", loss_on="masked", mask_tokens="decoder", '
                f'decoder="self" and decode_fraction=1; got {config}'
            )

    def _choose_scored(self, mask: Mask) -> Mask:
        """Return a mask of the patches to predict and to score."""
        if self.config.loss_on == "all":
            return _with_masked(mask, mask.num_tokens)
        if self.config.decode_fraction == 1 or not self.training:
            return mask
        count = max(round(self.config.decode_fraction * mask.num_masked), 1)
        hidden = mask.is_masked.flatten(1)
        noise = torch.rand(hidden.shape, device=hidden.device)
        return Mask.from_noise(hidden * (1 + noise), mask.grid, count)


def _with_masked(mask: Mask, count: int) -> Mask:
    """Mask none or all of a grid, for as many samples as `mask` has."""
    noise = torch.zeros(mask.batch_size, mask.num_tokens, device=mask.device)
    return Mask.from_noise(noise, mask.grid, count)


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
    flags=(
        "sampler",
        "views",
        "target",
        "pca_components",
        "normalize_pixels",
        "loss_on",
        "mask_tokens",
        "decoder",
        "decode_fraction",
        "decoder_dim",
        "decoder_depth",
        "decoder_heads",
    ),
    takes_any_size=True,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
