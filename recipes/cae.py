"""CAE: Context Autoencoder for Self-Supervised Representation Learning (Chen et al., 2202.03026).

python recipes/cae.py                                             # a few minutes on a CPU
"""

import os
import sys
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # Threads that spin for long while they wait bring a busy machine to a crawl.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read when torch loads
    if not __package__:  # a script: the same as `python -m recipes.cae` from the root
        sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import losses
from mimkit._containers import container
from mimkit.masking import Mask
from mimkit.nn import CAEDecoder, ContextRegressor, PixelHead, TokenHead, ViT
from mimkit.nn._vit import position_table


@dataclass(frozen=True)
class CAEConfig:
    """Shape of the model; the defaults are the paper's ViT-B/16.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        patch_size: Pixels per patch; one integer, or one per axis.
        in_channels: Channels of the images.
        dim: Width of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder.
        mlp_ratio: Hidden width of every MLP over its input's.
        layer_scale: First value of the factors of the encoder's residual branches; None for none.
        regressor_depth: Blocks of the regressor.
        decoder_dim: Width of regressor and decoder.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of regressor and decoder.
        decoder_layer_scale: As `layer_scale`, of regressor and decoder.
        vocabulary_size: Codes of the tokenizer.
        alignment_weight: Weight of the alignment loss; 0 leaves its target out.
        target: What is predicted: "tokens" of a tokenizer, or "rgb", normalised pixels.
        no_alignment: Whether to train without alignment (the paper's ablation).
        no_decoder: Whether to predict from the regressor's output directly (the paper's ablation).
        drop_path: Fraction of samples whose residual branches the last block of encoder, regressor
            and decoder leaves out.
        alignment_drop_path: Whether paths are dropped where the alignment's target is made, too,
            as published.
    """

    image_size: int | tuple[int, ...]
    patch_size: int | tuple[int, ...] = 16
    in_channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float | None = 0.1
    regressor_depth: int = 4
    decoder_dim: int = 768
    decoder_depth: int = 4
    decoder_heads: int = 12
    decoder_layer_scale: float | None = 0.1
    vocabulary_size: int = 8192
    alignment_weight: float = 2.0
    target: Literal["tokens", "rgb"] = "tokens"
    no_alignment: bool = False
    no_decoder: bool = False
    drop_path: float = 0.0
    alignment_drop_path: bool = True


