"""Data sets of the recipes.

An item is a pure function of (seed, epoch, sample id).

Axes: batch images, channels, height and width in pixels. `image_size` is (height, width).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset

from recipes.engine.data.images import Normalize, as_they_are, to_unit
from recipes.engine.seeds import sample_rng

# Photos and digits are drawn at random. An epoch is this many images.
IMAGES_PER_EPOCH = 12_800


# A model input (None if the image cannot be read) and its sample id.
Item = tuple[Tensor | None, int]


class TrainSet(Dataset[Item], ABC):
    """Images indexed by (epoch, sample id). The same index and seed give the same image."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples in an epoch."""

    @abstractmethod
    def __getitem__(self, index: tuple[int, int]) -> Item:
        """Return a model input (None if the image cannot be read) and its sample id."""

    def describe(self, sample_id: int) -> str:
        """Return a readable name of a sample."""
        return f"sample {sample_id}"


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Labelled model inputs for probes of frozen features.

    Attributes:
        train_images: Inputs to fit a probe on.
        train_labels: Their classes, counted from 0.
        test_images: Inputs to test the probe on, from other images or other parts of images.
        test_labels: Their classes.
    """

    train_images: Float[Tensor, "train channels height width"]
    train_labels: Int64[Tensor, " train"]
    test_images: Float[Tensor, "test channels height width"]
    test_labels: Int64[Tensor, " test"]


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set.

    Attributes:
        name: Value of `--data`.
        in_channels: Channels of an image.
        train: Training images.
        class_names: Names of the classes in the order of their labels; empty without labels.
        pictures: Held-out images [C, H, W] in [0, 1] whose reconstructions are drawn. Height and
            width are multiples of `image_size`. If empty, nothing is drawn.
        normalize: Turns images [B, C, H, W] in [0, 1] into model inputs, and also returns a mean
            and a standard deviation with `images == inputs * std + mean`.
        load_probe: Loads the labelled images for the probes; None without labels.
    """

    name: str
    in_channels: int
    train: TrainSet
    class_names: tuple[str, ...] = ()
    pictures: Sequence[Tensor] = ()
    normalize: Normalize = as_they_are
    load_probe: Callable[[], ProbeData] | None = None

    @cached_property
    def probe(self) -> ProbeData | None:
        """Labelled images for the probes, loaded at first use; None without labels."""
        return None if self.load_probe is None else self.load_probe()


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
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[tuple[int, int]]) -> list[Item]:
        """Return the items of a batch, normalized together. `DataLoader` calls this method."""
        images = torch.stack([self._draw(epoch, sample_id) for epoch, sample_id in indices])
        inputs, _, _ = self.normalize(to_unit(images))
        return [(image, index[1]) for image, index in zip(inputs, indices, strict=True)]

    def _draw(self, epoch: int, sample_id: int) -> UInt8[Tensor, "channels height width"]:
        rng = sample_rng(self.seed, epoch, sample_id)
        return self.source.draw(int(rng.integers(self.source.num_classes)), rng)


class Batch(NamedTuple):
    """The readable images of a batch.

    Attributes:
        images: Model inputs; shape (0, 0, 0, 0) if no image could be read.
        sample_ids: Sample id of each image.
        unreadable_ids: Sample ids of the images that could not be read.
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
