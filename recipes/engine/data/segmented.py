"""Images with a class for every pixel.

An item has four channels of bytes: the image, then the label of each pixel, so that both are
cropped, flipped, batched and moved together. `IGNORED` marks pixels that do not count.

A folder has ADE20K's layout: `images/training/<name>.jpg` with `annotations/training/<name>.png`,
and `validation` beside `training`. `labels` or `masks` may stand for `annotations`, and `train` and
`val` for `training` and `validation`; without these, the last tenth of the images is held out.
"""

from __future__ import annotations

import copy
import hashlib
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from mimkit._text import escaped
from recipes.engine.data.decode import Decoder, formats, open_picture
from recipes.engine.data.images import NORMALIZE, Normalize, model_inputs, normalize_by_image
from recipes.engine.data.listing import MAX_FILE_BYTES, Samples, hold_out, list_files
from recipes.engine.data.scenes import CLASSES, Part, Scenes, load_scenes
from recipes.engine.data.sets import Item, TrainSet
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError, read_bytes
from recipes.engine.seeds import sample_rng

IGNORED = 255
COLORS = 3
SURFACE = "surface"
TRAIN_SCENES, TEST_SCENES = 200, 200
_LABEL_FOLDERS = ("annotations", "labels", "masks")
_SPLITS = (("training", "validation"), ("train", "val"))

Labelled = UInt8[Tensor, "4 height width"]


@dataclass(frozen=True, eq=False)
class SegmentedData:
    """A data set for segmentation.

    Attributes:
        name: Value of `--data`.
        train: Training images, augmented.
        test: Held-out images as they are; their sizes may differ.
        class_names: Names of the classes, or their numbers.
        content: Number and hash of stored samples; None if images are composed.
    """

    name: str
    train: Segmented
    test: Segmented
    class_names: tuple[str, ...]
    content: str | None = None


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, flip and photometric distortion of an image with its labels.

    Attributes:
        scale: Least and largest shorter side, in shorter sides of the crop.
        distort: Whether brightness, contrast, saturation and hue are changed at random.

    Source:
        mmsegmentation `Resize`, `RandomCrop` (`cat_max_ratio=0.75`), `RandomFlip`,
        `PhotoMetricDistortion`, `Pad`, in this order. Contrast and saturation change about gray
        here, as in torchvision, and saturation and hue in a linear color space.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    distort: bool = True

    def __call__(self, item: Labelled, size: tuple[int, int], rng: np.random.Generator) -> Labelled:
        """Augment an item; `size` is height and width of the result in pixels."""
        factor = rng.uniform(*self.scale) * fitting_factor(tuple(item.shape[1:]), min(size))
        item = _resized(item, factor)
        item = _padded(_cropped(item, size, rng), size)
        if rng.integers(2):
            item = item.flip(-1)
        return _distorted(item, rng) if self.distort else item


def fitting_factor(size: tuple[int, ...], side: int) -> float:
    """Return the factor that brings the shorter side to `side`, and the longer to 4 x `side`."""
    return min(side / min(size), 4 * side / max(size))


def _resized(item: Labelled, factor: float) -> Labelled:
    if factor == 1:
        return item
    size = [max(1, round(length * factor)) for length in item.shape[1:]]
    image = F.interpolate(item[None, :COLORS], size, mode="bilinear", antialias=factor < 1)
    labels = F.interpolate(item[None, COLORS:], size, mode="nearest-exact")
    return torch.cat([image, labels], dim=1)[0]


def _cropped(item: Labelled, size: tuple[int, int], rng: np.random.Generator) -> Labelled:
    """Crop a random box in which no class has more than 75 % of the pixels, in ten attempts."""
    height, width = (min(pair) for pair in zip(size, item.shape[1:], strict=True))
    crop = item
    for _ in range(10):
        top = int(rng.integers(item.shape[1] - height + 1))
        left = int(rng.integers(item.shape[2] - width + 1))
        crop = item[:, top : top + height, left : left + width]
        counts = np.bincount(crop[COLORS].flatten().numpy(), minlength=IGNORED + 1)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    return crop


