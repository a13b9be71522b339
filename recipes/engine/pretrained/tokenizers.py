"""Tokenizers: load trained ones from files, and apply them to model inputs."""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._grids import per_axis, sides_of
from mimkit.interop import from_official
from mimkit.nn import DiscreteVAE, PatchTokenizer
from recipes.engine.data.images import NORMALIZE
from recipes.engine.errors import UserError, say
from recipes.engine.pretrained.files import check_finite, read_weights

_allows_missing = ContextVar("_allows_missing", default=False)


@contextlib.contextmanager
def missing_files_allowed() -> Iterator[None]:
    """Let an untrained DALL-E encoder stand in for a file that is missing: for a dry run."""
    token = _allows_missing.set(True)
    try:
        yield
    finally:
        _allows_missing.reset(token)


def to_pixels(inputs: Float[Tensor, "batch channels *spatial"]) -> Tensor:
    """Turn model inputs into pixels in [0, 1], the input of a tokenizer.

    For folders of images this undoes the normalization by constants. Inputs of other data sets are
    normalized differently: they are scaled with the same constants and clipped.
    """
    mean, std = _mean_and_std(inputs)
    return (inputs * std + mean).clamp(0, 1)


def to_inputs(pixels: Float[Tensor, "batch channels *spatial"]) -> Tensor:
    """Invert `to_pixels`."""
    mean, std = _mean_and_std(pixels)
    return (pixels - mean) / std


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, *[1] * (images.ndim - 2))
    channels = images.shape[1]
    if channels == len(NORMALIZE.mean):
        mean, std = NORMALIZE.mean, NORMALIZE.std
    else:
        mean, std = (0.45,) * channels, (0.225,) * channels
    return images.new_tensor(mean).view(shape), images.new_tensor(std).view(shape)


