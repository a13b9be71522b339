"""Labelled images to train and test a classifier."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from recipes.engine.data.augment import Augmentation
from recipes.engine.data.decode import DECODE, Decoder
from recipes.engine.data.folder import Crops, Share, alone, split_folder
from recipes.engine.data.images import NORMALIZE, CenterCrops
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import DataSet, Item, ProbeData, TrainSet
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
    image_size: tuple[int, int],
    augmentation: Augmentation,
    seed: int,
    decode: Decoder = DECODE,
    share: Share = alone,
) -> LabelledData:
    """Load a labelled data set.

    Args:
        name: "photos" or "digits", with 50 labelled crops per class; or a folder with
            `train/<class>/<image>` and optionally `val/<class>/<image>`. Without `val/`, a tenth of
            each class is held out.
        image_size: Height and width of a model input in pixels.
        augmentation: Augmentation of the images in a folder. Photos are only flipped, and digits
            are not augmented.
        seed: Seed of the run.
        decode: How the images in a folder are decoded.
        share: How several processes list a folder: `World.share`.

    Raises:
        UserError: If there is no such data set, or it has no labels.
    """
    if name not in ("photos", "digits") and Path(name).is_dir():
        return _load_folder(name, image_size, augmentation, seed, decode, share)
    data = load_data(name, image_size=image_size, seed=seed)
    probe: ProbeData | None = data.probe
    assert probe is not None  # bundled sets have labels
    images = StoredImages(probe.train_images, flip=name == "photos", seed=seed)
    test = StoredImages(probe.test_images, flip=False, seed=seed)
    return LabelledData(
        _with_train(data, images), probe.train_labels, test, probe.test_labels
    )  # fmt: skip


def _load_folder(
    name: str,
    image_size: tuple[int, int],
    augmentation: Augmentation,
    seed: int,
    decode: Decoder,
    share: Share,
) -> LabelledData:
    no_labels = UserError(f"--data {name} has no labels: expected train/<class>/<image> in it")
    if not (Path(name) / "train").is_dir():
        raise no_labels
    split = split_folder(Path(name), share)
    if not split.class_names:
        raise no_labels
    train, test = (
        Crops(samples, decode, crop, image_size, seed)
        for samples, crop in ((split.train, augmentation), (split.held_out, CenterCrops()))
    )
    data = DataSet(
        name=name,
        in_channels=3,
        class_names=split.class_names,
        train=train,
        normalize=NORMALIZE,
        content=split.content,
    )
    train_labels, test_labels = map(torch.from_numpy, (split.train.labels, split.held_out.labels))
    return LabelledData(data, train_labels, test, test_labels)


def _with_train(data: DataSet, train: TrainSet) -> DataSet:
    return dataclasses.replace(data, train=train, pictures=[])