def _padded(item: Labelled, size: tuple[int, int]) -> Labelled:
    """Pad right and bottom with the mean color and pixels that do not count."""
    height, width = item.shape[1:]
    if (height, width) == size:
        return item
    padded = torch.full((len(item), *size), IGNORED, dtype=torch.uint8)
    padded[:COLORS] = torch.tensor([round(255 * mean) for mean in NORMALIZE.mean])[:, None, None]
    padded[:, :height, :width] = item
    return padded


def _distorted(item: Labelled, rng: np.random.Generator) -> Labelled:
    """Change brightness, contrast, saturation and hue, each with probability 1/2."""
    image = item[:COLORS].float()
    if rng.integers(2):
        image = image + rng.uniform(-32, 32)
    if rng.integers(2):
        image = 128 + (image - 128) * rng.uniform(0.5, 1.5)
    gray = image.mean(dim=0, keepdim=True)
    if rng.integers(2):
        image = gray + (image - gray) * rng.uniform(0.5, 1.5)
    if rng.integers(2):
        image = torch.tensordot(_hue_rotation(math.radians(rng.uniform(-18, 18))), image, dims=1)
    return torch.cat([image.round().clamp(0, 255).to(torch.uint8), item[COLORS:]])


def _hue_rotation(angle: float) -> Float[Tensor, "3 3"]:
    """Rotate colors about gray."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    cosine = math.cos(angle)
    return cosine * torch.eye(3) + (1 - cosine) / 3 + math.sin(angle) * cross


class Segmented(TrainSet):
    """Items that are read, then augmented if there is an augmentation.

    Args:
        augmentation: The augmentation; None for items as they are.
        image_size: Height and width of augmented items in pixels.
        normalize: Normalization of images in [0, 1].
        seed: Seed of the augmentation.
    """

    def __init__(
        self,
        augmentation: Augmentation | None,
        image_size: tuple[int, int],
        normalize: Normalize,
        seed: int,
    ) -> None:
        self.augmentation = augmentation
        self.image_size = image_size
        self.normalize = normalize
        self.seed = seed

    @abstractmethod
    def read(self, sample_id: int) -> Labelled:
        """Return an item as it is stored.

        Raises:
            UnreadableError: If it cannot be read.
        """

    def seeded(self, seed: int) -> Segmented:
        """Return the same items with another seed of the augmentation."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def __getitem__(self, index: tuple[int, int]) -> Item:
        epoch, sample_id = index
        try:
            item = self.read(sample_id)
        except UnreadableError:
            return None, sample_id
        if self.augmentation is not None:
            item = self.augmentation(item, self.image_size, sample_rng(self.seed, epoch, sample_id))
        return item, sample_id

    def to_inputs(
        self, images: UInt8[Tensor, "batch 4 height width"]
    ) -> Float[Tensor, "batch 4 height width"]:
        """Normalize the images, and keep the labels as numbers."""
        inputs = model_inputs(images[:, :COLORS], self.normalize)
        return torch.cat([inputs, images[:, COLORS:].float()], dim=1)


class SceneItems(Segmented):
    """Scenes, each composed when it is first read, and kept.

    Args:
        scenes: The scenes.
        rest: As in `Segmented`.
    """

    def __init__(self, scenes: Scenes, *rest: Any) -> None:
        super().__init__(*rest)
        self.scenes = scenes
        self._items: dict[int, Labelled] = {}

    def __len__(self) -> int:
        return len(self.scenes)

    def read(self, sample_id: int) -> Labelled:
        """Return a scene's image with its labels."""
        if sample_id not in self._items:
            scene = self.scenes[sample_id]
            self._items[sample_id] = torch.cat([scene.image, scene.labels[None]])
        return self._items[sample_id]


