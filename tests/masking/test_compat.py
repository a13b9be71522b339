"""Published masks: two-sample tests, with fixed seeds, against the published distributions.

On small grids the whole distributions are compared, mask by mask. At the published sizes marginals,
adjacency and counts are compared.
"""

import functools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mimkit import masking
from mimkit.masking import Key, compat
from mimkit.testing import assert_sampler_conforms
from tests.masking.test_blockwise import neighbors_masked
from tests.strategies import keys

GRID = (14, 14)


def blocks_as_published(
    rng: random.Random,
    count: int,
    *,
    exact: bool = True,
    last: int = 0,
    grid: tuple[int, int] = GRID,
    min_block: int = 16,
) -> np.ndarray:
    """Run CAE's loop. BEiT's is not `exact`, and mmpretrain's has `last=1`."""
    mask, new = np.zeros(grid, dtype=bool), 1
    while mask.sum() < count and (exact or new):
        most, new = count - int(mask.sum()), 0
        for _ in range(10):
            area = rng.uniform(min_block, most)
            ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
            if w < grid[1] and h < grid[0]:
                top, left = rng.randint(0, grid[0] - h - last), rng.randint(0, grid[1] - w - last)
                block = mask[top : top + h, left : left + w]
                if 0 < (~block).sum() <= most:
                    new = int((~block).sum())
                    block[:] = True
                    break
    return mask


