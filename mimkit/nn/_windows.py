"""Windows of a grid of tokens, for attention inside them.

Axes: batch; tokens (of the grid); windows (of all samples); inside (tokens of a window); dim.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mimkit._grids import Grid


@dataclass(frozen=True)
class Windows:
    """Partition of a grid into windows; zeros pad the end of each axis that they do not divide.

    As in the authors' code, padding is not masked: the tokens of a window attend to it.

    Attributes:
        grid: Tokens per axis.
        side: Tokens per axis of a window.
        drop_alone: Whether drop path draws for each window, as in ConvMAE's detector, whose whole
            blocks run on windows; otherwise for each image, as in ViTDet.

    Source:
        ViTDet, arXiv:2203.16527; detectron2 `window_partition`, `window_unpartition`.

    Example:
        >>> import torch
        >>> windows, tokens = Windows(grid=(4, 5), side=(2, 3)), torch.rand(1, 20, 8)
        >>> windows.split(tokens).shape
        torch.Size([4, 6, 8])
        >>> torch.equal(windows.merge(windows.split(tokens)), tokens)
        True
    """

    grid: Grid
    side: Grid
    drop_alone: bool = False

    def split(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "windows inside dim"]:
        """Return the tokens of each window, row-major."""
        maps, axes = tokens.unflatten(1, self.grid), len(self.grid)
        missing = [-size % side for size, side in zip(self.grid, self.side, strict=True)]
        if any(missing):  # F.pad takes the last axis first
            ends = [end for amount in reversed(missing) for end in (0, amount)]
            maps = F.pad(maps, [0, 0, *ends])
        for axis in range(axes, 0, -1):
            maps = maps.unflatten(axis, (-1, self.side[axis - 1]))
        order = [*range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]  # counts, then insides
        split: Tensor = maps.permute(0, *order, -1).flatten(axes + 1, -2).flatten(0, axes)
        return split

    def merge(
        self, windows: Float[Tensor, "windows inside dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Undo `split`, and cut the padding off."""
        axes = len(self.grid)
        counts = [-(-size // side) for size, side in zip(self.grid, self.side, strict=True)]
        maps = windows.unflatten(0, (-1, *counts)).unflatten(axes + 1, self.side)
        for axis in range(1, axes + 1):  # the inside of an axis to the place after its count
            maps = maps.movedim(axes + axis, 2 * axis)
        for axis in range(1, axes + 1):
            maps = maps.flatten(axis, axis + 1).narrow(axis, 0, self.grid[axis - 1])
        merged: Tensor = maps.flatten(1, -2)
        return merged
