"""Patch embedding.

Axes: batch; channels; *spatial; tokens (the visible ones with a mask, all of the grid without);
patch (the values of one patch); dim. With a `RaggedMask`: rows (tokens of all samples,
concatenated).
"""

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Scales, Size, checked, uses_autocast
from mimkit._checks import Order, as_floats, byte_statistics, channel_statistic, check_stacked
from mimkit._grids import Grid, count_tokens, sides_of
from mimkit.masking import Mask, RaggedMask
from mimkit.patches import gather_patches, patchify

Images: TypeAlias = (
    Shaped[Tensor, "batch channels *spatial"] | Sequence[Shaped[Tensor, "channels ..."]]
)


class PatchProjection(nn.Module):
    """Linear projection of patches, with its weight stored in convolution layout."""

    def __init__(self, *, in_channels: int, patch: Sequence[int], dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_channels, *patch))
        self.bias = nn.Parameter(torch.empty(dim))
        nn.init.xavier_uniform_(self.weight.view(dim, -1))
        # MAE leaves the bias at PyTorch's default for a convolution.
        bound = 1 / math.sqrt(in_channels * count_tokens(patch))
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, patches: Float[Tensor, "*tokens patch"], order: Order = "c p1 p2"
    ) -> Float[Tensor, "*tokens dim"]:
        """Project patches whose values are in `order`."""
        if patches.device != self.weight.device:
            raise ValueError(
                f"the images are on {patches.device}, but the weights on {self.weight.device}"
            )
        if patches.dtype != self.weight.dtype and not uses_autocast(patches):
            raise TypeError(
                f"the images give patches of {patches.dtype}, but the weights are "
                f"{self.weight.dtype}: convert one, or use autocast"
            )
        weight = self.weight if order == "c p1 p2" else self.weight.movedim(1, -1)
        return F.linear(patches, weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Patch embedding that computes only the visible patches when a mask is given.

    Args:
        patch_size: Pixels per patch: an integer means a square patch, a tuple one side per axis.
        in_channels: Channels of the images.
        dim: Width of a token.
        order: Order in which the values of a patch are loaded and summed (see `patches.patchify`).
            It changes rounding only.

    Source:
        timm `PatchEmbed` (a convolution over all patches, parameters `proj.weight`, `proj.bias`);
        initialised as facebookresearch/mae does.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.75)
        >>> embed = PatchEmbed(patch_size=(8, 8), in_channels=3, dim=16)
        >>> embed(torch.rand(1, 3, 32, 32), mask).shape
        torch.Size([1, 4, 16])
    """

    # Numbers, and no buffers: they belong to the images, and are in no state dict.
    _mean: tuple[float, ...] | None = None
    _std: tuple[float, ...] | None = None

    @checked
    def __init__(
        self,
        *,
        patch_size: int | Sequence[int],
        in_channels: Size,
        dim: Size,
        order: Order = "c p1 p2",
    ) -> None:
        super().__init__()
        self.order: Order = order
        self.patch_size = sides_of("patch_size", patch_size)
        self.in_channels = in_channels
        self.proj = PatchProjection(in_channels=in_channels, patch=self.patch_size, dim=dim)

    @checked
    def normalize_bytes(self, mean: Sequence[float], std: Scales) -> None:
        """Normalise uint8 images from now on, while patches are read; floats stay as they are.

        So images stay bytes until here, and no other copy of them is made.

        Args:
            mean: One value per channel to subtract from uint8 images, once they are fractions.
            std: One value per channel to divide by afterwards.

        Example:
            >>> embed = PatchEmbed(patch_size=1, in_channels=1, dim=4)
            >>> embed.normalize_bytes([0.5], [0.25])
            >>> images = torch.tensor([[[[0, 85, 255]]]], dtype=torch.uint8)
            >>> torch.equal(embed(images), embed((images / 255 - 0.5) / 0.25))
            True
        """
        self._mean, self._std = tuple(mean), tuple(std)

    @checked
    def forward(
        self,
        images: Images,
        mask: Mask | RaggedMask | None = None,
    ) -> Float[Tensor, "batch tokens dim"] | Float[Tensor, "rows dim"]:
        """Embed the visible patches in ascending order of position, or all without a mask.

        With a `RaggedMask`, images may also be a list of different sizes; the tokens of all samples
        are then concatenated.

        Args:
            images: Images, float, or uint8, which become fractions in [0, 1] (see also
                `normalize_bytes`); with a `RaggedMask` also a list.
            mask: Which patches are visible.

        Returns:
            One token per visible patch; with a `RaggedMask`, packed.

        Raises:
            ValueError: If the images have another number of channels or are not divisible into
                patches, or the mask does not fit.
        """
        return self._embed(images, mask, self.patch_size)

    def _embed(self, images: Images, mask: Mask | RaggedMask | None, patch: Grid) -> Tensor:
        if not isinstance(mask, RaggedMask):
            check_stacked(images)
        for batch in [images] if isinstance(images, Tensor) else [i.unsqueeze(0) for i in images]:
            if batch.shape[1] != self.in_channels:
                raise ValueError(
                    f"images must have {self.in_channels} channels; got shape {tuple(batch.shape)}"
                )
        if mask is None:
            patches = patchify(self._as_inputs(check_stacked(images)), patch, order=self.order)
        else:
            statistics: Any = byte_statistics(images, self._mean, self._std)
            patches = gather_patches(images, mask, patch, order=self.order, **statistics)
        tokens: Tensor = self.proj(patches, self.order)
        return tokens

    def _as_inputs(self, images: Shaped[Tensor, "batch channels *spatial"]) -> Tensor:
        """Return floats as they are, and bytes as normalised fractions."""
        floats = as_floats(images)
        for name, values in byte_statistics(images, self._mean, self._std).items():
            numbers = floats.new_tensor(channel_statistic(name, values, images))
            column = numbers.view(-1, *[1] * (images.ndim - 2))
            floats = floats - column if name == "mean" else floats / column
        return floats
