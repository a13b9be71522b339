"""Property tests for your own samplers, encoders, losses and operators. Needs hypothesis."""

from mimkit.testing._encoders import (
    assert_mask_equivariant,
    assert_no_leak,
    assert_samples_isolated,
)
from mimkit.testing._losses import assert_reduction_exact
from mimkit.testing._operators import assert_op_correct
from mimkit.testing._samplers import assert_sampler_conforms
from mimkit.testing._strategies import grids, images, keys, masks, ratios
from mimkit.testing._wrong_inputs import assert_rejects_wrong_inputs

__all__ = [
    "assert_mask_equivariant",
    "assert_no_leak",
    "assert_op_correct",
    "assert_reduction_exact",
    "assert_rejects_wrong_inputs",
    "assert_sampler_conforms",
    "assert_samples_isolated",
    "grids",
    "images",
    "keys",
    "masks",
    "ratios",
]
