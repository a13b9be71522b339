"""CAE: Context Autoencoder for Self-Supervised Representation Learning (arXiv:2202.03026).

    python recipes/cae.py                                             # a few minutes on a CPU
    python recipes/cae.py --preset vit_base --data /path/to/imagenet --tokenizer dalle_encoder.pt

An encoder sees the visible half of an image's patches. From its latents, a regressor predicts the
latents of the others, which are aligned with what the same encoder makes of those patches alone; a
decoder turns them into the codes of a tokenizer. The full presets are the authors' pre-training
(AdamW 1.5e-3 at batch 2048, betas .9 and .999, weight decay .05, gradient norm at most 3, drop path
.1, block-wise masks of 98 of 196 patches, DALL-E's tokenizer). Published for 1600 epochs on
ImageNet-1K, top-1 after fine-tuning, linear and attentive probing: ViT-B 83.9 / 70.3 / 77.2,
ViT-L 86.2 / 77.8 / 81.2.

`--target features --teacher FILE --no-alignment --no-decoder` is CAE v2 (arXiv:2211.09799) at the
masked patches: it predicts a teacher's features by their cosine. docs/recipes.md says more.
"""

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from mimkit import container, losses
from mimkit.masking import Mask
from mimkit.nn import CAEDecoder, ContextRegressor, PixelHead, TokenHead
from mimkit.patches import sincos_positions, unpatchify
from recipes.engine import Masking, Preset, Recipe, Training, fields, run, targets
from recipes.engine.masks import join, mask_all
from recipes.engine.pretrained.teachers import load_teacher
from recipes.engine.pretrained.tokenizers import make_tokenizer
from recipes.engine.run import defaults
from recipes.engine.vit import TargetConfig, ViTConfig

Target = Literal["tokens", "rgb", "features"]


@dataclass(frozen=True)
class CAEConfig(TargetConfig, ViTConfig):
    """Shape of the model; the defaults are the paper's ViT-B/16.

    Attributes:
        layer_scale: First value of the factors of the encoder's residual branches; None for none.
        regressor_depth: Blocks of the regressor.
        decoder_dim: Width of regressor and decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of regressor and decoder.
        decoder_layer_scale: As `layer_scale`, of regressor and decoder.
        vocabulary_size: Codes of the tokenizer; a file brings its own.
        alignment_weight: Weight of the alignment loss; 0 leaves its target out.
        target: What is predicted: "tokens" of a tokenizer, "rgb", normalised pixels, or "features"
            of a teacher (CAE v2).
        feature_dim: Width of the teacher's features; a file brings its own.
        no_alignment: Whether to train without alignment (the paper's ablation).
        no_decoder: Whether to predict from the regressor's output directly (the paper's ablation).
        alignment_drop_path: Whether paths are dropped where the alignment's target is made, too,
            as published.
    """

    layer_scale: fields.NonNegativeFloat | None = 0.1
    regressor_depth: fields.Depth = 4
    decoder_dim: fields.Width = 768
    decoder_depth: fields.Depth = 4
    decoder_heads: fields.PositiveInt = 12
    decoder_layer_scale: fields.NonNegativeFloat | None = 0.1
    vocabulary_size: fields.PositiveInt = 8192
    alignment_weight: fields.NonNegativeFloat = 2.0
    target: Target = "tokens"
    feature_dim: fields.PositiveInt = 512
    no_alignment: bool = False
    no_decoder: bool = False
    alignment_drop_path: bool = True