@container
class CAEOutput:
    """What a forward pass gives.

    Attributes:
        loss: Main loss and weighted alignment loss.
        main_loss: Cross-entropy of the masked tokens; squared error of pixels with target "rgb".
        alignment_loss: Mean squared error of the predicted latents; 0 without alignment.
        token_accuracy: Share of masked tokens whose most likely code is right; None with "rgb".
        latent: The encoder's output: class token, then visible patches.
        latent_prediction: Latents of the masked patches, as the regressor predicts them.
        latent_target: What they should be: the encoder's output for the masked patches alone; None
            without alignment.
        prediction: Logits of the masked tokens, if asked for; pixels with target "rgb".
    """

    loss: Float32[Tensor, ""]
    main_loss: Float32[Tensor, ""]
    alignment_loss: Float32[Tensor, ""]
    token_accuracy: Float32[Tensor, ""] | None
    latent: Float[Tensor, "batch prefix_and_visible dim"]
    latent_prediction: Float[Tensor, "batch masked decoder_dim"]
    latent_target: Float[Tensor, "batch masked decoder_dim"] | None
    prediction: Float[Tensor, "batch masked vocabulary_or_patch"] | None


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
        self.encoder = ViT(
            image_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            layer_scale=config.layer_scale,
            qkv_bias="qv",
            first_axis="row",
            drop_path=config.drop_path,
        )
        width = config.decoder_dim
        # As published: no layer at all where the widths agree.
        layers = OrderedDict(
            linear=nn.Linear(config.dim, width), norm=nn.LayerNorm(width, eps=1e-6)
        )
        self.project = nn.Identity() if width == config.dim else nn.Sequential(layers)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(
            position_table(
                width,
                self.encoder.grid,
                num_prefix=self.encoder.num_prefix_tokens,
                first_axis="row",
            ),
            requires_grad=False,
        )
        self.regressor = ContextRegressor(
            dim=width,
            depth=config.regressor_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            layer_scale=config.decoder_layer_scale,
            drop_path=config.drop_path,
        )
        self.decoder = CAEDecoder(
            dim=width,
            depth=0 if config.no_decoder else config.decoder_depth,
            heads=config.decoder_heads,
            mlp_ratio=config.mlp_ratio,
            layer_scale=config.decoder_layer_scale,
            drop_path=config.drop_path,
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        self.head = (
            TokenHead(dim=width, vocabulary_size=config.vocabulary_size)
            if config.target == "tokens"
            else PixelHead(dim=width, patch_size=self.patch_size, in_channels=config.in_channels)
        )
        self._initialize()

    def forward(
        self,
        images: Float[Tensor, "batch channels *spatial"],
        mask: Mask,
        token_ids: Int64[Tensor, "batch tokens"] | None = None,
        *,
        return_logits: bool = False,
    ) -> CAEOutput:
        """Predict tokens and latents of the masked patches, and score both.

        Args:
            images: The images.
            mask: Which patches are masked.
            token_ids: The tokenizer's code of every patch, row by row; not read with target "rgb".
            return_logits: Whether to keep the logits, which otherwise never exist as a whole.

        Raises:
            ValueError: Token ids that are missing, of another shape, or (on a CPU) out of range.
        """
        latent = self.encoder(images, mask)
        visible = self.project(latent[:, self.encoder.num_prefix_tokens :])
        positions = self._positions(mask.masked_ids)
        queries = self.mask_token.expand(len(images), mask.num_masked, -1)
        predicted = self.regressor(queries, visible, positions, self._positions(mask.visible_ids))
        wanted = self._alignment_target(images, mask)
        alignment = (
            torch.zeros((), device=images.device)
            if wanted is None
            else losses.alignment_mse(predicted, wanted)
        )
        tokens = self.decoder(predicted, positions)
        if self.config.target == "rgb":
            prediction, accuracy = self.head(tokens), None
            main = losses.masked_pixel_loss(prediction, images, mask, self.patch_size)
        else:
            target = self._masked_ids(token_ids, mask)
            main, accuracy = self.head(tokens, target, return_accuracy=True)
            prediction = self.head(tokens) if return_logits else None
        loss = main + self.config.alignment_weight * alignment
        return CAEOutput(loss, main, alignment, accuracy, latent, predicted, wanted, prediction)

    def decode_full(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch tokens vocabulary_or_patch"]:
        """Predict every patch from the whole image, the regressor skipped.

        The decoder never saw an encoder's latents: that it understands them shows that predicted
        and encoded latents live in one space.

        Source:
            CAE, arXiv:2202.03026, section 4.1 and its figure of such pictures.
        """
        latent = self.project(self.encoder(images)[:, self.encoder.num_prefix_tokens :])
        positions = self.pos_embed[:, self.encoder.num_prefix_tokens :].expand(len(images), -1, -1)
        prediction: Tensor = self.head(self.decoder(latent, positions))
        return prediction

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

    def _positions(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        return F.embedding(ids, self.pos_embed[0, self.encoder.num_prefix_tokens :])

    def _masked_ids(self, token_ids: Tensor | None, mask: Mask) -> Int64[Tensor, "batch masked"]:
        shape = (mask.batch_size, mask.num_tokens)
        if token_ids is None or token_ids.shape != shape:
            got = None if token_ids is None else tuple(token_ids.shape)
            raise ValueError(
                f"token_ids must hold one code for each of the {mask.num_tokens} patches of "
                f"{mask.batch_size} images, {shape}; got {got}"
            )
        return token_ids.gather(1, mask.masked_ids)

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
