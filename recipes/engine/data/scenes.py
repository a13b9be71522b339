"""`scenes`: composed scenes with a class for every pixel, instances and boxes.

A scene is a surface (brick, grass, gravel or stained tissue) with one to four star-shaped cut-outs
of ten photographs on it: the bundled photographs of `photos`, at the same scales. They are composed
because no package ships a real labelled set of this kind. The left 60 % of each photograph is for
training, and the right 40 % is held out. Surfaces and cut-outs are normalized one by one, so that
neither color nor brightness alone names the photograph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from recipes.engine.data.images import normalize_by_image, to_unit
from recipes.engine.data.photos import FILES, PhotoCrops, build_pyramid, read_photo, split
from recipes.engine.errors import UserError
from recipes.engine.seeds import sample_rng

Part = Literal["train", "fit", "validation", "test"]

SURFACES = ("brick", "grass", "gravel", "ihc")
CLASSES = tuple(name for name in (file.partition(".")[0] for file in FILES) if name not in SURFACES)
MIN_SIZE, MAX_SIZE = 32, 256
MAX_CUT_OUTS = 4
# Share of the training part's height that is for fitting when settings are compared.
FIT_SHARE = 0.7
# Mean radius of a cut-out as a fraction of the scene's shorter side.
RADII = (0.14, 0.26)
# Largest height of each harmonic of the outline, relative to the mean radius.
HARMONICS = (0.0, 0.14, 0.12, 0.08, 0.06)
LARGEST = 1 + sum(HARMONICS)
# A cut-out is placed so that at least this share of each one below stays visible.
VISIBLE_SHARE = 0.6
ATTEMPTS = 20
# Gray level and contrast of everything in a scene, in [0, 1].
MEAN, STD = 0.5, 0.19
_PARTS: tuple[Part, ...] = ("train", "fit", "validation", "test")


@dataclass(frozen=True, eq=False)
class Scene:
    """An image with what is in it.

    Attributes:
        image: The image.
        labels: Class of each pixel: 0 for the surface, 1 to 10 for the photographs.
        masks: Visible pixels of each cut-out.
        boxes: Box around each mask: left, top, right and bottom in pixels; right and bottom are
            those of the last pixel + 1.
        classes: Class of each cut-out, 1 to 10.
    """

    image: UInt8[Tensor, "3 height width"]
    labels: UInt8[Tensor, "height width"]
    masks: Bool[Tensor, "cut_outs height width"]
    boxes: Float[Tensor, "cut_outs 4"]
    classes: Int64[Tensor, " cut_outs"]


@dataclass(frozen=True, eq=False)
class Scenes(Dataset[Scene]):
    """Scenes by number; the same seed, part and number give the same scene.

    Attributes:
        surfaces: Draws surfaces of the scene's size.
        photos: Draws pieces of photographs, from which cut-outs are cut.
        number: Number of scenes.
        seed: Seed of the scenes.
        part: "train"; or "test"; or, to compare settings without the test scenes, "fit" and
            "validation": the upper 70 % and the lower 30 % of the training part.
    """

    surfaces: PhotoCrops
    photos: PhotoCrops
    number: int
    seed: int
    part: Part

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Scene:
        """Compose a scene.

        Raises:
            IndexError: If there is no scene of this number.
        """
        if not 0 <= index < self.number:
            raise IndexError(f"scene {index} of {self.number}")
        rng = sample_rng(self.seed, _PARTS.index(self.part), index)
        surface = self.surfaces.draw(int(rng.integers(len(SURFACES))), rng)
        canvas = _Canvas(_even(surface, np.ones(surface.shape[1:], dtype=bool)))
        for _ in range(int(rng.integers(1, MAX_CUT_OUTS + 1))):
            label = int(rng.integers(len(CLASSES)))
            canvas.place(self.photos.draw(label, rng), label + 1, rng)
        return canvas.scene()


class _Canvas:
    """A scene while it is composed.

    Args:
        image: The surface, in [0, 1].
    """

    def __init__(self, image: Float[np.ndarray, "3 height width"]) -> None:
        self.image = image
        self.owner = np.zeros(image.shape[1:], dtype=np.int64)  # number of the cut-out, from 1
        self.classes: list[int] = []
        self.areas: list[int] = []  # pixels of each cut-out, hidden ones too

    def place(
        self, piece: UInt8[Tensor, "3 height width"], label: int, rng: np.random.Generator
    ) -> None:
        """Cut a star shape and put it somewhere, unless every attempt hides too much of another."""
        for _ in range(ATTEMPTS):
            inside = _outline(piece.shape[1:], rng)
            spare = np.subtract(self.owner.shape, inside.shape)
            top, left = rng.integers(spare + 1).tolist()
            place = slice(top, top + inside.shape[0]), slice(left, left + inside.shape[1])
            if self._leaves_enough(place, inside):
                self.classes.append(label)
                self.areas.append(int(inside.sum()))
                self.owner[place][inside] = len(self.classes)
                below = self.image[:, place[0], place[1]]
                below[:, inside] = _even(piece, inside)[:, inside]
                return

    def _leaves_enough(self, place: tuple[slice, slice], inside: Bool[np.ndarray, "h w"]) -> bool:
        """Whether enough of each earlier cut-out stays visible under a new one."""
        after = self.owner.copy()
        after[place][inside] = 0
        visible = np.bincount(after.ravel(), minlength=len(self.areas) + 1)[1:]
        return bool((visible >= VISIBLE_SHARE * np.array(self.areas)).all())

    def scene(self) -> Scene:
        """Return the scene."""
        masks = self.owner == np.arange(1, len(self.classes) + 1)[:, None, None]
        return Scene(
            image=torch.from_numpy((self.image * 255).round().astype(np.uint8)),
            labels=torch.from_numpy(np.array([0, *self.classes], dtype=np.uint8)[self.owner]),
            masks=torch.from_numpy(masks),
            boxes=torch.tensor([_box(mask) for mask in masks], dtype=torch.float32),
            classes=torch.tensor(self.classes, dtype=torch.int64),
        )


def load_scenes(
    number: int, *, image_size: tuple[int, int], seed: int, part: Part = "train"
) -> Scenes:
    """Load the photographs of one part, and number scenes of them.

    Args:
        number: Number of scenes.
        image_size: Height and width of a scene in pixels, 32 to 256.
        seed: Seed of the scenes.
        part: As in `Scenes`.

    Raises:
        UserError: If the scenes are too small or too large, or scikit-image is not installed.
    """
    if min(image_size) < MIN_SIZE or max(image_size) > MAX_SIZE:
        raise UserError(
            f"scenes are not composed at {image_size[0]} x {image_size[1]} pixels: "
            f"choose {MIN_SIZE} to {MAX_SIZE} a side"
        )
    return Scenes(*_sources(image_size, part), number, seed, part)


@cache
def _sources(image_size: tuple[int, int], part: Part) -> tuple[PhotoCrops, PhotoCrops]:
    """Return what draws surfaces and pieces of photographs.

    Half of a scene's shorter side shows as much of a photograph as a crop for pre-training does.
    """
    unit = min(image_size) // 2
    piece = 2 * math.ceil(RADII[1] * LARGEST * min(image_size))

    def crops(names: tuple[str, ...], size: tuple[int, int]) -> PhotoCrops:
        pyramids = []
        for name in names:
            photo = read_photo(next(file for file in FILES if file.startswith(name)))
            shorter_side = round(min(photo.size) * max(size) / unit)
            pyramids.append(build_pyramid(_part_of(photo, part), shorter_side, size))
        return PhotoCrops(pyramids, size)

    return crops(SURFACES, image_size), crops(CLASSES, (piece, piece))


def _part_of(photo: Image.Image, part: Part) -> Image.Image:
    left, right = split(photo)
    cut = round(FIT_SHARE * photo.height)
    parts = {
        "train": left,
        "test": right,
        "fit": left.crop((0, 0, left.width, cut)),
        "validation": left.crop((0, cut, left.width, left.height)),
    }
    return parts[part]


def _outline(size: torch.Size, rng: np.random.Generator) -> Bool[np.ndarray, "height width"]:
    """Draw a star-shaped mask, cropped to its box, inside a piece of a size."""
    side = size[0]
    radius = rng.uniform(*RADII) / RADII[1] * side / (2 * LARGEST)
    phases = rng.uniform(0, 2 * math.pi, len(HARMONICS))
    heights = rng.uniform(-1, 1, len(HARMONICS)) * HARMONICS
    rows, columns = np.mgrid[:side, :side] - (side - 1) / 2
    angle = np.arctan2(rows, columns)[..., None]
    orders = np.arange(1, len(HARMONICS) + 1)
    edge = radius * (1 + (heights * np.cos(orders * angle + phases)).sum(-1))
    inside: Bool[np.ndarray, "height width"] = np.hypot(rows, columns) <= edge
    left, top, right, bottom = _box(inside)
    return inside[top:bottom, left:right]


def _even(
    piece: UInt8[Tensor, "3 height width"], inside: Bool[np.ndarray, "h w"]
) -> Float[np.ndarray, "3 h w"]:
    """Give the pixels inside a shape the same mean and contrast in every channel and scene."""
    height, width = inside.shape
    pixels = to_unit(piece[:, :height, :width])
    chosen, _, _ = normalize_by_image(pixels[:, torch.from_numpy(inside)][None, :, None])
    even = np.zeros(pixels.shape, dtype=np.float32)
    even[:, inside] = (MEAN + STD * chosen[0, :, 0].numpy()).clip(0, 1)
    return even


def _box(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """Return the box around a mask: left, top, right and bottom; the last pixel + 1."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