@container
class CAEOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Main loss and weighted alignment loss.
        main_loss: Cross-entropy of the masked tokens; squared error of pixels with target "rgb";
            one minus the cosine with target "features".
        alignment_loss: Mean squared error of the predicted latents; 0 without alignment.
        token_accuracy: Share of masked tokens whose most likely code is right; None without codes.
        latent: The encoder's output: class token, then visible patches.
        latent_prediction: Latents of the masked patches, as the regressor predicts them.
        latent_target: What they should be: the encoder's output for the masked patches alone; None
            without alignment.
        prediction: Logits of the masked tokens, if asked for; or the predicted pixels or features.
        latent_spread: Standard deviation of the predicted latents over the patches of all images,
            mean over channels: near 0 where the alignment made all latents the same.
        top_token_share: Accuracy of always predicting the most frequent code; None without a
            tokenizer.
    """

    loss: Float32[Tensor, ""]
    main_loss: Float32[Tensor, ""]
    alignment_loss: Float32[Tensor, ""]
    token_accuracy: Float32[Tensor, ""] | None
    latent: Float[Tensor, "batch prefix_and_visible dim"]
    latent_prediction: Float[Tensor, "batch masked decoder_dim"]
    latent_target: Float[Tensor, "batch masked decoder_dim"] | None
    prediction: Float[Tensor, "batch masked values"] | None
    latent_spread: Float32[Tensor, ""]
    top_token_share: Float32[Tensor, ""] | None = None


class CAE(nn.Module):
    """Context autoencoder.

    Example:
        >>> from mimkit import masking
        >>> model = CAE(CAEConfig(image_size=32, patch_size=8, dim=64, depth=2, heads=4,
        ...                       regressor_depth=1, decoder_dim=64, decoder_depth=1,
        ...                       decoder_heads=4, vocabulary_size=16))
        >>> mask = masking.blockwise(masking.key([0, 1], seed=0), model.encoder.grid, 0.5)
        >>> token_ids = torch.randint(16, (2, 16))
        >>> output = model(torch.rand(2, 3, 32, 32), mask, token_ids)
        >>> output.latent.shape, output.latent_prediction.shape
        (torch.Size([2, 9, 64]), torch.Size([2, 8, 64]))
    """

    def __init__(self, config: CAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = config.build_vit(
            layer_scale=config.layer_scale, qkv_bias="qv", first_axis="row"
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        width, grid, prefix = config.decoder_dim, self.encoder.grid, self.encoder.num_prefix_tokens
        # As published: no layer at all where the widths agree.
        layers = {"linear": nn.Linear(config.dim, width), "norm": nn.LayerNorm(width, eps=1e-6)}
        self.project = nn.Identity() if width == config.dim else nn.Sequential(OrderedDict(layers))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        positions = sincos_positions(width, grid, first_axis="row", num_prefix=prefix)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        blocks: dict[str, Any] = {
            "dim": width,
            "heads": config.decoder_heads,
            "mlp_ratio": config.mlp_ratio,
            "layer_scale": config.decoder_layer_scale,
            "drop_path": config.drop_path,
        }
        self.regressor = ContextRegressor(depth=config.regressor_depth, **blocks)
        depth = 0 if config.no_decoder else config.decoder_depth
        self.decoder = CAEDecoder(depth=depth, **blocks)
        channels = config.in_channels
        self.head: nn.Module
        if config.target == "tokens":
            self.head = TokenHead(dim=width, vocabulary_size=config.vocabulary_size)
        elif config.target == "rgb":
            self.head = PixelHead(dim=width, patch_size=self.patch_size, in_channels=channels)
        else:
            self.head = nn.Linear(width, config.feature_dim)
        # In pre-training, the frozen tokenizer or teacher; else its output is given to `forward`.
        self.target: targets.Target | None = None
        self._initialize()

    def forward(
        self,
        images: Float[Tensor, "batch channels *spatial"],
        mask: Mask | Sequence[Mask],
        token_ids: Int64[Tensor, "batch tokens"] | None = None,
        *,
        features: Float[Tensor, "batch masked feature_dim"] | None = None,
        return_logits: bool = False,
    ) -> CAEOutput:
        """Predict tokens and latents of the masked patches, and score both.

        Args:
            images: The images.
            mask: Which patches are masked.
            token_ids: With target "tokens", the tokenizer's code of every patch, row by row.
            features: With target "features", the teacher's features of the masked patches.
            return_logits: Whether to keep the logits, which are else made chunk by chunk and gone.

        Raises:
            ValueError: If token ids or features are missing or of another shape, or (on a CPU) ids
                are out of range.
        """
        if token_ids is not None:
            _, token_ids = join(mask, token_ids)
        mask, images = join(mask, images)
        if isinstance(self.target, targets.TokenTarget):
            token_ids = self.target.encode(images)
        elif isinstance(self.target, targets.FeatureTarget):
            features = self.target(images, mask)
        prefix = self.encoder.num_prefix_tokens
        latent = self.encoder(images, mask)
        visible, positions = self.project(latent[:, prefix:]), self.pos_embed[0, prefix:]
        predicted = self.regressor.from_mask_token(self.mask_token[0, 0], visible, positions, mask)
        wanted = self._alignment_target(images, mask)
        alignment = torch.zeros((), device=images.device)
        if wanted is not None:
            alignment = losses.alignment_mse(predicted, wanted)
        tokens = self.decoder(predicted, positions[mask.masked_ids])
        prediction, accuracy, top_share = None, None, None
        if self.config.target == "tokens":
            ids = targets.given_codes(token_ids, mask)
            main, accuracy = self.head(tokens, ids, return_accuracy=True)
            if isinstance(self.target, targets.CountedTokenTarget):
                top_share = (ids == self.target.frequencies.argmax()).float().mean()
            if return_logits:
                prediction = self.head(tokens)
        else:
            prediction = self.head(tokens)
            if self.config.target == "rgb":
                main = losses.masked_pixel_loss(prediction, images, mask, self.patch_size)
            else:
                features = targets.given_features(features, mask, self.config.feature_dim)
                main = losses.masked_cosine(prediction, features, mask)
        return CAEOutput(
            loss=main + self.config.alignment_weight * alignment,
            main_loss=main,
            alignment_loss=alignment,
            token_accuracy=accuracy,
            latent=latent,
            latent_prediction=predicted,
            latent_target=wanted,
            prediction=prediction,
            latent_spread=predicted.detach().float().flatten(0, 1).std(dim=0).mean(),
            top_token_share=top_share,
        )

    @torch.no_grad()
    def _alignment_target(self, images: Tensor, mask: Mask) -> Tensor | None:
        """Encode the masked patches alone, with the weights of now: no second copy of them."""
        if self.config.no_alignment or self.config.alignment_weight == 0:
            return None
        training = self.encoder.training
        if not self.config.alignment_drop_path:
            self.encoder.eval()
        latent = self.encoder(images, mask.complement())[:, self.encoder.num_prefix_tokens :]
        self.encoder.train(training)
        target: Tensor = self.project(latent)
        return target

    def _initialize(self) -> None:
        """Draw weights as published: every linear layer Xavier-uniform, the rest as BEiT's."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        patches = self.encoder.patch_embed.proj
        nn.init.zeros_(patches.bias)
        assert self.encoder.cls_token is not None
        for weight in (patches.weight, self.encoder.cls_token, self.mask_token):
            # Cut off at one standard deviation, as the authors call it.
            nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)