def ijepa_as_published(
    generator: torch.Generator, batch: int, grid: tuple[int, int] = GRID, min_keep: int = 10
) -> tuple[Tensor, Tensor]:
    """Draw a batch of contexts (cut to the shortest) and first targets, True = inside."""
    rows, columns = grid

    def size(scale, aspect):
        share = torch.rand(1, generator=generator).item()
        area = int(rows * columns * (scale[0] + share * (scale[1] - scale[0])))
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        h, w = int(round(math.sqrt(area * ratio))), int(round(math.sqrt(area / ratio)))
        return min(h, rows - 1), min(w, columns - 1)

    def place(h, w, others):
        misses = 0
        while True:
            top = int(torch.randint(0, rows - h, (1,), generator=generator))
            left = int(torch.randint(0, columns - w, (1,), generator=generator))
            block = torch.zeros(grid, dtype=torch.bool)
            block[top : top + h, left : left + w] = True
            for other in others[: max(4 - misses // 20, 0)]:
                block &= ~other
            if block.sum() > min_keep:
                return block
            misses += 1

    target_size, context_size = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(batch):
        blocks = [place(*target_size, []) for _ in range(4)]
        targets.append(blocks[0])
        contexts.append(place(*context_size, blocks).flatten().nonzero().squeeze(1))
    kept = min(map(len, contexts))
    cut = torch.zeros(batch, rows * columns, dtype=torch.bool)
    for row, ids in zip(cut, contexts, strict=True):
        row[ids[:kept]] = True
    return cut.view(batch, *grid), torch.stack(targets)


def assert_same_distribution(ours: Tensor, theirs: Tensor, *, clusters: int | None = None) -> None:
    """Compare marginals, adjacency and counts of two samples at five standard errors.

    Args:
        ours: Booleans, [samples, rows, columns].
        theirs: The same number of samples.
        clusters: Independent groups of samples, where a batch shares random numbers.
    """
    groups = len(ours) if clusters is None else clusters
    for a, b in (
        (ours.double().flatten(1), theirs.double().flatten(1)),
        (neighbors_masked(ours)[:, None], neighbors_masked(theirs)[:, None]),
        (ours.double().sum((1, 2))[:, None], theirs.double().sum((1, 2))[:, None]),
    ):
        means = [x.view(groups, -1, x.shape[1]).mean(dim=1) for x in (a, b)]
        error = ((means[0].var(dim=0) + means[1].var(dim=0)) / groups).sqrt()
        gap = (means[0].mean(dim=0) - means[1].mean(dim=0)).abs()
        # A position that is hit once in thousands of draws has no estimate of its variance.
        assert (gap <= 5 * error + 5 / len(ours)).all(), float((gap / (error + 1e-9)).max())


def test_mmpretrain_follows_the_published_distribution():
    drawn, count = 1500, 75
    rng = random.Random(0)
    theirs = np.stack([blocks_as_published(rng, count, last=1) for _ in range(drawn)])
    ours = compat.mmpretrain(masking.key(range(drawn), seed=0), GRID, num_masked=count)
    assert_same_distribution(ours, torch.from_numpy(theirs))


def test_the_two_sample_test_distinguishes_mmpretrain_from_cae():
    key = masking.key(range(1500), seed=0)
    draws = [sampler(key, GRID, num_masked=75) for sampler in (compat.mmpretrain, compat.cae)]
    with pytest.raises(AssertionError):
        assert_same_distribution(*draws)


def test_mmpretrain_never_masks_the_last_row_and_column():
    is_masked = compat.mmpretrain(masking.key(range(1000), seed=0), GRID, num_masked=75)
    assert not is_masked[:, -1].any()
    assert not is_masked[:, :, -1].any()
    assert is_masked[:, :-1, :-1].any(dim=0).all()
    assert compat.cae(masking.key(range(1000), seed=0), GRID, num_masked=75).any(dim=0).all()


@pytest.fixture(scope="module")
def ijepa_draws() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw contexts and first targets of 300 batches of 8, ours and as published."""
    generator = torch.Generator().manual_seed(0)
    theirs = [ijepa_as_published(generator, 8) for _ in range(300)]
    keys = [masking.key(range(8 * n, 8 * n + 8), seed=0) for n in range(300)]
    return (
        ~torch.cat([compat.ijepa(key, GRID) for key in keys]),
        torch.cat([context for context, _ in theirs]),
        torch.cat([compat.ijepa_targets(key, GRID)[:, 0] for key in keys]),
        torch.cat([target for _, target in theirs]),
    )


def test_ijepa_follows_the_published_distribution(ijepa_draws):
    contexts, their_contexts, targets, their_targets = ijepa_draws
    assert_same_distribution(contexts, their_contexts, clusters=300)
    assert_same_distribution(targets, their_targets, clusters=300)


def test_the_two_sample_test_distinguishes_ijepa_from_multiblock(ijepa_draws):
    blocks = masking.multiblock(masking.key(range(2400), seed=0), GRID)
    with pytest.raises(AssertionError):
        assert_same_distribution(~blocks.context.is_masked, ijepa_draws[1], clusters=300)


def test_ijepa_never_uses_the_last_row_and_column(ijepa_draws):
    contexts, _, targets, _ = ijepa_draws
    for inside in (contexts, targets):
        assert not inside[:, -1].any()
        assert not inside[:, :, -1].any()
    assert targets[:, :-1, :-1].any(dim=0).all()


def test_the_bottom_is_visible_less_often_in_larger_batches():
    def visible_at_the_bottom(batch: int) -> float:
        keys = [masking.key(range(n, n + batch), seed=0) for n in range(0, 512, batch)]
        contexts = torch.cat([~compat.ijepa(key, GRID) for key in keys])
        return float(contexts[:, -4:].double().mean())

    assert visible_at_the_bottom(64) < 0.6 * visible_at_the_bottom(4)


def test_ijepa_draws_few_different_sizes():
    """One random number gives area and aspect ratio; published: 5 shapes in 200 seeds."""
    shapes = set()
    for seed in range(100):
        target = compat.ijepa_targets(masking.key([0], seed=seed), GRID)[0, 0]
        shapes.add((int(target.any(dim=1).sum()), int(target.any(dim=0).sum())))
    assert len(shapes) <= 6


@given(key=keys(min_batch=2))
def test_context_and_targets_are_disjoint_and_depend_on_the_key_only(key):
    context, targets = ~compat.ijepa(key, GRID), compat.ijepa_targets(key, GRID)
    assert torch.equal(context, ~compat.ijepa(key, GRID))
    assert len(context.sum((1, 2)).unique()) == 1
    assert not (context.unsqueeze(1) & targets)[:, 0].any()


@pytest.mark.parametrize("sampler", [compat.ijepa, compat.mmpretrain])
def test_an_empty_batch(sampler):
    options = {} if sampler is compat.ijepa else {"num_masked": 9}
    assert sampler(masking.key([], seed=0), GRID, **options).shape == (0, *GRID)


@pytest.mark.untyped
def test_assert_sampler_conforms_names_what_mmpretrain_never_masks():
    def sampler(key: Key, grid: tuple[int, ...], ratio: float) -> masking.Mask:
        return masking.Mask.from_bool(compat.mmpretrain(key, grid, ratio, min_block=4))

    with pytest.raises(AssertionError, match="index 6 of axis 0 and index 6 of axis 1 never"):
        assert_sampler_conforms(sampler, (7, 7), 0.4)


# Whole distributions on small grids.

DRAWN = 4000
BLOCKS = {"grid": (4, 5), "min_block": 6}


def mae_as_published(rng: np.random.RandomState) -> np.ndarray:
    shuffle = rng.rand(6).argsort()
    mask = np.ones(6, dtype=bool)
    mask[shuffle[: int(6 * (1 - 0.5))]] = False
    return mask


def simmim_as_published(rng: np.random.RandomState) -> np.ndarray:
    mask = np.zeros(6, dtype=bool)
    mask[rng.permutation(6)[: int(np.ceil(6 * 0.6))]] = True
    return mask.reshape(2, 3).repeat(2, axis=0).repeat(2, axis=1)


@functools.cache
def draw_small(name: str) -> tuple[Tensor, Tensor]:
    """Draw masks on a small grid: ours, and as published."""
    key, rng, generator = (
        masking.key(range(DRAWN), seed=0),
        np.random.RandomState(0),
        random.Random(0),
    )
    grid, min_block = BLOCKS["grid"], BLOCKS["min_block"]
    if name == "mae":
        ours = masking.uniform(key, (2, 3), 0.5, rounding="mae").is_masked
        return ours, torch.from_numpy(np.stack([mae_as_published(rng) for _ in range(DRAWN)]))
    if name == "simmim":
        ours = masking.uniform(key, (4, 6), 0.6, unit=2, rounding="simmim").is_masked
        return ours, torch.from_numpy(np.stack([simmim_as_published(rng) for _ in range(DRAWN)]))
    if name == "ijepa":
        batches = [masking.key(range(2 * n, 2 * n + 2), seed=0) for n in range(DRAWN // 4)]
        ours = [~compat.ijepa(batch, (4, 5), min_keep=1)[:1] for batch in batches]
        seeded = torch.Generator().manual_seed(0)
        theirs = [ijepa_as_published(seeded, 2, (4, 5), 1)[0][:1] for _ in batches]
        return torch.cat(ours), torch.cat(theirs)
    ours = getattr(compat, name)(key, grid, num_masked=9, min_block=min_block)
    options = {"beit": {"exact": False}, "cae": {}, "mmpretrain": {"last": 1}}[name]
    theirs = [blocks_as_published(generator, 9, **BLOCKS, **options) for _ in range(DRAWN)]
    return ours, torch.from_numpy(np.stack(theirs))


def assert_same_masks(ours: Tensor, theirs: Tensor) -> None:
    """Compare by a chi-squared test at 5 sigma; masks drawn less than ten times are pooled."""
    both = torch.cat([ours.flatten(1), theirs.flatten(1)])
    bits = (both.long() << torch.arange(both.shape[1])).sum(dim=1)
    kinds, kind = bits.unique(return_inverse=True)
    counts = [torch.bincount(part, minlength=len(kinds)) for part in kind.split(len(ours))]
    often = counts[0] + counts[1] >= 10
    a, b = (torch.cat([c[often], c[~often].sum().view(1)]).double() for c in counts)
    distance = float(((a - b) ** 2 / (a + b).clamp(min=1)).sum())
    freedom = max(int((a + b > 0).sum()) - 1, 1)
    assert distance < freedom + 5 * math.sqrt(2 * freedom) + 5, (distance, freedom)


DISTRIBUTIONS = ["mae", "simmim", "beit", "cae", "mmpretrain", "ijepa"]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_masks_of_a_small_grid_are_as_frequent_as_published(name):
    assert_same_masks(*draw_small(name))


@pytest.mark.parametrize(("one", "other"), [("beit", "cae"), ("mmpretrain", "cae")])
def test_the_chi_squared_test_distinguishes_published_samplers(one, other):
    with pytest.raises(AssertionError):
        assert_same_masks(draw_small(one)[0], draw_small(other)[1])


def test_the_chi_squared_test_distinguishes_batches_of_four_and_two():
    """The context of a sample is cut to the shortest of its batch."""
    contexts = [
        ~compat.ijepa(masking.key(range(4 * n, 4 * n + 4), seed=0), (4, 5), min_keep=1)[:1]
        for n in range(DRAWN // 4)
    ]
    with pytest.raises(AssertionError):
        assert_same_masks(torch.cat(contexts), draw_small("ijepa")[1])


KEY = masking.key([0, 1], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compat.ijepa(KEY, (2, 2)), r"does not end on grid \(2, 2\)"),
        (lambda: compat.ijepa(KEY, (1, 16)), r"\(1, 16\)"),
        (lambda: compat.ijepa(KEY, (16,)), r"two axes; got \(16,\)"),
        (lambda: compat.mmpretrain(KEY, (4, 4), num_masked=10), r"not end on grid \(4, 4\)"),
    ],
)
def test_an_error_where_the_published_loop_never_ends(call, message):
    with pytest.raises(ValueError, match=message):
        call()
