"""Targets that are classes: color clusters, and bins of channel values.

Axes: batch; channels; *spatial; masked (tokens); patch (the values of one patch); pixels (of a
patch, row-major); clusters; points (colors to cluster).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mimkit._arguments import Count, Size, checked
from mimkit._checks import as_floats, check_classes, check_no_nan
from mimkit.masking import Mask
from mimkit.targets._pixels import masked_pixels

_POINTS_AT_ONCE = 1 << 16


class ColorClusters:
    """The index of the nearest color for each masked pixel; k-means finds the colors.

    Args:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        num_clusters: Number of colors.

    Attributes:
        centers: The colors; `None` before `fit` or `load`.
        uses_ground_truth: Whether `invert` reads masked pixels: False.

    Source:
        iGPT (Chen et al., 2020), 512 clusters; SimMIM, arXiv:2111.09886, table 5 "iGPT cluster";
        the clusters are not in SimMIM's released code.

    Example:
        >>> images = torch.rand(4, 3, 8, 8)
        >>> mask = Mask.from_visible_ids(torch.zeros(4, 1, dtype=torch.int64), (2, 2))
        >>> target = ColorClusters(4, num_clusters=8).fit(images)
        >>> ids = target(images, mask)
        >>> ids.shape, target.invert(ids, images, mask).shape
        (torch.Size([4, 3, 16]), torch.Size([4, 3, 48]))
    """

    uses_ground_truth = False

    @checked
    def __init__(self, patch_size: int | Sequence[int], num_clusters: Size = 512) -> None:
        self.patch_size = patch_size
        self.num_clusters = num_clusters
        self.centers: Float[Tensor, "clusters channels"] | None = None

    @checked
    def fit(
        self,
        images: Shaped[Tensor, "batch channels *spatial"],
        *,
        initial: Float[Tensor, "clusters channels"] | None = None,
        max_iterations: Count = 100,
        generator: torch.Generator | None = None,
    ) -> "ColorClusters":
        """Cluster all pixels of `images`.

        Args:
            images: Floats, or uint8, which become fractions in [0, 1].
            initial: Centers to start from; drawn by k-means++ if `None`.
            max_iterations: Maximum number of iterations of Lloyd's algorithm. It stops earlier when
                no pixel changes its cluster.
            generator: Random generator for k-means++, on the CPU.

        Returns:
            The target itself.

        Raises:
            ValueError: If there are fewer pixels than clusters, or the initial centers have the
                wrong shape.
        """
        check_no_nan("images", images, always=True)
        points = as_floats(images).float().movedim(1, -1).flatten(0, -2)
        if len(points) < self.num_clusters:
            raise ValueError(
                f"{self.num_clusters} clusters need at least as many pixels; got {len(points)} "
                f"from images {tuple(images.shape)}"
            )
        if initial is None:
            initial = _plus_plus(points, self.num_clusters, generator)
        if initial.shape != (self.num_clusters, points.shape[1]):
            raise ValueError(
                f"initial must be [{self.num_clusters}, {points.shape[1]}]; "
                f"got {tuple(initial.shape)}"
            )
        self.centers = _lloyd(points, initial.to(points), max_iterations)
        return self

    @checked
    def save(self, path: str | Path) -> None:
        """Write the colors to a file.

        Args:
            path: File to write, replaced if it exists.

        Raises:
            RuntimeError: If called before `fit`.

        Example:
            >>> import tempfile
            >>> fitted = ColorClusters(4, num_clusters=8).fit(torch.rand(4, 3, 8, 8))
            >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            ...     fitted.save(file.name)
            ...     loaded = ColorClusters(4, num_clusters=8).load(file.name)
            >>> torch.equal(loaded.centers, fitted.centers)
            True
        """
        torch.save({"centers": self._fitted(torch.device("cpu"))}, path)

    @checked
    def load(self, path: str | Path) -> "ColorClusters":
        """Read the colors from a file that `save` wrote.

        Args:
            path: File to read; nothing in it is executed.

        Returns:
            The target itself.

        Raises:
            ValueError: If the file has a different number of clusters.

        Example:
            >>> import tempfile
            >>> fitted = ColorClusters(4, num_clusters=8).fit(torch.rand(4, 3, 8, 8))
            >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            ...     fitted.save(file.name)
            ...     loaded = ColorClusters(4, num_clusters=8).load(file.name)
            >>> torch.equal(loaded.centers, fitted.centers)
            True
        """
        centers = torch.load(path, map_location="cpu", weights_only=True)["centers"]
        if len(centers) != self.num_clusters:
            raise ValueError(f"{path} holds {len(centers)} clusters, not {self.num_clusters}")
        self.centers = centers
        return self

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Int64[Tensor, "batch masked pixels"]:
        """Return the cluster of each masked pixel.

        Args:
            images: Images; uint8 are read as fractions in [0, 1].
            mask: Which patches are masked; each sample the same number.

        Returns:
            Number of the nearest color of each pixel, in [0, num_clusters).

        Raises:
            RuntimeError: If called before `fit`.
            ValueError: If the images and the colors have different numbers of channels.
        """
        check_no_nan("images", images)
        patches = masked_pixels(images, mask, self.patch_size)
        centers = self._fitted(patches.device)
        if images.shape[1] != centers.shape[1]:
            raise ValueError(
                f"these colors have {centers.shape[1]} channels; got images {tuple(images.shape)}"
            )
        nearest, _ = _nearest(patches.reshape(-1, centers.shape[1]), centers)
        return nearest.view(*patches.shape[:2], patches.shape[2] // centers.shape[1])

    @checked
    def invert(
        self,
        values: Int64[Tensor, "batch masked pixels"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Return patches filled with the colors of the clusters.

        Args:
            values: Numbers of colors, in [0, num_clusters).
            images: Images; not read.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            RuntimeError: If called before `fit`.
            ValueError: If a number is out of range.
        """
        colors = self._fitted(values.device)
        check_classes("values", values, len(colors))
        return colors[values].flatten(2)

    def _fitted(self, device: torch.device) -> Tensor:
        if self.centers is None:
            raise RuntimeError("this ColorClusters has no colors yet: call fit(images) or load")
        return self.centers.to(device)