def build_with_target(config: CAEConfig) -> CAE:
    """Make the model together with the frozen tokenizer or teacher that makes its target."""
    images = (config.image_size, config.patch_sides, config.in_channels)
    target: targets.Target
    if config.target == "tokens":
        tokenizer = make_tokenizer(config.tokenizer, *images, config.vocabulary_size)
        target = targets.CountedTokenTarget(tokenizer, config.patch_sides)
        config = dataclasses.replace(config, vocabulary_size=target.num_values)
    elif config.target == "features":
        target = targets.SimilarityTarget(load_teacher(config.teacher, *images))
        config = dataclasses.replace(config, feature_dim=target.num_values)
    else:
        target = targets.PixelTarget(config.patch_sides, config.in_channels, normalize=True)
    model = CAE(config)
    model.target = target
    return model


def decode_full(
    model: CAE, images: Float[Tensor, "batch channels height width"]
) -> Mapping[str, Float[Tensor, "batch channels height width"]]:
    """Draw what the decoder makes of encoded whole images, which it never saw in training.

    That it understands them shows that predicted and encoded latents live in one space (section
    4.1 and its figure of such pictures).
    """
    assert model.target is not None
    grid, prefix = model.encoder.grid, model.encoder.num_prefix_tokens
    latent = model.project(model.encoder(images)[:, prefix:])
    positions = model.pos_embed[:, prefix:].expand(len(images), -1, -1)
    prediction = model.head(model.decoder(latent, positions)).float()
    everything = mask_all(images, grid)
    columns = {"encoder + decoder": model.target.invert(prediction, images, everything)}
    columns |= model.target.draw_references(images, everything)
    return {name: unpatchify(patches, grid, model.patch_size) for name, patches in columns.items()}


PAPER = Training(
    epochs=1600,
    batch_size=2048,
    base_lr=1.5e-3 * 256 / 2048,
    warmup_epochs=40,
    betas=(0.9, 0.999),
    min_lr=1e-5,
    clip_grad=3.0,
    crop_area=(0.08, 1.0),
)
MASKING = Masking(mask_ratio=0.5, sampler="blockwise")
BASE = CAEConfig(image_size=224, drop_path=0.1, tokenizer="dalle_encoder.pt")
LARGE = dataclasses.replace(
    BASE, dim=1024, depth=24, heads=16, layer_scale=1e-5, decoder_dim=1024, decoder_heads=16
)
TINY = dataclasses.replace(
    CAEConfig(image_size=32, patch_size=4, dim=96, depth=4, heads=4, vocabulary_size=128),
    regressor_depth=2,
    decoder_dim=96,
    decoder_depth=1,
    decoder_heads=4,
    alignment_weight=0.2,
)

PRESETS = {
    # Up to five minutes on two CPU cores, tokenizer and probes included.
    "tiny": Preset(
        TINY,
        Training(epochs=4, batch_size=32, base_lr=8e-3, warmup_epochs=0.3, clip_grad=1.0),
        dataclasses.replace(MASKING, min_block=4),
    ),
    "vit_base": Preset(BASE, PAPER, MASKING),
    "vit_large": Preset(LARGE, PAPER, MASKING),
    # `scripts/cae_large_1600e.sh` misses a line continuation: the width of regressor and decoder
    # never reaches the program, and the encoder's latents go through a projection to 768.
    "vit_large_as_shipped": Preset(
        dataclasses.replace(LARGE, decoder_dim=768, decoder_heads=12), PAPER, MASKING
    ),
}

RECIPE = Recipe(
    name="cae",
    presets=PRESETS,
    build=build_with_target,
    reconstruct=partial(defaults.reconstruct, return_logits=True),
    flags=(
        "tokenizer",
        "target",
        "teacher",
        "alignment_weight",
        "no_alignment",
        "no_decoder",
        "regressor_depth",
        "decoder_depth",
        "sampler",
        "min_block",
    ),
    pictures={"decode_full": decode_full},
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
