"""Philox4x32-10, and the public format of mask bits (version 1).

Every random decision of a sampler is a 32-bit word of the counter-based generator Philox4x32-10:

    key      = (seed bits 0-31, seed bits 32-63)
    counter  = ((stream << 16) | token // 4, epoch, sample id bits 0-31, sample id bits 32-63)
    word     = output[token % 4]
    stream   = (sampler << 8) | view               sampler: 0 uniform, 1 square,
                                                   2 and 3 blockwise, 4 and 5
                                                   inverse_block, 6 weighted,
                                                   7 to 9 multiblock

`uniform` ranks the tokens of a sample by `(word << 16) | token`; the lowest stay visible, and
`complementary` deals them out in that order. So a mask is a function of (seed, epoch, sample id)
alone, the same on every device and for any batching. `blockwise` reads area, aspect ratio, top and
left of its n-th block from the four words of block n of stream 2, and ranks by stream 3 the tokens
that it masks singly. `inverse_block` ranks its blocks by stream 4, and the tokens of the block that
it shows in part by stream 5. `weighted` reads a token's clock from stream 6, `multiblock` the n-th
target (aspect ratio, top, left, corner) from the four words of block n of stream 7, its context
block (scale, top, left) from stream 8, and ranks the context's tokens by stream 9. `tube` is
`uniform` with units as long as the shared axes. A change of any of this is a new version of the
format.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123.
"""

from jaxtyping import Int64
from torch import Tensor

from mimkit.masking._key import Key, check_key
from mimkit_kernels import philox4x32, sample_words

__all__ = ["FORMAT_VERSION", "MAX_TOKENS", "philox4x32", "random_words", "stream_of"]

FORMAT_VERSION = 1
MAX_TOKENS = 1 << 16
UNIFORM, SQUARE = 0, 1  # numbers of the samplers


def stream_of(key: Key, sampler: int) -> int:
    """Return the stream of a sampler for the view of `key`.

    Raises:
        TypeError: What is no key.
    """
    check_key(key)
    return (sampler << 8) | key.view_index


def random_words(key: Key, num_words: int, *, sampler: int) -> Int64[Tensor, "batch words"]:
    """Draw `num_words` 32-bit words for every sample of `key`, in the public format.

    Args:
        key: Seed, epoch, view and sample ids.
        num_words: Words per sample, at most 65536.
        sampler: Number of the sampler in the format, so that no two samplers share words.

    Returns:
        Values in [0, 2**32).
    """
    stream = stream_of(key, sampler)
    return sample_words(key.sample_ids, key.seed_and_epoch, stream, num_words)
