"""Data sets of the recipes: images in, model inputs out, nothing random but by (seed, epoch, id).

Axes: batch images, channels, height and width in pixels. `image_size` is (height, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes.engine.errors import UserError

# Photos and digits are drawn without end; this many images are called an epoch.
IMAGES_PER_EPOCH = 12_800
# A picture is a mosaic of tiles of `image_size`, about this many pixels on its shorter side.
PICTURE_SIZE = 192

Interpolation = Literal["bicubic", "bilinear"]

# A model input, None where the image cannot be read, and its sample id.
Item = tuple[Tensor | None, int]
Normalize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class TrainSet(Dataset[Item], ABC):
    """Images indexed by (epoch, sample id), the same image for the same index and seed."""

    @abstractmethod
    def __len__(self) -> int:
        """Count the samples of one epoch."""

    @abstractmethod
    def __getitem__(self, index: tuple[int, int]) -> Item:
        """Give the model input, None where the image cannot be read, and its sample id."""

    def describe(self, sample_id: int) -> str:
        """Name a sample for a person."""
        return f"sample {sample_id}"


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Labelled model inputs, drawn once, to measure frozen features with.

    Attributes:
        train_images: Inputs that a probe is fitted on.
        train_labels: Their classes, counted from 0.
        test_images: Inputs that the probe is scored on, from other images or parts of images.
        test_labels: Their classes.
    """

    train_images: Float[Tensor, "train channels height width"]
    train_labels: Int64[Tensor, " train"]
    test_images: Float[Tensor, "test channels height width"]
    test_labels: Int64[Tensor, " test"]


@dataclass(frozen=True, eq=False)
class DataSet:
    """What a recipe needs to know of its images.

    Attributes:
        name: What the user called it.
        in_channels: Channels of an image.
        class_names: Names of the classes in the order of their labels; empty without labels.
        train: The images to train on.
        pictures: A few held-out images [C, H, W] in [0, 1] to show reconstructions of; height and
            width are multiples of `image_size`.
        normalize: Turns images [B, C, H, W] in [0, 1] into model inputs, a mean and a standard
            deviation with `images == inputs * std + mean`.
        load_probe: Draws the labelled images; None without labels.
    """

    name: str
    in_channels: int
    class_names: tuple[str, ...]
    train: TrainSet
    pictures: list[Tensor]
    normalize: Normalize
    load_probe: Callable[[], ProbeData] | None

    @cached_property
    def probe(self) -> ProbeData | None:
        """Labelled images for the probes, drawn when first asked for; None without labels."""
        return None if self.load_probe is None else self.load_probe()


class ImageSource(Protocol):
    """Labelled images without end."""

    @property
    def num_classes(self) -> int:
        """Count the classes."""

    def draw(self, label: int, rng: np.random.Generator) -> UInt8[Tensor, "channels height width"]:
        """Draw an image of one class."""


@dataclass(frozen=True, eq=False)
class DrawnImages(TrainSet):
    """Training images that are drawn rather than stored.

    Attributes:
        source: Where the images come from; classes are equally likely.
        normalize: As in `DataSet`.
        seed: Seed of the run.
    """

    source: ImageSource
    normalize: Normalize
    seed: int

    def __len__(self) -> int:
        return IMAGES_PER_EPOCH

    def __getitem__(self, index: tuple[int, int]) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Item]:
        """Give the items of a batch, normalized together: a loader calls this where it exists."""
        images = torch.stack([self._draw(epoch, sample_id) for epoch, sample_id in indices])
        inputs, _, _ = self.normalize(to_unit(images))
        return [(image, index[1]) for image, index in zip(inputs, indices, strict=True)]

    def _draw(self, epoch: int, sample_id: int) -> UInt8[Tensor, "channels height width"]:
        rng = sample_rng(self.seed, epoch, sample_id)
        return self.source.draw(int(rng.integers(self.source.num_classes)), rng)


def load_data(
    name: str,
    *,
    image_size: tuple[int, int],
    seed: int,
    crop_area: tuple[float, float] = (0.2, 1.0),
    interpolation: Interpolation = "bicubic",
) -> DataSet:
    """Load a data set by its name.

    Args:
        name: "photos", "digits" or the path of a folder of images; a folder of the same name as a
            data set is reached as "./photos".
        image_size: Height and width of a model input in pixels.
        seed: Seed of everything that is drawn, not negative.
        crop_area: Of an image of a folder: least and largest share in a random crop.
        interpolation: How crops of a folder's images are resized.

    Returns:
        The data set.

    Raises:
        UserError: There is no such data set, or it has nothing of this size to offer.
    """
    if min(image_size) < 1:
        raise UserError(f"image_size {image_size} has an empty side; give at least 1 pixel each")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; give 0 or more")

    # Imported here: each of the three brings packages that the other two do not need.
    if name == "photos":
        from recipes.engine.photos import load_photos

        return load_photos(image_size=image_size, seed=seed)
    if name == "digits":
        from recipes.engine.digits import load_digits

        return load_digits(image_size=image_size, seed=seed)
    if Path(name).is_dir():
        from recipes.engine.folder import RandomCrops, load_folder

        crops = RandomCrops(crop_area, interpolation)
        return load_folder(name, image_size=image_size, seed=seed, crops=crops)
    raise UserError(f"no data set {name!r}: choose photos, digits or an existing folder of images")


