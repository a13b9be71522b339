"""Data sets of the recipes.

An item is a pure function of (seed, epoch, sample id).

Axes: batch images, channels, height and width in pixels. `image_size` is (height, width).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from recipes.engine.data.images import (
    Normalize,
    NormalizeByConstants,
    as_they_are,
    model_inputs,
    to_unit,
)
from recipes.engine.data.listing import Samples
from recipes.engine.data.statistics import Statistics
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng

# Photos and digits are drawn at random. An epoch is this many images.
IMAGES_PER_EPOCH = 12_800


# A run stops when more images than this and a larger share of the data set are unreadable.
MAX_UNREADABLE = 10
MAX_UNREADABLE_SHARE = 0.01

# An image (None if it cannot be read) and its sample id.
Item = tuple[Tensor | None, int]


class TrainSet(Dataset[Item], ABC):
    """Images indexed by (epoch, sample id). The same index and seed give the same image."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    @abstractmethod
    def __getitem__(self, index: tuple[int, int]) -> Item:
        """Return an image (None if it cannot be read) and its sample id.

        The image is a model input; or bytes (uint8), which `to_inputs` turns into one.
        """

    def to_inputs(self, images: Shaped[Tensor, batch * shape]) -> Float[Tensor, batch * shape]:
        """Turn images into model inputs, on the device that they are on.

        So bytes, not floats, cross from a worker to the training process and to the device.
        """
        return model_inputs(images, as_they_are)

    @property
    def byte_statistics(self) -> NormalizeByConstants | None:
        """How a model may do what `to_inputs` does with bytes, while it reads them.

        None: not at all, since images are floats, or `to_inputs` needs more than constants.
        """
        return None

    def to_device(self, batch: Batch, device: str) -> Batch:
        """Move the images of a batch to a device."""
        return batch._replace(images=batch.images.to(device, non_blocking=True))

    def describe(self, sample_id: int) -> str:
        """Return a readable name of a sample."""
        return f"sample {sample_id}"


@dataclass(frozen=True, eq=False)
class StoredSet(TrainSet):
    """Crops of stored samples. A subclass says how one is read and cropped.

    Attributes:
        samples: The samples, indexed by sample id.
        image_size: Size of a crop per axis.
        seed: Seed of the run.
        num_channels: Channels of a crop.
        dtype: Its type: bytes or floats.
        sizes_differ: Whether crops have sizes of their own instead of `image_size`.
    """

    samples: Samples
    image_size: tuple[int, ...]
    seed: int
    num_channels: int = 3
    dtype: torch.dtype = torch.uint8
    sizes_differ: bool = False

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        try:
            return self._crop(*index), index[1]
        except UnreadableError:
            return None, index[1]

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """Return a batch, which is filled in place. `DataLoader` calls this method."""
        if self.sizes_differ:
            return pack(self[index] for index in indices)
        shape = (len(indices), self.num_channels, *self.image_size)
        images = torch.empty(shape, dtype=self.dtype)
        sample_ids: list[int] = []
        unreadable_ids: list[int] = []
        for epoch, sample_id in indices:
            try:
                images[len(sample_ids)] = self._crop(epoch, sample_id)
                sample_ids.append(sample_id)
            except UnreadableError:
                unreadable_ids.append(sample_id)
        images = images[: len(sample_ids)]
        return Batch(images, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids)

    def _crop(self, epoch: int, sample_id: int) -> Shaped[Tensor, channels * spatial]:
        """Read and crop a sample.

        Raises:
            UnreadableError: If it cannot be read.
        """
        raise NotImplementedError

    def picture_size(self, sample_id: int) -> tuple[int, ...]:
        """Return the size of a picture to be shown: whole crops."""
        return self.image_size

    def describe(self, sample_id: int) -> str:
        """Return the path of a sample."""
        return self.samples.name(sample_id)


