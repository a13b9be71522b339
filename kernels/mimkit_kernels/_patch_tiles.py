"""Where the values of a patch lie: what the kernels that read patches from images share.

A patch is a tile of rows and columns: a column is a pixel of the patch's last axis, so that a row
is a run of neighbors in memory; rows count the other axes and the channels, channels slowest.
Images of one or two spatial axes are given axes of size 1 in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mimkit_kernels._jit import jit
from mimkit_kernels._register import power_of_2_from

if TYPE_CHECKING:
    import triton.language as tl


@dataclass(frozen=True)
class Geometry:
    """Sizes and strides of images as the kernels want them, over exactly three spatial axes.

    Attributes:
        arguments: Tokens of the last two axes, and the strides of the images.
        constants: Sizes of a patch.
        rows: Rows of a patch's tile.
        columns: Columns of a patch's tile.
    """

    arguments: dict[str, int]
    constants: dict[str, int]
    rows: int
    columns: int

    @classmethod
    def of(cls, images: Tensor, patch: Sequence[int]) -> Geometry:
        """Describe images that are cut into patches of `patch` pixels per axis."""
        missing = 3 - len(patch)
        sizes = (1,) * missing + tuple(patch)
        spatial = (1,) * missing + tuple(images.shape[2:])
        strides = (0,) * missing + images.stride()[2:]
        _, g2, g3 = (pixels // size for pixels, size in zip(spatial, sizes, strict=True))
        channels = images.shape[1]
        axes = zip(("sb", "sc", "s1", "s2", "s3"), (*images.stride()[:2], *strides), strict=True)
        return cls(
            arguments={"g2": g2, "g3": g3, **dict(axes)},
            constants={"C": channels, **dict(zip(("P1", "P2", "P3"), sizes, strict=True))},
            rows=channels * sizes[0] * sizes[1],
            columns=sizes[2],
        )

    def tile(self, max_values: int, max_columns: int) -> tuple[int, int]:
        """Return powers of 2, rows by columns, of a tile that covers the patch or a part of it."""
        columns = min(power_of_2_from(self.columns), max_columns)
        return min(power_of_2_from(self.rows), max(max_values // columns, 1)), columns


@jit
def pixel_offsets(
    sample: tl.tensor,
    token: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    sb: tl.tensor,
    sc: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
) -> tl.tensor:
    """Return where the values of a patch's tile lie in the images."""
    t1, t2, t3 = token // (g2 * g3), token // g3 % g2, token % g3
    # 64 bits up to the patch, 32 bits inside of it: wide images, few registers.
    start = sample.to(tl.int64) * sb
    start += t1.to(tl.int64) * P1 * s1 + t2.to(tl.int64) * P2 * s2 + t3.to(tl.int64) * P3 * s3
    inside = row // (P1 * P2) * sc + row // P2 % P1 * s1 + row % P2 * s2
    return start + (inside[:, None] + column[None, :] * s3)


@jit
def value_offsets(
    row: tl.tensor,
    column: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
) -> tl.tensor:
    """Return where the values of a tile lie in a patch vector."""
    if CHANNELS_LAST:
        pixel = (row % (P1 * P2))[:, None] * P3 + column[None, :]
        offsets = pixel * C + (row // (P1 * P2))[:, None]
    else:
        offsets = row[:, None] * P3 + column[None, :]
    return offsets


@jit
def normalized(
    pixels: tl.tensor,
    row: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
) -> tl.tensor:
    """Scale bytes to fractions, and apply the statistics of each row's channel."""
    values = pixels.to(tl.float32)
    if pixels.dtype == tl.uint8:
        values = values * (1 / 255)
    channel = tl.minimum(row // (P1 * P2), C - 1)
    if mean is not None:
        values = values - tl.load(mean + channel)[:, None]
    if std is not None:
        values = values / tl.load(std + channel)[:, None]
    return values
