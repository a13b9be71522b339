"""`photos`: crops of 14 photographs that ship with scikit-image. The label is the photo.

The left 60 % of each photo is for training, and the right 40 % is held out. Photos are split before
they are resized, so that no pixel of one part mixes into the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib import metadata, resources

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from recipes.engine.data.images import PICTURE_SIZE, normalize_by_image, to_bytes, to_unit
from recipes.engine.data.sets import DataSet, DrawnImages, draw_probe
from recipes.engine.errors import UserError

# Left out: drawings, tiny or nearly empty images, and the second view of the motorcycle.
FILES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
PICTURES = ("chelsea", "coffee", "motorcycle_left", "rocket")
TRAIN_SHARE = 0.6
# Longer side of a crop as a fraction of the photo's shorter side.
CROP_SCALES = np.geomspace(0.14, 0.45, num=5)
# Least standard deviation of a crop's gray values, in [0, 1]. Flatter crops (sky, black) are not
# drawn.
MIN_GRAY_STD = 0.03
# Smaller crops may all be flat. Larger crops enlarge even the largest photo about twice, and the
# pyramids take a gigabyte.
MIN_SIZE, MAX_SIZE = 8, 256
PROBE_PER_PHOTO = 50
PROBE_TEST = 2_500


@dataclass(frozen=True, eq=False)
class Level:
    """Level of an image pyramid: part of a photo, resized for one crop scale.

    Attributes:
        pixels: The resized part, channels first.
        corners: Top and left of every crop that is not flat.
    """

    pixels: NDArray[np.uint8]
    corners: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PhotoCrops:
    """Random crops of one part of every photo.

    Attributes:
        pyramids: The levels of each photo. A crop scale without a crop that is not flat has none.
        image_size: Height and width of a crop in pixels.
    """

    pyramids: list[list[Level]]
    image_size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        """Number of photos, which are the classes."""
        return len(self.pyramids)

    def draw(self, label: int, rng: np.random.Generator) -> UInt8[Tensor, "3 height width"]:
        """Draw a crop of one photo: its scale, position and flip, each uniformly."""
        levels = self.pyramids[label]
        level = levels[rng.integers(len(levels))]
        top, left = level.corners[rng.integers(len(level.corners))]
        height, width = self.image_size
        crop = level.pixels[:, top : top + height, left : left + width]
        if rng.integers(2):
            crop = crop[:, :, ::-1]
        return torch.from_numpy(crop.copy())


def load_photos(*, image_size: tuple[int, int], seed: int) -> DataSet:
    """Load the photographs.

    A probe is fitted on 50 labelled crops per class and tested on 2,500 crops in total.

    Args:
        image_size: Height and width of a crop in pixels, 8 to 256.
        seed: Seed of the run.

    Returns:
        The data set.

    Raises:
        UserError: If the crops are too small or too large, or scikit-image is not installed.
    """
    if min(image_size) < MIN_SIZE or max(image_size) > MAX_SIZE:
        raise UserError(
            f"photos has no crops of {image_size[0]} x {image_size[1]} pixels: "
            f"choose {MIN_SIZE} to {MAX_SIZE} a side, or train on a folder of images"
        )
    photos = {name.partition(".")[0]: read_photo(name) for name in FILES}
    halves = {name: split(photo) for name, photo in photos.items()}
    pyramids = {
        name: (
            build_pyramid(left, min(photos[name].size), image_size),
            build_pyramid(right, min(photos[name].size), image_size),
        )
        for name, (left, right) in halves.items()
    }
    train = PhotoCrops([left for left, _ in pyramids.values()], image_size)
    test = PhotoCrops([right for _, right in pyramids.values()], image_size)
    return DataSet(
        name="photos",
        in_channels=3,
        class_names=tuple(photos),
        train=DrawnImages(train, normalize_by_image, seed),
        pictures=[tiled_picture(halves[name][1], image_size) for name in PICTURES],
        normalize=normalize_by_image,
        load_probe=partial(
            draw_probe,
            train,
            test,
            normalize_by_image,
            train_per_class=PROBE_PER_PHOTO,
            num_test=PROBE_TEST,
            seed=seed,
        ),
    )


def read_photo(name: str) -> Image.Image:
    """Read one of scikit-image's photographs as RGB."""
    try:
        with resources.files("skimage.data").joinpath(name).open("rb") as file:
            return Image.open(file).convert("RGB")
    except ModuleNotFoundError as error:
        raise UserError(
            'the photos data set needs scikit-image: pip install "mimkit[recipes]"'
        ) from error
    except FileNotFoundError as error:
        version = metadata.version("scikit-image")
        raise UserError(
            f"the photos data set needs {name}, which this scikit-image {version} lacks: "
            "install scikit-image from PyPI"
        ) from error


