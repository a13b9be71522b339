"""Samplers: counts, reproducibility, support."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import Mask
from mimkit.testing import assert_sampler_conforms
from tests.golden_files import golden
from tests.strategies import epochs, grids, keys, masks, sample_ids, seeds, views

SAMPLERS = {
    "uniform": lambda key: masking.uniform(key, (6, 5), 0.6),
    "uniform in units": lambda key: masking.uniform(key, (6, 4), 0.5, unit=(2, 1)),
    "random square": lambda key: masking.square(key, (6, 5), 3, position="random"),
    "tube": lambda key: masking.tube(key, (6, 5), 0.5, shared_axes=1),
    "inverse block": lambda key: masking.inverse_block(key, (6, 5), 0.6),
    "visible block": lambda key: masking.visible_block(key, (6, 5), 0.6),
    "visible block inside": lambda key: masking.visible_block(key, (6, 5), 0.6, roll=False),
    "prefix": lambda key: masking.prefix(key, (6, 5), 0.6),
    "context of blocks": lambda key: masking.multiblock(key, (6, 5)).context,
    "last target": lambda key: masking.multiblock(key, (6, 5)).targets[-1],
    "weighted": lambda key: masking.weighted(
        key, (6, 5), 0.6, weights=torch.linspace(0, 1, 30).expand(key.batch_size, -1)
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
@given(key=keys(max_batch=6), data=st.data())
def test_permuting_the_batch_permutes_the_masks(name, key, data):
    order = data.draw(st.permutations(range(key.batch_size)))
    permuted = masking.Key(key.sample_ids[order], key.seed_and_epoch, key.view_index)
    assert SAMPLERS[name](permuted).equal(SAMPLERS[name](key)[order])


@pytest.mark.parametrize("name", SAMPLERS)
@given(key=keys(max_batch=6), data=st.data())
def test_splitting_the_batch_splits_the_masks(name, key, data):
    at = data.draw(st.integers(0, key.batch_size))
    parts = [
        SAMPLERS[name](masking.Key(ids, key.seed_and_epoch, key.view_index))
        for ids in key.sample_ids.tensor_split([at])
    ]
    assert Mask.cat(parts).equal(SAMPLERS[name](key))


@pytest.mark.parametrize("name", SAMPLERS)
@given(key=keys(max_batch=6))
def test_every_sampler_draws_valid_masks(name, key):
    SAMPLERS[name](key).validate()


@given(seed=seeds, epoch=epochs, view=views, sample_id=sample_ids, data=st.data())
def test_another_seed_epoch_view_or_sample_gives_another_mask(seed, epoch, view, sample_id, data):
    def draw(**changed):
        state = {"seed": seed, "epoch": epoch, "view": view, "sample_id": sample_id} | changed
        key = masking.key([state["sample_id"]], seed=state["seed"], epoch=state["epoch"])
        return masking.uniform(key.view(state["view"]), (20, 20), 0.5)

    bit = 1 << data.draw(st.integers(0, 31))
    one = draw()
    assert one.equal(draw())
    assert not one.equal(draw(seed=(seed ^ bit) % 2**64))
    assert not one.equal(draw(seed=(seed ^ (bit << 32)) % 2**64))
    assert not one.equal(draw(epoch=epoch ^ bit))
    assert not one.equal(draw(view=(view + 1) % 256))
    assert not one.equal(draw(sample_id=sample_id ^ (bit >> 1 or 1)))


def test_uniform_masks_every_token_equally_often():
    mask = masking.uniform(masking.key(range(4000), seed=0), (4, 5), 0.75)
    share = mask.is_masked.float().mean(dim=0)
    # Standard deviation of a share: sqrt(0.75 * 0.25 / 4000) = 0.0068.
    assert (share - 0.75).abs().max() < 5 * 0.0068


@pytest.mark.full
@pytest.mark.parametrize("unit", [1, 2])
def test_uniform_masks_every_token_of_a_large_grid_equally_often(unit):
    batch = 40_000
    mask = masking.uniform(masking.key(range(batch), seed=1), (14, 14), 0.75, unit=unit)
    share = mask.is_masked.float().mean(dim=0)
    ratio = mask.num_masked / mask.num_tokens
    assert (share - ratio).abs().max() < 5 * math.sqrt(ratio * (1 - ratio) / batch)


def test_uniform_masks_every_pair_equally_often():
    is_masked = masking.uniform(masking.key(range(4000), seed=0), (8,), 0.5).is_masked.float()
    together = is_masked.T @ is_masked / 4000
    pairs = together[~torch.eye(8, dtype=torch.bool)]
    expected = 4 / 8 * 3 / 7
    assert (pairs - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 4000)


@given(key=keys(), grid=grids(max_tokens=60))
def test_uniform_can_mask_nothing_and_everything(key, grid):
    tokens = list(range(math.prod(grid)))
    nothing = masking.uniform(key, grid, num_masked=0)
    everything = masking.uniform(key, grid, num_masked=len(tokens))
    assert nothing.visible_ids.tolist() == everything.masked_ids.tolist()
    assert nothing.visible_ids.tolist() == [tokens] * key.batch_size
    assert not nothing.is_masked.any()
    assert everything.is_masked.all()


def test_an_empty_batch():
    key = masking.key(torch.zeros(0, dtype=torch.int64), seed=0)
    mask = masking.uniform(key, (4, 4), 0.75)
    assert (mask.batch_size, mask.num_visible, mask.num_masked) == (0, 4, 12)


@given(key=keys(), unit=st.tuples(st.integers(1, 3), st.integers(1, 3)), data=st.data())
def test_a_unit_is_masked_as_a_whole(key, unit, data):
    coarse = data.draw(grids(max_axes=2, min_tokens=2, max_tokens=30).filter(lambda g: len(g) == 2))
    grid = tuple(n * u for n, u in zip(coarse, unit, strict=True))
    mask = masking.uniform(key, grid, 0.6, unit=unit)
    # The units of a grid are masked like the tokens of the coarse grid.
    assert mask.coarsen(unit).equal(masking.uniform(key, coarse, 0.6))


def test_units_of_two_have_the_structure_of_simmim():
    """SimMIM's generator repeats a uniform mask of 32-pixel units to the patch grid."""
    size, unit, patch, ratio = 224, 32, 16, 0.6
    mask = masking.uniform(
        masking.key(range(5), seed=0), (14, 14), ratio, unit=unit // patch, rounding="simmim"
    )
    units = size // unit
    count = int(np.ceil(units**2 * ratio))
    for is_masked in mask.is_masked.numpy():
        coarse = is_masked[::2, ::2]
        assert coarse.sum() == count
        assert np.array_equal(is_masked, coarse.repeat(2, axis=0).repeat(2, axis=1))


