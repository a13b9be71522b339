"""Philox4x32-10, and the public format of mask bits (version 1).

Every random decision of a sampler is a 32-bit word of the counter-based generator Philox4x32-10:

    key      = (seed bits 0-31, seed bits 32-63)
    counter  = ((stream << 16) | token // 4, epoch, sample id bits 0-31, sample id bits 32-63)
    word     = output[token % 4]
    stream   = (sampler << 8) | view               sampler: 0 uniform, 1 square,
                                                   2 and 3 blockwise, 4 and 5
                                                   inverse_block, 6 weighted,
                                                   7 to 9 multiblock,
                                                   10 visible_block,
                                                   11 random_prefix

So a mask is a function of (seed, epoch, sample id) alone, the same on every device and for any
batching. The samplers use the words as follows:

- `uniform` sorts the tokens of a sample by `(word << 16) | token`. The lowest stay visible.
  `complementary` splits the tokens in that order. `tube` is `uniform` with a unit that spans the
  shared axes.
- `blockwise`: the four words of counter block n of stream 2 give area, aspect ratio, top and left
  of the n-th block. Stream 3 sorts the tokens that are masked one at a time.
- `inverse_block`: stream 4 sorts the blocks, stream 5 the tokens of the last block.
- `weighted`: stream 6 gives one exponential random number per token.
- `multiblock`: the four words of counter block n of stream 7 give the n-th target (aspect ratio,
  top, left, corner). Stream 8 gives the context block (scale, top, left), and stream 9 sorts the
  tokens of the context.
- `visible_block`: the first three words of stream 10 give aspect ratio, top and left.
- `random_prefix`: the first word of stream 11 gives the length.

A change of any of this is a new version of the format.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123.
"""

from jaxtyping import Int64
from torch import Tensor

from mimkit.masking._key import Key
from mimkit_kernels import philox4x32, sample_words

__all__ = ["FORMAT_VERSION", "MAX_TOKENS", "philox4x32", "random_words", "stream_of"]

FORMAT_VERSION = 1
MAX_TOKENS = 1 << 16
UNIFORM, SQUARE = 0, 1  # sampler numbers


def stream_of(key: Key, sampler: int) -> int:
    """Return the stream of a sampler for the view of `key`."""
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
