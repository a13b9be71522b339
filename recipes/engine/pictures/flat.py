"""Pictures of images of any channels and one to three axes.

Axes: channels; *spatial; rows and columns of a picture. Values are in [0, 1].
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from recipes.engine.errors import UserError

_LEAST = 128  # pixels of the longer side of a picture of few points
_CURVE, _GAP = 64, 4  # pixels of a signal's curve, and between slices
_PAPER, _INK, _HIDDEN = 1.0, 0.15, 0.85


def flatten_image(
    image: Float[Tensor, "channels *spatial"], bands: Sequence[int] | None = None
) -> Float[Tensor, "colors rows columns"]:
    """Draw an image: a picture, the middle slices of a volume along each axis, or curves.

    Pictures of one or three channels stay as they are, if no bands are chosen.

    Args:
        image: The image; NaN where a signal is hidden.
        bands: Channels that become red, green and blue, or one that becomes gray, counted from 1.

    Raises:
        UserError: If there is no such channel.
    """
    if image.ndim == 3 and bands is None and len(image) in (1, 3):
        return image
    image = enlarged(choose(image, bands))
    if image.ndim == 2:
        return torch.cat([_curve(signal) for signal in image], dim=1)
    if image.ndim == 3:
        return image
    slices = [image.select(axis, image.shape[axis] // 2) for axis in (1, 2, 3)]
    height = max(part.shape[1] for part in slices)
    padded = [F.pad(s, (0, _GAP, 0, height - s.shape[1]), value=_PAPER) for s in slices]
    return torch.cat(padded, dim=2)[:, :, :-_GAP]


def plane(
    image: Float[Tensor, "channels *spatial"], bands: Sequence[int] | None = None
) -> Float[Tensor, "colors rows columns"]:
    """Return one picture of the points: the first middle slice of a volume, a signal in one row."""
    return middle(choose(image, bands))


def middle(values: Float[Tensor, "leading *spatial"]) -> Float[Tensor, "leading rows columns"]:
    """Return two axes: the middle slice of three; of one axis, one row."""
    if values.ndim == 4:
        return values[:, values.shape[1] // 2]
    return values[:, None] if values.ndim == 2 else values


def choose(
    image: Float[Tensor, "channels *spatial"], bands: Sequence[int] | None
) -> Float[Tensor, "colors *spatial"]:
    """Choose one or three channels; by default the first three, or one where there are two.

    Raises:
        UserError: If there is no such channel.
    """
    if bands is None:
        bands = (1, 2, 3) if len(image) >= 3 else (1,)
    if max(bands) > len(image):
        raise UserError(f"--bands {' '.join(map(str, bands))}: the data have {len(image)} channels")
    return image[[band - 1 for band in bands]]


def enlarged(image: Float[Tensor, "channels *spatial"]) -> Tensor:
    """Repeat points until the longer side has 128 pixels."""
    times = max(_LEAST // max(image.shape[1:]), 1)
    for axis in range(1, image.ndim):
        image = image.repeat_interleave(times, axis)
    return image


def _curve(signal: Float[Tensor, " points"]) -> Float[Tensor, "1 rows columns"]:
    """Draw a signal as a curve; where it is NaN, the paper is gray."""
    rows = (1 - signal.clamp(0, 1)) * (_CURVE - 1)
    before = torch.cat([rows[:1], rows[:-1]])
    before = torch.where(before.isnan(), rows, before)
    low, high = torch.minimum(rows, before).floor(), torch.maximum(rows, before).ceil()
    at = torch.arange(_CURVE)[:, None]
    paper = torch.where(signal.isnan(), _HIDDEN, _PAPER).expand(_CURVE, -1)
    drawn = torch.where((at >= low) & (at <= high), _INK, paper)
    return F.pad(drawn, (0, 0, 0, _GAP), value=_PAPER)[None]
