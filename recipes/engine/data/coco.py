"""Images with objects in COCO's layout: `{train,val}2017/` and `annotations/instances_*.json`.

Boxes are left, top, width and height in pixels; objects are polygons or run lengths (RLE); the ids
of categories, images and annotations have gaps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from recipes.engine.data.decode import DECODE, Decoder
from recipes.engine.data.instances import Instances, no_instances
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError, parse_json, read_bytes

_MOST_JSON = 4_000_000_000  # COCO's largest file has 470 MB
_MOST_IMAGE = 1_000_000_000
_MOST_PLACE = 1_000_000  # pixels
_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "segmentation"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True, eq=False)
class CocoImages:
    """The images of one part of a data set, by number, with their objects.

    Attributes:
        folder: Folder of the image files.
        images: Entries of the images in the JSON file.
        annotations: The annotations of each image.
        labels: Class, counted from 1, of each category id.
        decode: How images are decoded.
        content: The number of images and a hash of the JSON file.
    """

    folder: Path
    images: Sequence[Mapping[str, Any]]
    annotations: Sequence[Sequence[Mapping[str, Any]]]
    labels: Mapping[int, int]
    decode: Decoder
    content: str

    def __len__(self) -> int:
        return len(self.images)

    def load(self, number: int) -> tuple[UInt8[Tensor, "3 height width"], Instances]:
        """Decode an image, and draw its objects.

        Raises:
            UnreadableError: If the image cannot be read.
            UserError: If an object cannot be drawn, or the image has another size.
        """
        entry = self.images[number]
        file = self.folder / entry["file_name"]
        pixels = self.decode(read_bytes(file, most=_MOST_IMAGE))
        size = (entry["height"], entry["width"])
        if pixels.shape[:2] != size:
            raise UserError(
                f"{file} has {pixels.shape[0]} x {pixels.shape[1]} pixels, but {size[0]} x "
                f"{size[1]} in its annotations"
            )
        return torch.from_numpy(pixels).permute(2, 0, 1), self.objects(number)

    def objects(self, number: int) -> Instances:
        """Draw the objects of an image.

        Raises:
            UserError: If one cannot be drawn.
        """
        entry, annotations = self.images[number], self.annotations[number]
        size = (entry["height"], entry["width"])
        if not annotations:
            return no_instances(size)
        boxes = torch.tensor([one["bbox"] for one in annotations], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        masks = [draw_mask(one["segmentation"], size, name=_name(one)) for one in annotations]
        return Instances(
            boxes=boxes,
            classes=torch.tensor([self.labels[one["category_id"]] for one in annotations]),
            masks=torch.from_numpy(np.stack(masks)),
            is_crowd=torch.tensor([bool(one.get("iscrowd", 0)) for one in annotations]),
        )

    def describe(self, number: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.images[number]["file_name"])


def is_coco(folder: Path) -> bool:
    """Whether a folder has COCO's layout."""
    return any((folder / "annotations").glob("instances_*.json"))


def load_coco(
    folder: Path, decode: Decoder = DECODE
) -> tuple[CocoImages, CocoImages, tuple[str, ...]]:
    """Load both parts of a data set.

    Args:
        folder: Folder with `annotations/instances_train*.json` and `instances_val*.json`, and the
            images in the folder that a file is named after (`train2017/`).
        decode: How images are decoded.

    Returns:
        The images to train and to score on, and the names of the classes, in the order of their
        ids.

    Raises:
        UserError: If there is no such file or more than one, it cannot be read, or an entry does
            not fit.
    """
    train, names = _load_part(folder, "train", decode)
    val, val_names = _load_part(folder, "val", decode)
    if names != val_names or train.labels != val.labels:
        raise UserError(f"--data {folder}: the categories to train and to score on differ")
    return train, val, names


