"""Draw the masks of a run."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from torch import Tensor

from mimkit import masking
from mimkit._checks import check_even
from mimkit.masking import Key, Mask
from recipes.engine.fields import OpenFraction, PositiveInt, Within, check_fields

# One mask for the batch, or several masks of the same batch.
Masks: TypeAlias = Mask | Sequence[Mask]

Views = Annotated[int, Within(1, 1_024)]
Sampler = Literal["uniform", "blockwise", "gridwise", "inverse_block", "visible_block", "prefix"]


@dataclass(frozen=True)
class Masking:
    """Configuration of the masks.

    Attributes:
        mask_ratio: Fraction of patches to mask, in (0, 1).
        sampler: How masks are drawn (table 1f): "uniform" patch by patch, "blockwise" in blocks;
            "gridwise" leaves every second patch of every second row visible (ratio 0.75);
            "inverse_block" leaves blocks of 3 by 3 visible (data2vec 2.0), "visible_block" one
            block that may wrap around the border (CAPI), "prefix" the first patches (AIM).
        views: Masks per image. Each step runs the model on all of them, and loads each image once.
        min_block: Smallest block of a "blockwise" mask, in patches.

    Source:
        MAE, arXiv:2111.06377, table 1f.
    """

    mask_ratio: OpenFraction
    sampler: Sampler = "uniform"
    views: Views = 1
    min_block: PositiveInt = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sampler == "gridwise" and self.mask_ratio != 0.75:
            raise ValueError(
                f"--sampler gridwise masks three of four patches: give --mask-ratio 0.75 instead "
                f"of {self.mask_ratio}"
            )

    def draw(self, key: Key, grid: tuple[int, ...]) -> Masks:
        """Draw the masks of a batch; a list if there are several views."""
        return draw_views(self._draw_one, key, grid, self.views)

    def _draw_one(self, key: Key, grid: tuple[int, ...]) -> Mask:
        if self.sampler == "gridwise":
            return masking.gridwise(key, grid)
        if self.sampler == "blockwise":
            return masking.blockwise(key, grid, self.mask_ratio, min_block=self.min_block)
        draw: Callable[..., Mask] = getattr(masking, self.sampler)
        return draw(key, grid, self.mask_ratio)


@dataclass(frozen=True)
class UnitMasking:
    """Which patches of a batch are masked: whole units of them, as SimMIM does.

    Attributes:
        mask_ratio: Fraction of units to mask, in (0, 1), rounded up as the authors do.
        unit: Patches per axis that are masked together (table 1).

    Source:
        SimMIM, arXiv:2111.09886, section 3.2 and table 1.
    """

    mask_ratio: OpenFraction
    unit: PositiveInt

    def __post_init__(self) -> None:
        check_fields(self)

    def draw(self, key: Key, grid: tuple[int, ...]) -> Mask:
        """Draw the masks of a batch.

        Raises:
            ValueError: Units that do not divide the grid, or nothing that is left to see.
        """
        if any(size % self.unit for size in grid):
            raise ValueError(
                f"--unit {self.unit} does not divide the {'x'.join(map(str, grid))} patches of an "
                f"image: give a divisor of {math.gcd(*grid)}"
            )
        mask = masking.uniform(key, grid, self.mask_ratio, unit=self.unit, rounding="simmim")
        if mask.num_visible == 0:
            raise ValueError(
                f"--mask-ratio {self.mask_ratio}, rounded up to whole units of {self.unit}, hides "
                f"all {'x'.join(map(str, grid))} patches: give a smaller one"
            )
        return mask


def draw_views(
    draw: Callable[[Key, tuple[int, ...]], Mask], key: Key, grid: tuple[int, ...], views: int
) -> Masks:
    """Draw one mask, or a list of independent masks."""
    if views == 1:
        return draw(key, grid)
    return [draw(key.view(view), grid) for view in range(views)]


def join(masks: Masks, images: Tensor) -> tuple[Mask, Tensor]:
    """Concatenate several masks of the same images into one, and repeat the images to match.

    Raises:
        TypeError: If `masks` holds a `RaggedMask` or something else than a `Mask`.
    """
    if isinstance(masks, Sequence):
        for mask in masks:
            check_even(mask)
        return Mask.cat(masks), images.repeat(len(masks), *[1] * (images.ndim - 1))
    check_even(masks)
    return masks, images


def first(masks: Masks) -> Mask:
    """Return the first mask, if there are several."""
    return masks if isinstance(masks, Mask) else masks[0]


def mask_all(images: Tensor, grid: tuple[int, ...]) -> Mask:
    """Mask every patch of every image."""
    nothing = torch.zeros(len(images), 0, dtype=torch.int64)
    return Mask.from_visible_ids(nothing, grid).to(images.device)
