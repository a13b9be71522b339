"""Weighted masks: the exact distribution of masked sets, exact counts, zeros and errors."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import Key, Mask
from mimkit.testing import assert_sampler_conforms
from tests.masking.test_format import word
from tests.strategies import generators, grids, keys

DRAWN = 20_000
WEIGHTS = {
    "unequal": [1.0, 2.0, 3.0, 0.5, 4.0],
    "equal": [2.0, 2.0, 2.0, 2.0],
    "far apart": [1e-6, 1.0, 1e6, 1.0],
    "with zeros": [0.0, 1.0, 3.0, 0.0, 2.0],
}


def set_probabilities(weights: list[float], count: int) -> dict[tuple[int, ...], float]:
    """Compute the probability of every set of `count` tokens drawn one after the other."""
    sets: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), count):
        probability, left = 1.0, list(range(len(weights)))
        for token in order:
            total = sum(weights[t] for t in left)
            probability *= weights[token] / total if total else 1 / len(left)
            left.remove(token)
        members = tuple(sorted(order))
        sets[members] = sets.get(members, 0.0) + probability
    return sets


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_set_is_masked_with_its_probability(name, count):
    weights = WEIGHTS[name]
    expected = set_probabilities(weights, count)
    assert math.isclose(sum(expected.values()), 1)
    table = torch.tensor([weights]).expand(DRAWN, -1)
    key = masking.key(range(DRAWN), seed=1)
    mask = masking.weighted(key, (len(weights),), weights=table, num_masked=count)
    sets, counts = mask.masked_ids.unique(dim=0, return_counts=True)
    seen = {tuple(s): n / DRAWN for s, n in zip(sets.tolist(), counts.tolist(), strict=True)}
    for members, probability in expected.items():
        bound = 5 * math.sqrt(probability * (1 - probability) / DRAWN) + 1 / DRAWN
        assert abs(seen.get(members, 0.0) - probability) < bound, members


@pytest.mark.full
@pytest.mark.parametrize("grid", [(2, 3), (2, 1, 3), (7,)], ids=str)
@pytest.mark.parametrize("count", range(1, 6))
def test_set_probabilities_on_grids_of_every_number_of_axes(grid, count):
    """Run a chi-squared test over all sets, with two tables of weights."""
    num_tokens, drawn = math.prod(grid), 200_000
    tables = [[1.0 + 3.0 * (t * 5 % num_tokens) for t in range(num_tokens)], [1.0] * num_tokens]
    tables[1][0] = 0.1
    for weights in tables:
        expected = set_probabilities(weights, count)
        table = torch.tensor([weights]).expand(drawn, -1)
        key = masking.key(range(drawn), seed=5)
        mask = masking.weighted(key, grid, weights=table, num_masked=count)
        sets, counts = mask.masked_ids.unique(dim=0, return_counts=True)
        seen = {tuple(s): n for s, n in zip(sets.tolist(), counts.tolist(), strict=True)}
        assert seen.keys() <= expected.keys()
        means = {members: drawn * probability for members, probability in expected.items()}
        distance = sum((seen.get(members, 0) - mean) ** 2 / mean for members, mean in means.items())
        freedom = len(means) - 1
        assert distance < freedom + 5 * math.sqrt(2 * freedom) + 10


@given(key=keys(), grid=grids(max_tokens=60), generator=generators(), data=st.data())
def test_counts_are_exact_for_all_weights(key, grid, generator, data):
    count = data.draw(st.integers(0, math.prod(grid)))
    weights = torch.rand(key.batch_size, math.prod(grid), generator=generator)
    weights = weights * (weights > data.draw(st.sampled_from([0.0, 0.5, 2.0])))
    mask = masking.weighted(key, grid, weights=weights, num_masked=count)
    mask.validate()
    assert (mask.num_masked, mask.grid) == (count, grid)
    # A token of weight 0 is masked only if all others are.
    positive = weights > 0
    spilled = (mask.is_masked.flatten(1) & ~positive).any(dim=1)
    assert (mask.is_masked.flatten(1) | ~positive)[spilled].all()


@given(key=keys(), scale=st.sampled_from([1e-20, 3.0, 1e20]))
def test_the_scale_of_the_weights_does_not_matter(key, scale):
    weights = torch.linspace(0.1, 2, 12, dtype=torch.float64).expand(key.batch_size, -1)
    one = masking.weighted(key, (3, 4), 0.5, weights=weights)
    assert one.equal(masking.weighted(key, (3, 4), 0.5, weights=weights * scale))


@given(sample_id=st.integers(-(1 << 63), (1 << 63) - 1), seed=st.integers(0, (1 << 64) - 1))
def test_masks_follow_the_documented_format(sample_id, seed):
    state = {"seed": seed, "epoch": 0, "view": 0, "sample_id": sample_id}
    weights = [0.5 + token for token in range(10)]
    times = [
        -math.log((word(**state, sampler=6, token=token) + 0.5) / 2**32) / weight
        for token, weight in enumerate(weights)
    ]
    key = masking.key([sample_id], seed=seed)
    mask = masking.weighted(key, (10,), weights=torch.tensor([weights]), num_masked=4)
    assert mask.masked_ids[0].tolist() == sorted(sorted(range(10), key=times.__getitem__)[:4])


def weighted_by_position(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    weights = torch.linspace(1, 2, math.prod(grid)).expand(key.batch_size, -1)
    return masking.weighted(key, grid, ratio, weights=weights)


@pytest.mark.untyped
@pytest.mark.parametrize("grid", [(12,), (4, 6), (2, 3, 4)])
def test_weighted_conforms(grid):
    assert_sampler_conforms(weighted_by_position, grid, 0.6)


def test_drawing_has_no_gradient():
    weights = torch.ones(1, 4, requires_grad=True)
    mask = masking.weighted(masking.key([0], seed=0), (4,), 0.5, weights=weights)
    assert not mask.visible_ids.requires_grad


KEY = masking.key([0, 1], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(2, 3), r"\[2, 4\].*got \(2, 3\)"),
        (torch.ones(1, 4), r"weights \(1, 4\) and key must have one batch size"),
        (torch.tensor([[1.0] * 4, [1, -2, 1, 1]]), "sample 1 has -2.0 at token 1"),
        (torch.tensor([[1.0, 1, 1, math.nan]] * 2), "sample 0 has nan at token 3"),
        (torch.tensor([[1.0, math.inf, 1, 1]] * 2), "sample 0 has inf at token 1"),
    ],
)
def test_errors_repeat_what_was_passed(weights, message):
    with pytest.raises(ValueError, match=message):
        masking.weighted(KEY, (2, 2), 0.5, weights=weights)
