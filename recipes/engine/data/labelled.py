"""Labelled images to train and test a classifier."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from recipes.engine.data.arrays import AS_FITS, ArrayOptions
from recipes.engine.data.augment import Augmentation
from recipes.engine.data.decode import DECODE, Decoder
from recipes.engine.data.folder import Share, alone, load_folder
from recipes.engine.data.load import load_data
from recipes.engine.data.on_gpu import decoded_on
from recipes.engine.data.sets import DataSet, Item, ProbeData, StoredSet, TrainSet
from recipes.engine.data.statistics import FindStatistics, unknown
from recipes.engine.errors import UserError
from recipes.engine.seeds import sample_rng


@dataclass(frozen=True, eq=False)
class LabelledData:
    """Labelled images.

    Attributes:
        images: The data set. Its `train` holds the labelled training images.
        train_labels: Class of each training image by sample id, counted from 0.
        test: Test images, without augmentation.
        test_labels: Class of each test image by sample id.
    """

    images: DataSet
    train_labels: Int64[Tensor, " train"]
    test: TrainSet
    test_labels: Int64[Tensor, " test"]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.images.class_names)

    def decoded_on(self, name: str) -> Self:
        """Let training images be decoded where `--decode` says, as `on_gpu.decoded_on` does."""
        return dataclasses.replace(self, images=decoded_on(name, self.images))


@dataclass(frozen=True, eq=False)
class StoredImages(TrainSet):
    """Model inputs in memory.

    Attributes:
        inputs: The inputs, indexed by sample id.
        flip: Whether to flip each image horizontally with probability 1/2.
        seed: Seed of the run.
    """

    inputs: Float[Tensor, "images channels height width"]
    flip: bool
    seed: int

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        epoch, sample_id = index
        image = self.inputs[sample_id]
        flipped = self.flip and sample_rng(self.seed, epoch, sample_id).integers(2)
        return (image.flip(-1) if flipped else image), sample_id


def load_labelled(
    name: str,
    *,
    image_size: int | tuple[int, ...],
    augmentation: Augmentation,
    seed: int,
    decode: Decoder = DECODE,
    options: ArrayOptions = AS_FITS,
    find_statistics: FindStatistics = unknown,
    share: Share = alone,
) -> LabelledData:
    """Load a labelled data set.

    Args:
        name: "photos" or "digits", with 50 labelled crops per class; or a folder with
            `train/<class>/<image>` and optionally `val/<class>/<image>`. Without `val/`, a tenth of
            each class is held out.
        image_size: Size of a model input per axis; one integer if it is the same on every axis.
        augmentation: Augmentation of the images in a folder. Photos are only flipped, and digits
            are not augmented; arrays are cropped as `options` says.
        seed: Seed of the run.
        decode: How the images in a folder are decoded.
        options: How arrays are read; for folders only.
        find_statistics: As in `load_data`.
        share: How several processes list a folder: `World.share`.

    Raises:
        UserError: If there is no such data set, or it has no labels.
    """
    if name not in ("photos", "digits") and Path(name).is_dir():
        if not (Path(name) / "train").is_dir():
            raise _without_labels(name)
        data = load_folder(
            name,
            image_size=image_size,
            seed=seed,
            crop=augmentation,
            decode=decode,
            options=options,
            find_statistics=find_statistics,
            share=share,
        )
        check_classes(data)
        if augmentation.policy is not None and data.statistics is not None:
            raise UserError("--augment randaugment is for RGB pictures: choose --augment crop")
        return _of_folder(data)
    data = load_data(name, image_size=image_size, seed=seed)
    probe: ProbeData | None = data.probe
    assert probe is not None  # bundled sets have labels
    images = StoredImages(probe.train_images, flip=name == "photos", seed=seed)
    test = StoredImages(probe.test_images, flip=False, seed=seed)
    return LabelledData(
        _with_train(data, images), probe.train_labels, test, probe.test_labels
    )  # fmt: skip


def check_classes(data: DataSet) -> None:
    """Check that there are two classes or more.

    Raises:
        UserError: There are not.
    """
    if not data.class_names:
        raise _without_labels(data.name)
    if len(data.class_names) == 1:
        raise UserError(
            f"--data {data.name} has one class ({data.class_names[0]}): a classifier needs two or "
            "more folders in train/"
        )


def _without_labels(name: str) -> UserError:
    return UserError(f"--data {name} has no labels: expected train/<class>/<file> in it")


def _of_folder(data: DataSet) -> LabelledData:
    train, held_out = data.train, data.held_out
    assert isinstance(train, StoredSet)
    assert held_out is not None
    labels = (torch.from_numpy(part.samples.labels) for part in (train, held_out))
    train_labels, test_labels = labels
    return LabelledData(data, train_labels, held_out, test_labels)


def _with_train(data: DataSet, train: TrainSet) -> DataSet:
    return dataclasses.replace(data, train=train, pictures=[])
