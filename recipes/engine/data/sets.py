"""Data sets of the recipes: images in, model inputs out, nothing random but by (seed, epoch, id).

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

# Photos and digits are drawn without end; this many images are called an epoch.
IMAGES_PER_EPOCH = 12_800


# A model input, None where the image cannot be read, and its sample id.
Item = tuple[Tensor | None, int]


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
        train: The images to train on.
        class_names: Names of the classes in the order of their labels; empty without labels.
        pictures: A few held-out images [C, H, W] in [0, 1] to show reconstructions of; height and
            width are multiples of `image_size`. None are shown if it is empty.
        normalize: Turns images [B, C, H, W] in [0, 1] into model inputs, a mean and a standard
            deviation with `images == inputs * std + mean`.
        load_probe: Draws the labelled images; None without labels.
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
