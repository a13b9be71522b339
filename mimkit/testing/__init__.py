"""Property tests for your own samplers and encoders. Needs hypothesis."""

from mimkit.testing._encoders import assert_no_leak, assert_samples_isolated
from mimkit.testing._operators import assert_op_correct
from mimkit.testing._samplers import assert_sampler_conforms
from mimkit.testing._strategies import grids, images, keys, masks, ratios

__all__ = [
    "assert_no_leak",
    "assert_op_correct",
    "assert_sampler_conforms",
    "assert_samples_isolated",
    "grids",
    "images",
    "keys",
    "masks",
    "ratios",
]
