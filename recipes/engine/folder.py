"""A folder of images as a data set.

Two shapes are understood: `train/<class>/<image>` with an optional `val/<class>/<image>`, which
gives labels; and images at any depth, in the folder itself or in its `train/` and `val/`, which
gives none. Names that begin with a dot are passed over.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from recipes.engine.data import (
    PICTURE_SIZE,
    DataSet,
    Interpolation,
    Item,
    NormalizeByConstants,
    ProbeData,
    TrainSet,
    center_crop,
    covering_scale,
    sample_rng,
    to_bytes,
    to_unit,
)
from recipes.engine.errors import UserError

try:
    import simplejpeg
except ModuleNotFoundError:  # Pillow reads the same files in about twice the time.
    simplejpeg = None

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What Pillow raises for files that are missing, cut off, no images or absurdly large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# A run goes on while no more images than this, and no larger share of the set, are unreadable.
MAX_UNREADABLE = 10
MAX_UNREADABLE_SHARE = 0.01

# ImageNet's statistics and the papers' augmentation.
NORMALIZE = NormalizeByConstants(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CROP_RATIO = (3 / 4, 4 / 3)
# Evaluation resizes to 256 pixels to cut out 224.
CENTER_MARGIN = 256 / 224

NUM_PICTURES = 4
HELD_OUT_SHARE = 0.1
PROBE_PER_CLASS = 50
# At 224 pixels this many inputs take 1.5 GB; with many classes each has fewer than 50.
MAX_PROBE = 2_500


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        root: The folder.
        paths: Paths inside the folder, encoded for the file system. One array, because the pages
            of a list of a million strings are copied into every worker as it counts references.
        labels: Class of each file, counted from 0; 0 throughout without labels.
    """

    root: Path
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Give the path of a file."""
        return self.root / os.fsdecode(self.paths[index])

    def subset(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> ImageFiles:
        """Choose files by their indices or by a boolean for each."""
        return ImageFiles(self.root, self.paths[chosen], self.labels[chosen])


@dataclass(frozen=True)
class RandomCrops:
    """How random crops are taken.

    Attributes:
        area: Least and largest share of an image in a crop.
        interpolation: How crops are resized.

    Source:
        torchvision `RandomResizedCrop` as the papers use it: ratio 3/4-4/3, ten attempts and then
        the largest central box; its draws come from another generator. MAE and ConvMAE take areas
        of 20-100 % and resize bicubically, SimMIM 67-100 %, bilinearly, CAE 8-100 %.
    """

    area: tuple[float, float] = (0.2, 1.0)
    interpolation: Interpolation = "bicubic"

    def __call__(
        self, image: Image.Image, size: tuple[int, int], rng: np.random.Generator
    ) -> Image.Image:
        """Cut a box out of an image and resize it to height and width in pixels."""
        box = random_box(image.width, image.height, rng, area=self.area)
        height, width = size
        resampling = Image.Resampling[self.interpolation.upper()]
        return image.crop(box).resize((width, height), resampling)


@dataclass(frozen=True, eq=False)
class FolderImages(TrainSet):
    """Random crops of the images of a folder.

    Attributes:
        files: The images; a sample id counts them.
        image_size: Height and width of a crop in pixels.
        seed: Seed of the run.
        crops: How they are taken.
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
        """Give the path of an image."""
        return str(self.files.path(sample_id))


def load_folder(
    name: str, *, image_size: tuple[int, int], seed: int, crops: RandomCrops
) -> DataSet:
    """Load a folder of images.

    Without `val/`, the last tenth of each class is held out, or without labels the last 4 images.
    A class has up to 50 labelled images to fit a probe on and 50 to test it, 2,500 of all classes.

    Args:
        name: Path of the folder.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the crops.
        crops: How random crops are taken.

    Returns:
        The data set.

    Raises:
        UserError: The folder holds too few readable images, or only some of them have classes.
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


# Files


def list_images(root: Path, *, labelled: bool) -> tuple[ImageFiles, tuple[str, ...]]:
    """List the images below a folder, and the classes if each image lies in a folder of its class.

    Args:
        root: The folder.
        labelled: Whether the folders inside are classes.

    Returns:
        The files in the order of their paths, and the names of their classes; no names if the
        folder has no folders with images inside.

    Raises:
        UserError: There are no images, or only some lie in folders.
    """
    # By parts: as whole strings "cat-2/1.jpg" would come before "cat/1.jpg".
    paths = sorted(find_images(root), key=lambda path: path.split("/"))
    if not paths:
        raise UserError(f"{root} holds no images: expected files ending in {', '.join(SUFFIXES)}")
    classes = [path.partition("/")[0] for path in paths if "/" in path]
    if not labelled or not classes:
        return ImageFiles(root, encode(paths), np.zeros(len(paths), np.int64)), ()
    if len(classes) < len(paths):
        stray = next(path for path in paths if "/" not in path)
        raise UserError(
            f"{root / stray} has no class while other images do: "
            "move it into the folder of its class, or all images into one folder"
        )
    class_names, labels = np.unique(classes, return_inverse=True)
    return ImageFiles(root, encode(paths), labels), tuple(class_names.tolist())


def find_images(root: Path) -> Iterator[str]:
    """Find the images below a folder, links followed; paths are relative and use slashes."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (inside / name).as_posix()


