"""What models predict for masked patches: one class for each kind of target.

Axes: images; channels; *spatial; masked (patches); values (of a patch).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import losses, targets
from mimkit._checks import byte_statistics
from mimkit._grids import Grid
from mimkit.masking import Mask, RaggedMask
from mimkit.nn import PatchTokenizer, ViT
from recipes.engine.pretrained.tokenizers import Tokenizer, decode_codes

Error = Literal["l1", "l2", "smooth_l1"]
Images = Float[Tensor, "images channels *spatial"]
Patches = Float[Tensor, "images masked patch"]
Scores = dict[str, Float32[Tensor, ""]]

# ImageNet-normalised pixels lie between these.
DARKEST, BRIGHTEST = -2.2, 2.7

_ERRORS: dict[str, Callable[..., Any]] = {
    "l1": losses.masked_l1,
    "l2": losses.masked_mse,
    "smooth_l1": losses.masked_smooth_l1,
    "cosine": losses.masked_cosine,
}


class Target(nn.Module):
    """What a model predicts for each masked patch, and how the prediction is scored and drawn.

    A subclass defines `forward`, the true values, and where it can `invert`. It is a module, so
    that a checkpoint holds what `fit` learns (in buffers).

    Args:
        patch_size: Pixels per axis of a patch.
        value_shape: Shape of the prediction for a patch, as `patchify` orders pixels. The logits of
            classes are the last axis.
        point: Pixels per axis that one predicted point stands for; a whole patch by default.

    Attributes:
        patch_size: As given.
        value_shape: As given.
        point: As given.
        note: What a viewer of reconstructions must know.
    """

    note = "Masked patches are as predicted."

    def __init__(
        self, patch_size: Grid, value_shape: tuple[int, ...], point: Grid | None = None
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.value_shape = value_shape
        self.point = point or patch_size

    @property
    def num_values(self) -> int:
        """How many numbers a head must predict for a patch."""
        return math.prod(self.value_shape)

    def train(self, mode: bool = True) -> "Target":
        """Stay in evaluation mode: teachers and tokenizers are frozen."""
        return super().train(False)

    def fit(self, images: Images) -> None:
        """Learn from some model inputs what the target needs; nothing by default."""

    def forward(self, images: Images, mask: Mask) -> Shaped[Tensor, "images masked *values"]:
        """Return the true values of the masked patches."""
        raise NotImplementedError

    def group(self, mask: Mask) -> Mask:
        """Return the mask of what is predicted together: single patches by default."""
        return mask

    def loss(self, prediction: Tensor, images: Images, mask: Mask) -> Float32[Tensor, ""]:
        """Score a prediction of the masked patches."""
        raise NotImplementedError

    def baselines(self, images: Images, mask: Mask) -> Scores:
        """Score trivial predictors; predicting 0 everywhere by default."""
        return {"zero": self.loss(torch.zeros_like(self(images, mask)), images, mask)}

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Turn a prediction into pixels of the masked patches.

        Raises:
            NotImplementedError: There is no way back to pixels.
        """
        raise NotImplementedError(f"{type(self).__name__} has no way back to pixels")

    def draw_references(self, images: Images, mask: Mask) -> dict[str, Patches]:
        """Return patches to show beside a prediction, by caption; none by default."""
        return {}


# Numbers


