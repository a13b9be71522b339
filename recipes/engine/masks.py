"""Draw the masks of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from mimkit import masking
from mimkit._checks import check_even
from mimkit.masking import Key, Mask
from recipes.engine.fields import OpenFraction, PositiveInt, check_fields

# One mask for the batch, or several masks of the same batch.
Masks: TypeAlias = Mask | Sequence[Mask]

Sampler = Literal["uniform", "blockwise", "gridwise"]


@dataclass(frozen=True)
class Masking:
    """Configuration of the masks.

    Attributes:
        mask_ratio: Fraction of patches to mask, in (0, 1).
        sampler: "uniform" draws single patches, "blockwise" draws blocks of patches, and "gridwise"
            keeps every second patch of every second row visible.
        views: Masks per image. Each step runs the model on all of them, and loads each image once.

    Source:
        MAE, arXiv:2111.06377, table 1f.
    """

    mask_ratio: OpenFraction
    sampler: Sampler = "uniform"
    views: PositiveInt = 1

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
        draw = masking.blockwise if self.sampler == "blockwise" else masking.uniform
        return draw(key, grid, self.mask_ratio)


def draw_views(
    draw: Callable[[Key, tuple[int, ...]], Mask], key: Key, grid: tuple[int, ...], views: int
) -> Masks:
    """Draw one mask, or a list of independent masks."""
    if views == 1:
        return draw(key, grid)
    return [draw(key.view(view), grid) for view in range(views)]


def check_ratio(mask_ratio: float) -> None:
    """Check a mask ratio.

    Raises:
        ValueError: If it is not in (0, 1).
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(
            f"--mask-ratio {mask_ratio} is out of range: give a fraction between 0 and 1"
        )


def take_rows(masks: Masks, rows: Tensor) -> Masks:
    """Select the masks of some samples."""
    return masks[rows] if isinstance(masks, Mask) else [mask[rows] for mask in masks]


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