def check_readable(samples: TrainSet, unreadable: Collection[int]) -> None:
    """Check that few images are unreadable: the rule of every reader of a data set.

    Args:
        samples: The images.
        unreadable: Sample ids of the images that could not be read, in all processes.

    Raises:
        UserError: If more than 10 images and more than 1 % of all images are unreadable, or all.
    """
    limit = max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * len(samples))
    if len(unreadable) > limit or 0 < len(samples) == len(unreadable):
        examples = ", ".join(samples.describe(id) for id in sorted(unreadable)[:3])
        count = f"{len(unreadable)} of {len(samples)} images cannot"
        if len(unreadable) == len(samples):
            count = f"none of the {len(samples)} images can"
        raise UserError(f"{count} be read, among them {examples}: remove or replace them")


def read_first(
    samples: TrainSet, ids: Iterable[int], number: int, unreadable: set[int]
) -> Iterator[tuple[Tensor, int]]:
    """Read the first images that can be read, in epoch 0, and skip the others.

    Args:
        samples: The images.
        ids: Sample ids to try.
        number: Largest number of images to read.
        unreadable: Gets the ids of images that cannot be read.

    Yields:
        Images and sample ids.

    Raises:
        UserError: If too many cannot be read.
    """
    for sample_id in ids:
        if number == 0:
            return
        image, _ = samples[0, sample_id]
        if image is None:
            unreadable.add(sample_id)
            check_readable(samples, unreadable)
        else:
            number -= 1
            yield image, sample_id


def first_inputs(samples: TrainSet, number: int) -> Float[Tensor, "images channels *spatial"]:
    """Return the model inputs of the first images that can be read.

    Raises:
        UserError: If too many cannot be read.
    """
    images = [image for image, _ in read_first(samples, range(len(samples)), number, set())]
    return samples.to_inputs(torch.stack(images))


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Labelled model inputs for probes of frozen features.

    Attributes:
        train_images: Inputs to fit a probe on.
        train_labels: Their classes, counted from 0.
        test_images: Inputs to test the probe on, from other images or other parts of images.
        test_labels: Their classes.
    """

    train_images: Float[Tensor, "train channels *spatial"]
    train_labels: Int64[Tensor, " train"]
    test_images: Float[Tensor, "test channels *spatial"]
    test_labels: Int64[Tensor, " test"]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set.

    Attributes:
        name: Value of `--data`.
        in_channels: Channels of an image.
        train: Training images.
        class_names: Names of the classes in the order of their labels; empty without labels.
        pictures: Held-out images [C, *spatial] in [0, 1] whose reconstructions are drawn. Their
            sides are multiples of `image_size`. If empty, nothing is drawn.
        normalize: Turns images [B, C, *spatial] in [0, 1] into model inputs, and also returns a
            mean and a standard deviation with `images == inputs * std + mean`.
        load_probe: Loads the labelled images for the probes; None without labels.
        content: Number and hash of stored samples; None if images are drawn.
        image_size: Size of a model input per axis, where the samples decide how many axes it has.
        statistics: What arrays are normalised by; None for pictures.
        held_out: Test samples of a folder, cropped without chance.
    """

    name: str
    in_channels: int
    train: TrainSet
    class_names: tuple[str, ...] = ()
    pictures: Sequence[Tensor] = ()
    normalize: Normalize = as_they_are
    load_probe: Callable[[], ProbeData] | None = None
    content: str | None = None
    image_size: tuple[int, ...] | None = None
    statistics: Statistics | None = None
    held_out: StoredSet | None = None

    @cached_property
    def probe(self) -> ProbeData | None:
        """Labelled images for the probes, loaded at first use; None without labels."""
        return None if self.load_probe is None else self.load_probe()


