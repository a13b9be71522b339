"""A folder of images as a data set.

A folder has one of two layouts. With labels: `train/<class>/<image>`, and optionally
`val/<class>/<image>`. Without labels: images at any depth, in the folder itself or in its `train/`
and `val/`. Names that begin with a dot are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipes.engine.data.files import (
    NUM_PICTURES,
    UNREADABLE,
    ImageFiles,
    check_readable,
    first_readable,
    hold_out,
    list_images,
    read_image,
    relabel,
)
from recipes.engine.data.images import (
    NORMALIZE,
    RandomCrops,
    center_crop_to,
    model_input,
    picture_size,
    to_bytes,
    to_unit,
)
from recipes.engine.data.sets import DataSet, Item, ProbeData, TrainSet
from recipes.engine.errors import UserError
from recipes.engine.seeds import sample_rng

PROBE_PER_CLASS = 50
# At 224 pixels this many inputs take 1.5 GB. With many classes, each gets fewer than 50 images.
MAX_PROBE = 2_500


@dataclass(frozen=True, eq=False)
class FolderImages(TrainSet):
    """Random crops of the images in a folder.

    Attributes:
        files: The images, indexed by sample id.
        image_size: Height and width of a crop in pixels.
        seed: Seed of the run.
        crops: How crops are drawn.
    """

    files: ImageFiles
    image_size: tuple[int, int]
    seed: int
    crops: RandomCrops = RandomCrops()
    _unreadable: set[int] = field(default_factory=set, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        epoch, sample_id = index
        try:
            image = read_image(self.files.path(sample_id))
        except UNREADABLE:
            self._unreadable.add(sample_id)
            check_readable(self.files, self._unreadable)
            return None, sample_id
        rng = sample_rng(self.seed, epoch, sample_id)
        crop = self.crops(image, self.image_size, rng)
        if rng.integers(2):
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return model_input(crop), sample_id

    def describe(self, sample_id: int) -> str:
        """Return the path of an image."""
        return str(self.files.path(sample_id))


def load_folder(
    name: str, *, image_size: tuple[int, int], seed: int, crops: RandomCrops
) -> DataSet:
    """Load a folder of images.

    Without `val/`, the last tenth of each class is held out; without labels, the last 4 images. A
    probe is fitted on up to 50 images per class and tested on up to 50, each at most 2,500 in
    total.

    Args:
        name: Path of the folder.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the run.
        crops: How random crops are drawn.

    Returns:
        The data set.

    Raises:
        UserError: If the folder holds too few readable images, or only some of them have classes.
    """
    folder = Path(name)
    has_train = (folder / "train").is_dir()
    train, class_names = list_images(folder / "train" if has_train else folder, labelled=has_train)
    if has_train and (folder / "val").is_dir():
        held_out, val_names = list_images(folder / "val", labelled=bool(class_names))
        held_out = relabel(held_out, val_names, class_names)
    else:
        train, held_out = hold_out(train, labelled=bool(class_names))

    pictures = [
        to_unit(to_bytes(center_crop_to(image, picture_size(image_size))))
        for image in first_readable(held_out, spread(len(held_out)), NUM_PICTURES)
    ]
    if not pictures:
        raise UserError(f"none of the {len(held_out)} held-out images in {name} can be read")
    if not list(first_readable(train, range(len(train)), 1)):
        raise UserError(f"none of the {len(train)} training images in {name} can be read")
    return DataSet(
        name=name,
        in_channels=3,
        class_names=class_names,
        train=FolderImages(train, image_size, seed, crops),
        pictures=pictures,
        normalize=NORMALIZE,
        load_probe=partial(load_probe, train, held_out, len(class_names), image_size, seed)
        if class_names
        else None,
    )


def spread(number: int) -> list[int]:
    """Order indices so that the first few are evenly spaced over all of them."""
    step = max(1, number // NUM_PICTURES)
    return [index for start in range(step) for index in range(start, number, step)]


def load_probe(
    train: ImageFiles,
    held_out: ImageFiles,
    num_classes: int,
    image_size: tuple[int, int],
    seed: int,
) -> ProbeData:
    """Read labelled images for the probes, the same number of each class where there are enough.

    Args:
        train: Files to fit a probe on.
        held_out: Files to test it on.
        num_classes: Number of classes in `train`.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the run.

    Returns:
        Center crops with their labels.
    """
    per_class = max(1, min(PROBE_PER_CLASS, MAX_PROBE // num_classes))

    def read(files: ImageFiles, part: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(seed, part)
        inputs: list[Tensor] = []
        labels: list[int] = []
        for label in range(num_classes):
            order = rng.permutation(np.flatnonzero(files.labels == label))
            for image in first_readable(files, order.tolist(), per_class):
                inputs.append(model_input(center_crop_to(image, image_size)))
                labels.append(label)
        return torch.stack(inputs), torch.tensor(labels)

    return ProbeData(*read(train, part=0), *read(held_out, part=1))
