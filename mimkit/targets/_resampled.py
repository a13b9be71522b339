"""Pixel targets at a lower resolution, or normalised by windows.

Axes: batch; channels; *spatial; masked (tokens, or groups of them); patch (the values of one).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import Size, checked
from mimkit._checks import Order, as_floats, check_even, check_values
from mimkit._grids import Grid, divide, per_axis
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify, restore, unpatchify
from mimkit.targets._pixels import masked_pixels

_NORMALIZATION_EPS = 1e-6  # inside the square root


@checked
@dataclass(frozen=True)
class DownsampledPixels:
    """The means of square blocks of masked pixels.

    Attributes:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        factor: Side of a square in pixels. It must divide the patch size, or be a multiple of it.
            If it is a multiple, masked patches must fill whole squares, and each square gives one
            row of the target.
        order: Order of the values inside a patch (see `patches.patchify`).
        uses_ground_truth: Whether `invert` reads masked pixels: False.

    Source:
        SimMIM, arXiv:2111.09886, section 4.1.4 "prediction resolutions"; not in the released code.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> DownsampledPixels((1, 4), (1, 2))(torch.arange(8.0).view(1, 1, 1, 8), mask)
        tensor([[[0.5000, 2.5000]]])
    """

    patch_size: int | Sequence[int]
    factor: int | Sequence[int]
    order: Order = "p1 p2 c"
    uses_ground_truth: ClassVar[bool] = False

    @checked
    def group(self, mask: Mask) -> Mask:
        """Return the mask of the predicted units: patches, or squares of several patches.

        Args:
            mask: Which patches are masked.

        Returns:
            The same mask where a square is at most a patch; else one on the coarser grid of the
            squares.

        Raises:
            ValueError: If the factor does not fit the patch size, or (on a CPU) a square is partly
                masked.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[[True, True, False, False]] * 2]))
            >>> DownsampledPixels(4, 8).group(mask).is_masked
            tensor([[[ True, False]]])
        """
        squares, patch = self._sizes(mask)
        return mask if squares == patch else mask.coarsen(divide("factor", squares, patch, "patch"))

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Return the means of the masked squares.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Means, float32: one row per masked unit of `group`.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the factor does not fit the patch size, the mask does not fit the
                images, or (on a CPU) a square is partly masked.
        """
        outer, _ = self._sizes(mask)
        factor = per_axis("factor", self.factor, len(outer))
        pixels = masked_pixels(images, self.group(mask), outer, "c p1 p2")
        means = pixels.view(*pixels.shape[:2], images.shape[1], *outer)
        for axis, side in enumerate(factor, 3):
            means = means.unflatten(axis, (-1, side)).mean(dim=axis + 1)
        return _in_order(means, self.order)

    @checked
    def invert(
        self,
        values: Float[Tensor, "batch rows means"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Return patches in which every square is filled with its mean.

        Args:
            values: What `__call__` returns, or a prediction of it.
            images: Images; only their number of channels is read.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            ValueError: If the values do not fit the images, or the mask the squares.

        Example:
            >>> images = torch.arange(4.0).view(1, 1, 1, 4)
            >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
            >>> target = DownsampledPixels((1, 4), (1, 2))
            >>> target.invert(target(images, mask), images, mask)
            tensor([[[0.5000, 0.5000, 2.5000, 2.5000]]])
        """
        outer, patch = self._sizes(mask)
        factor = per_axis("factor", self.factor, len(outer))
        inside = divide("patch", outer, factor, "factor")
        check_values(values, images, inside)
        means = _channels_first(values, inside, images.shape[1], self.order)
        for axis, side in enumerate(factor, 3):
            means = means.repeat_interleave(side, dim=axis)
        if outer == patch:
            return _in_order(means, self.order)
        group = self.group(mask)
        visible = means.new_zeros(len(values), group.num_visible, means[0, 0].numel())
        squares = restore(visible, group, means.flatten(2))
        maps = unpatchify(squares, group.grid, outer, order="c p1 p2")
        return gather_masked(patchify(maps, patch, order=self.order), mask)

    def _sizes(self, mask: Mask) -> tuple[Grid, Grid]:
        """Return the size in pixels of a predicted unit, and that of a patch."""
        check_even(mask)
        patch = per_axis("patch_size", self.patch_size, len(mask.grid))
        factor = per_axis("factor", self.factor, len(mask.grid))
        if all(f % p == 0 for f, p in zip(factor, patch, strict=True)):
            return factor, patch
        divide("patch size", patch, factor, "factor")
        return patch, patch


@checked
@dataclass(frozen=True)
class WindowNormalizedPixels:
    """The masked pixels, each normalised by mean and variance of the window around it.

    Attributes:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        window: Side of the window in pixels, an odd number. Its part outside the image is ignored.
        order: Order of the values inside a patch (see `patches.patchify`).
        uses_ground_truth: Whether `invert` reads masked pixels: True. It needs the means and
            standard deviations of their windows.

    Raises:
        ValueError: If the window is even or below 3.

    Source:
        microsoft/Swin-Transformer `models/simmim.py` `norm_targets`, a port of SimMIM, whose own
        release and paper have no such target. Here windows are averaged axis by axis.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
        >>> WindowNormalizedPixels((1, 3), window=3)(torch.tensor([[[[1.0, 2.0, 3.0]]]]), mask)
        tensor([[[-0.7071,  0.0000,  0.7071]]])
    """

    patch_size: int | Sequence[int]
    window: Size = 47
    order: Order = "p1 p2 c"
    uses_ground_truth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"window must be odd and at least 3; got {self.window}")

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Return the normalised pixels of the masked patches.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Values normalised by the pixels around each, float32.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the mask does not fit the images.
        """
        images = as_floats(images).float()
        mean, std = self._statistics(images)
        return masked_pixels((images - mean) / std, mask, self.patch_size, self.order)

    @checked
    def invert(
        self,
        values: Float[Tensor, "batch masked patch"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Undo the normalisation with the mean and standard deviation of the true windows.

        Args:
            values: What `__call__` returns, or a prediction of it.
            images: The true images, whose windows give mean and standard deviation.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            ValueError: If the values do not fit the images and the patch size.

        Example:
            >>> from mimkit.targets import Pixels
            >>> images = torch.rand(2, 3, 8, 8)
            >>> mask = Mask.from_visible_ids(torch.zeros(2, 1, dtype=torch.int64), (2, 2))
            >>> target = WindowNormalizedPixels(4, window=3)
            >>> patches = target.invert(target(images, mask), images, mask)
            >>> torch.allclose(patches, Pixels(4)(images, mask), atol=1e-5)
            True
        """
        check_values(values, images, self.patch_size)
        mean, std = (
            masked_pixels(statistic, mask, self.patch_size, self.order)
            for statistic in self._statistics(as_floats(images).float())
        )
        return values * std + mean

    def _statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, mean_square, count = images, images.square(), torch.ones(())
        for axis, size in enumerate(images.shape[2:], 2):
            mean, mean_square = self._pool(mean, axis), self._pool(mean_square, axis)
            position, radius = torch.arange(size), self.window // 2
            inside = (position + radius + 1).clamp(max=size) - (position - radius).clamp(min=0)
            count = count.unsqueeze(-1) * inside
        unbiased = (count / (count - 1).clamp(min=1)).to(images.device)
        variance = ((mean_square - mean.square()) * unbiased).clamp(min=0)
        return mean, (variance + _NORMALIZATION_EPS).sqrt()

    def _pool(self, values: Tensor, axis: int) -> Tensor:
        lines = values.movedim(axis, -1)
        pooled = F.avg_pool1d(
            lines.reshape(-1, 1, lines.shape[-1]),
            self.window,
            stride=1,
            padding=self.window // 2,
            count_include_pad=False,
        )
        return pooled.view(lines.shape).movedim(-1, axis)


def _in_order(
    patches: Float[Tensor, "batch masked channels *points"], order: Order
) -> Float[Tensor, "batch masked patch"]:
    """Flatten each patch to a vector in this order."""
    if order == "p1 p2 c":
        patches = patches.movedim(2, -1)
    return patches.flatten(2)


def _channels_first(
    values: Float[Tensor, "batch masked patch"], points: Grid, channels: int, order: Order
) -> Float[Tensor, "batch masked channels *points"]:
    """Undo `_in_order`."""
    num_points = math.prod(points)
    pattern = "b m (n c) -> b m c n" if order == "p1 p2 c" else "b m (c n) -> b m c n"
    flat = rearrange(values, pattern, c=channels, n=num_points)
    return flat.view(*flat.shape[:3], *points)
