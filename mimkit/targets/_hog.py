"""Histograms of oriented gradients.

Axes: batch; channels; height, width; masked (tokens); values (bins of all cells of one patch).
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
from mimkit._checks import as_floats, check_mask
from mimkit._grids import divide, per_axis
from mimkit.masking import Mask
from mimkit.patches import gather_masked, grid_of

_EPS = 1e-5


@checked
@dataclass(frozen=True)
class HOG:
    """Histograms of oriented gradients in the cells of the masked patches.

    Each channel has its own histogram. Every pixel adds the magnitude of its gradient (central
    differences, 0 at the border of the image) to one orientation bin. Each histogram is normalised
    to an L2 norm of 1.

    Attributes:
        patch_size: Pixels per patch; one integer, or one per axis.
        cell: Pixels per cell; one integer, or one per axis. It must divide the patch.
        num_bins: Number of orientation bins in [0, 180) degrees.
        uses_ground_truth: False: `invert` is not possible.

    Source:
        Dalal and Triggs, 2005; MaskFeat, arXiv:2112.09133, section 3.2 (9 bins, cells of 8 pixels,
        each channel separately). Values are those of scikit-image's `feature.hog` for single
        channels, with blocks of one cell and "L2" norm.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> HOG(16)(torch.rand(1, 3, 16, 32), mask).shape
        torch.Size([1, 1, 108])
    """

    patch_size: int | Sequence[int]
    cell: int | Sequence[int] = 8
    num_bins: Size = 9
    uses_ground_truth: ClassVar[bool] = False

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels height width"], mask: Mask
    ) -> Float[Tensor, "batch masked values"]:
        """Return the histograms of the masked patches: cells row-major, then channels, then bins.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Histograms of unit length over the bins of a cell, float32.

        Raises:
            ValueError: If the cells do not divide the patches, the images do not have two spatial
                axes, or the mask does not fit them.
        """
        if images.ndim != 4:
            raise ValueError(f"images must have two spatial axes; got shape {tuple(images.shape)}")
        patch = per_axis("patch_size", self.patch_size, 2)
        cell = per_axis("cell", self.cell, 2)
        inside = divide("patch size", patch, cell, "cell")
        check_mask(mask, grid_of(images, patch), images)
        histograms = self._histograms(as_floats(images), cell[0], cell[1])
        norm = (histograms.square().sum(dim=2, keepdim=True) + _EPS**2).sqrt()
        values = rearrange(
            histograms / norm,
            "b c n (y i) (x j) -> b (y x) (i j c n)",
            i=inside[0],
            j=inside[1],
        )
        return gather_masked(values, mask)

    @checked
    def invert(
        self, values: Tensor, images: Tensor, mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Not possible: pixels cannot be computed from gradients.

        Args:
            values: Any.
            images: Any.
            mask: Any.

        Returns:
            Nothing: it always raises.

        Raises:
            NotImplementedError: Always.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
            >>> HOG(16).invert(torch.rand(1, 1, 108), torch.rand(1, 3, 16, 32), mask)
            Traceback (most recent call last):
            NotImplementedError: HOG cannot be turned back into pixels
        """
        raise NotImplementedError("HOG cannot be turned back into pixels")

    def _histograms(
        self, images: Tensor, height: int, width: int
    ) -> Float[Tensor, "batch channels bins cells_down cells_across"]:
        images = images if images.dtype == torch.float64 else images.float()
        down, across = torch.zeros_like(images), torch.zeros_like(images)
        down[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
        across[..., 1:-1] = images[..., 2:] - images[..., :-2]
        angle = torch.atan2(down, across).remainder(math.pi) / math.pi  # in units of 180 degrees
        bins = (angle * self.num_bins).long().remainder(self.num_bins)
        votes = images.new_zeros(*images.shape[:2], self.num_bins, *images.shape[2:])
        votes.scatter_(2, bins.unsqueeze(2), torch.hypot(down, across).unsqueeze(2))
        cells = F.avg_pool2d(votes.flatten(0, 1), (height, width))
        return cells.view(*votes.shape[:3], *cells.shape[2:])