class ImageTokenizer(nn.Module):
    """A frozen discrete VAE that encodes every patch of a model input as one code.

    Args:
        vae: The discrete VAE.
        image_size: Height and width of a model input, in pixels.
        patch_size: Height and width of a patch, in pixels: a multiple of the VAE's stride. Images
            are resized so that each patch gets one code.

    Raises:
        ValueError: If the patch size is not a multiple of the stride.
    """

    def __init__(
        self, vae: DiscreteVAE, image_size: Sequence[int], patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        if any(patch % vae.stride for patch in patch_size):
            raise ValueError(
                f"a code of this tokenizer stands for {vae.stride} x {vae.stride} pixels, and a "
                f"patch size of {tuple(patch_size)} is not a multiple: choose another patch size "
                "or tokenizer"
            )
        self.vae = vae.requires_grad_(False)
        self.vocabulary_size = vae.vocabulary_size
        self.image_size = tuple(image_size)
        sizes = zip(image_size, patch_size, strict=True)
        self.read_size = tuple(size // patch * vae.stride for size, patch in sizes)

    @torch.no_grad()
    def encode(
        self, inputs: Float[Tensor, "batch channels height width"]
    ) -> Int64[Tensor, "batch rows columns"]:
        """Return the code of every patch."""
        return self.vae.encode(_resize(to_pixels(inputs), self.read_size))

    @torch.no_grad()
    def decode(
        self, ids: Int64[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Decode codes to model inputs; gray if there is no decoder."""
        if self.vae.decoder is None:
            channels = self.vae.in_channels
            return torch.zeros(len(ids), channels, *self.image_size, device=ids.device)
        return to_inputs(_resize(self.vae.decode(ids), self.image_size))


def _resize(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    resized = F.interpolate(
        images, size=tuple(size), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(0, 1)


Tokenizer = ImageTokenizer | PatchTokenizer


def make_tokenizer(
    name: str,
    image_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    in_channels: int,
    vocabulary_size: int,
) -> Tokenizer:
    """Make the tokenizer that `--tokenizer` names.

    Args:
        name: "patches" for k-means codes of normalized patches, which must be fitted; or a file, as
            in `load_tokenizer`.
        image_size: Height and width of model inputs, in pixels.
        patch_size: Height and width of a patch, in pixels.
        in_channels: Channels of the images.
        vocabulary_size: Number of codes of "patches". Not used with a file.

    Raises:
        UserError: As in `load_tokenizer`.
    """
    if name != "patches":
        return load_tokenizer(Path(name), image_size, patch_size, in_channels)
    return PatchTokenizer(
        patch_size=per_axis("patch_size", patch_size, len(sides_of("image_size", image_size))),
        in_channels=in_channels,
        vocabulary_size=vocabulary_size,
    )


def decode_codes(
    tokenizer: Tokenizer,
    ids: Int64[Tensor, "batch rows columns"],
    like: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Decode codes to images; a `PatchTokenizer` takes brightness and contrast from `like`."""
    if isinstance(tokenizer, PatchTokenizer):
        return tokenizer.decode(ids, like=like)
    return tokenizer.decode(ids)


def load_tokenizer(
    path: Path,
    image_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    in_channels: int,
) -> ImageTokenizer:
    """Load a tokenizer: one of `recipes/tokenizer.py`, or DALL-E's encoder.

    Args:
        path: `tokenizer.safetensors`, or a checkpoint under OpenAI's names.
        image_size: Height and width of model inputs, in pixels.
        patch_size: Height and width of a patch, in pixels.
        in_channels: Channels of the images.

    Raises:
        UserError: If the file cannot be read or holds no tokenizer, or the tokenizer does not fit
            the images.
    """
    sizes = sides_of("image_size", image_size)
    if _allows_missing.get() and not path.exists():
        vae = DiscreteVAE(in_channels=in_channels, has_decoder=False)
        return ImageTokenizer(vae, sizes, per_axis("patch_size", patch_size, len(sizes)))
    if not path.is_file():
        raise UserError(
            f"--tokenizer {path} is not a file: give a tokenizer.safetensors of "
            "mimkit tokenizer, the weights of DALL-E's encoder, or patches"
        )
    weights = read_weights("--tokenizer", path).tensors
    check_finite("--tokenizer", path, weights)
    ours = "encoder.blocks.input.weight" in weights
    try:
        renamed = weights if ours else from_official("dalle", weights)
    except (TypeError, ValueError) as error:
        raise UserError(f"--tokenizer {path} holds no discrete VAE: {error}") from error
    vae = build_vae(path, renamed)
    if vae.decoder is None:
        say(
            f"warning: --tokenizer {path} has no decoder: predictions are drawn gray",
            file=sys.stderr,
        )
    if vae.in_channels != in_channels:
        raise UserError(
            f"--tokenizer {path} takes images of {vae.in_channels} channels, not {in_channels}"
        )
    try:
        return ImageTokenizer(vae, sizes, per_axis("patch_size", patch_size, len(sizes)))
    except ValueError as error:
        raise UserError(f"--tokenizer {path}: {error}") from error


def build_vae(path: Path, weights: Mapping[str, Tensor]) -> DiscreteVAE:
    """Build a discrete VAE from its weights, and infer its shape from them.

    Raises:
        UserError: If they are not the weights of a discrete VAE.
    """
    try:
        dim, in_channels = weights["encoder.blocks.input.weight"].shape[:2]
        numbers = [
            (int(match[1]), int(match[2]))
            for match in map(
                re.compile(r"encoder\.blocks\.group_(\d+)\.block_(\d+)").match, weights
            )
            if match
        ]
        has_decoder = "decoder.blocks.input.weight" in weights
        stem_dim = weights["decoder.blocks.input.weight"].shape[0] if has_decoder else 8
        with torch.device("cpu"):  # real weights, even inside a `meta` device context
            vae = DiscreteVAE(
                in_channels=in_channels,
                dim=dim,
                groups=max(group for group, _ in numbers),
                depth=max(block for _, block in numbers),
                vocabulary_size=weights["encoder.blocks.output.conv.weight"].shape[0],
                stem_dim=stem_dim,
                has_decoder=has_decoder,
            )
        vae.load_state_dict(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"--tokenizer {path} holds no discrete VAE") from error
    return vae
