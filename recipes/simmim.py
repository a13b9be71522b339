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

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    # Threads that spin for long while they wait bring a busy machine to a crawl.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch loads
    if not __package__:  # a script: the same as `python -m recipes.simmim` from the root
        sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from einops import rearrange
from jaxtyping import Float, Float32
from torch import Tensor, nn

from mimkit import container, losses, masking, targets, viz
from mimkit._grids import Grid
from mimkit.masking import Key, Mask
from mimkit.nn import PatchTokenizer, SimMIMHead, SwinTransformer, ViT
from recipes.engine import Preset, Recipe, Training, notes, run
from recipes.engine.fields import check_fields
from recipes.engine.masks import check_ratio, join
from recipes.engine.pretrained.teachers import load_teacher
from recipes.engine.pretrained.tokenizers import Tokenizer, decode_masked, make_tokenizer

TargetName = Literal[
    "pixels", "pixels_2x", "pixels_4x", "pixels_8x", "pixels_16x", "pixels_32x",
    "window_normalized", "clusters", "bins_8", "bins_256", "hog", "tokens", "features",
]  # fmt: skip
HeadName = Literal["linear", "mlp", "inverse_swin_t", "inverse_swin_b"]
LossName = Literal["l1", "l2", "smooth_l1", "cosine", "cross_entropy"]
_CLASS_TARGETS = ("clusters", "bins_8", "bins_256", "tokens")
_PATCH_TARGETS = ("hog", "tokens", "features")  # predicted for a patch as a whole
_NO_WAY_BACK = ("hog", "features")  # to pixels
# ImageNet-normalised pixels lie between these.
_DARKEST, _BRIGHTEST = -2.2, 2.7
# The paper's base models; what is 0 in a configuration is taken from here.
_BASE: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 16, "dim": 768, "depth": 12, "heads": 12},
    "swin": {"patch_size": 4, "dim": 128, "depth": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
}