def encode(paths: list[str]) -> NDArray[np.bytes_]:
    """Put paths into one array."""
    return np.array([os.fsencode(path) for path in paths])


def relabel(files: ImageFiles, names: tuple[str, ...], class_names: tuple[str, ...]) -> ImageFiles:
    """Renumber the classes of held-out files as in training.

    Args:
        files: The held-out files.
        names: Names of their classes.
        class_names: Names of the training classes.

    Returns:
        The files with new labels.

    Raises:
        UserError: The held-out files have no classes while the training images do, or others.
    """
    if class_names and not names:
        raise UserError(f"{files.root} has no class folders while the training images do")
    if unknown := sorted(set(names) - set(class_names)):
        raise UserError(f"{files.root / unknown[0]} is a class without training images")
    if not names:
        return files
    labels = np.array([class_names.index(name) for name in names])
    return ImageFiles(files.root, files.paths, labels[files.labels])


def hold_out(files: ImageFiles, *, labelled: bool) -> tuple[ImageFiles, ImageFiles]:
    """Split files into those to train on and the last ones, held out.

    Args:
        files: The files, those of a class in one run.
        labelled: Whether to hold out a tenth of each class, at least one image, rather than the
            last images of the folder.

    Returns:
        Files to train on and files held out.

    Raises:
        UserError: There are too few to split.
    """
    counts = np.bincount(files.labels)
    if labelled:
        num_held_out = np.maximum(1, (counts * HELD_OUT_SHARE).astype(np.int64))
    else:
        num_held_out = np.minimum(NUM_PICTURES, counts // 2)
    # Rank 1 is a class's last file.
    rank = counts.cumsum()[files.labels] - np.arange(len(files))
    is_held_out = (rank <= num_held_out[files.labels]) & (counts[files.labels] > 1)
    if not is_held_out.any():
        raise UserError(
            f"{files.root} has too few images to hold one out: "
            "give two or more, or a val folder beside train"
        )
    return files.subset(~is_held_out), files.subset(is_held_out)


# Images


def read_image(path: Path) -> Image.Image:
    """Read a file as RGB, its orientation tag ignored as the papers' loaders do.

    Args:
        path: The file.

    Returns:
        The image.

    Raises:
        OSError: It is no image, or one of the other errors in `UNREADABLE`.
    """
    data = path.read_bytes()
    if simplejpeg is not None and data.startswith(b"\xff\xd8"):
        with suppress(ValueError):  # CMYK, or damaged: Pillow decides.
            return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_readable(files: ImageFiles, unreadable: Iterable[int]) -> None:
    """Stop once too many images turned out unreadable.

    Args:
        files: The images.
        unreadable: Indices of those that could not be read.

    Raises:
        UserError: There are more than 10 of them, and more than 1 % of the images.
    """
    indices = sorted(unreadable)
    limit = max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * len(files))
    if len(indices) > limit:
        examples = ", ".join(str(files.path(index)) for index in indices[:3])
        raise UserError(
            f"{len(indices)} of {len(files)} images cannot be read, among them {examples}: "
            "remove or replace them"
        )


def first_readable(files: ImageFiles, order: Iterable[int], number: int) -> Iterator[Image.Image]:
    """Read the first images that can be read; an unreadable one makes room for the next.

    Args:
        files: The files.
        order: Indices of the files to try.
        number: How many images to read at most.

    Yields:
        The images.

    Raises:
        UserError: Too many cannot be read.
    """
    unreadable: set[int] = set()
    for index in order:
        if number == 0:
            return
        try:
            image = read_image(files.path(index))
        except UNREADABLE:
            unreadable.add(index)
            check_readable(files, unreadable)
            continue
        number -= 1
        yield image


def random_box(
    width: int, height: int, rng: np.random.Generator, *, area: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draw left, top, right and bottom of a box inside an image, in pixels."""
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


def center_crop_to(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cut out the center as evaluation does: 224 of 256 pixels of the shorter side."""
    return center_crop(image, size, scale=covering_scale(image, size) * CENTER_MARGIN)


def model_input(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Normalize a crop."""
    inputs, _, _ = NORMALIZE(to_unit(to_bytes(image))[None])
    return inputs[0]


def picture_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Size a picture of whole tiles: as many as fit 192 pixels, at least one, on each side."""
    height, width = (side * max(1, PICTURE_SIZE // side) for side in image_size)
    return height, width


# Probe


def spread(number: int) -> list[int]:
    """Order indices so that the first few lie evenly over all of them."""
    step = max(1, number // NUM_PICTURES)
    return [index for start in range(step) for index in range(start, number, step)]


def load_probe(
    train: ImageFiles,
    held_out: ImageFiles,
    num_classes: int,
    image_size: tuple[int, int],
    seed: int,
) -> ProbeData:
    """Read labelled images, as many of each class where there are.

    Args:
        train: Files to fit on.
        held_out: Files to score on.
        num_classes: Classes in `train`.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the choice.

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
