"""A small patch tokenizer: k-means codes of image patches.

Axes: batch; channels; *spatial; *grid; codes; patch (the values of one patch).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from mimkit._arguments import Count, Seed, Size, checked
from mimkit._checks import check_axes, check_classes, check_no_nan, patch_statistics
from mimkit._grids import as_sizes, count_tokens, divide
from mimkit.patches import grid_of, patchify, unpatchify

_CHUNK = 1 << 14  # patches per distance matrix, to bound memory


class PatchTokenizer(nn.Module):
    """Tokenizer that codes each patch by its nearest k-means center, after normalisation.

    Patches are normalised to zero mean and unit variance. For small images and small vocabularies
    it fits in about a second; `DiscreteVAE` is the published tokenizer.

    Args:
        patch_size: Pixels per patch, per spatial axis.
        in_channels: Channels of the images.
        vocabulary_size: Number of codes.

    Attributes:
        patch_size: As given.
        vocabulary_size: As given.
        centers: The k-means centers; zeros before `fit`.

    Source:
        mimkit's own: Lloyd's k-means on MAE's normalised patches.

    Example:
        >>> tokenizer = PatchTokenizer(patch_size=(4, 4), in_channels=3, vocabulary_size=8)
        >>> images = torch.rand(4, 3, 8, 12)
        >>> tokenizer.fit(images).encode(images).shape
        torch.Size([4, 2, 3])
    """

    centers: Float[Tensor, "codes patch"]

    @checked
    def __init__(
        self, *, patch_size: Sequence[int], in_channels: Size, vocabulary_size: Size
    ) -> None:
        super().__init__()
        self.axis_sizes = {"channels": in_channels}
        self.patch_size = as_sizes("patch_size", patch_size)
        self.vocabulary_size = vocabulary_size
        width = in_channels * count_tokens(self.patch_size)
        self.register_buffer("centers", torch.zeros(vocabulary_size, width))

    @torch.no_grad()
    @checked
    def fit(
        self,
        images: Shaped[Tensor, "batch channels *spatial"],
        *,
        iterations: Count = 20,
        seed: Seed = 0,
    ) -> "PatchTokenizer":
        """Fit the centers by k-means (Lloyd's iterations, initialised with random patches).

        Args:
            images: Images to fit to.
            iterations: Number of Lloyd's iterations.
            seed: Seed of the choice of the first centers.

        Returns:
            The tokenizer itself.

        Raises:
            ValueError: If there are fewer patches than codes.
        """
        check_no_nan("images", images, always=True)
        patches = self._normalized(images).flatten(0, -2)
        count = len(self.centers)
        if len(patches) < count:
            raise ValueError(
                f"{count} codes need at least {count} patches; got {len(patches)} from images "
                f"{tuple(images.shape)}"
            )
        order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(int(seed)))
        self.centers.copy_(patches[order[:count].to(patches.device)])
        for _ in range(iterations):
            ids = self._nearest(patches)
            sums = torch.zeros_like(self.centers).index_add_(0, ids, patches)
            sizes = torch.bincount(ids, minlength=count).unsqueeze(1)
            # A center without patches stays where it is.
            self.centers.copy_(torch.where(sizes > 0, sums / sizes.clamp(min=1), self.centers))
        return self

    @torch.no_grad()
    @checked
    def encode(
        self, images: Shaped[Tensor, "batch channels *spatial"]
    ) -> Int64[Tensor, "batch *grid"]:
        """Return the code of each patch.

        Args:
            images: Images, uint8 (read as fractions in [0, 1]) or float.

        Returns:
            Codes in [0, vocabulary_size), one per patch.

        Raises:
            ValueError: If images are on another device than the centers, or (on a CPU) contain NaN.
        """
        check_no_nan("images", images)
        patches = self._normalized(images)
        ids = self._nearest(patches.flatten(0, -2))
        return ids.view(images.shape[0], *grid_of(images, self.patch_size))

    @checked
    def decode(
        self,
        ids: Int64[Tensor, "batch *grid"],
        *,
        like: Float[Tensor, "batch channels *spatial"],
    ) -> Float[Tensor, "batch channels *spatial"]:
        """Decode codes to images.

        Args:
            ids: One code per patch.
            like: Images that give each patch its mean and standard deviation, since codes stand for
                normalised patches.

        Returns:
            Images of the shape of `like`.

        Raises:
            ValueError: If `ids` and `like` have different grids.

        Example:
            >>> images = torch.rand(4, 3, 8, 12)
            >>> tokenizer = PatchTokenizer(patch_size=(4, 4), in_channels=3, vocabulary_size=8)
            >>> ids = tokenizer.fit(images).encode(images)
            >>> tokenizer.decode(ids, like=images).shape
            torch.Size([4, 3, 8, 12])
        """
        check_axes(like, self.patch_size, "like")
        grid = divide("like", like.shape[2:], self.patch_size, "patch size")
        if tuple(ids.shape[1:]) != grid:
            raise ValueError(
                f"ids must have the grid of `like`, {grid}; got {tuple(ids.shape)} for like "
                f"{tuple(like.shape)}"
            )
        check_classes("ids", ids, len(self.centers))
        mean, std = patch_statistics(patchify(like, self.patch_size))
        patches = self.centers[ids.flatten(1)] * std + mean
        return unpatchify(patches, ids.shape[1:], self.patch_size, order="c p1 p2")

    def _normalized(self, images: Tensor) -> Float[Tensor, "batch tokens patch"]:
        if images.device != self.centers.device:
            raise ValueError(
                f"images are on {images.device}, but the centers on {self.centers.device}"
            )
        patches = patchify(images.float(), self.patch_size, order="c p1 p2")
        mean, std = patch_statistics(patches)
        return (patches - mean) / std

    def _nearest(self, patches: Float[Tensor, "patches patch"]) -> Int64[Tensor, " patches"]:
        # argmin |p - c|^2 = argmax (p . c - |c|^2 / 2): |p|^2 is the same for all centers.
        offset = self.centers.square().sum(dim=1) / 2
        scores = [chunk @ self.centers.T - offset for chunk in patches.split(_CHUNK)]
        return torch.cat([score.argmax(dim=1) for score in scores])