def _load_part(folder: Path, part: str, decode: Decoder) -> tuple[CocoImages, tuple[str, ...]]:
    files = sorted((folder / "annotations").glob(f"instances_{part}*.json"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"--data {folder} needs one annotations/instances_{part}*.json; found {found}"
        )
    file = files[0]
    images = folder / file.stem.removeprefix("instances_")
    if not images.is_dir():
        raise UserError(f"--data {folder} has {file.name}, but no folder {images.name} of images")
    try:
        content = read_bytes(file, most=_MOST_JSON)
        entries = parse_json(content)
    except UnreadableError as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    try:
        _check_entries(entries)
    except UnreadableError as error:
        raise UserError(f"{file}: {error}") from error
    by_image: dict[int, list[Mapping[str, Any]]] = {one["id"]: [] for one in entries["images"]}
    for annotation in entries["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    categories = sorted(entries["categories"], key=lambda category: int(category["id"]))
    part_images = CocoImages(
        folder=images,
        images=entries["images"],
        annotations=list(by_image.values()),
        labels={category["id"]: label for label, category in enumerate(categories, start=1)},
        decode=decode,
        content=f"{len(by_image)} images, {hashlib.sha256(content).hexdigest()[:8]}",
    )
    return part_images, tuple(str(category["name"]) for category in categories)


def _check_entries(entries: Any) -> None:
    """Check what can be checked without drawing an object or decoding an image.

    Raises:
        UnreadableError: If something does not fit.
    """
    if not isinstance(entries, dict):
        raise UnreadableError("it must hold images, annotations and categories")
    ids: dict[str, set[Any]] = {}
    for kind, fields in _FIELDS.items():
        if not isinstance(entries.get(kind), list):
            raise UnreadableError(f"it has no list of {kind}")
        ids[kind] = set()
        for number, entry in enumerate(entries[kind]):
            missing = [name for name in fields if not isinstance(entry, dict) or name not in entry]
            if missing:
                raise UnreadableError(f"entry {number} of {kind} has no {missing[0]}")
            if type(entry["id"]) is not int:
                raise UnreadableError(f"entry {number} of {kind} has the id {entry['id']!r:.40}")
            if entry["id"] in ids[kind]:
                raise UnreadableError(f"two {kind} have the id {entry['id']}")
            ids[kind].add(entry["id"])
    if not entries["images"] or not entries["categories"]:
        raise UnreadableError("it has no images or no categories")
    for image in entries["images"]:
        _check_image(image)
    for annotation in entries["annotations"]:
        _check_annotation(annotation, ids)


def _check_image(image: Mapping[str, Any]) -> None:
    size = (image["height"], image["width"])
    if not all(type(side) is int and side > 0 for side in size):
        raise UnreadableError(
            f"image {image['id']} has height {size[0]!r:.40}, width {size[1]!r:.40}"
        )
    name = image["file_name"]
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnreadableError(f"image {image['id']} has the file name {name!r:.80}")


def _check_annotation(annotation: Mapping[str, Any], ids: Mapping[str, set[Any]]) -> None:
    name = _name(annotation)
    for kind, field in (("images", "image_id"), ("categories", "category_id")):
        given = annotation[field]
        if type(given) is not int or given not in ids[kind]:
            known = len(ids[kind])
            raise UnreadableError(f"{name} has {field} {given!r:.40}, none of the {known} {kind}")
    box = annotation["bbox"]
    is_box = isinstance(box, list) and len(box) == 4 and all(map(_is_place, box))
    if not is_box or min(box[2:]) < 0:
        raise UnreadableError(
            f"{name} has bbox {box!r:.80}: expected left, top, width and height in pixels"
        )
    if annotation.get("iscrowd", 0) not in (0, 1):
        raise UnreadableError(f"{name} has iscrowd {annotation['iscrowd']!r:.40}: expected 0 or 1")


def _is_place(value: Any) -> bool:
    """Whether a value is a number of pixels that an image can have, also outside of it."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -_MOST_PLACE <= value <= _MOST_PLACE


def _name(annotation: Mapping[str, Any]) -> str:
    return f"annotation {annotation['id']}"


def draw_mask(
    segmentation: Any, size: tuple[int, int], *, name: str
) -> Bool[np.ndarray, "height width"]:
    """Draw an object as COCO's tools do.

    Args:
        segmentation: Polygons, each a list of x and y in turn; or run lengths: `size` and `counts`,
            a list or COCO's compressed string.
        size: Height and width of the image.
        name: Name of the object, for messages.

    Raises:
        UserError: If it cannot be drawn, or is of an image of another size.

    Example:
        >>> runs = {"size": [2, 3], "counts": [1, 3, 2]}  # column by column
        >>> draw_mask(runs, (2, 3), name="object").astype(int)
        array([[0, 1, 0],
               [1, 1, 0]])
        >>> packed = {"size": [2, 3], "counts": "132"}
        >>> draw_mask(packed, (2, 3), name="object").sum()
        np.int64(3)
    """
    if isinstance(segmentation, list):
        return _draw_polygons(segmentation, size, name)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise UserError(f"{name} has a segmentation that is neither polygons nor run lengths")
    if segmentation["size"] != [*size]:
        raise UserError(
            f"{name} has a mask of size {segmentation['size']!r:.40}, its image has [{size[0]}, "
            f"{size[1]}]"
        )
    counts = segmentation["counts"]
    given = _unpacked(counts) if isinstance(counts, str) else counts
    runs: list[int] = given if isinstance(given, list) else [-1]
    if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise UserError(
            f"{name} has run lengths that do not decode: they must add up to its image's "
            f"{size[0] * size[1]} pixels"
        )
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(size[::-1]).T


def _unpacked(text: str) -> list[int] | None:
    """Unpack COCO's compressed run lengths; None if they are damaged.

    A number has five bits a character, from the lowest, after which one bit says whether it goes
    on; from the fourth number on, the difference to the number two before is stored.

    Source:
        cocodataset/cocoapi `maskApi.c` `rleFrString`.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs


def _draw_polygons(
    polygons: Sequence[Any], size: tuple[int, int], name: str
) -> Bool[np.ndarray, "height width"]:
    """Draw polygons; one of fewer than three points has no pixels."""
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) % 2 or not all(map(_is_place, polygon)):
            raise UserError(
                f"{name} has a polygon {polygon!r:.60}: expected x and y in turn, in pixels"
            )
    drawn = [polygon for polygon in polygons if len(polygon) >= 6]
    if not drawn:
        return np.zeros(size, dtype=bool)
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise UserError('polygons need faster-coco-eval: pip install "mimkit[detect]"') from error
    inside: Bool[np.ndarray, "height width"] = mask.decode(
        mask.merge(mask.frPyObjects(drawn, *size))
    ).astype(bool)
    return inside
