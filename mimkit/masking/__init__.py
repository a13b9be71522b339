"""Masks, the keys that determine them, and the samplers that draw them."""

from mimkit.masking import compat, stats
from mimkit.masking._blockwise import blockwise
from mimkit.masking._complementary import complementary
from mimkit.masking._counts import num_masked
from mimkit.masking._dataset import with_ids
from mimkit.masking._inverse_block import inverse_block
from mimkit.masking._key import Key, fresh_key, key
from mimkit.masking._mask import Mask
from mimkit.masking._multiblock import MultiBlock, multiblock
from mimkit.masking._philox import FORMAT_VERSION, philox4x32
from mimkit.masking._prefix import prefix, random_prefix
from mimkit.masking._ragged import RaggedMask, ragged
from mimkit.masking._samplers import gridwise, square, uniform
from mimkit.masking._tube import tube
from mimkit.masking._visible_block import visible_block
from mimkit.masking._weighted import weighted

__all__ = [
    "FORMAT_VERSION",
    "Key",
    "Mask",
    "MultiBlock",
    "RaggedMask",
    "blockwise",
    "compat",
    "complementary",
    "fresh_key",
    "gridwise",
    "inverse_block",
    "key",
    "multiblock",
    "num_masked",
    "philox4x32",
    "prefix",
    "ragged",
    "random_prefix",
    "square",
    "stats",
    "tube",
    "uniform",
    "visible_block",
    "weighted",
    "with_ids",
]
