"""How the masks of a run are drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from mimkit import masking
from mimkit._checks import check_even
from mimkit.masking import Key, Mask
from recipes.engine.fields import OpenFraction, PositiveInt, check_fields

# Several masks an image, one after the other for the whole batch, as the models take them.
Masks: TypeAlias = Mask | Sequence[Mask]

Sampler = Literal["uniform", "blockwise", "gridwise"]


@dataclass(frozen=True)
class Masking:
    """Which patches of a batch are masked.

    Attributes:
        mask_ratio: Fraction of patches to mask, in (0, 1).
        sampler: How masks are drawn (table 1f): "uniform" patch by patch, "blockwise" in blocks;
            "gridwise" leaves every second patch of every second row visible (ratio 0.75).
        views: Masks an image: a step costs as many passes, and loads each image once.
        min_block: Smallest block of a "blockwise" mask, in patches.

    Source:
        MAE, arXiv:2111.06377, table 1f.
    """

    mask_ratio: OpenFraction
    sampler: Sampler = "uniform"
    views: PositiveInt = 1
    min_block: PositiveInt = 16

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sampler == "gridwise" and self.mask_ratio != 0.75:
            raise ValueError(
                f"--sampler gridwise masks three patches in four: --mask-ratio {self.mask_ratio} "
                "does not fit"
            )

    def draw(self, key: Key, grid: tuple[int, ...]) -> Masks:
        """Draw the masks of a batch; a list where each image gets several."""
        return draw_views(self._draw_one, key, grid, self.views)

    def _draw_one(self, key: Key, grid: tuple[int, ...]) -> Mask:
        if self.sampler == "gridwise":
            return masking.gridwise(key, grid)
        if self.sampler == "blockwise":
            return masking.blockwise(key, grid, self.mask_ratio, min_block=self.min_block)
        return masking.uniform(key, grid, self.mask_ratio)


def draw_views(
    draw: Callable[[Key, tuple[int, ...]], Mask], key: Key, grid: tuple[int, ...], views: int
) -> Masks:
    """Draw one mask an image, or a list of independent ones."""
    if views == 1:
        return draw(key, grid)
    return [draw(key.view(view), grid) for view in range(views)]


def take_rows(masks: Masks, rows: Tensor) -> Masks:
    """Take the masks of some samples."""
    return masks[rows] if isinstance(masks, Mask) else [mask[rows] for mask in masks]


def join(masks: Masks, images: Tensor) -> tuple[Mask, Tensor]:
    """Make one mask of several of the same images, and repeat these: mask by mask.

    Raises:
        TypeError: A `RaggedMask`, or what is no mask at all.
    """
    if isinstance(masks, Sequence):
        for mask in masks:
            check_even(mask)
        return Mask.cat(masks), images.repeat(len(masks), *[1] * (images.ndim - 1))
    check_even(masks)
    return masks, images


def first(masks: Masks) -> Mask:
    """Return the first mask of each image."""
    return masks if isinstance(masks, Mask) else masks[0]
