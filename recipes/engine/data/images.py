"""From pixels to model inputs: crops, conversions and normalization.

Axes: batch images, channels, height and width in pixels. Sizes are (height, width).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.engine.reading import UnreadableError

Interpolation = Literal["bicubic", "bilinear"]

Normalize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

# A picture is a mosaic of tiles of `image_size`. Its shorter side has about this many pixels.
PICTURE_SIZE = 192
CROP_RATIO = (3 / 4, 4 / 3)

# Evaluation resizes to 256 pixels and crops the central 224.
CENTER_MARGIN = 256 / 224


@dataclass(frozen=True)
class NormalizeByConstants:
    """Normalize each channel by the mean and standard deviation of the data set.

    Attributes:
        mean: Mean of each channel, for images in [0, 1].
        std: Standard deviation of each channel.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, mean [1, C, 1, ...] and standard deviation [1, C, 1, ...]."""
        shape = (1, -1, *[1] * (images.ndim - 2))
        mean = images.new_tensor(self.mean).view(shape)
        std = images.new_tensor(self.std).view(shape)
        return (images - mean).div_(std), mean, std


# ImageNet's statistics and the papers' augmentation.
NORMALIZE = NormalizeByConstants(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def as_they_are(
    images: Float[Tensor, "batch channels height width"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return images unchanged, with mean 0 and standard deviation 1."""
    return images, images.new_zeros(1, 1, 1, 1), images.new_ones(1, 1, 1, 1)


