"""Tokenizers: reading trained ones from files, and using them on a recipe's model inputs."""

import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._grids import per_axis, sides_of
from mimkit.interop import from_official, load_checkpoint
from mimkit.nn import DiscreteVAE, PatchTokenizer
from recipes.engine.data.images import NORMALIZE
from recipes.engine.errors import UserError, reason_of

_UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError)


def to_pixels(inputs: Float[Tensor, "batch channels *spatial"]) -> Tensor:
    """Turn model inputs into pixels in [0, 1], as a tokenizer reads them.

    Inputs of a folder are normalised by constants, which this undoes. Those of `photos` and
    `digits` are normalised image by image: they get the same constants, and are clipped.
    """
    mean, std = _constants(inputs)
    return (inputs * std + mean).clamp(0, 1)


def to_inputs(pixels: Float[Tensor, "batch channels *spatial"]) -> Tensor:
    """Undo `to_pixels`."""
    mean, std = _constants(pixels)
    return (pixels - mean) / std


def _constants(images: Tensor) -> tuple[Tensor, Tensor]:
    shape = (1, -1, *[1] * (images.ndim - 2))
    channels = images.shape[1]
    if channels == len(NORMALIZE.mean):
        return images.new_tensor(NORMALIZE.mean).view(shape), images.new_tensor(NORMALIZE.std).view(
            shape
        )
    return images.new_tensor([0.45] * channels).view(shape), images.new_tensor(
        [0.225] * channels
    ).view(shape)


class ImageTokenizer(nn.Module):
    """A frozen discrete VAE that gives a code to every patch of a model input.

    Args:
        vae: The discrete VAE.
        image_size: Height and width of a model input.
        patch_size: Height and width of a patch; a multiple of the stride of the VAE: images are
            made smaller until a code stands for a patch.

    Raises:
        ValueError: A stride that does not match the patches.
    """

    def __init__(
        self, vae: DiscreteVAE, image_size: Sequence[int], patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        if any(patch % vae.stride for patch in patch_size):
            raise ValueError(
                f"a code of this tokenizer stands for {vae.stride} x {vae.stride} pixels, of which "
                f"patches of {tuple(patch_size)} pixels are no multiple: choose another patch size "
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
        return self.vae.encode(_resized(to_pixels(inputs), self.read_size))

    @torch.no_grad()
    def decode(
        self, ids: Int64[Tensor, "batch rows columns"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the model inputs that codes stand for; gray where there is no decoder."""
        if self.vae.decoder is None:
            channels = self.vae.in_channels
            return torch.zeros(len(ids), channels, *self.image_size, device=ids.device)
        return to_inputs(_resized(self.vae.decode(ids), self.image_size))


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
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
        name: "patches" for k-means codes of normalised patches, yet to be fitted; or a file, as in
            `load_tokenizer`.
        image_size: Height and width of model inputs, in pixels.
        patch_size: Height and width of a patch.
        in_channels: Channels of the images.
        vocabulary_size: Number of codes of "patches"; a file says its own.

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
    """Return the images that codes stand for; codes of patches get the contrast of `like`'s."""
    if isinstance(tokenizer, PatchTokenizer):
        return tokenizer.decode(ids, like=like)
    return tokenizer.decode(ids)


def load_tokenizer(
    path: Path,
    image_size: int | Sequence[int],
    patch_size: int | Sequence[int],
    in_channels: int,
) -> ImageTokenizer:
    """Read a tokenizer: ours (with its decoder), or DALL-E's encoder.

    Args:
        path: `tokenizer.safetensors`, or a checkpoint under OpenAI's names.
        image_size: Height and width of model inputs, in pixels.
        patch_size: Height and width of a patch.
        in_channels: Channels of the images.

    Raises:
        UserError: A file that cannot be read or holds something else, or a tokenizer that does not
            fit the images.
    """
    if not path.is_file():
        raise UserError(
            f"--tokenizer {path} is no file: give tokenizer.safetensors of recipes/tokenizer.py, "
            "the weights of DALL-E's encoder, or patches"
        )
    try:
        weights = load_checkpoint(path)
    except _UNREADABLE as error:
        raise UserError(f"--tokenizer {path} cannot be read: {reason_of(error)}") from error
    ours = "encoder.blocks.input.weight" in weights
    vae = build_vae(path, weights if ours else from_official("dalle", weights))
    if vae.decoder is None:
        print(
            f"warning: --tokenizer {path} has no decoder: predictions are drawn gray",
            file=sys.stderr,
        )
    if vae.in_channels != in_channels:
        raise UserError(
            f"--tokenizer {path} takes images of {vae.in_channels} channels, not {in_channels}"
        )
    sizes = sides_of("image_size", image_size)
    try:
        return ImageTokenizer(vae, sizes, per_axis("patch_size", patch_size, len(sizes)))
    except ValueError as error:
        raise UserError(f"--tokenizer {path}: {error}") from error


def build_vae(path: Path, weights: Mapping[str, Tensor]) -> DiscreteVAE:
    """Build the discrete VAE that weights are of.

    Raises:
        UserError: They are of something else.
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
        with torch.device("cpu"):  # weights, even where only shapes are asked for
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
