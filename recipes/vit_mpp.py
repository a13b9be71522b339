"""Masked patch prediction of the Vision Transformer (Dosovitskiy et al., arXiv:2010.11929, B.1.2).

    python recipes/vit_mpp.py                                         # a few minutes on a CPU
    python recipes/vit_mpp.py --preset vit_base --data /path/to/imagenet --precision bf16

Half of the patch embeddings are corrupted: 80 % become a mask token, 10 % another patch's
embedding, 10 % stay. From each the mean color of its patch is predicted, in 3 bits a channel: one
of 512 classes. The paper trained a ViT-B/16 on JFT for 1M steps of 4096 (Adam, 2e-4, 10k steps of
warm-up): 79.9 % on ImageNet-1K after fine-tuning, 2 points above training from scratch. The full
preset is that schedule in epochs of ImageNet.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from mimkit import container
from mimkit.masking import Mask
from mimkit.nn import ConvStem
from mimkit.patches import gather_masked
from recipes.engine import Masking, Preset, Recipe, Training, fields, run, targets
from recipes.engine.masks import join
from recipes.engine.vit import ViTConfig


@dataclass(frozen=True)
class MPPConfig(ViTConfig):
    """Shape of the model; the defaults are the paper's ViT-B/16.

    Attributes:
        stem: Channels after each strided convolution of a hybrid's stem; none for patches of
            pixels.
        mask_share: Share of the corrupted patches that become the mask token.
        other_share: Share of them that become another corrupted patch.
    """

    stem: tuple[fields.Width, ...] = ()
    mask_share: fields.Fraction = 0.8
    other_share: fields.Fraction = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_share + self.other_share > 1:
            raise ValueError(
                "mask_share and other_share must be shares of one whole; "
                f"got {self.mask_share} and {self.other_share}"
            )


@container
class MPPOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Cross-entropy over the corrupted patches.
        prediction: Logits of the mean color of the corrupted patches.
        latent: The encoder's output: class token, then one token per patch.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked colors"]
    latent: Float[Tensor, "samples prefix_and_tokens dim"]


class MPP(nn.Module):
    """Vision Transformer that predicts the mean color of corrupted patches.

    In evaluation, all corrupted patches are mask tokens.

    Example:
        >>> from mimkit import masking
        >>> model = MPP(MPPConfig(image_size=32, patch_size=8, dim=16, depth=1, heads=2))
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), model.encoder.grid, 0.5)
        >>> model(torch.rand(2, 3, 32, 32), mask).prediction.shape
        torch.Size([2, 8, 512])
    """

    def __init__(self, config: MPPConfig) -> None:
        super().__init__()
        self.config = config
        stem = (
            ConvStem(in_channels=config.in_channels, channels=config.stem) if config.stem else None
        )
        self.encoder = config.build_vit(learn_positions=True, stem=stem)
        self.patch_size = self.encoder.patch_embed.patch_size
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
        self.target = targets.MeanColorTarget(self.patch_size, config.in_channels)
        self.head = nn.Linear(config.dim, self.target.num_values)

    def forward(
        self, images: Float[Tensor, "images channels *spatial"], mask: Mask | Sequence[Mask]
    ) -> MPPOutput:
        """Predict the mean colors of the corrupted patches, and score the prediction."""
        mask, images = join(mask, images)
        tokens = self._corrupt(images, mask) if self.training else self.mask_token
        latent = self.encoder(images, mask, mask_token=tokens)
        prefix = self.encoder.num_prefix_tokens
        prediction = self.head(gather_masked(latent, mask, num_prefix=prefix)[:, prefix:])
        return MPPOutput(self.target.loss(prediction, images, mask), prediction, latent)

    def _corrupt(self, images: Tensor, mask: Mask) -> Float[Tensor, "images masked dim"]:
        """Return what stands for each corrupted patch."""
        hidden = self.encoder.patch_embed(images, mask.complement())
        chosen = torch.randint(max(mask.num_masked, 1), hidden.shape[:2], device=hidden.device)
        others = hidden.gather(1, chosen.unsqueeze(2).expand_as(hidden))
        dice = torch.rand(*hidden.shape[:2], 1, device=hidden.device)
        kept = torch.where(dice < self.config.mask_share + self.config.other_share, others, hidden)
        return torch.where(dice < self.config.mask_share, self.mask_token.to(kept.dtype), kept)


PRESETS = {
    "tiny": Preset(
        MPPConfig(image_size=32, patch_size=4, dim=96, depth=4, heads=3),
        Training(epochs=6, batch_size=32, base_lr=6e-3, warmup_epochs=0.3, clip_grad=1.0),
        Masking(mask_ratio=0.5),
    ),
    "vit_base": Preset(
        MPPConfig(image_size=224),
        Training(
            epochs=3200,
            batch_size=4096,
            base_lr=1.25e-5,
            warmup_epochs=32,
            weight_decay=0.0,
            betas=(0.9, 0.999),
        ),
        Masking(mask_ratio=0.5),
    ),
}

RECIPE = Recipe(
    name="vit_mpp",
    presets=PRESETS,
    build=MPP,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
