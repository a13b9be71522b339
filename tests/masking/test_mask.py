"""`Mask`: construction, conversion and comparison."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import mimkit
import mimkit.patches
from mimkit import masking
from mimkit.masking import Mask
from tests.strategies import generators, grids, keys, masks


def booleans(mask: Mask) -> np.ndarray:
    return mask.is_masked.numpy()


@given(masks())
def test_visible_and_masked_ids_are_ascending_and_fill_the_grid(mask):
    mask.validate()
    for visible, masked in zip(mask.visible_ids.tolist(), mask.masked_ids.tolist(), strict=True):
        assert visible == sorted(visible)
        assert masked == sorted(masked)
        assert sorted(visible + masked) == list(range(math.prod(mask.grid)))


@given(masks())
def test_the_properties_agree_with_the_ids(mask):
    assert mask.batch_size == len(mask.visible_ids)
    assert mask.num_tokens == math.prod(mask.grid) == mask.num_visible + mask.num_masked
    assert (mask.num_visible, mask.num_masked) == (
        mask.visible_ids.shape[1],
        mask.masked_ids.shape[1],
    )
    assert mask.device == torch.device("cpu")
    assert mask.is_masked.shape == (mask.batch_size, *mask.grid)
    assert mask.is_masked.dtype == torch.bool
    flat = booleans(mask).reshape(mask.batch_size, -1)
    for row, masked, visible in zip(flat, mask.masked_ids, mask.visible_ids, strict=True):
        assert np.array_equal(np.flatnonzero(row), masked)
        assert np.array_equal(np.flatnonzero(~row), visible)


@given(masks())
def test_restore_ids_put_visible_and_masked_tokens_in_grid_order(mask):
    order = torch.cat([mask.visible_ids, mask.masked_ids], dim=1)
    in_grid_order = order.gather(1, mask.restore_ids)
    assert torch.equal(in_grid_order, torch.arange(mask.num_tokens).expand_as(order))


@given(masks())
def test_from_bool_undoes_is_masked(mask):
    assert Mask.from_bool(mask.is_masked).equal(mask)
    assert Mask.from_bool(mask.is_masked, num_masked=mask.num_masked).equal(mask)


@given(masks(), generators())
def test_from_visible_ids_accepts_any_order_and_integer_type(mask, generator):
    shuffle = torch.rand(mask.visible_ids.shape, generator=generator).argsort(dim=1)
    shuffled = mask.visible_ids.gather(1, shuffle)
    assert Mask.from_visible_ids(shuffled, mask.grid).equal(mask)
    made = Mask.from_visible_ids(shuffled.to(torch.int32), mask.grid)
    assert made.equal(mask)
    assert made.visible_ids.dtype == torch.int64


@given(masks(), st.data())
def test_from_noise_keeps_the_lowest_visible(mask, data):
    noise = torch.rand(mask.batch_size, mask.num_tokens, generator=data.draw(generators()))
    drawn = Mask.from_noise(noise, mask.grid, mask.num_masked)
    assert drawn.num_masked == mask.num_masked
    if 0 < mask.num_masked < mask.num_tokens:
        highest_visible = noise.gather(1, drawn.visible_ids).amax(dim=1)
        assert (highest_visible < noise.gather(1, drawn.masked_ids).amin(dim=1)).all()


@given(grid=grids(max_tokens=60), num_boxes=st.integers(1, 3), data=st.data())
def test_from_boxes_masks_the_union_of_the_boxes(grid, num_boxes, data):
    expected = np.zeros((1, *grid), dtype=bool)
    boxes = []
    for _ in range(num_boxes):
        bounds = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in grid]
        boxes.append([start for start, _ in bounds] + [stop for _, stop in bounds])
        expected[(0, *(slice(*bound) for bound in bounds))] = True
    mask = Mask.from_boxes(torch.tensor([boxes]), grid)
    assert np.array_equal(booleans(mask), expected)
    assert Mask.from_boxes(torch.tensor([boxes]), grid, num_masked=mask.num_masked).equal(mask)


@given(masks())
def test_the_complement_swaps_visible_and_masked(mask):
    other = ~mask
    other.validate()
    assert torch.equal(other.is_masked, ~mask.is_masked)
    assert (other.num_visible, other.num_masked) == (mask.num_masked, mask.num_visible)
    assert mask.complement().equal(other)
    assert (~other).equal(mask)


@given(masks(), st.data())
def test_indexing_selects_the_same_rows_as_of_the_booleans(mask, data):
    row = st.integers(-mask.batch_size, mask.batch_size - 1)
    single, several = data.draw(row), data.draw(st.lists(row, min_size=1, max_size=5))
    chosen = data.draw(st.lists(st.booleans(), min_size=mask.batch_size, max_size=mask.batch_size))
    assert mask[single].is_masked.equal(mask.is_masked[[single]])
    assert mask[several].is_masked.equal(mask.is_masked[several])
    assert mask[torch.tensor(several)].is_masked.equal(mask.is_masked[several])
    assert mask[torch.tensor(chosen)].is_masked.equal(mask.is_masked[torch.tensor(chosen)])
    assert mask[single:].is_masked.equal(mask.is_masked[single:])
    assert mask[::2].is_masked.equal(mask.is_masked[::2])


@given(masks(), st.data())
def test_rows_may_be_any_sequence(mask, data):
    rows = data.draw(st.lists(st.integers(0, mask.batch_size - 1), min_size=1, max_size=3))
    assert mask[tuple(rows)].equal(mask[rows])
    assert mask[range(mask.batch_size)].equal(mask)
    assert mask[torch.tensor(rows[0])].equal(mask[rows[0]])


@pytest.mark.untyped
def test_a_row_may_be_a_numpy_integer():
    mask = masking.uniform(masking.key([0, 1], seed=0), (4,), 0.5)
    assert mask[np.int64(1)].equal(mask[1])


@given(masks())
def test_iteration_yields_one_row_at_a_time(mask):
    rows = list(mask)
    assert len(rows) == mask.batch_size
    assert Mask.cat(rows).equal(mask)


def test_a_row_out_of_range_is_an_index_error():
    mask = masking.uniform(masking.key([0, 1], seed=0), (4,), 0.5)
    with pytest.raises(IndexError):
        mask[2]


@given(grid=grids(max_tokens=40), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_cat_concatenates_batches(grid, sizes):
    count = math.prod(grid) // 2
    parts = [
        masking.uniform(masking.key(range(size), seed=seed), grid, num_masked=count)
        for seed, size in enumerate(sizes)
    ]
    whole = Mask.cat(parts)
    assert whole.batch_size == sum(sizes)
    assert torch.equal(whole.is_masked, torch.cat([part.is_masked for part in parts]))


@given(masks(grid=None), st.data())
def test_coarsen_undoes_refine(mask, data):
    factors = data.draw(st.tuples(*[st.integers(1, 3)] * len(mask.grid)))
    fine = mask.refine(factors)
    fine.validate()
    expected = booleans(mask)
    for axis, factor in enumerate(factors, 1):
        expected = expected.repeat(factor, axis=axis)
    assert np.array_equal(booleans(fine), expected)
    assert fine.coarsen(factors).equal(mask)


@given(masks(), st.integers(1, 3))
def test_one_factor_applies_to_every_axis(mask, factor):
    assert mask.refine(factor).equal(mask.refine([factor] * len(mask.grid)))
    assert mask.refine(factor).coarsen(factor).equal(mask)


def test_a_cell_that_is_partly_masked_cannot_be_coarsened():
    is_masked = torch.tensor([[[True] * 4, [True] * 4], [[True, True, False, True]] * 2])
    with pytest.raises(ValueError, match=r"sample 0"):
        Mask.from_bool(torch.stack([is_masked[1], is_masked[1]])).coarsen(2)
    is_masked = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0]], [[1, 1, 1, 0], [0, 0, 0, 1]]]).bool()
    with pytest.raises(ValueError, match=r"cell \(0, 0\) of sample 1 is partly masked"):
        Mask.from_bool(is_masked).coarsen(2)


@given(masks(), masks())
def test_masks_are_equal_if_they_mask_the_same_positions(one, other):
    same = one.grid == other.grid and torch.equal(one.is_masked, other.is_masked)
    assert one.equal(other) == same
    assert one.equal(Mask.from_bool(one.is_masked.clone()))


def test_masks_of_different_grids_counts_or_batch_sizes_are_not_equal():
    def all_visible(*shape: int) -> Mask:
        return Mask.from_bool(torch.zeros(shape, dtype=torch.bool))

    assert not all_visible(1, 2, 3).equal(all_visible(1, 3, 2))
    assert not all_visible(1, 2, 3).equal(all_visible(1, 6))
    assert not all_visible(1, 4).equal(all_visible(2, 4))
    assert not (~all_visible(1, 4)).equal(~all_visible(2, 4))
    assert not (~all_visible(1, 4)).equal(all_visible(1, 4))


@given(masks(batch_size=1), st.integers(1, 5))
def test_expand_repeats_one_sample_without_a_copy(mask, batch_size):
    shared = mask.expand(batch_size)
    assert torch.equal(shared.is_masked, mask.is_masked.expand(batch_size, *mask.grid))
    assert shared.visible_ids.data_ptr() == mask.visible_ids.data_ptr()


@given(masks())
def test_to_a_device_moves_both_ids(mask):
    moved = mask.to("meta", non_blocking=True)
    assert moved.device.type == moved.masked_ids.device.type == "meta"
    assert moved.grid == mask.grid
    assert mask.to("cpu").equal(mask)


@pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="page-locked memory needs an accelerator"
)
def test_pinned_masks_are_equal_and_page_locked():
    mask = masking.uniform(masking.key(range(3), seed=0), (4, 4), 0.75)
    pinned = mask.pin_memory()
    assert pinned.equal(mask)
    assert pinned.visible_ids.is_pinned()
    assert pinned.masked_ids.is_pinned()


@given(masks())
def test_masks_can_be_copied_and_pickled(mask):
    for copied in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert type(copied) is Mask
        assert copied.equal(mask)
        assert copied.masked_ids.equal(mask.masked_ids)
        assert copied.grid == mask.grid
    assert copy.deepcopy(mask).visible_ids is not mask.visible_ids


@given(masks())
def test_a_mask_is_a_pytree_of_its_ids(mask):
    leaves, structure = pytree.tree_flatten(mask)
    assert len(leaves) == 2
    assert leaves[0] is mask.visible_ids
    assert leaves[1] is mask.masked_ids
    assert pytree.tree_unflatten(leaves, structure).equal(mask)
    named, _ = pytree.tree_flatten_with_path(mask)
    assert [pytree.keystr(path) for path, _ in named] == [".visible_ids", ".masked_ids"]


@given(keys())
def test_a_key_is_a_pytree_of_ids_and_seed(key):
    named, structure = pytree.tree_flatten_with_path(key)
    assert [pytree.keystr(path) for path, _ in named] == [".sample_ids", ".seed_and_epoch"]
    again = pytree.tree_unflatten([leaf for _, leaf in named], structure)
    assert again.view_index == key.view_index
    assert masking.uniform(again, (5, 5), 0.5).equal(masking.uniform(key, (5, 5), 0.5))
    pickled = pickle.loads(pickle.dumps(key))
    assert masking.uniform(pickled, (5, 5), 0.5).equal(masking.uniform(key, (5, 5), 0.5))


@pytest.mark.untyped
def test_unflattening_a_mask_checks_nothing():
    """DDP, export and `tree_map` put placeholders in place of tensors."""
    mask = masking.uniform(masking.key([0], seed=0), (4,), 0.5)
    shapes = pytree.tree_map(lambda ids: tuple(ids.shape), mask)
    assert (shapes.visible_ids, shapes.masked_ids) == ((1, 2), (1, 2))


def test_masks_and_keys_cannot_be_changed():
    mask = masking.uniform(masking.key([0], seed=0), (4,), 0.5)
    with pytest.raises(AttributeError):
        mask.grid = (2, 2)
    with pytest.raises(AttributeError):
        masking.key([0], seed=0).view_index = 1


def test_the_repr_of_a_mask():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 4), 0.75)
    assert repr(mask) == (
        "Mask(batch_size=2, grid=(2, 4), num_visible=2, num_masked=6, device='cpu')"
    )


def test_unequal_counts_name_the_first_sample_that_differs():
    is_masked = torch.tensor([[True, False, False]] * 2 + [[True, True, False]])
    with pytest.raises(ValueError, match=r"1 of 3, but sample 2 masks 2"):
        Mask.from_bool(is_masked)
    with pytest.raises(ValueError, match=r"2 of 3, but sample 0 masks 1"):
        Mask.from_bool(is_masked, num_masked=2)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


MASK = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Mask.from_visible_ids(ids([0, 16]), (4, 4)), r"\[0, 16\).*0 to 16"),
        (lambda: Mask.from_visible_ids(ids([-1, 3]), (4, 4)), r"-1 to 3"),
        (lambda: Mask.from_visible_ids(ids([0, 1], [2, 2]), (4, 4)), r"sample 1.*\[2, 2\]"),
        (lambda: Mask.from_visible_ids(ids([0, 1, 2, 3, 4]), (2, 2)), r"\(1, 5\)"),
        (lambda: Mask.from_visible_ids(torch.tensor([0, 1]), (2, 2)), r"\(2,\)"),
        (lambda: Mask.from_noise(torch.rand(2, 15), (4, 4), 3), r"\[batch, 16\].*\(2, 15\)"),
        (lambda: Mask.from_noise(torch.rand(2, 16), (4, 4), 17), r"\[0, 16\]; got 17"),
        (lambda: Mask.from_noise(torch.full((1, 4), float("nan")), (2, 2), 1), "NaN"),
        (lambda: Mask.from_boxes(ids([0, 0, 1, 2]), (2, 2)), r"\(1, 4\)"),
        (lambda: Mask.from_boxes(ids([0, 0, 1, 3])[None], (2, 2)), r"\[0, 0, 1, 3\].*sample 0"),
        (lambda: Mask.from_boxes(ids([1, 0, 0, 1])[None], (2, 2)), r"\[1, 0, 0, 1\]"),
        (lambda: Mask.from_bool(torch.zeros(1, 2, 2, 2, 2, dtype=torch.bool)), r"\(2, 2, 2, 2\)"),
        (lambda: Mask.cat([]), "at least one"),
        (lambda: Mask.cat([MASK, ~MASK]), r"4.*12|12.*4"),
        (lambda: Mask.cat([MASK, MASK.refine(2)]), r"\(8, 8\)"),
        (lambda: MASK.expand(3), "2 samples to 3"),
        (lambda: MASK.coarsen(3), r"\(4, 4\).*\(3, 3\)"),
        (lambda: MASK.refine((2, 2, 2)), r"\(2, 2, 2\)"),
        (lambda: MASK.refine(0), "got 0"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
@pytest.mark.parametrize(
    "call",
    [
        lambda: Mask.from_bool(torch.zeros(1, 4, dtype=torch.uint8)),
        lambda: Mask.from_visible_ids(torch.zeros(1, 1), (2, 2)),
        lambda: Mask.from_visible_ids(torch.ones(1, 1, dtype=torch.bool), (2, 2)),
    ],
)
def test_errors_name_a_wrong_dtype(call):
    with pytest.raises(TypeError, match=r"torch\.(uint8|float32|bool)"):
        call()


@pytest.mark.parametrize(
    ("visible", "masked", "message"),
    [
        (ids([1, 0]), ids([2, 3]), "sample 0"),
        (ids([0, 1], [0, 1]), ids([2, 3], [1, 3]), "sample 1"),
        (ids([0, 1]), ids([2, 4]), "sample 0"),
        (ids([0, 1]), ids([2]), "3 ids do not fill"),
    ],
)
def test_validate_finds_ids_that_are_not_a_partition(visible, masked, message):
    mask = Mask(visible, masked, (2, 2))
    with pytest.raises(ValueError, match=message):
        mask.validate()


def test_use_check_validates_within_its_block():
    tokens = torch.zeros(1, 4, 2)
    wrong = Mask(ids([1, 0]), ids([2, 3]), (2, 2))
    mimkit.patches.gather_visible(tokens, wrong)
    with mimkit.use(check=True), pytest.raises(ValueError, match="ascending"):
        mimkit.patches.gather_visible(tokens, wrong)
    mimkit.patches.gather_visible(tokens, wrong)