class FilesWithLabels(Segmented):
    """Images in files, each with a PNG of labels.

    Args:
        images: The images.
        labels: Path of the labels of every image of the folder, by its row.
        decode: How images are decoded.
        meaning: What the values of labels mean.
        rest: As in `Segmented`.
    """

    def __init__(
        self,
        images: Samples,
        labels: Sequence[Path],
        decode: Decoder,
        meaning: LabelMeaning,
        *rest: Any,
    ) -> None:
        super().__init__(*rest)
        self.images, self.labels = images, labels
        self.decode, self.meaning = decode, meaning

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, sample_id: int) -> str:
        """Return the path of an image."""
        return self.images.name(sample_id)

    def read(self, sample_id: int) -> Labelled:
        """Return an image with its labels.

        Raises:
            UnreadableError: If one of the two cannot be read.
            UserError: If the labels have another size, or values that are no class.
        """
        pixels = self.decode(self.images.read(sample_id))
        file = self.labels[self.images.rows[sample_id]]
        labels = self.meaning.classes(read_labels(file), file)
        if labels.shape != pixels.shape[:2]:
            sizes = [" x ".join(map(str, array.shape[:2])) for array in (labels, pixels)]
            raise UserError(
                f"the labels {file} have {sizes[0]} pixels, their image "
                f"{self.describe(sample_id)} has {sizes[1]}: replace one of them"
            )
        return torch.from_numpy(np.concatenate([pixels, labels[..., None]], axis=2)).movedim(2, 0)


@dataclass(frozen=True)
class LabelMeaning:
    """What the values in a file of labels mean.

    Attributes:
        num_classes: Number of classes.
        ignore_label: Value of pixels that do not count.
        zero_is_ignored: Whether 0 is such a value, too, and 1 the first class.
    """

    num_classes: int
    ignore_label: int = IGNORED
    zero_is_ignored: bool = False

    def classes(self, values: NDArray[np.int64], file: Path) -> NDArray[np.uint8]:
        """Return the class of each pixel, or `IGNORED`.

        Raises:
            UserError: If a value is no class.
        """
        first = int(self.zero_is_ignored)
        ignored = values == self.ignore_label
        if self.zero_is_ignored:
            ignored |= values == 0
        numbers = values - first
        wrong = ~ignored & ((numbers < 0) | (numbers >= self.num_classes))
        if wrong.any():
            raise UserError(
                f"the labels {file} hold {values[wrong].flat[0]}, where the classes are {first} to "
                f"{self.num_classes - 1 + first} (--num-classes {self.num_classes}) and "
                f"{self.ignore_label} is ignored: give other --num-classes or --ignore-label"
            )
        return np.where(ignored, IGNORED, numbers).astype(np.uint8)


def read_labels(file: Path) -> NDArray[np.int64]:
    """Read a PNG of labels: gray values of 8 or 16 bits, or the numbers of a palette's colors.

    Raises:
        UnreadableError: If it cannot be read.
        UserError: If it is a picture in colors.
    """
    content = read_bytes(file, most=MAX_FILE_BYTES)
    with open_picture(content, "PNG") as picture:
        if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
            raise UserError(
                f"the labels {file} are a picture in colors ({picture.mode}): give a gray or "
                "palette PNG whose values are the numbers of classes"
            )
        return np.asarray(picture).astype(np.int64)


