"""Triton kernels of mimkit; each one is a file of its own."""

from mimkit_kernels._dispatch import Backend, Settings
from mimkit_kernels.gather_patches import gather_patches
from mimkit_kernels.linear_cross_entropy import linear_cross_entropy
from mimkit_kernels.masked_pixel_loss import (
    elementwise_error,
    masked_pixel_loss,
    patch_statistics,
)

__all__ = [
    "Backend",
    "Settings",
    "elementwise_error",
    "gather_patches",
    "linear_cross_entropy",
    "masked_pixel_loss",
    "patch_statistics",
]
