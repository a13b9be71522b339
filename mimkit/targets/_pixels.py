"""Pixel targets.

Axes: batch; channels; *spatial; masked (tokens); patch (the values of one patch).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor

from mimkit._arguments import Scales, Size, checked
from mimkit._checks import (
    Order,
    as_floats,
    check_even,
    check_no_nan,
    check_values,
    patch_statistics,
)
from mimkit.masking import Mask
from mimkit.patches import gather_patches, patchify


def masked_pixels(
    images: Tensor,
    mask: Mask,
    patch_size: int | Sequence[int],
    order: Order = "p1 p2 c",
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
) -> Tensor:
    """Return the pixels of the masked patches, float32: what `Pixels` computes.

    A function, since PyTorch 2.11 cannot compile code that makes an object of a checked class.
    """
    check_even(mask)
    patches = gather_patches(images, mask.complement(), patch_size, mean=mean, std=std, order=order)
    return patches.float()


@checked
@dataclass(frozen=True)
class Pixels:
    """The masked pixels themselves.

    Attributes:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        order: Order of the values inside a patch (see `patches.patchify`).
        mean: One value per channel to subtract (see `patches.gather_patches`).
        std: One value per channel to divide by afterwards.
        uses_ground_truth: Whether `invert` reads masked pixels: False.

    Source:
        MAE, arXiv:2111.06377, section 3 "Reconstruction target"; microsoft/SimMIM, which predicts
        them too. Both normalise the images by mean and standard deviation of ImageNet first.

    Example:
        >>> from mimkit import masking
        >>> images = torch.rand(2, 3, 8, 8)
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.75)
        >>> Pixels(4)(images, mask).shape
        torch.Size([2, 3, 48])
    """

    patch_size: int | Sequence[int]
    order: Order = "p1 p2 c"
    mean: Sequence[float] | Tensor | None = None
    std: Scales | Tensor | None = None
    uses_ground_truth: ClassVar[bool] = False

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Return the pixels of the masked patches.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Values after `mean` and `std`, float32.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the mask does not fit the images.
        """
        return masked_pixels(
            images, mask, self.patch_size, self.order, mean=self.mean, std=self.std
        )

    @checked
    def invert(
        self,
        values: Float[Tensor, "batch masked patch"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Undo `mean` and `std`: return patches in the range of the images (uint8: [0, 1]).

        Args:
            values: What `__call__` returns, or a prediction of it.
            images: The images that the values belong to.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            ValueError: If the values do not fit the images and the patch size.

        Example:
            >>> images = torch.rand(2, 3, 8, 8)
            >>> mask = Mask.from_visible_ids(torch.zeros(2, 1, dtype=torch.int64), (2, 2))
            >>> target = Pixels(4, mean=[0.5] * 3, std=[0.25] * 3)
            >>> patches = target.invert(target(images, mask), images, mask)
            >>> torch.allclose(patches, Pixels(4)(images, mask), atol=1e-6)
            True
        """
        check_values(values, images, self.patch_size)
        channels = images.shape[1]
        pixels = values.shape[2] // channels
        for statistic, apply in ((self.std, torch.mul), (self.mean, torch.add)):
            if statistic is not None:
                per_channel = torch.as_tensor(statistic, dtype=values.dtype, device=values.device)
                per_value = (
                    per_channel.repeat(pixels)
                    if self.order == "p1 p2 c"
                    else per_channel.repeat_interleave(pixels)
                )
                values = apply(values, per_value)
        return values


@checked
@dataclass(frozen=True)
class NormalizedPixels:
    """The masked pixels, with each patch normalised to zero mean and unit variance ("norm-pix").

    Attributes:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        order: Order of the values inside a patch (see `patches.patchify`).
        mean: One value per channel to subtract first (see `patches.gather_patches`).
        std: One value per channel to divide by, before the patches are normalised.
        uses_ground_truth: Whether `invert` reads masked pixels: True. It needs the mean and
            standard deviation of each masked patch, so its result is not a pure prediction.

    Source:
        MAE, arXiv:2111.06377, section 3 "Reconstruction target"; facebookresearch/mae
        `forward_loss`: variance divided by n - 1, epsilon 1e-6 inside the square root.

    Example:
        >>> from mimkit import masking
        >>> images = torch.rand(2, 3, 8, 8)
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.75)
        >>> values = NormalizedPixels(4)(images, mask)
        >>> values.shape, values.mean(dim=2).abs().max() < 1e-5
        (torch.Size([2, 3, 48]), tensor(True))
    """

    patch_size: int | Sequence[int]
    order: Order = "p1 p2 c"
    mean: Sequence[float] | Tensor | None = None
    std: Scales | Tensor | None = None
    uses_ground_truth: ClassVar[bool] = True

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked patch"]:
        """Return the normalised pixels of the masked patches.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Values of mean 0 and variance 1 in each patch, float32.

        Raises:
            ValueError: If patches have a single value, and so no variance.

        Example:
            >>> images = torch.tensor([[[[1.0, 3.0]]]])
            >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
            >>> NormalizedPixels((1, 2))(images, mask)
            tensor([[[-0.7071,  0.7071]]])
        """
        # Statistics are computed in the order of memory; values are reordered afterwards.
        patches = masked_pixels(
            images, mask, self.patch_size, "c p1 p2", mean=self.mean, std=self.std
        )
        mean, std = patch_statistics(patches)
        normalized = (patches - mean) / std
        if self.order == "c p1 p2":
            return normalized
        return rearrange(normalized, "b m (c p) -> b m (p c)", c=images.shape[1])

    @checked
    def invert(
        self,
        values: Float[Tensor, "batch masked patch"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Undo the normalisation with the mean and standard deviation of the true patches.

        Args:
            values: What `__call__` returns, or a prediction of it.
            images: The true images, whose masked patches give mean and standard deviation.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            ValueError: If the shape of the values is not that of the masked patches.

        Example:
            >>> images = torch.rand(2, 3, 8, 8)
            >>> mask = Mask.from_visible_ids(torch.zeros(2, 1, dtype=torch.int64), (2, 2))
            >>> target = NormalizedPixels(4)
            >>> patches = target.invert(target(images, mask), images, mask)
            >>> torch.allclose(patches, Pixels(4)(images, mask), atol=1e-5)
            True
        """
        pixels = self._pixels(images, mask)
        if values.shape != pixels.shape:
            raise ValueError(
                f"values must be {tuple(pixels.shape)}, one patch per masked token of the images; "
                f"got {tuple(values.shape)}"
            )
        mean, std = patch_statistics(pixels)
        return self._pixels.invert(values * std + mean, images, mask)

    @property
    def _pixels(self) -> Pixels:
        return Pixels(self.patch_size, self.order, self.mean, self.std)


class PCATarget:
    """Coefficients of the masked patches on their first principal components.

    Args:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        num_components: Number of components.
        order: Order of the values inside a patch (see `patches.patchify`).

    Attributes:
        center: Mean patch; `None` before `fit`.
        components: Orthonormal rows, largest variance first; `None` before `fit`.
        uses_ground_truth: Whether `invert` reads masked pixels: False.

    Source:
        MAE, arXiv:2111.06377, table 1d "PCA" (96 components); not in the released code.

    Example:
        >>> from mimkit import masking
        >>> images = torch.randn(4, 3, 8, 8)
        >>> mask = masking.uniform(masking.key(range(4), seed=0), (4, 4), 0.5)
        >>> target = PCATarget(2, num_components=12).fit(images)
        >>> patches = target.invert(target(images, mask), images, mask)
        >>> torch.allclose(patches, Pixels(2)(images, mask), atol=1e-4)  # all 12 components
        True
    """

    uses_ground_truth = False

    @checked
    def __init__(
        self,
        patch_size: int | Sequence[int],
        num_components: Size = 96,
        *,
        order: Order = "p1 p2 c",
    ) -> None:
        self.patch_size = patch_size
        self.num_components = num_components
        self.order: Order = order
        self.center: Float[Tensor, " patch"] | None = None
        self.components: Float[Tensor, "components patch"] | None = None

    @checked
    def fit(self, images: Shaped[Tensor, "batch channels *spatial"]) -> "PCATarget":
        """Compute the principal components of all patches of `images`.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.

        Returns:
            The target itself.

        Raises:
            ValueError: If there are more components than values in a patch, or fewer than two
                patches.
        """
        check_no_nan("images", images, always=True)
        patches = patchify(as_floats(images), self.patch_size, order=self.order)
        patches = patches.flatten(0, 1).double()
        if len(patches) < 2:
            raise ValueError(
                f"fit needs at least 2 patches; got {len(patches)} from images "
                f"{tuple(images.shape)}"
            )
        if self.num_components > patches.shape[1]:
            raise ValueError(
                f"{self.num_components} components do not fit patches of {patches.shape[1]} values"
            )
        center = patches.mean(dim=0)
        # Eigenvalues come in ascending order.
        directions = torch.linalg.eigh((patches - center).T.cov()).eigenvectors
        self.center = center.float()
        self.components = directions.flip(1)[:, : self.num_components].T.float().contiguous()
        return self

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Float[Tensor, "batch masked components"]:
        """Return the coefficients of the masked patches.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.
            mask: Which patches are masked; each sample the same number.

        Returns:
            Coefficients, largest variance first, float32.

        Raises:
            RuntimeError: If called before `fit`.
            ValueError: If the patches have another number of values than those of `fit`.
        """
        patches = masked_pixels(images, mask, self.patch_size, self.order)
        center, components = self._fitted(patches.device)
        if patches.shape[2] != len(center):
            raise ValueError(
                f"images must give patches of {len(center)} values, as those of fit; got "
                f"{patches.shape[2]} from {tuple(images.shape)}"
            )
        return (patches - center) @ components.T

    @checked
    def invert(
        self,
        values: Float[Tensor, "batch masked components"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Return the patches that have these coefficients.

        Args:
            values: Coefficients.
            images: Images; not read.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            RuntimeError: If called before `fit`.
            ValueError: If there is another number of coefficients, or they are not float32.
        """
        center, components = self._fitted(values.device)
        if values.dtype != components.dtype or values.shape[2] != len(components):
            raise ValueError(
                f"values must be {components.dtype} and [batch, masked, {len(components)}]; got "
                f"{values.dtype} and {tuple(values.shape)}"
            )
        return values @ components + center

    def _fitted(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self.center is None or self.components is None:
            raise RuntimeError("this PCATarget has no components yet: call fit(images) first")
        return self.center.to(device), self.components.to(device)
