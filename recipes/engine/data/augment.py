"""Augmentation of labelled images: random crops, RandAugment, random erasing."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from recipes.engine.data.images import CROP_RATIO, NORMALIZE, model_input
from recipes.engine.errors import UserError

# Share of the image in a crop, as in timm and BYOL's linear probe. Pre-training uses 20 % or more.
CROP_AREA = (0.08, 1.0)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)

Policy = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True, eq=False)
class Augmentation:
    """Random crop, flip, RandAugment, normalization and random erasing.

    Attributes:
        attempts: Largest number of boxes to draw until one lies inside the image. If none does, the
            last one is clipped.
        policy: RandAugment, or None.
        erase: Probability of random erasing.
    """

    attempts: int = 10
    policy: Policy | None = None
    erase: float = 0.0

    def __call__(
        self, image: Image.Image, size: tuple[int, int], rng: np.random.Generator
    ) -> Float[Tensor, "3 height width"]:
        """Turn an image into a model input; `size` is height and width in pixels."""
        height, width = size
        box = random_box(image.width, image.height, rng, attempts=self.attempts)
        crop = image.crop(box).resize((width, height), Image.Resampling.BICUBIC)
        if rng.integers(2):
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy is not None:
            with_seed(int(rng.integers(2**32)))
            crop = self.policy(crop)
        inputs = model_input(crop)
        return random_erase(inputs, rng) if rng.uniform() < self.erase else inputs


def random_box(
    width: int, height: int, rng: np.random.Generator, *, attempts: int
) -> tuple[int, int, int, int]:
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


def random_erase(
    inputs: Float[Tensor, "channels height width"], rng: np.random.Generator
) -> Float[Tensor, "channels height width"]:
    """Replace a random box with noise.

    Source:
        Zhong et al., arXiv:1708.04896; timm `RandomErasing`, mode "pixel", one box, ten attempts.
    """
    height, width = inputs.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_height < height and box_width < width:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            noise = rng.standard_normal((len(inputs), box_height, box_width), dtype=np.float32)
            erased = inputs.clone()
            erased[:, top : top + box_height, left : left + box_width] = torch.from_numpy(noise)
            return erased
    return inputs


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