def load_segmented(
    name: str,
    *,
    image_size: tuple[int, int],
    augmentation: Augmentation,
    num_classes: int | None,
    ignore_label: int = IGNORED,
    zero_is_ignored: bool = False,
    seed: int,
    decode: Decoder,
) -> SegmentedData:
    """Load a data set for segmentation.

    Args:
        name: "scenes", or a folder.
        image_size: Height and width of training items in pixels.
        augmentation: Augmentation of training items.
        num_classes: Number of classes of a folder.
        ignore_label: Value of pixels of a folder's labels that do not count.
        zero_is_ignored: Whether 0 is such a value, too.
        seed: Seed of the run.
        decode: How images are decoded.

    Raises:
        UserError: If there is no such data set, or something in it does not fit.
    """
    if name == "scenes":
        return load_scene_items(image_size, augmentation, num_classes, seed)
    if not Path(name).is_dir():
        raise UserError(f"no data set {name!r}: choose scenes or a folder with images and labels")
    if num_classes is None:
        raise UserError(f"--data {name} needs --num-classes: the number of classes in its labels")
    meaning = LabelMeaning(num_classes, ignore_label, zero_is_ignored)
    train_part, *test_part = _splits_of(Path(name))
    train, train_labels = _find_pairs(Path(name), *train_part)
    if test_part:
        test, test_labels = _find_pairs(Path(name), *test_part[0])
    else:
        (train, test), test_labels = hold_out(train, labelled=True), train_labels
    content = hashlib.sha256(train.fingerprint + test.fingerprint).hexdigest()[:8]
    return SegmentedData(
        name=name,
        train=FilesWithLabels(
            train, train_labels, decode, meaning, augmentation, image_size, NORMALIZE, seed
        ),
        test=FilesWithLabels(test, test_labels, decode, meaning, None, image_size, NORMALIZE, seed),
        class_names=tuple(map(str, range(int(zero_is_ignored), num_classes + zero_is_ignored))),
        content=f"{len(train)} + {len(test)} images, {content}",
    )


def load_scene_items(
    image_size: tuple[int, int],
    augmentation: Augmentation,
    num_classes: int | None,
    seed: int,
    parts: tuple[Part, Part] = ("train", "test"),
) -> SegmentedData:
    """Load scenes to train on and to test on, the same ones for every seed.

    Raises:
        UserError: If another number of classes was asked for.
    """
    names = (SURFACE, *CLASSES)
    if num_classes not in (None, len(names)):
        raise UserError(f"--num-classes {num_classes}: scenes have {len(names)}, leave it out")

    train, test = (
        load_scenes(number, image_size=image_size, seed=0, part=part)
        for number, part in zip((TRAIN_SCENES, TEST_SCENES), parts, strict=True)
    )
    return SegmentedData(
        name="scenes",
        train=SceneItems(train, augmentation, image_size, normalize_by_image, seed),
        test=SceneItems(test, None, image_size, normalize_by_image, seed),
        class_names=names,
    )


def _splits_of(root: Path) -> list[tuple[str, ...]]:
    """Return the names of the training and the held-out part; one empty name without parts."""
    for split in _SPLITS:
        found = [(root / "images" / part).is_dir() for part in split]
        if all(found):
            return [(part,) for part in split]
        if any(found):
            raise UserError(f"{root / 'images'} holds only one of {' and '.join(split)}")
    return [()]


def _find_pairs(root: Path, *part: str) -> tuple[Samples, list[Path]]:
    """List the images of a part, and the paths of their labels.

    Raises:
        UserError: If a folder is missing or empty, or an image has no file of labels.
    """
    folder = Path(root, "images", *part)
    label_folder = next((root / n for n in _LABEL_FOLDERS if (root / n).is_dir()), None)
    if not folder.is_dir() or label_folder is None:
        raise UserError(
            f"--data {root} must hold the folders images and annotations (or labels, or masks)"
        )
    suffixes = [suffix for some in formats().values() for suffix in some]
    images, _, _ = list_files(folder, suffixes, labelled=False, seen=set())
    names = [Path(images.name(index)).relative_to(folder) for index in range(len(images))]
    labels = [Path(label_folder, *part, name).with_suffix(".png") for name in names]
    missing = [file for file in labels if not file.is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(labels):,} images in {folder} have no labels, the first "
            f"{escaped(missing[0])}: add them, or move the images elsewhere"
        )
    return images, labels
