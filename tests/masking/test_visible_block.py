"""Masks of everything except one block (CAPI), and of everything after a prefix (AIM)."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import Key, Mask, RaggedMask
from mimkit.testing import assert_sampler_conforms
from tests.masking.test_format import word
from tests.strategies import grids, keys

FLAT = grids(max_axes=2, max_tokens=80)


def state_of(key: Key) -> dict[str, int]:
    return {
        "seed": int(key.seed_and_epoch[0]) % 2**64,
        "epoch": int(key.seed_and_epoch[1]),
        "view": key.view_index,
        "sample_id": int(key.sample_ids[0]),
    }


@pytest.mark.parametrize("roll", [False, True])
@settings(max_examples=25)
@given(key=keys(), grid=FLAT, data=st.data())
def test_counts_are_exact_on_every_grid(roll, key, grid, data):
    count = data.draw(st.integers(0, math.prod(grid)))
    mask = masking.visible_block(key, grid, num_masked=count, roll=roll)
    mask.validate()
    assert (mask.num_masked, mask.grid) == (count, grid)


@pytest.mark.untyped
@pytest.mark.parametrize("grid", [(12,), (5, 7)])
def test_visible_block_conforms(grid):
    assert_sampler_conforms(masking.visible_block, grid, 0.7)


@pytest.mark.untyped
def test_a_visible_block_inside_of_the_grid_conforms():
    inside = partial(masking.visible_block, roll=False)
    assert_sampler_conforms(inside, (5, 7), 0.7, least=0.05)


@pytest.mark.untyped
@pytest.mark.parametrize(
    "grid", [(3, 4), *(pytest.param(g, marks=pytest.mark.full) for g in [(12,), (2, 2, 3)])]
)
def test_prefixes_conform(grid):
    same = torch.ones(grid, dtype=torch.bool)
    assert_sampler_conforms(masking.prefix, grid, 0.7, fixed=same)
    ends = torch.arange(math.prod(grid)).view(grid) % (math.prod(grid) - 1) == 0
    assert_sampler_conforms(masking.random_prefix, grid, fixed=ends)


@pytest.mark.untyped
def test_prefixes_that_are_not_what_they_claim_are_caught():
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    with pytest.raises(AssertionError, match="expected other masks for other seeds"):
        assert_sampler_conforms(masking.prefix, (3, 4), 0.7, fixed=nothing)
    with pytest.raises(AssertionError, match="masked in some masks; .* position \\(0, 0\\) never"):
        assert_sampler_conforms(masking.random_prefix, (3, 4))
    with pytest.raises(AssertionError, match="fixed positions .* position \\(0, 1\\) is masked"):
        assert_sampler_conforms(masking.random_prefix, (3, 4), fixed=~nothing)
    with pytest.raises(AssertionError, match="expected 6 of 12 tokens masked at ratio 0.5"):
        assert_sampler_conforms(lambda k, grid, _: masking.random_prefix(k, grid), (3, 4), 0.5)
    with pytest.raises(ValueError, match="shape of the grid"):
        assert_sampler_conforms(masking.prefix, (4, 3), 0.7, fixed=nothing)

    def of_the_longest(key, grid):
        longest = max(masking.random_prefix(key, grid).num_visible)
        return masking.random_prefix(key, grid, longest=longest)

    with pytest.raises(AssertionError, match="batch's"):
        assert_sampler_conforms(of_the_longest, (30,))


@settings(max_examples=25)
@given(key=keys(max_batch=1), grid=FLAT, data=st.data())
def test_masks_follow_the_documented_format(key, grid, data):
    """Place the rectangle by hand, and mask the end of its rows."""
    height, width = (1, *grid)[-2:]
    count = data.draw(st.integers(0, height * width - 1))
    area = height * width - count
    aspect, top, left = (word(**state_of(key), sampler=10, token=token) for token in range(3))
    step = (math.log(2) - math.log(0.5)) / 256
    ratio = math.exp(math.log(0.5) + ((aspect * 256 >> 32) + 0.5) * step)
    h = min(max(round(math.sqrt(area * ratio)), -(-area // width), 1), height)
    w = -(-area // h)
    expected = np.ones((height, width), dtype=bool)
    places = [(row, column) for row in range(h) for column in range(w)][:area]
    for row, column in places:
        expected[(row + (top * height >> 32)) % height, (column + (left * width >> 32)) % width] = 0
    mask = masking.visible_block(key, grid, num_masked=count)
    assert np.array_equal(mask.is_masked[0].numpy(), expected.reshape(grid))


def test_with_roll_every_token_is_masked_equally_often_and_without_the_border_is_more_often():
    key, samples = masking.key(range(4000), seed=0), 4000
    rates = masking.visible_block(key, (6, 8), 0.65).is_masked.float().mean(dim=0)
    assert (rates - 31 / 48).abs().max() < 5 * math.sqrt(0.65 * 0.35 / samples)
    inside = masking.visible_block(key, (6, 8), 0.65, roll=False).is_masked.float().mean(dim=0)
    assert inside[0, 0] > 0.85 > 0.3 > inside[3, 4]


def test_without_roll_the_visible_tokens_fill_one_box_but_for_its_end():
    mask = masking.visible_block(masking.key(range(200), seed=0), (9, 11), 0.7, roll=False)
    for is_masked in mask.is_masked:
        rows, columns = torch.where(~is_masked)
        box = is_masked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert not box[:-1].any()
        assert box[-1].int().diff().ge(0).all()  # only the end of the last row is masked


@settings(max_examples=25)
@given(key=keys(), grid=grids(max_tokens=60), data=st.data())
def test_a_prefix_is_the_first_tokens(key, grid, data):
    count = data.draw(st.integers(0, math.prod(grid)))
    mask = masking.prefix(key, grid, num_masked=count)
    mask.validate()
    expected = torch.arange(math.prod(grid)).view(grid) >= math.prod(grid) - count
    assert torch.equal(mask.is_masked, expected.expand(key.batch_size, *grid))


@settings(max_examples=25)
@given(key=keys(min_batch=1, max_batch=5), grid=grids(min_tokens=2, max_tokens=60), data=st.data())
def test_a_random_prefix_is_that_of_each_sample_alone(key, grid, data):
    mask = masking.random_prefix(key, grid)
    mask.validate()
    assert all(1 <= length < math.prod(grid) for length in mask.num_visible)
    order = data.draw(st.permutations(range(key.batch_size)))
    permuted = Key(key.sample_ids[order], key.seed_and_epoch, key.view_index)
    assert masking.random_prefix(permuted, grid).equal(mask[order])
    first = Key(key.sample_ids[:1], key.seed_and_epoch, key.view_index)
    length = 1 + (word(**state_of(first), sampler=11, token=0) * (math.prod(grid) - 1) >> 32)
    alone = masking.random_prefix(first, grid)
    expected = Mask.from_visible_ids(torch.arange(length)[None], grid)
    assert alone.equal(RaggedMask.cat([expected]))


def test_lengths_of_random_prefixes_are_uniform():
    mask = masking.random_prefix(masking.key(range(1200), seed=0), (12,), shortest=3, longest=8)
    counts = torch.tensor(mask.num_visible).bincount(minlength=12)
    assert counts[:3].sum() == counts[9:].sum() == 0
    assert (counts[3:9] - 200).abs().max() < 5 * math.sqrt(200)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("sampler", "grid", "options", "message"),
    [
        ("visible_block", (4, 4), {}, "ratio=None, num_masked=None"),
        ("visible_block", (2, 4, 4), {"ratio": 0.5}, "one or two axes"),
        ("visible_block", (300, 300), {"ratio": 0.5}, "90000 tokens"),
        ("visible_block", (4, 4), {"ratio": 0.5, "aspect": (2.0, 0.5)}, "aspect"),
        ("prefix", (4, 4), {}, "ratio=None, num_masked=None"),
        ("prefix", (4, 4), {"num_masked": 17}, "17"),
        ("random_prefix", (4, 4), {"longest": 17}, "17"),
        ("random_prefix", (4, 4), {"shortest": 5, "longest": 3}, "5 and 3"),
    ],
)
def test_errors_repeat_what_was_passed(sampler, grid, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(masking, sampler)(masking.key([0], seed=0), grid, **options)