def split(photo: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Split a photo into its training part and its held-out part."""
    cut = round(TRAIN_SHARE * photo.width)
    return (
        photo.crop((0, 0, cut, photo.height)),
        photo.crop((cut, 0, photo.width, photo.height)),
    )


def build_pyramid(part: Image.Image, shorter_side: int, image_size: tuple[int, int]) -> list[Level]:
    """Resize a part of a photo for each crop scale.

    Args:
        part: Part of a photo.
        shorter_side: Shorter side of the whole photo in pixels.
        image_size: Height and width of a crop in pixels.

    Returns:
        The levels that have a crop that is not flat.
    """
    levels = []
    for crop_scale in CROP_SCALES:
        # The held-out part of a square photo is narrower than the largest crop.
        scale = max(max(image_size) / (crop_scale * shorter_side), covering_scale(part, image_size))
        size = round(part.width * scale), round(part.height * scale)
        pixels = np.array(part.resize(size, Image.Resampling.LANCZOS)).transpose(2, 0, 1)
        corners = np.argwhere(gray_std(pixels, image_size) >= MIN_GRAY_STD).astype(np.int32)
        if len(corners):
            levels.append(Level(np.ascontiguousarray(pixels), corners))
    return levels


def gray_std(
    pixels: NDArray[np.uint8], image_size: tuple[int, int]
) -> Float[np.ndarray, "tops lefts"]:
    """Compute the standard deviation of gray, in [0, 1], of every crop of an image.

    Args:
        pixels: The image, channels first.
        image_size: Height and width of a crop in pixels.

    Returns:
        One number for each position of the crop's top left corner.
    """
    gray = pixels.mean(axis=0) / 255
    mean = box_mean(gray, image_size)
    variance = box_mean(gray**2, image_size) - mean**2
    std: Float[np.ndarray, "tops lefts"] = np.sqrt(variance.clip(min=0))
    return std


def box_mean(
    values: Float[np.ndarray, "height width"], box: tuple[int, int]
) -> Float[np.ndarray, "tops lefts"]:
    """Average over every box of a size in an array, by differences of cumulative sums."""
    height, width = box
    sums = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    rows = sums[height:] - sums[:-height]
    boxes: Float[np.ndarray, "tops lefts"] = rows[:, width:] - rows[:, :-width]
    return boxes / (height * width)


def tiled_picture(
    part: Image.Image, image_size: tuple[int, int]
) -> Float[Tensor, "3 height width"]:
    """Resize a part of a photo to about 192 pixels, at least one tile, and crop whole tiles."""
    scale = max(PICTURE_SIZE / min(part.size), covering_scale(part, image_size))
    height, width = (
        max(1, int(length * scale / side)) * side
        for length, side in zip((part.height, part.width), image_size, strict=True)
    )
    return to_unit(to_bytes(center_crop(part, (height, width), scale=scale)))


def center_crop(image: Image.Image, size: tuple[int, int], *, scale: float) -> Image.Image:
    """Resize an image and crop its center.

    Args:
        image: The image.
        size: Height and width of the result in pixels.
        scale: Factor by which the image is resized.

    Returns:
        The crop.
    """
    height, width = size
    left = max(0.0, (image.width - width / scale) / 2)
    top = max(0.0, (image.height - height / scale) / 2)
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def covering_scale(image: Image.Image, size: tuple[int, int]) -> float:
    """Return the smallest resize factor with which an image covers a size in pixels."""
    return max(size[0] / image.height, size[1] / image.width)
