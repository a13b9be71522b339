"""Augmentation of labelled images: random crops, RandAugment, random erasing."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from recipes.engine.data.images import (
    CROP_RATIO,
    NORMALIZE,
    Box,
    BoxCrops,
    Crop,
    Pixels,
    to_bytes,
)
from recipes.engine.errors import UserError

# Share of the image in a crop, as in timm and BYOL's linear probe. Pre-training uses 20 % or more.
CROP_AREA = (0.08, 1.0)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)

Policy = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, eq=False)
class Augmentation(BoxCrops):
    """Random crop, flip, RandAugment and random erasing.

    Attributes:
        attempts: Largest number of boxes to draw until one lies inside the image. If none does, the
            last one is clipped.
        policy: RandAugment, or None.
        erase: Probability of random erasing.
    """

    attempts: int = 10
    policy: Policy | None = None
    erase: float = 0.0

    def box(self, width: int, height: int, rng: np.random.Generator) -> Box:
        """Draw a box inside an image."""
        return random_box(width, height, rng, attempts=self.attempts)

    def __call__(self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Augment an image; `size` is height and width in pixels."""
        crop = super().__call__(pixels, size, rng)
        if self.policy is not None:
            with_seed(int(rng.integers(2**32)))
            image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            crop = to_bytes(self.policy(image))
        return random_erase(crop, rng) if rng.uniform() < self.erase else crop


def random_box(width: int, height: int, rng: np.random.Generator, *, attempts: int) -> Box:
    """Draw a box that covers 8-100 % of an image.

    Args:
        width: Width of the image in pixels.
        height: Height of the image in pixels.
        rng: Random generator.
        attempts: Largest number of boxes to draw until one lies inside the image. If none does, the
            last one is clipped.

    Returns:
        Left, top, right and bottom in pixels.

    Source:
        One attempt: facebookresearch/mae `crop.py`, which follows BYOL. Ten attempts: timm and
        torchvision. They differ in very long images: where all ten attempts fail, they take the
        center.
    """
    for _ in range(attempts):
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    box_width, box_height = min(max(box_width, 1), width), min(max(box_height, 1), height)
    left = int(rng.integers(width - box_width + 1))
    top = int(rng.integers(height - box_height + 1))
    return left, top, left + box_width, top + box_height


def random_erase(crop: Crop, rng: np.random.Generator) -> Crop:
    """Replace a random box with noise that normalization turns into a standard normal.

    Noise that no pixel can have, 2 to 2.6 standard deviations from the mean, is clipped.

    Source:
        Zhong et al., arXiv:1708.04896; timm `RandomErasing`, mode "pixel", one box, ten attempts.
    """
    height, width = crop.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            noise = rng.standard_normal((box_height, box_width, len(crop)), dtype=np.float32)
            colors = (255 * (noise * NORMALIZE.std + NORMALIZE.mean)).round().clip(0, 255)
            erased = crop.clone()
            box = erased[:, top : top + box_height, left : left + box_width]
            box.copy_(torch.from_numpy(colors.transpose(2, 0, 1)))
            return erased
    return crop


def with_seed(seed: int) -> None:
    """Seed the generators that timm (Python's, NumPy's) and torchvision (PyTorch's) draw from.

    In the training process only drop path draws from them as well, and each step seeds it again.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def rand_augment(image_size: tuple[int, int]) -> Policy:
    """Make the RandAugment policy of MAE's fine-tuning.

    It is timm's. If timm is not installed, it is torchvision's, which is similar.

    Args:
        image_size: Height and width of the images in pixels.

    Raises:
        UserError: If neither package is installed.
    """
    fill = tuple(round(255 * mean) for mean in NORMALIZE.mean)
    try:
        from timm.data.auto_augment import rand_augment_transform

        settings = {
            "translate_const": int(min(image_size) * 0.45),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        }
        timm_policy: Policy = rand_augment_transform(RAND_AUGMENT, settings)
        return timm_policy
    except ModuleNotFoundError:
        pass
    try:
        from torchvision.transforms import InterpolationMode, RandAugment

        policy: Policy = RandAugment(
            num_ops=2, magnitude=9, interpolation=InterpolationMode.BICUBIC, fill=list(fill)
        )
        return policy
    except ModuleNotFoundError:
        raise UserError(
            "--augment randaugment needs timm or torchvision: pip install timm, "
            "or choose --augment crop"
        ) from None