def test_num_masked_counts_tokens_not_units():
    mask = masking.uniform(masking.key([0], seed=0), (4, 4), num_masked=8, unit=2)
    assert mask.num_masked == 8
    assert mask.coarsen(2).num_masked == 2


@given(grid=grids(max_tokens=100), data=st.data())
def test_gridwise_keeps_one_token_per_step(grid, data):
    steps = data.draw(st.tuples(*[st.integers(1, 3)] * len(grid)))
    mask = masking.gridwise(masking.key(range(2), seed=0), grid, keep_every=steps)
    mask.validate()
    place = np.indices(grid)
    expected = np.any([axis % step for axis, step in zip(place, steps, strict=True)], axis=0)
    assert np.array_equal(mask.is_masked.numpy(), np.stack([expected] * 2))


@given(grid=grids(max_tokens=100), key=keys(), data=st.data())
def test_a_square_is_one_box_inside_the_grid(grid, key, data):
    sides = data.draw(st.tuples(*[st.integers(1, size) for size in grid]))
    position = data.draw(st.sampled_from(["center", "random"]))
    mask = masking.square(key, grid, sides, position=position)
    mask.validate()
    assert mask.num_masked == math.prod(sides)
    for is_masked in mask.is_masked:
        corners = is_masked.nonzero()
        extent = corners.max(dim=0).values - corners.min(dim=0).values + 1
        assert tuple(extent.tolist()) == sides


@pytest.mark.parametrize(
    ("grid", "side", "start"), [((5, 6), 3, (1, 1)), ((4, 7), 2, (1, 2)), ((3,), 3, (0,))]
)
def test_a_central_square_is_in_the_middle_rounded_towards_the_origin(grid, side, start):
    mask = masking.square(masking.key(range(2), seed=0), grid, side)
    expected = torch.zeros(2, *grid, dtype=torch.bool)
    expected[(slice(None), *(slice(s, s + side) for s in start))] = True
    assert torch.equal(mask.is_masked, expected)


def test_a_random_square_is_at_every_position_equally_often():
    grid, sides, batch = (5, 4), (2, 3), 2000
    mask = masking.square(masking.key(range(batch), seed=0), grid, sides, position="random")
    counts = torch.bincount(mask.masked_ids[:, 0], minlength=20).view(grid)
    possible = torch.zeros(grid, dtype=torch.bool)
    possible[:4, :2] = True
    assert torch.equal(counts > 0, possible)
    assert (counts[possible] - batch / 8).abs().max() < 5 * math.sqrt(batch / 8)


