"""Block-wise masks: exact counts on any grid, and agreement with the published samplers."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit import masking
from mimkit.masking import Mask, compat
from mimkit.masking.compat import draw_blocks
from mimkit.testing import assert_sampler_conforms
from tests.golden_files import golden
from tests.strategies import grids, keys

GOLDEN = golden("beit_masking")
CASES = {
    "n75": ((14, 14), {"num_masked": 75}),
    "n98": ((14, 14), {"num_masked": 98}),
    "8x10_n30_min4_max12": ((8, 10), {"num_masked": 30, "min_block": 4, "max_block": 12}),
}


def neighbors_masked(is_masked: Tensor) -> Tensor:
    """Count horizontally and vertically adjacent masked pairs of each sample."""
    down = is_masked[:, 1:] & is_masked[:, :-1]
    across = is_masked[:, :, 1:] & is_masked[:, :, :-1]
    return (down.sum((1, 2)) + across.sum((1, 2))).double()


def assert_statistics_agree(is_masked: Tensor, name: str) -> None:
    """Compare with the golden file, at five standard deviations of the difference."""
    drawn = len(GOLDEN[f"{name}/counts"])
    assert len(is_masked) == drawn
    share = GOLDEN.tensor(f"{name}/freq_map")
    bound = 5 * (2 * share * (1 - share) / drawn).sqrt()
    assert ((is_masked.double().mean(0) - share).abs() <= bound).all()
    pairs = neighbors_masked(is_masked)
    spread = float(GOLDEN[f"{name}/adjacent_masked_pairs_std"])
    mean = float(GOLDEN[f"{name}/adjacent_masked_pairs_mean"])
    assert abs(pairs.mean() - mean) < 5 * spread * math.sqrt(2 / drawn)
    assert abs(pairs.std() / spread - 1) < 0.1


@given(
    key=keys(),
    grid=grids(max_axes=2, max_tokens=120),
    data=st.data(),
    min_block=st.integers(1, 20),
)
def test_counts_are_exact_on_every_grid(key, grid, data, min_block):
    count = data.draw(st.integers(0, math.prod(grid)))
    largest = data.draw(st.none() | st.integers(min_block, 40))
    mask = masking.blockwise(key, grid, num_masked=count, min_block=min_block, max_block=largest)
    mask.validate()
    assert (mask.num_masked, mask.grid) == (count, grid)


@pytest.mark.parametrize("grid", [(1, 40), (40, 1), (40,), (1, 1), (2, 2), (256, 256)])
def test_extreme_counts_and_grids(grid):
    num_tokens = math.prod(grid)
    for count in {0, 1, num_tokens - 1, num_tokens}:
        mask = masking.blockwise(masking.key([0, 1], seed=0), grid, num_masked=count)
        mask.validate()
        assert mask.num_masked == count


@pytest.mark.untyped
@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.5), ((1, 30), 0.4), ((7, 9), 0.75)])
def test_blockwise_conforms(grid, ratio):
    assert_sampler_conforms(masking.blockwise, grid, ratio)


@given(key=keys(max_batch=6), data=st.data())
def test_masks_do_not_depend_on_the_batch(key, data):
    order = data.draw(st.permutations(range(key.batch_size)))
    permuted = masking.Key(key.sample_ids[order], key.seed_and_epoch, key.view_index)
    whole = masking.blockwise(key, (6, 7), 0.5)
    assert masking.blockwise(permuted, (6, 7), 0.5).equal(whole[order])


@pytest.mark.parametrize("name", CASES)
def test_marginals_and_adjacency_agree_with_the_published_sampler(name):
    grid, options = CASES[name]
    mask = masking.blockwise(masking.key(range(2000), seed=1), grid, **options)
    assert_statistics_agree(mask.is_masked, f"cae_{name}")


def test_uniform_masks_do_not_agree_with_the_published_sampler():
    is_masked = masking.uniform(masking.key(range(2000), seed=1), (14, 14), 0.5).is_masked
    with pytest.raises(AssertionError):
        assert_statistics_agree(is_masked, "cae_n98")


def test_tokens_on_one_axis_are_masked_in_runs():
    is_masked = masking.blockwise(masking.key(range(200), seed=0), (1, 64), 0.5).is_masked
    uniform = masking.uniform(masking.key(range(200), seed=0), (1, 64), 0.5).is_masked
    assert neighbors_masked(is_masked).mean() > 1.5 * neighbors_masked(uniform).mean()


def test_masks_follow_the_documented_format():
    """Draw one sample, one attempt at a time, as the format is documented."""
    grid, count, sample, seed = (9, 11), 40, 5, 3
    key = masking.key([sample], seed=seed)

    def word(sampler: int, token: int) -> int:
        parts = [(sampler << 24) | token // 4, 0, sample, 0]
        words = masking.philox4x32(
            (np.array([seed]), np.array([0])), tuple(np.array([p]) for p in parts)
        )
        return int(words[token % 4][0])

    is_masked = np.zeros(grid, dtype=bool)
    rejected, attempt = 0, 0
    while is_masked.sum() < count and rejected < 32:
        area_word, bin_word, top_word, left_word = (word(2, 4 * attempt + i) for i in range(4))
        attempt, rejected = attempt + 1, rejected + 1
        most = count - int(is_masked.sum())
        least, largest = min(most, 16), max(most, 16)
        area = least + (area_word * (largest - least + 1) >> 32)
        aspect = math.exp(math.log(0.3) + ((bin_word >> 24) + 0.5) * -2 * math.log(0.3) / 256)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= grid[0] or w >= grid[1]:
            continue
        top, left = top_word * (grid[0] - h + 1) >> 32, left_word * (grid[1] - w + 1) >> 32
        block = is_masked[top : top + h, left : left + w]
        if 0 < h * w - block.sum() <= most:
            block[...] = True
            rejected = 0
    ranks = sorted((word(3, t), t) for t in np.flatnonzero(~is_masked))
    for _, token in ranks[: count - int(is_masked.sum())]:
        is_masked.flat[token] = True
    mask = masking.blockwise(key, grid, num_masked=count)
    assert np.array_equal(mask.is_masked[0].numpy(), is_masked)


def test_an_empty_batch():
    mask = masking.blockwise(masking.key([], seed=0), (4, 5), 0.5)
    assert (mask.batch_size, mask.num_masked) == (0, 10)


@pytest.mark.parametrize("kind", ["cae", "beit"])
@pytest.mark.parametrize("name", CASES)
def test_the_published_algorithms_reproduce_the_published_masks(kind, name):
    grid, options = CASES[name]
    if f"{kind}_{name}/first16" not in GOLDEN:
        assert (kind, name) == ("beit", "8x10_n30_min4_max12")  # not in the file
        return
    rng = random.Random(GOLDEN.config[f"{kind}_{name}"]["seed"])
    count = options["num_masked"]
    limits = options.get("min_block", 16), options.get("max_block", count)
    drawn = [
        draw_blocks(rng, grid, count, limits, (0.3, 1 / 0.3), exact=kind == "cae")
        for _ in range(2000)
    ]
    assert np.array_equal(np.stack(drawn[:16]), GOLDEN[f"{kind}_{name}/first16"].astype(bool))
    counts = [int(mask.sum()) for mask in drawn]
    assert counts == GOLDEN[f"{kind}_{name}/counts"].tolist()


@pytest.mark.parametrize(("kind", "sampler"), [("cae", compat.cae), ("beit", compat.beit)])
def test_compat_samplers_agree_with_the_published_statistics(kind, sampler):
    is_masked = sampler(masking.key(range(2000), seed=1), (14, 14), num_masked=75)
    assert_statistics_agree(is_masked, f"{kind}_n75")


def test_beit_may_mask_too_few_tokens_for_a_mask():
    is_masked = compat.beit(masking.key(range(100), seed=0), (14, 14), num_masked=75)
    counts = is_masked.sum((1, 2))
    assert counts.max() == 75
    assert counts.min() < 75
    with pytest.raises(ValueError, match="sample"):
        Mask.from_bool(is_masked)


@given(key=keys())
def test_a_compat_mask_depends_on_its_key_only(key):
    once = compat.cae(key, (8, 10), 0.5)
    rows = masking.Key(key.sample_ids[-1:], key.seed_and_epoch, key.view_index)
    assert torch.equal(compat.cae(rows, (8, 10), 0.5), once[-1:])


KEY = masking.key([0, 1], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masking.blockwise(KEY, (4, 4)), "ratio=None, num_masked=None"),
        (lambda: masking.blockwise(KEY, (2, 4, 4), 0.5), r"one or two axes; got \(2, 4, 4\)"),
        (lambda: masking.blockwise(KEY, (300, 300), 0.5), "90000 tokens"),
        (lambda: masking.blockwise(KEY, (9, 9), 0.5, min_block=0), "got 0 and None"),
        (lambda: masking.blockwise(KEY, (9, 9), 0.5, max_block=8), "got 16 and 8"),
        (lambda: masking.blockwise(KEY, (9, 9), 0.5, aspect=(2.0, 1.0)), r"\(2.0, 1.0\)"),
        (lambda: compat.cae(KEY, (16,), 0.5), r"\(16,\)"),
        (lambda: compat.cae(KEY, (1, 16), 0.5), r"does not end on grid \(1, 16\)"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
