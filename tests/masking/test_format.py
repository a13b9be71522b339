"""The public format of mask bits, against an implementation in Python integers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import philox4x32
from tests.strategies import epochs, grids, sample_ids, seeds, views

M32 = (1 << 32) - 1
UNIFORM, SQUARE = 0, 1

# Random123 1.14.0, tests/kat_vectors: counter, key, answer of philox4x32 with 10 rounds.
KNOWN_ANSWERS = {
    "zeros": ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    "digits of pi": (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
}

words = st.integers(0, M32)


def hexadecimal(numbers: str) -> tuple[int, ...]:
    return tuple(int(number, 16) for number in numbers.split())


def philox_of_integers(key: tuple[int, ...], counter: tuple[int, ...]) -> tuple[int, ...]:
    """Compute Philox as in figure 2 of Salmon et al., 2011, with Python integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        low0, high0 = (0xD2511F53 * c0) % 2**32, (0xD2511F53 * c0) // 2**32
        low1, high1 = (0xCD9E8D57 * c2) % 2**32, (0xCD9E8D57 * c2) // 2**32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def word(*, seed: int, epoch: int, view: int, sampler: int, sample_id: int, token: int) -> int:
    """Compute one random word as `mimkit/masking/_philox.py` documents the format."""
    stream = (sampler << 8) | view
    key = (seed & M32, (seed >> 32) & M32)
    counter = (
        (stream << 16) | (token // 4),
        epoch,
        sample_id & M32,
        (sample_id >> 32) & M32,
    )
    return philox_of_integers(key, counter)[token % 4]


def visible_in_format(num_tokens: int, num_masked: int, **state: int) -> list[int]:
    ranks = {
        token: (word(**state, sampler=UNIFORM, token=token) << 16) | token
        for token in range(num_tokens)
    }
    return sorted(sorted(ranks, key=ranks.__getitem__)[: num_tokens - num_masked])


def of_torch(key: tuple[int, ...], counter: tuple[int, ...]) -> tuple[int, ...]:
    answer = philox4x32(
        tuple(torch.tensor([value]) for value in key),
        tuple(torch.tensor([value]) for value in counter),
    )
    return tuple(int(value) for value in answer)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_matches_the_known_answers(name):
    counter, key, answer = map(hexadecimal, KNOWN_ANSWERS[name])
    assert of_torch(key, counter) == answer
    assert philox_of_integers(key, counter) == answer


@given(key=st.tuples(words, words), counter=st.tuples(words, words, words, words))
def test_philox_equals_integer_arithmetic(key, counter):
    assert of_torch(key, counter) == philox_of_integers(key, counter)


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 100))
def test_numpy_and_torch_agree_bit_for_bit(seed, length):
    generator = np.random.default_rng(seed)
    arrays = [generator.integers(0, 1 << 32, length, dtype=np.int64) for _ in range(6)]
    of_numpy = philox4x32(tuple(arrays[:2]), tuple(arrays[2:]))
    tensors = [torch.from_numpy(array) for array in arrays]
    for ours, theirs in zip(
        philox4x32(tuple(tensors[:2]), tuple(tensors[2:])), of_numpy, strict=True
    ):
        assert theirs.dtype == np.int64
        assert np.array_equal(ours.numpy(), theirs)


def test_the_format_is_version_1():
    assert masking.FORMAT_VERSION == 1


@given(
    seed=seeds,
    epoch=epochs,
    view=views,
    ids=st.lists(sample_ids, min_size=1, max_size=3),
    grid=grids(max_tokens=60),
    data=st.data(),
)
@example(seed=0, epoch=0, view=0, ids=[0], grid=(5,), data=None)
@example(seed=-1, epoch=2**32 - 1, view=255, ids=[-1, -(1 << 63)], grid=(7, 3), data=None)
@example(seed=(1 << 64) - 1, epoch=1, view=1, ids=[(1 << 40) + 3, 3], grid=(2, 3, 4), data=None)
def test_uniform_follows_the_documented_format(seed, epoch, view, ids, grid, data):
    num_tokens = math.prod(grid)
    count = num_tokens // 2 if data is None else data.draw(st.integers(0, num_tokens))
    key = masking.key(ids, seed=seed, epoch=epoch).view(view)
    mask = masking.uniform(key, grid, num_masked=count)
    assert mask.visible_ids.tolist() == [
        visible_in_format(num_tokens, count, seed=seed, epoch=epoch, view=view, sample_id=i)
        for i in ids
    ]


@given(seed=st.integers(-(1 << 63), -1), ids=st.lists(sample_ids, min_size=1, max_size=3))
def test_a_signed_seed_equals_its_unsigned_form(seed, ids):
    signed, unsigned = (
        masking.uniform(masking.key(ids, seed=value), (5, 6), 0.5) for value in (seed, seed + 2**64)
    )
    assert signed.equal(unsigned)


@given(seed=seeds, epoch=epochs, ids=st.lists(sample_ids, min_size=1, max_size=3), view=views)
def test_a_random_square_follows_the_documented_format(seed, epoch, ids, view):
    grid, side = (9, 4, 3), (3, 4, 1)
    key = masking.key(ids, seed=seed, epoch=epoch).view(view)
    mask = masking.square(key, grid, side, position="random")
    for row, sample_id in enumerate(ids):
        state = {"seed": seed, "epoch": epoch, "view": view, "sample_id": sample_id}
        start = [
            (word(**state, sampler=SQUARE, token=axis) * (grid[axis] - side[axis] + 1)) >> 32
            for axis in range(3)
        ]
        box = tuple(slice(s, s + n) for s, n in zip(start, side, strict=True))
        assert bool(mask.is_masked[row][box].all())


def test_uniform_on_the_largest_grid_of_the_format():
    key = masking.key([1 << 41], seed=7, epoch=3)
    mask = masking.uniform(key, (256, 256), num_masked=65535)
    expected = visible_in_format(65536, 65535, seed=7, epoch=3, view=0, sample_id=1 << 41)
    assert mask.visible_ids.tolist() == [expected]
    with pytest.raises(ValueError, match=r"\(257, 256\) has 65792 units"):
        masking.uniform(key, (257, 256), 0.5)
