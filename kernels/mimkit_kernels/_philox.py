"""Philox4x32-10 for PyTorch, NumPy and Triton, and the random words of a batch of samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from mimkit_kernels._jit import jit

if TYPE_CHECKING:
    import triton.language as tl

_M32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = TypeVar("Words", Tensor, np.ndarray)


def philox4x32(
    key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Compute Philox4x32-10 on PyTorch or NumPy int64 arrays, with identical results.

    Args:
        key: Two words, each an int64 array with values in [0, 2**32).
        counter: Four words, broadcast against each other.

    Returns:
        Four words, int64 arrays with values in [0, 2**32).

    Raises:
        TypeError: If a word is not an int64 array, or some are tensors and others of NumPy.
        ValueError: If the number of words, their devices or their shapes do not fit.

    Source:
        Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; Random123, whose
        known answers it gives.

    Example:
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox4x32((zero, zero), (zero, zero, zero, zero))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    for name, words, number in (("key", key, 2), ("counter", counter, 4)):
        if not isinstance(words, Sequence) or len(words) != number:
            raise ValueError(f"{name} must be {number} words; got {words!r:.80}")
        for word in words:
            is_dense = getattr(word, "layout", torch.strided) is torch.strided
            if str(getattr(word, "dtype", "")) not in ("int64", "torch.int64") or not is_dense:
                raise TypeError(
                    f"{name} must be of dense int64 tensors or NumPy arrays; got {word!r:.80}"
                )
    every = (*key, *counter)
    kinds = {str(word.device) if isinstance(word, Tensor) else "NumPy" for word in every}
    if len(kinds) > 1:
        raise ValueError(f"key and counter must be in one place; got {sorted(kinds)}")
    shapes = [tuple(word.shape) for word in every]
    axes = zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)
    if any(len(set(axis) - {1}) > 1 for axis in axes):
        raise ValueError(f"key and counter must broadcast against each other; got {shapes}")
    return _philox4x32(key, counter)


def _philox4x32(
    key: tuple[Words, Words], counter: tuple[Words, Words, Words, Words]
) -> tuple[Words, Words, Words, Words]:
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high_a, low_a = _product(c0, _MULTIPLIERS[0])
        high_b, low_b = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + _WEYL[0]) & _M32, (k1 + _WEYL[1]) & _M32
    return c0, c1, c2, c3


def sample_words(
    sample_ids: Tensor, seed_and_epoch: Tensor, stream: int, num_words: int, first_block: int = 0
) -> Tensor:
    """Draw random 32-bit words for every sample, starting at a block: [batch, words], int64.

    Word w of a sample is output w % 4 of Philox with the seed as key and the counter
    ((stream << 16) | first_block + w // 4, epoch, sample id bits 0-31, sample id bits 32-63).
    """
    seed, epoch = seed_and_epoch.unbind()
    last_block = first_block + (num_words + 3) // 4
    blocks = torch.arange(first_block, last_block, device=sample_ids.device) | (stream << 16)
    sample = sample_ids.unsqueeze(1)
    words = _philox4x32(
        (seed & _M32, (seed >> 32) & _M32),
        (blocks, epoch & _M32, sample & _M32, (sample >> 32) & _M32),
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :num_words]


def _product(word: Words, multiplier: int) -> tuple[Words, Words]:
    """Return the high and the low word of a product of two words, without overflow.

    int64 overflow wraps in PyTorch, but is undefined in the C++ code of Inductor: compilers may
    then remove the mask after a shift. The multipliers minus 2**32 are small enough to avoid it.
    """
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _M32


@jit
def draw_words(
    seed: tl.tensor, epoch: tl.tensor, sample: tl.tensor, counter: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the four words of each Philox block of one sample, as `sample_words` does."""
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    # All words must be uint32: Triton cannot mix them with int64 scalars.
    zero = counter ^ counter
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + epoch.to(tl.uint32), zero + low, zero + high)
    return w0, w1, w2, w3


@jit
def token_ranks(
    seed: tl.tensor,
    epoch: tl.tensor,
    sample: tl.tensor,
    first_counter: tl.tensor,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Return a random rank for each token of one sample; no two ranks are equal."""
    counter = (tl.arange(0, TOKENS // 4) + first_counter).to(tl.uint32)
    w0, w1, w2, w3 = draw_words(seed, epoch, sample, counter)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words.to(tl.int64) << 16) | tl.arange(0, TOKENS)


@jit
def kth_lowest_rank(ranks: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Return the `k`-th lowest rank of one sample, counted from 1; -1, below all ranks, for 0.

    Its 48 bits are found one by one, by counting: a few instructions in a loop. A sort gives the
    same, but is unrolled, which takes the compiler up to 20 s.
    """
    found = tl.zeros((), tl.int64)
    for step in range(48):
        trial = found + (tl.full((), 1 << 47, tl.int64) >> step)
        below = tl.sum((ranks < trial).to(tl.int32), axis=0)
        found = tl.where(below < k, trial, found)
    return tl.where(k > 0, found, -1)


def counter_start(stream: int) -> int:
    """Return the first Philox counter of a stream, as int32.

    Always a multiple of 16 and of 32 bits, so that no stream compiles a kernel again.
    """
    start = stream << 16
    return start - (1 << 32) if start >= 1 << 31 else start
