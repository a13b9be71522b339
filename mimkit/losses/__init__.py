"""Losses on masked positions, and the losses of trivial predictors."""

from mimkit.losses._alignment import alignment_mse
from mimkit.losses._baselines import baselines
from mimkit.losses._linear_cross_entropy import linear_cross_entropy
from mimkit.losses._masked import (
    masked_cosine,
    masked_cross_entropy,
    masked_l1,
    masked_mse,
    masked_pixel_loss,
    masked_smooth_l1,
)

__all__ = [
    "alignment_mse",
    "baselines",
    "linear_cross_entropy",
    "masked_cosine",
    "masked_cross_entropy",
    "masked_l1",
    "masked_mse",
    "masked_pixel_loss",
    "masked_smooth_l1",
]