@pytest.mark.parametrize("case", range(6))
def test_from_noise_masks_the_same_tokens_as_mae(case):
    arrays = golden("mae_random_masking")
    noise = arrays.tensor(f"case{case}/noise")
    kept = arrays.tensor(f"case{case}/ids_keep")
    count = noise.shape[1] - kept.shape[1]
    mask = Mask.from_noise(noise, (noise.shape[1],), count)
    assert torch.equal(mask.visible_ids, kept.sort(dim=1).values)
    assert torch.equal(mask.is_masked.float(), arrays.tensor(f"case{case}/mask"))
    ratio = arrays.config["cases"][case]["mask_ratio"]
    assert count == masking.num_masked(noise.shape[1], ratio, rounding="mae")


@given(noise=st.lists(st.integers(0, 2), min_size=1, max_size=12), data=st.data())
def test_of_equal_noise_the_lower_index_stays_visible(noise, data):
    count = data.draw(st.integers(0, len(noise)))
    mask = Mask.from_noise(torch.tensor([noise], dtype=torch.float32), (len(noise),), count)
    by_noise = sorted(range(len(noise)), key=lambda token: (noise[token], token))
    assert mask.visible_ids[0].tolist() == sorted(by_noise[: len(noise) - count])


@given(key=keys(), mask=masks())
def test_views_are_not_cumulative(key, mask):
    assert key.view(7).view(3).view_index == 3
    draw = masking.uniform(key.view(5).view(0), mask.grid, num_masked=mask.num_masked)
    assert draw.equal(masking.uniform(key.view(0), mask.grid, num_masked=mask.num_masked))


def test_fresh_keys_depend_on_the_random_state_of_torch():
    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        key = masking.fresh_key(3, generator=generator, **options)
        return masking.uniform(key, (6, 6), 0.5)

    assert draw(0).equal(draw(0))
    assert not draw(0).equal(draw(1))
    torch.manual_seed(5)
    one, two = masking.fresh_key(2), masking.fresh_key(2)
    torch.manual_seed(5)
    again = masking.fresh_key(2)
    assert torch.equal(one.seed_and_epoch, again.seed_and_epoch)
    assert not torch.equal(one.seed_and_epoch, two.seed_and_epoch)


def test_a_generator_does_not_change_the_global_random_state():
    before = torch.get_rng_state()
    masking.fresh_key(2, generator=torch.Generator().manual_seed(0))
    masking.uniform(masking.key([0], seed=0), (4, 4), 0.5)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_ids_of_any_integer_type_give_the_same_masks(dtype):
    ids = torch.tensor([3, 250], dtype=dtype)
    mask = masking.uniform(masking.key(ids, seed=0), (5, 5), 0.5)
    assert mask.equal(masking.uniform(masking.key([3, 250], seed=0), (5, 5), 0.5))