@dataclass(frozen=True)
class SimMIMConfig:
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
        target: What is predicted: "pixels", their means over squares ("pixels_2x" to "pixels_32x"),
            "window_normalized" pixels, the nearest of color "clusters", the bin of each channel
            ("bins_8", "bins_256"), "hog", the "tokens" of a tokenizer, or "features" of a teacher.
        head: "linear", "mlp", "inverse_swin_t" or "inverse_swin_b".
        loss: "l1", "l2", "smooth_l1"; of features also "cosine"; of classes, "cross_entropy". None
            for "l1" or, of features and classes, these.
        num_clusters: Number of color clusters, or of the codes of tokenizer "patches".
        tokenizer: "patches" for k-means codes of normalised patches, fitted on the first images; or
            a file: `tokenizer.safetensors` of `recipes/tokenizer.py`, or DALL-E's encoder.
        teacher: File of the encoder whose features are predicted.
    """

    image_size: int | tuple[int, ...]
    encoder: Literal["vit", "swin"] = "vit"
    patch_size: int | tuple[int, ...] = 0
    in_channels: int = 3
    dim: int = 0
    depth: int | tuple[int, ...] = 0
    heads: int | tuple[int, ...] = 0
    window: int = 6
    mlp_ratio: float = 4.0
    layer_scale: float | None = 0.1
    drop_path: float = 0.0
    target: TargetName = "pixels"
    head: HeadName = "linear"
    loss: LossName | None = None
    num_clusters: int = 512
    tokenizer: str = "patches"
    teacher: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.teacher is not None and self.target != "features":
            raise ValueError(f'a teacher is for target "features"; got target {self.target!r}')
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
    def predicts_classes(self) -> bool:
        """Whether the target is classes, not numbers."""
        return self.target in _CLASS_TARGETS

    @property
    def scored_by(self) -> LossName:
        """The loss: what was asked for, or what fits the target best."""
        return self.loss or self._fitting_losses[0]

    @property
    def _fitting_losses(self) -> tuple[LossName, ...]:
        if self.predicts_classes:
            return ("cross_entropy",)
        if self.target == "features":
            return ("cosine", "l1", "l2", "smooth_l1")
        return ("l1", "l2", "smooth_l1")


@container
class SimMIMOutput:
    """What a forward pass gives; of a list of K masks, K rows an image, mask by mask.

    Attributes:
        loss: Mean error over the masked patches.
        prediction: Predicted values of the masked patches: of pixels, in `patchify`'s order; of
            classes, their logits behind one axis for each pixel (and channel).
        latent: The encoder's output: class token (ViT), then one token per position.
    """

    loss: Float32[Tensor, ""]
    prediction: Float[Tensor, "samples masked ..."]
    latent: Float[Tensor, "samples prefix_and_tokens dim"]


class SimMIM(nn.Module):
    """Encoder of visible patches and mask tokens, and a light head.

    Example:
        >>> model = SimMIM(SimMIMConfig(image_size=32, encoder="swin", patch_size=4, dim=16,
        ...                             depth=(2, 2), heads=(1, 2), window=4))
        >>> key = masking.key([0, 1], seed=0)
        >>> mask = masking.uniform(key, model.encoder.grid, 0.5, unit=2)
        >>> output = model(torch.rand(2, 3, 32, 32), mask)
        >>> output.prediction.shape, output.latent.shape
        (torch.Size([2, 32, 48]), torch.Size([2, 16, 32]))
    """

    colors: Tensor

    def __init__(self, config: SimMIMConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder: ViT | SwinTransformer = (
            make_swin(config) if config.encoder == "swin" else make_vit(config)
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if config.target == "clusters":
            # A buffer, so that a checkpoint holds what `fit` finds.
            self.register_buffer("colors", torch.zeros(config.num_clusters, config.in_channels))
        images = (config.image_size, self.patch_size, config.in_channels)
        self.tokenizer: Tokenizer | None = None
        self.teacher: ViT | None = None
        if config.target == "tokens":
            self.tokenizer = make_tokenizer(config.tokenizer, *images, config.num_clusters)
        elif config.target == "features":
            self.teacher = load_teacher(config.teacher, *images)
        self.point, values = self._size_of_points()
        stride = getattr(self.encoder, "stride", self.patch_size)
        if any(side % point for side, point in zip(stride, self.point, strict=True)):
            raise ValueError(
                f"target {config.target!r} has points of {self.point} pixels, which do not divide "
                f"the {tuple(stride)} pixels of the encoder's tokens: choose a finer target"
            )
        self.head = SimMIMHead(
            config.head,
            grid=getattr(self.encoder, "out_grid", self.encoder.grid),
            dim=self.encoder.dim,
            token=_points(stride, self.point),
            patch=_points(self.patch_size, self.point),
            values=values,
            window=config.window,
            finest=max(4 // self.point[0], 1),
        )
        # What the authors leave out of weight decay, besides vectors.
        self.not_decayed = ("mask_token",) if config.encoder == "swin" else ("encoder.cls_token",)

    def forward(
        self, images: Float[Tensor, "images channels *spatial"], mask: Mask | Sequence[Mask]
    ) -> SimMIMOutput:
        """Predict the masked patches of `images` and score the prediction."""
        mask, images = join(mask, images)
        latent = self.encoder(images, mask, mask_token=self.mask_token)
        tokens = latent[:, self.encoder.num_prefix_tokens :]
        predicted = self.head(tokens, self._scored(mask))
        prediction = self._arrange(predicted)
        return SimMIMOutput(self._score(predicted, prediction, images, mask), prediction, latent)

    def _arrange(self, predicted: Tensor) -> Tensor:
        """Bring what the head predicts from "c p1 p2" to `patchify`'s order; classes come last."""
        channels, target = self.config.in_channels, self.config.target
        if target in _PATCH_TARGETS:
            return predicted
        if target == "clusters":
            return rearrange(predicted, "b m (k p) -> b m p k", k=self.config.num_clusters)
        if self.config.predicts_classes:
            bins = _num_bins(target)
            return rearrange(predicted, "b m (c k p) -> b m (p c) k", c=channels, k=bins)
        return rearrange(predicted, "b m (c p) -> b m (p c)", c=channels)

    def _score(self, predicted: Tensor, prediction: Tensor, images: Tensor, mask: Mask) -> Tensor:
        kind = self.config.scored_by
        if self.config.target == "pixels":
            assert kind != "cross_entropy"
            assert kind != "cosine"
            return losses.masked_pixel_loss(
                predicted, images, mask, self.patch_size, normalize=None, kind=kind, order="c p1 p2"
            )
        target = self.target(images, mask)
        loss: Tensor = _ERRORS[kind](prediction, target, self._scored(mask))
        return loss

    def _scored(self, mask: Mask) -> Mask:
        """Return the mask of what is predicted together: patches, or squares of several."""
        target = self.target
        return target.group(mask) if isinstance(target, targets.DownsampledPixels) else mask

    def check_masks(self, mask: Mask) -> None:
        """Check that masked patches fill whole squares, where these are to be predicted.

        Raises:
            ValueError: They do not.
        """
        try:
            self._scored(mask)
        except ValueError as error:
            unit = max(-(-p // q) for p, q in zip(self.point, self.patch_size, strict=True))
            raise ValueError(
                f"--target {self.config.target} predicts squares of several patches, which must be "
                f"masked as a whole: give --unit {unit} or a multiple of it"
            ) from error

    @property
    def target(self) -> Any:
        """What is predicted."""
        name = self.config.target
        if name == "window_normalized":
            return targets.WindowNormalizedPixels(self.patch_size)
        if name == "clusters":
            clusters = targets.ColorClusters(self.patch_size, self.config.num_clusters)
            clusters.centers = self.colors
            return clusters
        if name == "tokens":
            assert self.tokenizer is not None
            return targets.TokenTarget(self.tokenizer.encode)
        if name == "features":
            assert self.teacher is not None
            prefix = self.teacher.num_prefix_tokens
            return targets.FeatureTarget(self.teacher, num_prefix=prefix)
        if name.startswith("bins"):
            return targets.ChannelBins(self.patch_size, _num_bins(name), _DARKEST, _BRIGHTEST)
        if name == "hog":
            return targets.HOG(self.patch_size, _hog_cell(self.patch_size))
        if name == "pixels":
            return targets.Pixels(self.patch_size)
        return targets.DownsampledPixels(self.patch_size, _factor(name))

    def _size_of_points(self) -> tuple[Grid, int]:
        """Return the pixels that one predicted point stands for, and its number of values."""
        name, channels = self.config.target, self.config.in_channels
        axes = len(self.patch_size)
        if name == "hog":
            cells = math.prod(
                patch // cell
                for patch, cell in zip(self.patch_size, _hog_cell(self.patch_size), strict=True)
            )
            return self.patch_size, cells * channels * self.target.num_bins
        if self.tokenizer is not None:
            return self.patch_size, self.tokenizer.vocabulary_size
        if self.teacher is not None:
            return self.patch_size, self.teacher.dim
        if name == "clusters":
            return (1,) * axes, self.config.num_clusters
        if self.config.predicts_classes:
            return (1,) * axes, channels * _num_bins(name)
        return (_factor(name),) * axes, channels

    def fit(self, images: Float[Tensor, "images channels *spatial"]) -> None:
        """Find the color clusters or the typical patches of images, where they are the target."""
        if isinstance(self.tokenizer, PatchTokenizer):
            self.tokenizer.fit(images)
        if self.config.target == "clusters":
            clusters = targets.ColorClusters(self.patch_size, self.config.num_clusters)
            colors = images.movedim(1, -1).flatten(0, -2)
            few = colors[:: max(len(colors) // (64 * self.config.num_clusters), 1)]
            clusters.fit(few.T[None], max_iterations=20, generator=torch.Generator().manual_seed(0))
            assert clusters.centers is not None
            self.colors.copy_(clusters.centers)


_ERRORS: dict[LossName, Any] = {
    "l1": losses.masked_l1,
    "l2": losses.masked_mse,
    "smooth_l1": losses.masked_smooth_l1,
    "cosine": losses.masked_cosine,
    "cross_entropy": losses.masked_cross_entropy,
}


def make_swin(config: SimMIMConfig) -> SwinTransformer:
    """Make the Swin encoder."""
    assert isinstance(config.depth, Sequence)
    assert isinstance(config.heads, Sequence)
    return SwinTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        window=config.window,
        mlp_ratio=config.mlp_ratio,
        drop_path=config.drop_path,
    )


def make_vit(config: SimMIMConfig) -> ViT:
    """Make the ViT encoder: positions are in attention alone, one table for all blocks."""
    assert isinstance(config.depth, int)
    assert isinstance(config.heads, int)
    encoder = ViT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path=config.drop_path,
        absolute_positions=False,
        relative_positions="shared",
        layer_scale=config.layer_scale,
        qkv_bias="qv",
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


def _points(side: Grid, point: Grid) -> Grid:
    """Count the points per axis in so many pixels; a point larger than these counts as one."""
    return tuple(max(s, p) // p for s, p in zip(side, point, strict=True))


def _factor(target: str) -> int:
    """Return the side of a square whose mean is predicted: 8 for "pixels_8x"."""
    return int(target[len("pixels_") : -1]) if target.startswith("pixels_") else 1


def _num_bins(target: str) -> int:
    return int(target.removeprefix("bins_"))


def _hog_cell(patch: Grid) -> Grid:
    return tuple(math.gcd(side, 8) for side in patch)


def reconstruct(
    model: SimMIM, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> Float[Tensor, "batch channels *spatial"]:
    """Fill in the masked patches; leave them gray where there is no way back to pixels."""
    if model.config.target in _NO_WAY_BACK:
        return viz.show_masked(images, mask, model.patch_size, color=0.0)
    prediction = model(images, mask).prediction.float()
    values = prediction.argmax(dim=-1) if model.config.predicts_classes else prediction
    if model.tokenizer is None:
        patches = model.target.invert(values, images, mask)
    else:
        patches = decode_masked(model.tokenizer, values, images, mask, model.patch_size)
    return viz.fill_masked(images, mask, patches, model.patch_size)


def describe_way_back(model: SimMIM) -> str:
    """Say how predictions became the pixels of the picture."""
    name = model.config.target
    if name == "pixels":
        return notes.AS_PREDICTED
    if name == "window_normalized":
        return "Predictions are normalised; here they have the ground truth's window statistics."
    if name in _NO_WAY_BACK:
        return f"{name} has no way back to pixels: masked patches stay gray."
    if name == "tokens":
        is_of_patches = isinstance(model.tokenizer, PatchTokenizer)
        return notes.WITH_TRUE_CONTRAST if is_of_patches else notes.AS_DECODED
    if model.config.predicts_classes:
        return "Each masked pixel has the color of its most likely class."
    return f"Each square of {_factor(name)} x {_factor(name)} px has the mean predicted for it."


def baselines(
    model: SimMIM, images: Float[Tensor, "batch channels *spatial"], mask: Mask
) -> dict[str, Float32[Tensor, ""]]:
    """Score trivial predictors under the model's loss.

    Of targets other than pixels: 0 everywhere, for features their mean, or for classes how often
    each one occurs.
    """
    kind = model.config.scored_by
    if model.config.target == "pixels":
        assert kind != "cross_entropy"
        assert kind != "cosine"
        return losses.baselines(images, mask, model.patch_size, normalize=None, kind=kind)
    target = model.target(images, mask)
    if model.config.target == "features":
        mean = target.mean(dim=(0, 1)).expand_as(target)
        return {"mean": _ERRORS[kind](mean, target, mask)}
    if not model.config.predicts_classes:
        return {"zero": _ERRORS[kind](torch.zeros_like(target), target, model._scored(mask))}
    share = target.flatten().bincount() / target.numel()
    return {"frequencies": -(share * share.clamp(min=1e-12).log()).sum()}


@dataclass(frozen=True)
class UnitMasking:
    """Which patches of a batch are masked: whole units of them.

    Attributes:
        mask_ratio: Fraction of units to mask, in (0, 1), rounded up as the authors do.
        unit: Patches per axis of a unit.
    """

    mask_ratio: float
    unit: int

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        if self.unit < 1:
            raise ValueError(f"--unit {self.unit} is too small: give 1 or more patches")

    def draw(self, key: Key, grid: tuple[int, ...]) -> Mask:
        """Draw the masks of a batch.

        Raises:
            ValueError: Units that do not divide the grid, or nothing that is left to see.
        """
        if any(size % self.unit for size in grid):
            raise ValueError(
                f"--unit {self.unit} does not divide the {'x'.join(map(str, grid))} patches of an "
                f"image: give a divisor of {math.gcd(*grid)}"
            )
        mask = masking.uniform(key, grid, self.mask_ratio, unit=self.unit, rounding="simmim")
        if mask.num_visible == 0:
            raise ValueError(
                f"--mask-ratio {self.mask_ratio}, rounded up to whole units of {self.unit}, hides "
                f"all {'x'.join(map(str, grid))} patches: give a smaller one"
            )
        return mask


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
EPOCHS_800 = Training(
    epochs=800,
    batch_size=2048,
    base_lr=5e-5,
    warmup_epochs=10,
    warmup_lr=2e-6,
    milestones=(700,),
    betas=(0.9, 0.999),
    clip_grad=5.0,
    crop_area=(0.67, 1.0),
    interpolation="bilinear",
)
UNITS_OF_8 = UnitMasking(mask_ratio=0.6, unit=8)  # 32 pixels of patches of 4
SWIN_BASE = SimMIMConfig(image_size=192, encoder="swin")

PRESETS = {
    "tiny": Preset(
        SimMIMConfig(
            image_size=32,
            encoder="swin",
            patch_size=4,
            dim=64,
            depth=(2, 4),
            heads=(2, 4),
            window=4,
        ),
        Training(
            epochs=7,
            batch_size=64,
            base_lr=6e-3,
            warmup_epochs=0.3,
            betas=(0.9, 0.95),
            clip_grad=1.0,
        ),
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
        SimMIMConfig(
            image_size=192,
            encoder="swin",
            dim=192,
            depth=(2, 2, 18, 2),
            heads=(6, 12, 24, 48),
            window=12,
        ),
        EPOCHS_800,
        UNITS_OF_8,
    ),
}

RECIPE = Recipe(
    name="simmim",
    presets=PRESETS,
    build=SimMIM,
    baselines=baselines,
    reconstruct=reconstruct,
    note=describe_way_back,
    flags=("unit", "window", "head", "target", "loss", "tokenizer", "teacher"),
    fit=SimMIM.fit,
)

if __name__ == "__main__":
    sys.exit(run(RECIPE, __doc__))
