"""Philox4x32-10, and the public format of mask bits (version 1).

Every random decision of a sampler is a 32-bit word of the counter-based generator Philox4x32-10:

    key      = (seed bits 0-31, seed bits 32-63)
    counter  = ((stream << 16) | token // 4, epoch, sample id bits 0-31, sample id bits 32-63)
    word     = output[token % 4]
    stream   = (sampler << 8) | view               sampler: 0 uniform, 1 square,
                                                   2 and 3 blockwise

`uniform` ranks the tokens of a sample by `(word << 16) | token`; the lowest stay visible, and
`complementary` deals them out in that order. So a mask is a function of (seed, epoch, sample id)
alone, the same on every device and for any batching. `blockwise` reads area, aspect ratio, top and
left of its n-th block from the four words of block n of stream 2, and ranks by stream 3 the tokens
that it masks singly. A change of any of this is a new version of the format.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123.
"""

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mimkit.masking._key import Key

FORMAT_VERSION = 1
MAX_TOKENS = 1 << 16
UNIFORM, SQUARE = 0, 1  # numbers of the samplers

_M32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = TypeVar("Words", Tensor, np.ndarray)


def philox4x32(
    key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 on PyTorch or NumPy int64 arrays, word by word the same.

    Args:
        key: Two words, each an int64 array with values in [0, 2**32).
        counter: Four words, broadcast against each other.

    Returns:
        Four words, int64 arrays with values in [0, 2**32).

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox4x32((zero, zero), (zero, zero, zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high_a, low_a = _product(c0, _MULTIPLIERS[0])
        high_b, low_b = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _M32, (k1 + _WEYL[1]) & _M32
    return c0, c1, c2, c3


def _product(word: Words, multiplier: int) -> tuple[Words, Words]:
    """Return the high and the low word of a product of two words, without overflow.

    Overflow of int64 wraps in PyTorch, but is undefined in the C++ that Inductor writes, where
    compilers then drop the mask behind a shift. Less 2**32, both multipliers are small enough.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _M32


def random_words(
    key: Key, num_words: int, *, sampler: int, first_block: int = 0
) -> Int64[Tensor, "batch words"]:
    """Draw `num_words` 32-bit words for every sample of `key`, in the public format.

    Args:
        key: Seed, epoch, view and sample ids.
        num_words: Words per sample, at most 65536.
        sampler: Number of the sampler in the format, so that no two samplers share words.
        first_block: Blocks of four words to skip.

    Returns:
        Values in [0, 2**32).
    """
    seed, epoch = key.seed_and_epoch.unbind()
    stream = (sampler << 8) | key.view_index
    last_block = first_block + (num_words + 3) // 4
    blocks = torch.arange(first_block, last_block, device=key.device) | (stream << 16)
    sample = key.sample_ids.unsqueeze(1)
    words = philox4x32(
        (seed & _M32, (seed >> 32) & _M32),
        (blocks, epoch & _M32, sample & _M32, (sample >> 32) & _M32),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :num_words]