KEY = masking.key([0, 1], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masking.uniform(KEY, (4, 4)), "ratio=None, num_masked=None"),
        (lambda: masking.uniform(KEY, (4, 4), 0.5, num_masked=3), "ratio=0.5, num_masked=3"),
        (lambda: masking.uniform(KEY, (4, 4), num_masked=17), r"\[0, 16\]; got 17"),
        (lambda: masking.uniform(KEY, (4, 4), num_masked=-1), r"\[0, 16\]; got -1"),
        (lambda: masking.uniform(KEY, (4, 4), 2), "got 2"),
        (lambda: masking.uniform(KEY, (4, 5), 0.5, unit=2), r"\(4, 5\).*unit \(2, 2\)"),
        (lambda: masking.uniform(KEY, (4, 4), num_masked=3, unit=2), "num_masked=3.* 4 tokens"),
        (lambda: masking.uniform(KEY, (4, 0), 0.5), r"\(4, 0\)"),
        (lambda: masking.uniform(KEY, (2, 2, 2, 2), 0.5), r"\(2, 2, 2, 2\)"),
        (lambda: masking.square(KEY, (4, 4), 5), r"\(5, 5\).*\(4, 4\)"),
        (lambda: masking.square(KEY, (4, 4), 2, position="corner"), "'corner'"),
        (lambda: masking.gridwise(KEY, (4, 4), keep_every=(2, 2, 2)), r"\(2, 2, 2\)"),
        (lambda: masking.key([0], seed=1 << 64), str(1 << 64)),
        (lambda: masking.key([0], seed=-(1 << 63) - 1), str(-(1 << 63) - 1)),
        (lambda: masking.key([0], seed=0, epoch=-1), "got -1"),
        (lambda: masking.key([0], seed=0, epoch=1 << 32), str(1 << 32)),
        (lambda: masking.key(torch.zeros(2, 2, dtype=torch.int64), seed=0), r"\(2, 2\)"),
        (lambda: KEY.view(256), "256"),
        (lambda: KEY.view(-1), "-1"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
@pytest.mark.parametrize("ids", [[0.5], [True], torch.zeros(2)])
def test_ids_that_are_not_integers_raise(ids):
    with pytest.raises(TypeError, match="sample_ids must be .*integers"):
        masking.key(ids, seed=0)


@pytest.mark.untyped
def test_a_grid_that_is_not_integers_raises():
    with pytest.raises(TypeError, match=r"14\.0"):
        masking.uniform(KEY, (14.0, 14), 0.5)


def tubes(key, grid, ratio):
    """Draw tubes along the shortest axis; on a grid of one axis, uniform masks."""
    if len(grid) == 1:
        return masking.uniform(key, grid, ratio)
    axis = min(range(len(grid)), key=grid.__getitem__)
    count = masking.num_masked(math.prod(grid) // grid[axis], ratio)
    return masking.tube(key, grid, num_masked=count * grid[axis], shared_axes=axis)


def weighted_by_position(key, grid, ratio):
    weights = torch.linspace(1, 3, math.prod(grid)).expand(key.batch_size, -1)
    return masking.weighted(key, grid, ratio, weights=weights)


def blocks(key, grid, ratio):
    """Draw small blocks: blocks of 16 tokens always mask the middle of a small grid."""
    return masking.blockwise(key, grid, ratio, min_block=1)


def first_of_three(key, grid, ratio):
    return masking.complementary(key, grid, 3)[0]


def context(key, grid, ratio):
    return masking.multiblock(key, grid, num_targets=2, target_ratio=ratio / 3).context


def second_target(key, grid, ratio):
    return masking.multiblock(key, grid, num_targets=2, target_ratio=ratio / 3).targets[1]


CONFORMING = {
    "uniform": masking.uniform,
    "blockwise": blocks,
    "complementary": first_of_three,
    "context": context,
    "target": second_target,
    "inverse_block": masking.inverse_block,
    "visible_block": masking.visible_block,
    "tube": tubes,
    "weighted": weighted_by_position,
}


def assert_conforms_on(name, grid, ratio):
    count, least = None, 0.1
    if name == "tube" and len(grid) > 1:
        assume(math.prod(grid) // min(grid) >= 2)
        count = masking.num_masked(math.prod(grid) // min(grid), ratio) * min(grid)
    if name == "visible_block":
        assume(len(grid) < 3)
    if name == "blockwise":
        assume(len(grid) < 3)
        ratio, least = min(ratio, 0.75), 0.02
    if name == "complementary":
        count = math.prod(grid) - -(-math.prod(grid) // 3)
    if name in ("context", "target"):
        plane = math.prod(grid[-2:])
        assume(plane > 1)
        if name == "context":  # a target longer than half of both sides always covers the middle
            ratio, least = ratio / 2, 0.05
        area = masking.num_masked(plane, ratio / 3)
        assume(plane > 2 * area)
        if name == "target":  # one placement of at most `plane` covers a corner, 3 times of 4
            least = 0.75 / area
        count = (2 * area if name == "context" else area) * (math.prod(grid) // plane)
    assert_sampler_conforms(CONFORMING[name], grid, ratio, num_masked=count, least=least)


# On given grids they are quick: test_blockwise.py, test_inverse_block.py, test_multiblock.py and
# test_visible_block.py.
LONG = {"blockwise", "context", "inverse_block", "target", "visible_block"}


@pytest.mark.untyped
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n in LONG)) for n in CONFORMING]
)
@given(grid=grids(min_tokens=3, max_tokens=40), ratio=st.fractions(1, 9).map(lambda n: n / 10))
def test_samplers_conform_on_drawn_grids(name, grid, ratio):
    assert_conforms_on(name, grid, ratio)


@pytest.mark.untyped
@pytest.mark.full
@pytest.mark.parametrize("name", CONFORMING)
@settings(max_examples=8)
@given(grid=grids(min_tokens=3, max_tokens=4096), ratio=st.fractions(1, 19).map(lambda n: n / 20))
def test_samplers_conform_on_large_grids(name, grid, ratio):
    assert_conforms_on(name, grid, ratio)
