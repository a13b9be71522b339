"""Complementary masks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import Mask, complementary
from tests.golden_files import golden
from tests.strategies import grids, keys


@given(keys(), grids(max_tokens=60), st.data())
def test_every_token_is_visible_in_exactly_one_part(key, grid, data):
    num_tokens = torch.Size(grid).numel()
    parts = data.draw(st.integers(1, num_tokens))
    drawn = complementary(key, grid, parts)
    assert len(drawn) == parts
    for mask in drawn:
        mask.validate()
        assert mask.grid == grid
        assert mask.num_visible in (num_tokens // parts, -(-num_tokens // parts))
    together = torch.cat([mask.visible_ids for mask in drawn], dim=1)
    assert torch.equal(together.sort(dim=1).values, torch.arange(num_tokens).expand_as(together))


@given(keys(), st.sampled_from([2, 4, 8]))
def test_the_first_part_is_the_uniform_mask(key, parts):
    first = complementary(key, (4, 4), parts)[0]
    assert first.equal(masking.uniform(key, (4, 4), num_masked=16 - 16 // parts))


@given(keys(min_batch=2))
def test_the_parts_of_a_sample_do_not_depend_on_its_batch(key):
    together = complementary(key, (3, 4), 3)
    alone = complementary(
        masking.Key(key.sample_ids[1:2], key.seed_and_epoch, key.view_index), (3, 4), 3
    )
    assert all(a[1].equal(b) for a, b in zip(together, alone, strict=True))


def test_all_parts_are_equally_likely_for_every_token():
    drawn = complementary(masking.key(range(4000), seed=3), (4, 4), 4)
    shares = torch.stack([1 - mask.is_masked.float().mean(0) for mask in drawn])
    assert (shares - 0.25).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5


def test_quarters_of_a_permutation_match_the_authors():
    """Split the permutation of their noise: `ids_keep4` are its quarters."""
    vectors = golden("fastconvmae_A")
    order = vectors.tensor("in/noise").argsort(dim=1)
    groups = [Mask.from_visible_ids(ids, (4, 4)) for ids in order.tensor_split(4, dim=1)]
    theirs = vectors.tensor("out/mask").bool().view(4, 2, 4, 4)
    assert torch.equal(torch.stack([mask.is_masked for mask in groups]), theirs)


KEY = masking.key([0], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        (0, ValueError, r"\[1, 16\].*got 0"),
        (17, ValueError, r"\[1, 16\].*got 17"),
        (2.0, TypeError, "2.0"),
    ],
)
def test_errors_repeat_what_was_passed(parts, error, message):
    with pytest.raises(error, match=message):
        complementary(KEY, (4, 4), parts)