class Batch(NamedTuple):
    """The readable images of a batch.

    Attributes:
        images: Model inputs; no rows at all if nothing of the batch was readable.
        sample_ids: One id per image.
        unreadable_ids: Ids of the images that were left out.
    """

    images: Float[Tensor, "batch channels height width"]
    sample_ids: Int64[Tensor, " batch"]
    unreadable_ids: list[int]


def collate(items: Iterable[Item]) -> Batch:
    """Stack the readable items of a batch."""
    images, sample_ids, unreadable_ids = [], [], []
    for image, sample_id in items:
        if image is None:
            unreadable_ids.append(sample_id)
        else:
            images.append(image)
            sample_ids.append(sample_id)
    stacked = torch.stack(images) if images else torch.empty(0, 0, 0, 0)
    return Batch(stacked, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids)


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """Make the random generator that belongs to a key.

    Args:
        seed: Seed of the run.
        key: Integers from 0; keys of different lengths give different generators.

    Returns:
        A fresh generator.
    """
    # A list [seed, *key] would be padded with zeros, so that (1,) and (1, 0) would collide.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def draw_probe(
    train: ImageSource,
    test: ImageSource,
    normalize: Normalize,
    *,
    train_per_class: int,
    num_test: int,
    seed: int,
) -> ProbeData:
    """Draw labelled images, equally many of each class.

    Args:
        train: Source of the images to fit on.
        test: Source of the images to score on.
        normalize: As in `DataSet`.
        train_per_class: Labelled images of each class to fit on.
        num_test: Images to score on, all classes together.
        seed: Seed of the draw.

    Returns:
        The labelled inputs.
    """

    def draw(source: ImageSource, number: int, part: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(seed, part)
        labels = np.arange(number) % source.num_classes
        images = torch.stack([source.draw(int(label), rng) for label in labels])
        inputs = [normalize(to_unit(batch))[0] for batch in torch.split(images, 256)]
        return torch.cat(inputs), torch.from_numpy(labels)

    return ProbeData(
        *draw(train, train_per_class * train.num_classes, part=0),
        *draw(test, num_test, part=1),
    )


def normalize_by_image(
    images: Float[Tensor, "batch channels height width"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each channel of each image by its own mean and standard deviation.

    Color texture stays; the mean color and the brightness, which would name the photo, go.

    Args:
        images: Images in [0, 1].

    Returns:
        Inputs, mean [B, C, 1, 1] and standard deviation [B, C, 1, 1]; .02 is added to the latter
        so that noise in a flat channel stays small.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    centered = images - mean
    # Several times faster on a CPU than `torch.std`.
    std = centered.square().mean(dim=(2, 3), keepdim=True).sqrt() + 0.02
    return centered / std, mean, std


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
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give inputs, mean [1, C, 1, 1] and standard deviation [1, C, 1, 1]."""
        mean = images.new_tensor(self.mean).view(1, -1, 1, 1)
        std = images.new_tensor(self.std).view(1, -1, 1, 1)
        return (images - mean) / std, mean, std


def center_crop(image: Image.Image, size: tuple[int, int], *, scale: float) -> Image.Image:
    """Resize an image and cut out its center.

    Args:
        image: The image.
        size: Height and width of the result in pixels.
        scale: Factor of the resizing.

    Returns:
        The center.
    """
    height, width = size
    left = max(0.0, (image.width - width / scale) / 2)
    top = max(0.0, (image.height - height / scale) / 2)
    # Resizing the box alone keeps a 1 x 10,000 image from becoming 256 x 2,560,000 on the way.
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def covering_scale(image: Image.Image, size: tuple[int, int]) -> float:
    """Find the factor by which an image must be resized to just cover a size in pixels."""
    return max(size[0] / image.height, size[1] / image.width)


def to_bytes(image: Image.Image) -> UInt8[Tensor, "channels height width"]:
    """Convert an 8-bit image to a tensor."""
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def to_unit(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert bytes to numbers in [0, 1]."""
    return images.float() / 255
