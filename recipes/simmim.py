"""SimMIM: a Simple Framework for Masked Image Modeling (Xie et al., arXiv:2111.09886).

    python recipes/simmim.py                                          # a few minutes on a CPU
    python recipes/simmim.py --preset swin_base --data /path/to/imagenet --precision bf16

The encoder sees all positions, mask tokens in the place of large masked units; a linear layer
predicts their raw pixels under an L1 loss. The full presets are the authors' pre-training: units of
32 pixels, 60 % masked, AdamW, betas .9 and .999, weight decay .05, gradients clipped at 5, batch
2048, random crops of scale .67-1 and flips. For 800 epochs: rate 1e-4 per 512 images, divided by 10
at epoch 700; for 100 epochs: 2e-4, cosine. Published top-1 on ImageNet-1K after fine-tuning: ViT-B
83.8, Swin-B 83.5 (100 epochs) and 84.0 (800), Swin-L 85.4.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, cast

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Shaped
from torch import Tensor, nn

from mimkit import container
from mimkit._grids import Grid
from mimkit.masking import Mask, RaggedMask
from mimkit.nn import SimMIMHead, SwinTransformer, ViT
from recipes.engine import Preset, Recipe, Training, fields, run, targets
from recipes.engine.masks import UnitMasking, join, mask_all
from recipes.engine.pretrained.teachers import load_teacher
from recipes.engine.pretrained.tokenizers import make_tokenizer
from recipes.engine.vit import TargetConfig

TargetName = Literal[
    "pixels", "pixels_2x", "pixels_4x", "pixels_8x", "pixels_16x", "pixels_32x",
    "window_normalized", "clusters", "bins_8", "bins_256", "hog", "tokens", "features",
]  # fmt: skip
HeadName = Literal["linear", "mlp", "inverse_swin_t", "inverse_swin_b"]
LossName = Literal["l1", "l2", "smooth_l1", "cosine", "cross_entropy"]
# The paper's base models; what is 0 in a configuration is taken from here.
_BASE: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12},
    "swin": {"patch_size": 4, "dim": 128, "depth": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
}


@dataclass(frozen=True)
class SimMIMConfig(TargetConfig):
    """Shape of the model; the defaults are the paper's ViT-B/16, or Swin-B with `encoder="swin"`.

    Attributes:
        image_size: Pixels per axis; an integer means a square image.
        encoder: "vit" or "swin".
        patch_size: Pixels per patch, which is what a mask is of; 0 for the base model's.
        in_channels: Channels of the images.
        dim: Width of the encoder (of Swin's first stage); 0 for the base model's.
        depth: Blocks of the encoder; for Swin, of each stage.
        heads: Attention heads; for Swin, of each stage.
        window: Tokens per axis of a Swin window.
        mlp_ratio: Hidden width of every MLP over its input's.
        layer_scale: First value of the ViT's learned factors of residual branches; None for none.
        drop_path: Fraction of samples whose residual branches the last encoder block leaves out.
        positions: Positions of the ViT: "relative", one table for all blocks as in the paper;
            "absolute" for a learned table; "none".
        qkv_bias: Biases of the ViT's attention: "qv" for queries and values as in the paper, True
            for keys too.
        norm_eps: Epsilon of the encoder's LayerNorms; None for the paper's, 1e-6 (ViT) or 1e-5.
        act: Activation of the encoder's MLPs: "gelu", or "gelu_tanh" for its approximation.
        target: What is predicted (figure 4, table 5): "pixels", their means over squares
            ("pixels_2x" to "pixels_32x"; squares larger than a patch need a `unit` that covers
            them), "window_normalized" pixels, the nearest of color "clusters", the bin of each
            channel ("bins_8", "bins_256"), "hog", the "tokens" of a tokenizer, or "features" of a
            teacher.
        head: The prediction head (table 2).
        loss: "l1", "l2", "smooth_l1"; of features also "cosine"; of classes, "cross_entropy"
            (table 5). None for "l1" or, of features and classes, these.
        num_clusters: Number of color clusters, or of the codes of tokenizer "patches".
    """

    image_size: fields.Pixels | tuple[fields.Pixels, ...]
    encoder: Literal["vit", "swin"] = "vit"
    patch_size: Annotated[int, fields.Within(0, 2**24)] | tuple[fields.Pixels, ...] = 0
    in_channels: fields.PositiveInt = 3
    dim: Annotated[int, fields.Within(0, 2**17)] = 0
    depth: fields.Depth | tuple[fields.Depth, ...] = 0
    heads: fields.NonNegativeInt | tuple[fields.PositiveInt, ...] = 0
    window: fields.PositiveInt = 6
    mlp_ratio: fields.PositiveFloat = 4.0
    layer_scale: fields.NonNegativeFloat | None = 0.1
    drop_path: fields.Fraction = 0.0
    positions: Literal["relative", "absolute", "none"] = "relative"
    qkv_bias: bool | Literal["qv"] = "qv"
    norm_eps: fields.PositiveFloat | None = None
    act: Literal["gelu", "gelu_tanh"] = "gelu"
    target: TargetName = "pixels"
    head: HeadName = "linear"
    loss: LossName | None = None
    num_clusters: fields.PositiveInt = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in (None, *self._fitting_losses):
            raise ValueError(
                f"loss {self.loss!r} does not fit target {self.target!r}: choose of "
                f"{self._fitting_losses}"
            )
        for name, value in _BASE[self.encoder].items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        for name in ("depth", "heads"):
            if isinstance(getattr(self, name), int) != (self.encoder == "vit"):
                wanted = "one number" if self.encoder == "vit" else "one number a stage"
                raise ValueError(
                    f"{name} of a {self.encoder} encoder must be {wanted}; "
                    f"got {getattr(self, name)}"
                )

    @property
    def encoder_shape(self) -> dict[str, Any]:
        """What ViT and Swin are built from alike."""
        names = ("image_size", "patch_size", "in_channels", "dim", "depth", "heads")
        shape = {name: getattr(self, name) for name in (*names, "mlp_ratio", "drop_path", "act")}
        return shape | ({} if self.norm_eps is None else {"norm_eps": self.norm_eps})

    @property
    def scored_by(self) -> LossName:
        """The loss: what was asked for, or what fits the target best."""
        return self.loss or self._fitting_losses[0]

    @property
    def _fitting_losses(self) -> tuple[LossName, ...]:
        if self.target in ("clusters", "bins_8", "bins_256", "tokens"):
            return ("cross_entropy",)
        if self.target == "features":
            return ("cosine", "l1", "l2", "smooth_l1")
        return ("l1", "l2", "smooth_l1")


@container
class SimMIMOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Mean error over the masked patches.
        prediction: Predicted values of the masked patches, in `patchify`'s order. Classes have
            their logits on the last axis, after one axis for pixels (and channels).
        latent: The encoder's output: class token (ViT), then one token per position.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked ..."] | Float[Tensor, "rows values"]
    latent: Float[Tensor, "samples prefix_and_tokens dim"]


class SimMIM(nn.Module):
    """Encoder of visible patches and mask tokens, and a light head.

    Example:
        >>> from mimkit import masking
        >>> model = SimMIM(SimMIMConfig(image_size=32, encoder="swin", patch_size=4, dim=16,
        ...                             depth=(2, 2), heads=(1, 2), window=4))
        >>> key = masking.key([0, 1], seed=0)
        >>> mask = masking.uniform(key, model.encoder.grid, 0.5, unit=2)
        >>> output = model(torch.rand(2, 3, 32, 32), mask)
        >>> output.prediction.shape, output.latent.shape
        (torch.Size([2, 32, 48]), torch.Size([2, 16, 32]))
    """

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: ViT | SwinTransformer = (
            SwinTransformer(**config.encoder_shape, window=config.window)
            if config.encoder == "swin"
            else make_vit(config)
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.target = make_target(config, self.patch_size)
        point = self.target.point
        stride = getattr(self.encoder, "stride", self.patch_size)
        if any(side % p for side, p in zip(stride, point, strict=True)):
            raise ValueError(
                f"target {config.target!r} has points of {point} pixels, which do not divide the "
                f"{tuple(stride)} pixels of the encoder's tokens: choose a finer target"
            )
        patch = _count_points(self.patch_size, point)
        self.points_per_patch = math.prod(patch)
        self.head = SimMIMHead(
            config.head,
            grid=getattr(self.encoder, "out_grid", self.encoder.grid),
            dim=self.encoder.dim,
            token=_count_points(stride, point),
            patch=patch,
            values=self.target.num_values // self.points_per_patch,
            window=config.window,
            finest=max(4 // point[0], 1),
        )
        # What the authors leave out of weight decay, besides vectors.
        self.not_decayed: tuple[str, ...] = (
            ("mask_token",) if config.encoder == "swin" else ("encoder.cls_token",)
        )
        if config.encoder == "vit" and config.positions == "absolute":
            self.not_decayed += ("encoder.pos_embed",)

    @property
    def readers(self) -> tuple[nn.Module, nn.Module]:
        """What reads the images: these parts normalise bytes themselves, where both can."""
        return self.encoder.patch_embed, self.target

    def forward(
        self,
        images: Shaped[Tensor, "images channels *spatial"],
        mask: Mask | RaggedMask | Sequence[Mask],
    ) -> SimMIMOutput:
        """Predict the masked patches of `images` and score the prediction.

        Under a `RaggedMask`, predictions are packed: one sample after the other.

        Raises:
            ValueError: A `RaggedMask`, and a target other than the pixels.
        """
        if not isinstance(mask, RaggedMask):
            mask, images = join(mask, images)
        elif self.config.target != "pixels":
            raise ValueError(f'a RaggedMask needs target="pixels"; got {self.config.target!r}')
        latent = self.encoder(images, mask, mask_token=self.mask_token)
        tokens = latent[:, self.encoder.num_prefix_tokens :]
        if isinstance(mask, RaggedMask):  # predict all patches, keep the masked ones
            predicted = self.head(tokens, mask_all(images, self.encoder.grid))
            predicted = predicted.flatten(0, 1)[mask.masked_rows]
        else:
            predicted = self.head(tokens, self.target.group(mask))
        # The head's order is "c p1 p2", as published.
        prediction = rearrange(predicted, "... (c p) -> ... (p c)", p=self.points_per_patch)
        prediction = prediction.unflatten(-1, self.target.value_shape)
        # Of the targets, `PixelTarget` takes a `RaggedMask`.
        loss = self.target.loss(prediction, images, cast(Any, mask))
        return SimMIMOutput(loss, prediction, latent)


def make_target(config: SimMIMConfig, patch_size: Grid) -> targets.Target:
    """Make what is predicted."""
    name, error = config.target, cast(Any, config.scored_by)
    shape = (patch_size, config.in_channels)
    if name == "pixels":
        return targets.PixelTarget(*shape, error=error)
    if name.startswith("pixels_"):  # "pixels_8x"
        return targets.SquareTarget(*shape, int(name[len("pixels_") : -1]), error=error)
    if name == "window_normalized":
        return targets.WindowTarget(*shape, error=error)
    if name == "hog":
        return targets.HOGTarget(*shape, error=error)
    if name == "clusters":
        return targets.ClusterTarget(*shape, config.num_clusters)
    if name.startswith("bins_"):  # "bins_256"
        return targets.BinTarget(*shape, int(name.removeprefix("bins_")))
    if name == "tokens":
        codes = config.num_clusters
        tokenizer = make_tokenizer(config.tokenizer, config.image_size, *shape, codes)
        return targets.TokenTarget(tokenizer, patch_size)
    teacher = load_teacher(config.teacher, config.image_size, *shape)
    return targets.FeatureTarget(teacher, normalize=True, error=error)


def make_vit(config: SimMIMConfig) -> ViT:
    """Make the ViT encoder: in the paper, positions are in attention alone."""
    encoder = ViT(
        **config.encoder_shape,
        absolute_positions=config.positions == "absolute",
        learn_positions=True,
        relative_positions="shared" if config.positions == "relative" else None,
        layer_scale=config.layer_scale,
        qkv_bias=config.qkv_bias,
    )
    # The authors' initialization: cut off at one standard deviation, less for later blocks.
    truncated = partial(nn.init.trunc_normal_, std=0.02, a=-0.02, b=0.02)
    assert encoder.cls_token is not None
    truncated(encoder.cls_token)
    linear: list[Any] = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    for module in (encoder.patch_embed.proj, *linear):
        truncated(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    blocks: Any = encoder.blocks
    with torch.no_grad():
        for index, block in enumerate(blocks, 1):
            block.attn.proj.weight /= math.sqrt(2 * index)
            block.mlp.fc2.weight /= math.sqrt(2 * index)
    return encoder


def _count_points(side: Grid, point: Grid) -> Grid:
    """Count points along each axis of a patch; one that is larger than the patch counts as one."""
    return tuple(max(s, p) // p for s, p in zip(side, point, strict=True))


# Rates per 512 images there; 2048 images a step.
EPOCHS_100 = Training(
    epochs=100,
    batch_size=2048,
    base_lr=1e-4,
    warmup_epochs=10,
    warmup_lr=4e-6,
    min_lr=4e-5,
    cosine_from_start=True,
    betas=(0.9, 0.999),
    clip_grad=5.0,
    crop_area=(0.67, 1.0),
    interpolation="bilinear",
)
EPOCHS_800 = dataclasses.replace(
    EPOCHS_100,
    epochs=800,
    base_lr=5e-5,
    warmup_lr=2e-6,
    min_lr=0.0,
    cosine_from_start=False,
    milestones=(700,),
)
UNITS_OF_8 = UnitMasking(mask_ratio=0.6, unit=8)  # 32 pixels of patches of 4
SWIN_BASE = SimMIMConfig(image_size=192, encoder="swin")

PRESETS = {
    "tiny": Preset(
        dataclasses.replace(SWIN_BASE, image_size=32, dim=64, depth=(2, 4), heads=(2, 4), window=4),
        Training(epochs=7, batch_size=64, base_lr=6e-3, warmup_epochs=0.3, clip_grad=1.0),
        UnitMasking(mask_ratio=0.6, unit=2),
    ),
    "vit_base": Preset(
        SimMIMConfig(image_size=224, encoder="vit", drop_path=0.1),
        EPOCHS_800,
        UnitMasking(mask_ratio=0.6, unit=2),
    ),
    "swin_base": Preset(SWIN_BASE, EPOCHS_800, UNITS_OF_8),
    "swin_base_100": Preset(SWIN_BASE, EPOCHS_100, UNITS_OF_8),
    "swin_large": Preset(
        dataclasses.replace(SWIN_BASE, dim=192, heads=(6, 12, 24, 48), window=12),
        EPOCHS_800,
        UNITS_OF_8,
    ),
}

RECIPE = Recipe(
    name="simmim",
    presets=PRESETS,
    build=SimMIM,
    flags=("unit", "window", "head", "target", "loss", "tokenizer", "teacher"),
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
