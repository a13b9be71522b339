"""Mean and deviation of each channel of stored arrays.

Axes: batch; channels; *spatial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from recipes.engine.data.images import NormalizeByConstants

MEASURED_CROPS = 256
_VALUES = 1_024  # of a channel of a crop, for the range that is shown
_SHOWN = (0.01, 0.99)


@dataclass(frozen=True)
class Statistics:
    """What arrays are normalised by, and what range of their values is shown; one number a channel.

    Attributes:
        mean: Mean.
        std: Standard deviation; 1 where all values are equal.
        low: Value that is shown black: the 1 % quantile.
        high: Value that is shown white: the 99 % quantile.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def normalize(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch channels *spatial"]:
        """Turn values into model inputs."""
        return (images - _column(self.mean, images)).div_(_column(self.std, images))

    def of_fractions(self) -> NormalizeByConstants:
        """Return mean and deviation of bytes that have become fractions in [0, 1]."""
        mean, std = (tuple(value / 255 for value in values) for values in (self.mean, self.std))
        return NormalizeByConstants(mean, std)

    def to_shown(
        self, image: Shaped[Tensor, channels * spatial]
    ) -> Float[Tensor, channels * spatial]:
        """Turn values into what is shown, from 0 (low) to 1 (high)."""
        values = image[None].float()
        low, high = (_column(v, values) for v in (self.low, self.high))
        return ((values - low) / (high - low))[0]

    def from_shown(
        self, shown: Float[Tensor, "batch channels *spatial"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, mean and deviation with `shown == inputs * std + mean`."""
        mean, std, low, high = (
            _column(v, shown) for v in (self.mean, self.std, self.low, self.high)
        )
        mean, std = (mean - low) / (high - low), std / (high - low)
        return (shown - mean) / std, mean, std


# Finds the statistics of an earlier run, or of an encoder: channels, image size -> statistics.
FindStatistics = Callable[[int, tuple[int, ...]], Statistics | None]


def unknown(channels: int, image_size: tuple[int, ...]) -> None:
    """Find none: they are measured."""


def _column(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return like.new_tensor(numbers).view(1, -1, *[1] * (like.ndim - 2))


def measure(crops: Iterable[Tensor]) -> Statistics:
    """Measure the channels of crops [channels, *spatial], of which there is at least one."""
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    some: list[Tensor] = []
    for crop in crops:
        values = crop.flatten(1).double()
        number = values.shape[1]
        # Chan et al.: exact also where the mean is large beside the deviation.
        own = values.mean(dim=1)
        apart = own - mean
        squares = squares + (values - own[:, None]).square().sum(dim=1)
        squares = squares + apart.square() * (count * number / (count + number))
        mean = mean + apart * (number / (count + number))
        count += number
        some.append(values[:, :: max(number // _VALUES, 1)])
    std = (squares / count).sqrt()
    # A deviation that float32 cannot tell from none.
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    ordered = torch.cat(some, dim=1).sort(dim=1).values
    last = ordered.shape[1] - 1
    low, high = (ordered[:, round(share * last)] for share in _SHOWN)
    high = torch.where(high > low, high, low + std)
    return Statistics(*(tuple(numbers.tolist()) for numbers in (mean, std, low, high)))