def normalize_by_image(
    images: Float[Tensor, "batch channels height width"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel of each image by its own mean and standard deviation.

    This removes mean color and brightness, which would identify the photo. Color texture stays.

    Args:
        images: Images in [0, 1].

    Returns:
        Inputs, mean [B, C, 1, 1] and standard deviation [B, C, 1, 1]. The standard deviation has
        0.02 added, so that noise in a flat channel stays small.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    centered = images - mean
    # Several times faster on a CPU than `torch.std`.
    std = centered.square().mean(dim=(2, 3), keepdim=True).sqrt() + 0.02
    return centered / std, mean, std


def to_bytes(image: Image.Image) -> UInt8[Tensor, "channels height width"]:
    """Convert an 8-bit image to a tensor."""
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_unit(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert bytes to floats in [0, 1]."""
    return images.float().div_(255)


def model_inputs(images: Tensor, normalize: Normalize) -> Float[Tensor, "batch channels *spatial"]:
    """Turn bytes into model inputs, on the device that they are on; floats stay as they are."""
    return normalize(to_unit(images))[0] if images.dtype == torch.uint8 else images


# Crops. Pixels are as decoders return them, crops as models take them.

Pixels = UInt8[np.ndarray, "height width channels"]
Crop = UInt8[Tensor, "channels height width"]
Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels


class Cropping(Protocol):
    """Turns the pixels of an image into a crop of a size: height and width in pixels."""

    def __call__(self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Crop an image."""


def resize(pixels: Pixels, box: Box, size: tuple[int, int], interpolation: Interpolation) -> Crop:
    """Resize a box of an image, with the antialiasing of Pillow.

    Only the box is resized: all of a 1 x 10,000 image would become 256 x 2,560,000 pixels.
    """
    left, top, right, bottom = box
    crop = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return F.interpolate(crop, size, mode=interpolation, antialias=True)[0]


class Cut(NamedTuple):
    """What is drawn for a crop: a box, and whether it is flipped."""

    box: Box
    is_flipped: bool


class BoxCrops(ABC):
    """Crops of a random box, resized, half of them flipped; drawn from the image's size alone."""

    interpolation: Interpolation = "bicubic"

    @abstractmethod
    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Draw a box inside an image."""

    def cut(self, width: int, height: int, rng: np.random.Generator) -> Cut:
        """Draw what is cut out of an image, before anything else is drawn."""
        return Cut(self.box(width, height, rng), bool(rng.integers(2)))

    def apply(self, cut: Cut, pixels: Pixels, size: tuple[int, int]) -> Crop:
        """Cut a box out of an image and resize it to height and width in pixels."""
        crop = resize(pixels, cut.box, size, self.interpolation)
        return crop.flip(-1) if cut.is_flipped else crop

    def __call__(self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Crop a random box of an image and resize it to height and width in pixels."""
        height, width = pixels.shape[:2]
        return self.apply(self.cut(width, height, rng), pixels, size)


@dataclass(frozen=True)
class RandomCrops(BoxCrops):
    """Random resized crops, half of them flipped.

    Attributes:
        area: Least and largest share of the image in a crop.
        interpolation: How crops are resized.

    Source:
        torchvision `RandomResizedCrop` as the papers use it, with another random generator: aspect
        ratio 3/4-4/3, ten attempts, then the largest central box. MAE and ConvMAE use areas of
        20-100 % and bicubic interpolation, SimMIM 67-100 % and bilinear, CAE 8-100 %.
    """

    area: tuple[float, float] = (0.2, 1.0)
    interpolation: Interpolation = "bicubic"

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Draw a box inside an image."""
        return random_box(width, height, rng, area=self.area)


@dataclass(frozen=True)
class CenterCrops:
    """Center crops of evaluation: 224 of 256 pixels of the shorter side, resized bicubically."""

    def __call__(
        self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator | None = None
    ) -> Crop:
        """Crop the center of an image; nothing is drawn."""
        height, width = pixels.shape[:2]
        scale = max(size[0] / height, size[1] / width) * CENTER_MARGIN
        box_height, box_width = (
            min(length, max(1, round(side / scale)))
            for length, side in zip((height, width), size, strict=True)
        )
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return resize(pixels, (left, top, left + box_width, top + box_height), size, "bicubic")


@dataclass(frozen=True)
class NativeCrops:
    """Images in their own aspect ratios, each of as many patches as fit into a number of tokens.

    Images of more pixels are scaled down, others keep their size but for a part of a patch: they
    are scaled to the whole number of patches that cuts off least. Nothing is distorted.

    Attributes:
        most: Largest number of patches of an image.
        patch: Height and width of a patch in pixels.
        interpolation: How images are resized.
        is_random: Whether cut and flip are drawn; otherwise as much is cut off on both sides.

    Source:
        The sizes of NaViT, arXiv:2307.06304, section 2; which patches fit is mimkit's own.
    """

    most: int
    patch: tuple[int, int]
    interpolation: Interpolation = "bicubic"
    is_random: bool = True

    def __call__(self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Crop and resize an image to a size of its own, instead of `size`."""
        sides = pixels.shape[0], pixels.shape[1]
        grid = native_grid(sides, self.patch, self.most)
        if grid == (1, 1):
            raise UnreadableError(
                f"it has {sides[0]} x {sides[1]} pixels, too few for two patches of "
                f"{self.patch[0]} x {self.patch[1]}"
            )
        inside = grid[0] * self.patch[0], grid[1] * self.patch[1]
        scale = max(new / old for new, old in zip(inside, sides, strict=True))
        height, width = (
            min(old, max(1, round(new / scale))) for new, old in zip(inside, sides, strict=True)
        )
        top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
        if self.is_random:
            top = int(rng.integers(sides[0] - height + 1))
            left = int(rng.integers(sides[1] - width + 1))
        crop = resize(pixels, (left, top, left + width, top + height), inside, self.interpolation)
        return crop.flip(-1) if self.is_random and rng.integers(2) else crop


def native_grid(sides: tuple[int, int], patch: tuple[int, int], most: int) -> tuple[int, int]:
    """Return how many patches of an image are encoded, with its aspect ratio.

    Args:
        sides: Height and width in pixels.
        patch: Height and width of a patch.
        most: Largest number of patches.

    Returns:
        Rows and columns: those that cut off least of the image.

    Example:
        >>> native_grid((375, 500), (16, 16), 196), native_grid((60, 100), (16, 16), 196)
        ((12, 16), (4, 7))
    """
    exact = [side / size for side, size in zip(sides, patch, strict=True)]
    scale = min(1.0, math.sqrt(most / math.prod(exact)))
    rows, columns = (min(max(number * scale, 1.0), most) for number in exact)

    def kept(grid: tuple[int, int]) -> float:
        ratio = (grid[0] * exact[1]) / (grid[1] * exact[0])
        return min(ratio, 1 / ratio)

    around = (
        (height, width)
        for height in (math.floor(rows), math.ceil(rows))
        for width in (math.floor(columns), math.ceil(columns))
    )
    return max((grid for grid in around if math.prod(grid) <= most), key=kept)


def random_box(
    width: int, height: int, rng: np.random.Generator, *, area: tuple[float, float]
) -> Box:
    """Draw a box inside an image."""
    for _ in range(10):
        pixels = width * height * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width + 1))
            top = int(rng.integers(height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, round(height * CROP_RATIO[1]))
    box_height = min(height, round(width / CROP_RATIO[0]))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def picture_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of a picture: per side, the tiles that fit 192 pixels, at least one."""
    height, width = (side * max(1, PICTURE_SIZE // side) for side in image_size)
    return height, width
