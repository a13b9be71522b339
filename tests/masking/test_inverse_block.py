"""Inverse block masks: exact counts, whole blocks, and the documented format."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.testing import assert_sampler_conforms
from tests.masking.test_format import word
from tests.strategies import grids, keys


@given(key=keys(), grid=grids(max_tokens=80), data=st.data())
def test_counts_are_exact_on_every_grid(key, grid, data):
    count = data.draw(st.integers(0, math.prod(grid)))
    block = data.draw(st.tuples(*[st.integers(1, 2 * size) for size in grid]))
    mask = masking.inverse_block(key, grid, num_masked=count, block=block)
    mask.validate()
    assert (mask.num_masked, mask.grid) == (count, grid)


@pytest.mark.untyped
@pytest.mark.parametrize("grid", [(12,), (5, 7), (2, 4, 5)])
def test_inverse_block_conforms(grid):
    assert_sampler_conforms(masking.inverse_block, grid, 0.7)


@pytest.mark.parametrize("grid", [(1, 40), (1, 1), (64, 64)])
def test_extreme_counts_and_grids(grid):
    for count in {0, 1, math.prod(grid) - 1, math.prod(grid)}:
        mask = masking.inverse_block(masking.key([0, 1], seed=0), grid, num_masked=count)
        assert mask.num_masked == count


@given(key=keys(max_batch=1), block=st.integers(1, 4), count=st.integers(0, 42))
def test_masks_follow_the_documented_format(key, block, count):
    """Add blocks one after the other; of the last one, only a part becomes visible."""
    grid = (6, 7)
    state = {
        "seed": int(key.seed_and_epoch[0]) % 2**64,
        "epoch": int(key.seed_and_epoch[1]),
        "view": key.view_index,
        "sample_id": int(key.sample_ids[0]),
    }
    left = 42 - count
    visible = np.zeros(grid, dtype=bool)
    for token in sorted(range(42), key=lambda t: (word(**state, sampler=4, token=t), t)):
        shown = np.zeros(grid, dtype=bool)
        row, column = divmod(token, 7)
        before = (block - 1) // 2
        top, start = max(row - before, 0), max(column - before, 0)
        shown[top : row - before + block, start : column - before + block] = True
        new = sorted(
            np.flatnonzero(shown & ~visible),
            key=lambda t: (word(**state, sampler=5, token=int(t)), t),
        )
        visible.flat[new[: left - int(visible.sum())]] = True
    mask = masking.inverse_block(key, grid, num_masked=count, block=block)
    assert np.array_equal(~mask.is_masked[0].numpy(), visible)


def test_blocks_of_one_token_are_uniform():
    mask = masking.inverse_block(masking.key(range(4000), seed=0), (4, 5), 0.75, block=1)
    share = mask.is_masked.float().mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4000)


def test_visible_tokens_are_clustered():
    key = masking.key(range(300), seed=0)

    def pairs(mask):
        seen = ~mask.is_masked
        return (seen[:, 1:] & seen[:, :-1]).sum() + (seen[:, :, 1:] & seen[:, :, :-1]).sum()

    blocks = masking.inverse_block(key, (14, 14), 0.8)
    assert pairs(blocks) > 2 * pairs(masking.uniform(key, (14, 14), 0.8))


def test_an_empty_batch():
    mask = masking.inverse_block(masking.key([], seed=0), (4, 5), 0.5)
    assert (mask.batch_size, mask.num_masked) == (0, 10)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ((4, 4), {}, "ratio=None, num_masked=None"),
        ((300, 300), {"ratio": 0.5}, "90000 tokens"),
        ((4, 4), {"ratio": 0.5, "block": 0}, "block"),
    ],
)
def test_errors_repeat_what_was_passed(grid, options, message):
    with pytest.raises(ValueError, match=message):
        masking.inverse_block(masking.key(torch.tensor([0]), seed=0), grid, **options)