@checked
@dataclass(frozen=True)
class ChannelBins:
    """The index of the interval (bin) of each value of the masked pixels.

    Attributes:
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        num_bins: Number of intervals, all of the same width.
        low: Start of the first interval; smaller values are assigned to it too.
        high: End of the last interval; larger values are assigned to it too. For uint8 images,
            `low` and `high` are fractions of 255.
        uses_ground_truth: Whether `invert` reads masked pixels: False.

    Raises:
        ValueError: If `low` is not below `high`.

    Source:
        SimMIM, arXiv:2111.09886, table 5 "per-channel 8-bin" and "256-bin"; not in the released
        code.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
        >>> bins = ChannelBins((1, 3), num_bins=8)
        >>> bins(torch.tensor([[[[0.0, 0.5, 1.0]]]]), mask)
        tensor([[[0, 4, 7]]])
    """

    patch_size: int | Sequence[int]
    num_bins: Size = 8
    low: float = 0.0
    high: float = 1.0
    uses_ground_truth: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.num_bins < 1 or not self.low < self.high:
            raise ValueError(
                "bins need at least one interval from low to high; "
                f"got {self.num_bins} from {self.low} to {self.high}"
            )

    @checked
    def __call__(
        self, images: Shaped[Tensor, "batch channels *spatial"], mask: Mask
    ) -> Int64[Tensor, "batch masked patch"]:
        """Return the bins of the masked patches, in the order "p1 p2 c".

        Args:
            images: Images; uint8 are read as fractions in [0, 1].
            mask: Which patches are masked; each sample the same number.

        Returns:
            Bins in [0, num_bins); values outside [low, high] get the first or the last.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the mask does not fit the images, or (on a CPU) they contain NaN.
        """
        check_no_nan("images", images)
        patches = masked_pixels(images, mask, self.patch_size)
        values = patches if patches.dtype == torch.float64 else patches.float()
        # Edges are rounded once. A value that is scaled instead is rounded too, maybe over an edge.
        edges = torch.linspace(
            self.low, self.high, self.num_bins + 1, dtype=torch.float64, device=values.device
        ).to(values.dtype)
        return torch.bucketize(values, edges[1:-1], right=True)

    @checked
    def invert(
        self,
        values: Int64[Tensor, "batch masked patch"],
        images: Shaped[Tensor, "batch channels *spatial"],
        mask: Mask,
    ) -> Float[Tensor, "batch masked patch"]:
        """Return patches filled with the centers of the bins.

        Args:
            values: Bins in [0, num_bins).
            images: Images; not read.
            mask: Which patches are masked; each sample the same number.

        Returns:
            One patch per masked token, in ascending order of position, [batch, masked, patch].

        Raises:
            ValueError: If a bin is out of range.

        Example:
            >>> images = torch.tensor([[[[0.1, 0.9]]]])
            >>> mask = Mask.from_bool(torch.tensor([[[True]]]))
            >>> bins = ChannelBins((1, 2), num_bins=2)
            >>> bins.invert(bins(images, mask), images, mask)
            tensor([[[0.2500, 0.7500]]])
        """
        check_classes("values", values, self.num_bins)
        return self.low + (values + 0.5) * ((self.high - self.low) / self.num_bins)


def _nearest(
    points: Float[Tensor, "points channels"], centers: Float[Tensor, "clusters channels"]
) -> tuple[Int64[Tensor, " points"], Float[Tensor, " points"]]:
    """Return each point's nearest center, and the squared distance to it."""
    parts = [
        (part[:, None] - centers).square().sum(dim=-1).min(dim=1)
        for part in points.split(max(_POINTS_AT_ONCE // len(centers), 1))
    ]
    if not parts:
        return points.new_zeros(0, dtype=torch.int64), points.new_zeros(0)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _plus_plus(
    points: Float[Tensor, "points channels"], num_clusters: int, generator: torch.Generator | None
) -> Float[Tensor, "clusters channels"]:
    """Draw initial centers with k-means++: far points have a higher probability."""
    first = int(torch.randint(len(points), (), generator=generator))
    chosen = [first]
    nearest = (points - points[first]).square().sum(dim=1)
    for _ in range(1, num_clusters):
        # Sampled from the cumulative sum, because `multinomial` takes at most 2**24 points.
        sums = nearest.double().cumsum(dim=0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(sums) * sums[-1]
        chosen.append(int(torch.searchsorted(sums, drawn, right=True).clamp(max=len(points) - 1)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(dim=1))
    return points[chosen]


def _lloyd(
    points: Float[Tensor, "points channels"],
    centers: Float[Tensor, "clusters channels"],
    max_iterations: int,
) -> Float[Tensor, "clusters channels"]:
    """Move centers to the means of their points until no point changes its center."""
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(max_iterations):
        nearest, distances = _nearest(points, centers)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        counts = labels.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers, dtype=torch.float64)
        sums.index_add_(0, labels, points.double())
        centers = (sums / counts.clamp(min=1)[:, None]).to(points.dtype)
        empty = (counts == 0).nonzero().flatten()
        # Empty clusters move to the points that are farthest from their centers.
        centers[empty] = points[distances.topk(len(empty)).indices]
    return centers
