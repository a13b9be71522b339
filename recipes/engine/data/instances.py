"""Labelled objects in images, and how images with objects are resized, flipped and cropped.

Axes: objects; height, width in pixels. Boxes are left, top, right and bottom in pixels; right and
bottom are those of the last pixel + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from recipes.engine.data.images import NormalizeByConstants, model_inputs
from recipes.engine.data.scenes import Scene, Scenes
from recipes.engine.data.sets import Batch, Item, TrainSet
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng


@dataclass(frozen=True, eq=False)
class Instances:
    """The objects of one image.

    Attributes:
        boxes: Their boxes.
        classes: Their classes, counted from 1.
        masks: Their pixels.
        is_crowd: Whether each is a group of objects: not trained on, and in scoring not missed.
    """

    boxes: Float[Tensor, "objects 4"]
    classes: Int64[Tensor, " objects"]
    masks: Bool[Tensor, "objects height width"]
    is_crowd: Bool[Tensor, " objects"]

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, rows: Tensor) -> Instances:
        """Select some objects."""
        return Instances(
            self.boxes[rows], self.classes[rows], self.masks[rows], self.is_crowd[rows]
        )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.masks.shape[1], self.masks.shape[2]


def no_instances(size: tuple[int, int]) -> Instances:
    """Return the objects of an image of a size that has none."""
    return Instances(
        boxes=torch.zeros(0, 4),
        classes=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, *size, dtype=torch.bool),
        is_crowd=torch.zeros(0, dtype=torch.bool),
    )


def check_instances(
    instances: Instances, size: tuple[int, int], num_classes: int, *, name: str
) -> None:
    """Check that objects fit their image and the classes.

    torchvision trains on objects of class 0 as background, without a word.

    Args:
        instances: The objects.
        size: Height and width of the image.
        num_classes: Number of classes.
        name: Name of the image, for messages.

    Raises:
        UserError: If a class is not in 1 to `num_classes`, a mask has another size than the image,
            or a box is not finite or has its corners in the wrong order.
    """
    odd = [label for label in instances.classes.tolist() if not 1 <= label <= num_classes]
    if odd:
        raise UserError(
            f"{name} has an object of class {odd[0]}: classes are 1 to {num_classes}, 0 is the "
            "background"
        )
    if instances.size != size:
        raise UserError(
            f"{name} has {size[0]} x {size[1]} pixels, its masks have {instances.size[0]} x "
            f"{instances.size[1]}"
        )
    boxes = instances.boxes
    is_odd = ~boxes.isfinite().all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)
    if is_odd.any():
        raise UserError(
            f"{name} has a box {boxes[is_odd][0].tolist()}: expected left, top, right and bottom "
            "in pixels"
        )


class InstanceSource(Protocol):
    """Images with their objects, by number."""

    def __len__(self) -> int:
        """Return the number of images."""

    def load(self, number: int) -> tuple[UInt8[Tensor, "3 height width"], Instances]:
        """Return an image and its objects.

        Raises:
            UnreadableError: If the image cannot be read.
        """

    def describe(self, number: int) -> str:
        """Return a readable name of an image."""


@dataclass(frozen=True, eq=False)
class SceneInstances:
    """Composed scenes, which are composed once and kept.

    Attributes:
        scenes: The scenes.
    """

    scenes: Scenes

    def __len__(self) -> int:
        return len(self.scenes)

    @cached_property
    def composed(self) -> list[Scene]:
        """All scenes."""
        return [self.scenes[number] for number in range(len(self.scenes))]

    def load(self, number: int) -> tuple[UInt8[Tensor, "3 height width"], Instances]:
        """Return a scene and its cut-outs."""
        scene = self.composed[number]
        no_crowd = torch.zeros(len(scene.classes), dtype=torch.bool)
        return scene.image, Instances(scene.boxes, scene.classes, scene.masks, no_crowd)

    def describe(self, number: int) -> str:
        """Return the number of a scene."""
        return f"scene {number}"


@dataclass(frozen=True, eq=False)
class InstanceImages(TrainSet):
    """Square images, padded at the right and at the bottom with the mean color, and their objects.

    Attributes:
        source: The images.
        num_classes: Number of classes.
        side: Height and width.
        normalize: Turns images in [0, 1] into model inputs.
        jitter: Smallest and largest scale of large-scale jitter, 1 being the scale that fits the
            square; None for images as they are, without flips, whose objects keep the size of the
            stored image.
        seed: Seed of the run.

    Source:
        Large-scale jitter: Ghiasi et al., arXiv:2012.07177; detectron2 `ResizeScale` and
        `FixedSizeCrop`. Boxes are taken from the masks after cropping, as ViTDet does
        (`recompute_boxes`).
    """

    source: InstanceSource
    num_classes: int
    side: int
    normalize: NormalizeByConstants
    jitter: tuple[float, float] | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        """Return an image without its objects (None if it cannot be read), and its sample id."""
        try:
            return self._load(*index)[0], index[1]
        except UnreadableError:
            return None, index[1]

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """Return a batch with its objects as targets. `DataLoader` calls this method."""
        loaded, sample_ids, unreadable_ids = [], [], []
        for epoch, sample_id in indices:
            try:
                loaded.append(self._load(epoch, sample_id))
                sample_ids.append(sample_id)
            except UnreadableError:
                unreadable_ids.append(sample_id)
        images = torch.stack([image for image, _ in loaded]) if loaded else torch.empty(0, 0, 0, 0)
        targets = tuple(instances for _, instances in loaded)
        return Batch(images, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids, targets)

    def seeded(self, seed: int) -> InstanceImages:
        """Return the same images with another seed of the augmentation."""
        return dataclasses.replace(self, seed=seed)

    def to_inputs(self, images: Shaped[Tensor, batch * shape]) -> Float[Tensor, batch * shape]:
        """Normalize images."""
        return model_inputs(images, self.normalize)

    def describe(self, sample_id: int) -> str:
        """Return the name of an image."""
        return self.source.describe(sample_id)

    def _load(self, epoch: int, sample_id: int) -> tuple[Tensor, Instances]:
        image, instances = self.source.load(sample_id)
        size = (image.shape[1], image.shape[2])
        check_instances(instances, size, self.num_classes, name=self.describe(sample_id))
        if self.jitter is None:
            return self._pad(resize_image(image, fitted(size, self.side))), instances
        rng = sample_rng(self.seed, epoch, sample_id)
        return self._jittered(image, instances[~instances.is_crowd], rng)

    def _jittered(
        self, image: Tensor, instances: Instances, rng: np.random.Generator
    ) -> tuple[Tensor, Instances]:
        assert self.jitter is not None
        scale = rng.uniform(*self.jitter)
        height, width = fitted(instances.size, scale * self.side)
        image = resize_image(image, (height, width))
        masks = resize_masks(instances.masks, (height, width))
        top, left = (int(rng.integers(max(side - self.side, 0) + 1)) for side in (height, width))
        window = slice(top, top + self.side), slice(left, left + self.side)
        image, masks = image[:, *window], masks[:, *window]
        if rng.integers(2):
            image, masks = image.flip(-1), masks.flip(-1)
        seen = masks.flatten(1).any(1)
        masks = masks[seen]
        padding = (0, self.side - image.shape[2], 0, self.side - image.shape[1])
        return self._pad(image), Instances(
            boxes=boxes_around(masks),
            classes=instances.classes[seen],
            masks=F.pad(masks, padding),
            is_crowd=instances.is_crowd[seen],
        )

    def _pad(self, image: UInt8[Tensor, "3 height width"]) -> UInt8[Tensor, "3 side side"]:
        padded = (torch.tensor(self.normalize.mean) * 255).round().to(torch.uint8)
        padded = padded[:, None, None].repeat(1, self.side, self.side)
        padded[:, : image.shape[1], : image.shape[2]] = image
        return padded


def fitted(size: tuple[int, int], side: float) -> tuple[int, int]:
    """Return height and width of an image once its longer axis has a number of pixels.

    Example:
        >>> fitted((480, 640), 1024)
        (768, 1024)
    """
    scale = side / max(size)
    height, width = (max(1, round(length * scale)) for length in size)
    return height, width


def resize_image(image: UInt8[Tensor, "3 h w"], size: tuple[int, int]) -> UInt8[Tensor, "3 h2 w2"]:
    """Resize an image bilinearly, with antialiasing."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def resize_masks(
    masks: Bool[Tensor, "objects h w"], size: tuple[int, int]
) -> Bool[Tensor, "objects h2 w2"]:
    """Resize masks by their nearest pixels."""
    if masks.shape[1:] == size or not len(masks):
        return masks.new_zeros(0, *size) if not len(masks) else masks
    return F.interpolate(masks[None].to(torch.uint8), size, mode="nearest-exact")[0].bool()


def boxes_around(masks: Bool[Tensor, "objects height width"]) -> Float[Tensor, "objects 4"]:
    """Return the box around each mask, which must have a pixel.

    Example:
        >>> masks = torch.zeros(1, 4, 6, dtype=torch.bool)
        >>> masks[0, 1:3, 2:5] = True
        >>> boxes_around(masks)
        tensor([[2., 1., 5., 3.]])
    """
    columns, rows = masks.any(1).to(torch.uint8), masks.any(2).to(torch.uint8)
    sides = [
        columns.argmax(1),
        rows.argmax(1),
        columns.shape[1] - columns.flip(1).argmax(1),
        rows.shape[1] - rows.flip(1).argmax(1),
    ]
    return torch.stack(sides, dim=1).float()


def join_targets(targets: Sequence[Instances]) -> list[dict[str, Tensor]]:
    """Return objects as torchvision's detectors take them."""
    return [
        {"boxes": one.boxes, "labels": one.classes, "masks": one.masks.to(torch.uint8)}
        for one in targets
    ]