class Batch(NamedTuple):
    """The readable images of a batch.

    Attributes:
        images: Model inputs, or bytes until they are on the device; none if no image could be read.
        sample_ids: Sample id of each image.
        unreadable_ids: Sample ids of the images that could not be read.
        targets: What is in each image, where the data set loads it with the image.
        shapes: Shape of each image, if they differ. `images` is a list on the device, and before
            that one row of all their values: a worker sends one tensor, not one for each image.
    """

    images: Any
    sample_ids: Int64[Tensor, " batch"]
    unreadable_ids: list[int]
    targets: tuple[Any, ...] = ()
    shapes: tuple[tuple[int, ...], ...] | None = None


def pack(items: Iterable[Item]) -> Batch:
    """Put the readable items of a batch, of any sizes, into one row of values."""
    found = list(items)
    images = [image for image, _ in found if image is not None]
    return Batch(
        torch.cat([image.flatten() for image in images]) if images else torch.empty(0),
        torch.tensor([id for image, id in found if image is not None], dtype=torch.int64),
        [id for image, id in found if image is None],
        shapes=tuple(tuple(image.shape) for image in images),
    )


def unpack(batch: Batch) -> list[Tensor]:
    """Return the images of a batch that `pack` has made, without a copy."""
    assert batch.shapes is not None
    rows = batch.images.split([math.prod(shape) for shape in batch.shapes])
    return [row.view(shape) for row, shape in zip(rows, batch.shapes, strict=True)]


def collate(items: Batch | Iterable[Item]) -> Batch:
    """Stack the readable items of a batch, if the data set has not done so."""
    if isinstance(items, Batch):
        return items
    images, sample_ids, unreadable_ids = [], [], []
    for image, sample_id in items:
        if image is None:
            unreadable_ids.append(sample_id)
        else:
            images.append(image)
            sample_ids.append(sample_id)
    stacked = torch.stack(images) if images else torch.empty(0, 0, 0, 0)
    return Batch(stacked, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids)


class ImageSource(Protocol):
    """Draws random images of a class."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""

    def draw(self, label: int, rng: np.random.Generator) -> UInt8[Tensor, "channels height width"]:
        """Draw an image of one class."""


@dataclass(frozen=True, eq=False)
class DrawnImages(TrainSet):
    """Training images that are drawn rather than stored.

    Attributes:
        source: Draws the images; classes are equally likely.
        normalize: As in `DataSet`.
        seed: Seed of the run.
    """

    source: ImageSource
    normalize: Normalize
    seed: int

    def __len__(self) -> int:
        return IMAGES_PER_EPOCH

    def __getitem__(self, index: tuple[int, int]) -> Item:
        return self._draw(*index), index[1]

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """Return a batch. `DataLoader` calls this method."""
        images = torch.stack([self._draw(epoch, sample_id) for epoch, sample_id in indices])
        sample_ids = torch.tensor([sample_id for _, sample_id in indices])
        return Batch(images, sample_ids, [])

    def to_inputs(self, images: Shaped[Tensor, batch * shape]) -> Float[Tensor, batch * shape]:
        """Normalize images."""
        return model_inputs(images, self.normalize)

    @property
    def byte_statistics(self) -> NormalizeByConstants | None:
        """The constants, if these are what normalizes."""
        return self.normalize if isinstance(self.normalize, NormalizeByConstants) else None

    def _draw(self, epoch: int, sample_id: int) -> UInt8[Tensor, "channels height width"]:
        rng = sample_rng(self.seed, epoch, sample_id)
        return self.source.draw(int(rng.integers(self.source.num_classes)), rng)


def draw_probe(
    train: ImageSource,
    test: ImageSource,
    normalize: Normalize,
    *,
    train_per_class: int,
    num_test: int,
    seed: int,
) -> ProbeData:
    """Draw labelled images for the probes, the same number of each class.

    Args:
        train: Draws the images to fit a probe on.
        test: Draws the images to test it on.
        normalize: As in `DataSet`.
        train_per_class: Training images per class.
        num_test: Test images in total.
        seed: Seed of the run.

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
