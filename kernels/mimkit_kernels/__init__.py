"""Triton kernels of mimkit, one file each."""

from mimkit_kernels._dispatch import Backend, settings
from mimkit_kernels._philox import philox4x32, sample_words
from mimkit_kernels._slots import split_positions
from mimkit_kernels.blockwise_sample import blockwise_sample
from mimkit_kernels.gather_patches import gather_patches
from mimkit_kernels.linear_cross_entropy import linear_cross_entropy
from mimkit_kernels.masked_pixel_loss import (
    elementwise_error,
    masked_pixel_loss,
    patch_statistics,
)
from mimkit_kernels.move_tokens import gather_tokens, restore_tokens
from mimkit_kernels.packed_depthwise_conv import packed_depthwise_conv
from mimkit_kernels.regressor_inputs import regressor_inputs
from mimkit_kernels.uniform_sample import kth_lowest, uniform_sample

__all__ = [
    "Backend",
    "blockwise_sample",
    "elementwise_error",
    "gather_patches",
    "gather_tokens",
    "kth_lowest",
    "linear_cross_entropy",
    "masked_pixel_loss",
    "packed_depthwise_conv",
    "patch_statistics",
    "philox4x32",
    "regressor_inputs",
    "restore_tokens",
    "sample_words",
    "settings",
    "split_positions",
    "uniform_sample",
]
