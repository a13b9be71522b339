"""`digits`: scikit-learn's 8 x 8 handwritten digits, scaled, rotated and placed on a canvas.

The last 360 of the 1,797 digits are held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from recipes.engine.data.images import PICTURE_SIZE, NormalizeByConstants, to_bytes, to_unit
from recipes.engine.data.sets import DataSet, DrawnImages, draw_probe
from recipes.engine.errors import UserError
from recipes.engine.seeds import sample_rng

NUM_TEST_DIGITS = 360
# Black pixels around a digit, so that interpolation blends its edge into the canvas.
MARGIN = 1
# A smaller canvas would shrink a digit below its own 8 pixels.
MIN_SIZE, MAX_SIZE = 16, 1_024
# Side of the digit's square as a fraction of the canvas's shorter side.
DIGIT_SCALE = (0.5, 0.9)
MAX_ROTATION = math.radians(20)
# Measured over 10,000 canvases of 32 x 32 pixels.
NORMALIZE = NormalizeByConstants(mean=(0.16,), std=(0.30,))
NUM_PICTURES = 3
PROBE_PER_DIGIT = 50
PROBE_TEST = 2_500


@dataclass(frozen=True, eq=False)
class DigitCanvases:
    """Canvases with one digit each.

    Attributes:
        digits: The images of each class: 8 x 8 pixels and a black margin.
        image_size: Height and width of a canvas in pixels.
    """

    digits: list[NDArray[np.uint8]]
    image_size: tuple[int, int]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.digits)

    def draw(self, label: int, rng: np.random.Generator) -> UInt8[Tensor, "1 height width"]:
        """Draw an image of the class, its size, angle and position, each uniformly."""
        digit = self.digits[label][rng.integers(len(self.digits[label]))]
        side = rng.uniform(*DIGIT_SCALE) * min(self.image_size)
        angle = rng.uniform(-MAX_ROTATION, MAX_ROTATION)
        center = [rng.uniform(side / 2, length - side / 2) for length in self.image_size]
        return to_bytes(place(digit, self.image_size, center=center, side=side, angle=angle))


def load_digits(*, image_size: tuple[int, int], seed: int) -> DataSet:
    """Load the digits.

    A probe is fitted on 50 labelled canvases per class and tested on 2,500 canvases in total.

    Args:
        image_size: Height and width of a canvas in pixels, at least 16.
        seed: Seed of the run.

    Returns:
        The data set.

    Raises:
        UserError: If the canvas is too small or too large, or scikit-learn is not installed.
    """
    if min(image_size) < MIN_SIZE or max(image_size) > MAX_SIZE:
        raise UserError(
            f"digits need a canvas of at least {MIN_SIZE} and at most {MAX_SIZE:,} pixels a side, "
            f"not {image_size[0]} x {image_size[1]}"
        )
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise UserError(
            'the digits data set needs scikit-learn: pip install "mimkit[recipes]"'
        ) from error
    digits = datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    images = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    is_test = np.arange(len(images)) >= len(images) - NUM_TEST_DIGITS

    def canvases(chosen: NDArray[np.bool_]) -> DigitCanvases:
        classes = range(len(digits.target_names))
        return DigitCanvases([images[chosen & (digits.target == c)] for c in classes], image_size)

    train, test = canvases(~is_test), canvases(is_test)
    return DataSet(
        name="digits",
        in_channels=1,
        class_names=tuple(str(name) for name in digits.target_names),
        train=DrawnImages(train, NORMALIZE, seed),
        pictures=[mosaic(test, sample_rng(seed, 2, number)) for number in range(NUM_PICTURES)],
        normalize=NORMALIZE,
        load_probe=partial(
            draw_probe,
            train,
            test,
            NORMALIZE,
            train_per_class=PROBE_PER_DIGIT,
            num_test=PROBE_TEST,
            seed=seed,
        ),
    )


def place(
    digit: NDArray[np.uint8],
    image_size: tuple[int, int],
    *,
    center: list[float],
    side: float,
    angle: float,
) -> Image.Image:
    """Draw a digit on a black canvas.

    Args:
        digit: A small square image with a margin.
        image_size: Height and width of the canvas in pixels.
        center: Row and column of the digit's center on the canvas, in pixels.
        side: Side of the digit on the canvas in pixels, without its margin.
        angle: Rotation in radians.

    Returns:
        The canvas.
    """
    source = Image.fromarray(digit)
    scale = (len(digit) - 2 * MARGIN) / side
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    y, x = center
    middle = source.width / 2
    # Pillow wants the map from the canvas to the source.
    to_source = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
    height, width = image_size
    return source.transform(
        (width, height), Image.Transform.AFFINE, to_source, Image.Resampling.BICUBIC
    )


def mosaic(canvases: DigitCanvases, rng: np.random.Generator) -> Float[Tensor, "1 height width"]:
    """Tile canvases of random digits into a picture of about 192 pixels, at least one canvas."""
    rows, columns = (max(1, PICTURE_SIZE // side) for side in canvases.image_size)
    labels = rng.integers(canvases.num_classes, size=rows * columns)
    tiles = torch.stack([canvases.draw(int(label), rng) for label in labels])
    return rearrange(to_unit(tiles), "(rows columns) c h w -> c (rows h) (columns w)", rows=rows)