class NumberTarget(Target):
    """Numbers that one of mimkit's targets computes.

    Args:
        values: Computes them: images, mask -> values.
        patch_size: As in `Target`.
        num_values: Numbers per patch.
        point: As in `Target`.
        error: "l1", "l2", "smooth_l1" or "cosine".
        note: As in `Target`.
    """

    def __init__(
        self,
        values: Callable[[Tensor, Mask], Tensor],
        patch_size: Grid,
        num_values: int,
        point: Grid | None = None,
        *,
        error: Error | Literal["cosine"],
        note: str,
    ) -> None:
        super().__init__(patch_size, (num_values,), point)
        self.values: Any = values
        self.error = error
        self.note = note

    def forward(self, images: Images, mask: Mask) -> Float[Tensor, "images masked values"]:
        """Return the true values of the masked patches."""
        values: Tensor = self.values(images, mask)
        return values

    def loss(self, prediction: Tensor, images: Images, mask: Mask) -> Float32[Tensor, ""]:
        """Score a prediction by its mean error."""
        return self._error(prediction, self(images, mask), mask)

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Turn a prediction into pixels, where the values allow it."""
        patches: Tensor = self.values.invert(prediction, images, mask)
        return patches

    def _error(self, prediction: Tensor, values: Tensor, mask: Mask) -> Float32[Tensor, ""]:
        loss: Tensor = _ERRORS[self.error](prediction, values, self.group(mask))
        return loss


class PixelTarget(Target):
    """The pixels of the masked patches, as they are or normalised patch by patch.

    Masks may be finer than the patches (ConvMAE): then a position's own pixels are its patch.
    Bytes become fractions, which `normalize_bytes` lets it normalise while it reads them.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        normalize: Whether each patch is brought to zero mean and unit variance.
        error: "l1", "l2" or "smooth_l1".

    Source:
        MAE, arXiv:2111.06377, section 3 "Reconstruction target"; SimMIM, arXiv:2111.09886,
        section 3.4 (pixels as they are).
    """

    def __init__(
        self, patch_size: Grid, in_channels: int, *, normalize: bool = False, error: Error = "l2"
    ) -> None:
        num_values = in_channels * math.prod(patch_size)
        super().__init__(patch_size, (num_values,), point=(1,) * len(patch_size))
        self._mean: Sequence[float] | None = None
        self._std: Sequence[float] | None = None
        self.normalize: Literal["patch"] | None = "patch" if normalize else None
        self.error: Error = error
        if normalize:
            self.note = (
                "Predicted patches are normalised; here they have the true patches' mean and "
                "contrast."
            )

    def normalize_bytes(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise the fractions of bytes from now on; floats stay as they are."""
        self._mean, self._std = mean, std

    def forward(self, images: Images, mask: Mask) -> Float[Tensor, "images masked values"]:
        """Return the (normalised) pixels of the masked patches."""
        return self._pixels(images, mask)(images, mask)

    def loss(
        self, prediction: Tensor, images: Images | Sequence[Tensor], mask: Mask | RaggedMask
    ) -> Float32[Tensor, ""]:
        """Score a prediction by its mean error; the target itself is never stored."""
        loss: Tensor = losses.masked_pixel_loss(
            prediction,
            images,
            mask,
            self._patch_of(images, mask),
            normalize=self.normalize,
            kind=self.error,
            **self._statistics(images),
        )
        return loss

    def baselines(self, images: Images, mask: Mask) -> Scores:
        """Score what `losses.baselines` predicts: the mean color, the nearest patch, ..."""
        options: dict[str, Any] = {"normalize": self.normalize, "kind": self.error}
        options |= self._statistics(images)
        return losses.baselines(images, mask, self._patch_of(images, mask), **options)

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Return pixels; normalised ones get the true patches' mean and contrast."""
        return self._pixels(images, mask).invert(prediction, images, mask)

    def _pixels(self, images: Tensor, mask: Mask) -> targets.Pixels | targets.NormalizedPixels:
        values = targets.NormalizedPixels if self.normalize else targets.Pixels
        return values(self._patch_of(images, mask), **self._statistics(images))

    def _statistics(self, images: Tensor | Sequence[Tensor]) -> dict[str, Any]:
        return byte_statistics(images, self._mean, self._std)

    def _patch_of(self, images: Tensor | Sequence[Tensor], mask: Mask | RaggedMask) -> Grid:
        if isinstance(mask, RaggedMask) or not isinstance(images, Tensor):
            return self.patch_size
        return tuple(size // n for size, n in zip(images.shape[2:], mask.grid, strict=True))


class PCATarget(Target):
    """The largest principal components of the masked patches.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        num_components: How many components.

    Attributes:
        center: The mean patch, once fitted.
        components: The directions, largest variance first, once fitted.

    Source:
        MAE, arXiv:2111.06377, table 1d.
    """

    center: Tensor
    components: Tensor

    def __init__(self, patch_size: Grid, in_channels: int, num_components: int) -> None:
        pixels = in_channels * math.prod(patch_size)
        if not 1 <= num_components <= pixels:
            raise ValueError(
                f"pca_components must be in [1, {pixels}] for these patches; got {num_components}"
            )
        super().__init__(patch_size, (num_components,))
        self.register_buffer("center", torch.zeros(pixels))
        self.register_buffer("components", torch.zeros(num_components, pixels))

    def fit(self, images: Images) -> None:
        """Find the components of the patches of `images`."""
        fitted = targets.PCATarget(self.patch_size, self.num_values).fit(images)
        assert fitted.center is not None
        assert fitted.components is not None
        self.center.copy_(fitted.center)
        self.components.copy_(fitted.components)

    def forward(self, images: Images, mask: Mask) -> Float[Tensor, "images masked components"]:
        """Return the coefficients of the masked patches."""
        return self._fitted()(images, mask)

    def loss(self, prediction: Tensor, images: Images, mask: Mask) -> Float32[Tensor, ""]:
        """Score predicted coefficients by their mean squared error."""
        loss: Tensor = losses.masked_mse(prediction, self(images, mask), mask)
        return loss

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Return the patches that coefficients stand for."""
        return self._fitted().invert(prediction, images, mask)

    def _fitted(self) -> targets.PCATarget:
        target = targets.PCATarget(self.patch_size, self.num_values)
        target.center, target.components = self.center, self.components
        return target


class SquareTarget(NumberTarget):
    """The mean colors of squares of pixels.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        side: Side of a square in pixels. It divides the patches, or they divide it.
        error: "l1", "l2" or "smooth_l1".

    Source:
        SimMIM, arXiv:2111.09886, section 4.1.4 "prediction resolutions".
    """

    def __init__(self, patch_size: Grid, in_channels: int, side: int, *, error: Error) -> None:
        squares = math.prod(max(patch, side) // side for patch in patch_size)
        super().__init__(
            targets.DownsampledPixels(patch_size, side),
            patch_size,
            in_channels * squares,
            (side,) * len(patch_size),
            error=error,
            note=f"Each square of {side} x {side} px has the mean predicted for it.",
        )

    def group(self, mask: Mask) -> Mask:
        """Return the mask of the squares, where these are larger than a patch.

        Raises:
            ValueError: Masked patches do not fill whole squares.
        """
        try:
            grouped: Mask = self.values.group(mask)
        except ValueError as error:
            side = self.point[0]
            unit = max(-(-side // patch) for patch in self.patch_size)
            raise ValueError(
                f"--target pixels_{side}x predicts squares of several patches, which must be "
                f"masked as a whole: give --unit {unit} or a multiple of it"
            ) from error
        return grouped


class WindowTarget(NumberTarget):
    """Pixels normalised by the mean and deviation of the window around each.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        error: "l1", "l2" or "smooth_l1".

    Source:
        microsoft/Swin-Transformer `models/simmim.py`, `norm_targets`.
    """

    def __init__(self, patch_size: Grid, in_channels: int, *, error: Error) -> None:
        super().__init__(
            targets.WindowNormalizedPixels(patch_size),
            patch_size,
            in_channels * math.prod(patch_size),
            (1,) * len(patch_size),
            error=error,
            note="Predictions are normalised; here they have the ground truth's window statistics.",
        )


class HOGTarget(NumberTarget):
    """Histograms of oriented gradients, in cells of at most 8 pixels a side.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        error: "l1", "l2" or "smooth_l1".

    Source:
        MaskFeat, arXiv:2112.09133, section 3.2.
    """

    def __init__(self, patch_size: Grid, in_channels: int, *, error: Error) -> None:
        cell = tuple(math.gcd(side, 8) for side in patch_size)
        cells = math.prod(patch // side for patch, side in zip(patch_size, cell, strict=True))
        hog = targets.HOG(patch_size, cell)
        super().__init__(
            hog,
            patch_size,
            cells * in_channels * hog.num_bins,
            error=error,
            note="hog has no way back to pixels: masked patches stay gray.",
        )


class FeatureTarget(NumberTarget):
    """The features that a frozen teacher computes for the masked patches.

    Args:
        teacher: The teacher.
        normalize: Whether each feature vector is brought to zero mean and unit variance.
        error: "l1", "l2", "smooth_l1" or "cosine".

    Source:
        MaskFeat, arXiv:2112.09133, section 3.2; CAE v2, arXiv:2211.09799 (cosine).
    """

    def __init__(
        self, teacher: ViT, *, normalize: bool, error: Error | Literal["cosine"] = "cosine"
    ) -> None:
        features = targets.FeatureTarget(
            teacher, num_prefix=teacher.num_prefix_tokens, normalize=normalize
        )
        note = "features has no way back to pixels: masked patches stay gray."
        patch_size = teacher.patch_embed.patch_size
        super().__init__(features, patch_size, teacher.dim, error=error, note=note)
        self.teacher = teacher

    def baselines(self, images: Images, mask: Mask) -> Scores:
        """Score the mean feature of the masked patches; under the cosine, the mean direction."""
        features = self(images, mask)
        addends = F.normalize(features, dim=2) if self.error == "cosine" else features
        mean = addends.mean(dim=(0, 1)).expand_as(features)
        return {"mean": self._error(mean, features, mask)}


class SimilarityTarget(FeatureTarget):
    """Features of a teacher, predicted by direction alone; drawn as the cosine with the teacher's.

    Args:
        teacher: The teacher.

    Source:
        CAE v2, arXiv:2211.09799.
    """

    def __init__(self, teacher: ViT) -> None:
        super().__init__(teacher, normalize=False, error="cosine")
        self.note = "The brighter a patch, the nearer its features to the teacher's."

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Return patches of one brightness: the cosine."""
        cosine = F.cosine_similarity(prediction, self(images, mask), dim=2)
        return cosine.unsqueeze(2).expand(-1, -1, images.shape[1] * math.prod(self.patch_size))


# Classes


class ClassTarget(Target):
    """Classes: predictions are logits on a last axis, scored by their cross-entropy."""

    note = "Each masked pixel has the color of its most likely class."

    def loss(self, prediction: Tensor, images: Images, mask: Mask) -> Float32[Tensor, ""]:
        """Score logits by their cross-entropy."""
        loss: Tensor = losses.masked_cross_entropy(prediction, self(images, mask), mask)
        return loss

    def baselines(self, images: Images, mask: Mask) -> Scores:
        """Score the best constant prediction: how often each class occurs in these patches."""
        classes = self(images, mask)
        share = classes.flatten().bincount() / classes.numel()
        return {"frequencies": -(share * share.clamp(min=1e-12).log()).sum()}

    def invert(self, prediction: Tensor, images: Images, mask: Mask) -> Patches:
        """Draw the most likely classes."""
        return self.draw(prediction.argmax(dim=-1), images, mask)

    def draw(
        self, classes: Int64[Tensor, "images masked *values"], images: Images, mask: Mask
    ) -> Patches:
        """Return the patches that classes stand for."""
        raise NotImplementedError


class ClusterTarget(ClassTarget):
    """For each pixel, the nearest of some colors that k-means finds in the first images.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        num_clusters: How many colors.

    Attributes:
        colors: The colors, once fitted.

    Source:
        SimMIM, arXiv:2111.09886, table 5 "iGPT cluster".
    """

    colors: Tensor

    def __init__(self, patch_size: Grid, in_channels: int, num_clusters: int) -> None:
        shape = (math.prod(patch_size), num_clusters)
        super().__init__(patch_size, shape, point=(1,) * len(patch_size))
        self.register_buffer("colors", torch.zeros(num_clusters, in_channels))

    def fit(self, images: Images) -> None:
        """Find the colors: 20 rounds of k-means over about 64 pixels a color."""
        clusters = self._clusters()
        colors = images.movedim(1, -1).flatten(0, -2)
        few = colors[:: max(len(colors) // (64 * len(self.colors)), 1)]
        clusters.fit(few.T[None], max_iterations=20, generator=torch.Generator().manual_seed(0))
        assert clusters.centers is not None
        self.colors.copy_(clusters.centers)

    def forward(self, images: Images, mask: Mask) -> Int64[Tensor, "images masked pixels"]:
        """Return the nearest color of each masked pixel."""
        return self._clusters()(images, mask)

    def draw(
        self, classes: Int64[Tensor, "images masked pixels"], images: Images, mask: Mask
    ) -> Patches:
        """Return patches of these colors."""
        return self._clusters().invert(classes, images, mask)

    def _clusters(self) -> targets.ColorClusters:
        clusters = targets.ColorClusters(self.patch_size, len(self.colors))
        clusters.centers = self.colors
        return clusters


class BinTarget(ClassTarget):
    """For each pixel and channel, which of some equal intervals its value is in.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.
        num_bins: How many intervals.

    Source:
        SimMIM, arXiv:2111.09886, table 5 "per-channel 8-bin" and "256-bin".
    """

    def __init__(self, patch_size: Grid, in_channels: int, num_bins: int) -> None:
        shape = (in_channels * math.prod(patch_size), num_bins)
        super().__init__(patch_size, shape, point=(1,) * len(patch_size))
        self.bins = targets.ChannelBins(patch_size, num_bins, DARKEST, BRIGHTEST)

    def forward(self, images: Images, mask: Mask) -> Int64[Tensor, "images masked patch"]:
        """Return the interval of each masked value."""
        return self.bins(images, mask)

    def draw(
        self, classes: Int64[Tensor, "images masked patch"], images: Images, mask: Mask
    ) -> Patches:
        """Return patches of the intervals' centers."""
        return self.bins.invert(classes, images, mask)


class MeanColorTarget(ClassTarget):
    """The mean color of a patch, in 8 levels a channel: one class for each color.

    Args:
        patch_size: Pixels per axis of a patch.
        in_channels: Channels of the images.

    Source:
        Vision Transformer, arXiv:2010.11929, section B.1.2.
    """

    note = "Each masked patch has the one color that is predicted for it, of 8 levels a channel."

    def __init__(self, patch_size: Grid, in_channels: int) -> None:
        super().__init__(patch_size, (8**in_channels,))
        self.mean = targets.DownsampledPixels(patch_size, patch_size)
        self.in_channels = in_channels

    def forward(self, images: Images, mask: Mask) -> Int64[Tensor, "images masked"]:
        """Return the class of each masked patch's color: three bits for each channel."""
        means = self.mean(images, mask)
        position = (means - DARKEST) * (8 / (BRIGHTEST - DARKEST))
        levels = position.floor().long().clamp(0, 7)
        return (levels << self._bits(images.device)).sum(dim=2)

    def draw(self, classes: Int64[Tensor, "images masked"], images: Images, mask: Mask) -> Patches:
        """Return patches of one color each."""
        levels = (classes.unsqueeze(2) >> self._bits(classes.device)) & 7
        color = DARKEST + (levels + 0.5) * ((BRIGHTEST - DARKEST) / 8)
        return color.repeat(1, 1, math.prod(self.patch_size))

    def _bits(self, device: torch.device) -> Tensor:
        return 3 * torch.arange(self.in_channels, device=device)


class TokenTarget(ClassTarget):
    """The codes that a frozen tokenizer gives to the masked patches.

    Args:
        tokenizer: The tokenizer; one of patches is fitted on the first images.
        patch_size: Pixels per axis of a patch.

    Source:
        BEiT, arXiv:2106.08254, section 2.2.
    """

    def __init__(self, tokenizer: Tokenizer, patch_size: Grid) -> None:
        super().__init__(patch_size, (tokenizer.vocabulary_size,))
        self.tokenizer = tokenizer
        self.note = (
            "Codes stand for normalised patches, drawn with the true patches' contrast."
            if isinstance(tokenizer, PatchTokenizer)
            else "Masked patches are as the tokenizer decodes the predicted codes."
        )

    def fit(self, images: Images) -> None:
        """Find the typical patches, where these are the codes."""
        if isinstance(self.tokenizer, PatchTokenizer):
            self.tokenizer.fit(images)

    def encode(self, images: Images) -> Int64[Tensor, "images tokens"]:
        """Return the code of every patch."""
        return self.tokenizer.encode(images).flatten(1)

    def forward(self, images: Images, mask: Mask) -> Int64[Tensor, "images masked"]:
        """Return the codes of the masked patches."""
        return self._codes(images)(images, mask)

    def draw(self, classes: Int64[Tensor, "images masked"], images: Images, mask: Mask) -> Patches:
        """Decode codes together with those of the visible patches; return the masked patches."""
        return self._codes(images).invert(classes, images, mask)

    def _codes(self, like: Tensor) -> targets.TokenTarget:
        decode = partial(decode_codes, self.tokenizer, like=like)
        return targets.TokenTarget(self.tokenizer.encode, decode, self.patch_size)


class CountedTokenTarget(TokenTarget):
    """Codes of a tokenizer, and how often each occurs in the first images.

    Args:
        tokenizer: As in `TokenTarget`.
        patch_size: As in `TokenTarget`.

    Attributes:
        frequencies: Share of each code; equal shares until fitted.
    """

    frequencies: Float[Tensor, " vocabulary"]

    def __init__(self, tokenizer: Tokenizer, patch_size: Grid) -> None:
        super().__init__(tokenizer, patch_size)
        self.register_buffer("frequencies", torch.full(self.value_shape, 1 / self.num_values))

    def fit(self, images: Images) -> None:
        """Fit the tokenizer where it needs it, and count the codes of `images`."""
        super().fit(images)
        counts = self.encode(images).flatten().bincount(minlength=self.num_values)
        self.frequencies.copy_((counts + 1) / (counts + 1).sum())

    def baselines(self, images: Images, mask: Mask) -> Scores:
        """Score two constant predictions: "uniform" shares, and the "unigram" shares counted."""
        uniform = torch.tensor(math.log(self.num_values), device=images.device)
        unigram = -self.frequencies.log()[self(images, mask)].mean()
        return {"uniform": uniform, "unigram": unigram}

    def draw_references(self, images: Images, mask: Mask) -> dict[str, Patches]:
        """Draw the true codes, and for patches the most frequent one: contrast without a code."""
        codes = self(images, mask)
        found = {"tokens themselves": self.draw(codes, images, mask)}
        if isinstance(self.tokenizer, PatchTokenizer):
            common = self.frequencies.argmax().expand_as(codes)
            found["contrast, one code"] = self.draw(common, images, mask)
        return found


# Targets that a caller gives instead of images


def given_codes(token_ids: Tensor | None, mask: Mask) -> Int64[Tensor, "images masked"]:
    """Return the codes of the masked patches.

    Raises:
        ValueError: If the codes of all patches are missing, or of another shape.
    """
    shape = (mask.batch_size, mask.num_tokens)
    what = f"one code for each of the {shape[1]} patches of {shape[0]} images"
    return _checked("token_ids", token_ids, shape, what).gather(1, mask.masked_ids)


def given_features(
    features: Tensor | None, mask: Mask, dim: int
) -> Float[Tensor, "images masked dim"]:
    """Return the features of the masked patches.

    Raises:
        ValueError: If they are missing, or of another shape.
    """
    shape = (mask.batch_size, mask.num_masked, dim)
    what = f"{dim} numbers for each of the {shape[1]} masked patches of {shape[0]} images"
    return _checked("features", features, shape, what)


def _checked(name: str, values: Tensor | None, shape: tuple[int, ...], what: str) -> Tensor:
    if values is None or values.shape != shape:
        got = None if values is None else tuple(values.shape)
        raise ValueError(f"{name} must hold {what}, {shape}; got {got}")
    return values
