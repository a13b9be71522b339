"""Masks of samples that differ in grid or in number of masked tokens."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from mimkit import masking
from mimkit.masking import Key, Mask, RaggedMask
from tests.strategies import generators, grids, keys, ragged_masks

SAMPLERS = {"uniform": masking.uniform, "blockwise": masking.blockwise}


def example() -> RaggedMask:
    hidden = [
        torch.tensor([[False, True]]),
        torch.tensor([[True], [True], [False]]),
        torch.tensor([[False, False]]),
    ]
    return RaggedMask.from_bool(hidden)


@given(st.lists(grids(max_tokens=30), min_size=1, max_size=4), generators())
def test_from_bool_equals_the_mask_of_each_sample_alone(some_grids, generator):
    hidden = [torch.rand(grid, generator=generator) < 0.6 for grid in some_grids]
    mask = RaggedMask.from_bool(hidden)
    mask.validate()
    assert mask.grids == tuple(some_grids)
    for one, sample, again in zip(mask.unbind(), hidden, mask.is_masked, strict=True):
        assert one.equal(Mask.from_bool(sample.unsqueeze(0)))
        assert torch.equal(again, sample)
    visible = [torch.arange(h.numel())[~h.flatten()].flip(0) for h in hidden]
    assert RaggedMask.from_visible_ids(visible, some_grids).equal(mask)


@given(grids(max_tokens=30), st.integers(1, 4), generators())
def test_from_bool_of_a_tensor_equals_that_of_a_list(grid, batch, generator):
    hidden = torch.rand(batch, *grid, generator=generator) < 0.6
    assert RaggedMask.from_bool(hidden).equal(RaggedMask.from_bool(list(hidden)))


def test_samplers_with_unequal_counts_make_a_ragged_mask():
    torch.manual_seed(0)
    key = masking.key(range(4), seed=0)
    hidden = torch.stack([masking.uniform(key.view(i), (6, 6), 0.2).is_masked[i] for i in range(4)])
    hidden = hidden | masking.blockwise(key, (6, 6), 0.5).is_masked
    mask = RaggedMask.from_bool(hidden)
    assert mask.num_masked == tuple(hidden.flatten(1).sum(dim=1).tolist())
    assert len(set(mask.num_masked)) > 1
    with pytest.raises(ValueError, match="same number"):
        Mask.from_bool(hidden)


@given(ragged_masks())
def test_unbind_and_indexing_are_undone_by_cat(mask):
    assert RaggedMask.cat(mask.unbind()).equal(mask)
    assert RaggedMask.cat([mask[i] for i in range(mask.batch_size)]).equal(mask)
    opposite = list(range(mask.batch_size))[::-1]
    assert mask[opposite][opposite].equal(mask)
    assert mask[torch.tensor(opposite)].equal(mask[opposite])
    assert mask[:1].equal(mask[0])
    assert mask.complement().complement().equal(mask)
    mask.complement().validate()
    assert (~mask).num_visible == mask.num_masked


@given(ragged_masks())
def test_visible_and_masked_rows_together_are_all_rows(mask):
    total = sum(mask.num_tokens)
    rows = torch.cat([mask.visible_rows, mask.masked_rows])
    assert torch.equal(rows.sort().values, torch.arange(total))
    hidden = torch.cat([sample.flatten() for sample in mask.is_masked])
    assert not hidden[mask.visible_rows].any()
    assert hidden[mask.masked_rows].all()
    visible = mask.split_visible(mask.visible_rows)
    assert tuple(map(len, visible)) == mask.num_visible
    assert tuple(map(len, mask.split_masked(mask.masked_rows))) == mask.num_masked


@given(
    keys(min_batch=1, max_batch=4),
    st.sampled_from(sorted(SAMPLERS)),
    st.data(),
)
def test_each_drawn_sample_equals_the_mask_drawn_alone(key, name, data):
    batch, sampler = key.batch_size, SAMPLERS[name]
    shapes = grids(min_axes=2, max_axes=2, min_tokens=4, max_tokens=60)
    some_grids = data.draw(st.lists(shapes, min_size=batch, max_size=batch))
    ratios = data.draw(st.lists(st.sampled_from([0.25, 0.5, 0.75]), min_size=batch, max_size=batch))
    mask = masking.ragged(sampler, key, some_grids, ratios)
    mask.validate()
    for i, one in enumerate(mask.unbind()):
        alone = Key(key.sample_ids[i : i + 1], key.seed_and_epoch, key.view_index)
        assert one.equal(sampler(alone, some_grids[i], ratios[i]))


@pytest.mark.untyped  # integers for fractions
@given(keys(min_batch=1, max_batch=4), grids(max_tokens=40), st.data())
def test_ratios_of_0_and_1_mask_none_and_all(key, grid, data):
    batch = key.batch_size
    ratios = data.draw(st.lists(st.sampled_from([0, 0.0, 1, 1.0]), min_size=batch, max_size=batch))
    mask = masking.ragged(masking.uniform, key, grid, ratios)
    mask.validate()
    assert mask.num_masked == tuple(int(ratio) * mask.num_tokens[0] for ratio in ratios)


def test_one_grid_ratio_or_count_applies_to_all_samples():
    key = masking.key(range(3), seed=0)
    equal = masking.ragged(masking.uniform, key, (4, 4), 0.75)
    assert equal.equal(RaggedMask.cat([masking.uniform(key, (4, 4), 0.75)]))
    counts = masking.ragged(masking.uniform, key, (4, 4), num_masked=[1, 16, 0])
    assert counts.num_masked == (1, 16, 0)
    squares = masking.ragged(masking.square, key, [(3, 3), (4, 2), (2, 2)], side=2)
    assert squares.num_masked == (4, 4, 4)
    coarse = masking.ragged(masking.uniform, key, (4, 4), [0.5, 0.25, 0.75], unit=2)
    assert coarse.num_masked == (8, 4, 12)


def test_a_ragged_mask_is_a_pytree_of_tensors():
    mask = example()
    leaves, spec = pytree.tree_flatten(mask)
    assert len(leaves) == 4
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert pytree.tree_unflatten(leaves, spec).equal(mask)
    assert mask.to("cpu").equal(mask)
    (loaded,) = DataLoader([mask], batch_size=None)
    assert loaded.equal(mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_visible": (1, 2, 2)}, "do not fit the counts"),
        ({"cu_masked": torch.tensor([0, 2, 3, 3])}, "cu_masked"),
        ({"visible_ids": torch.tensor([0, 1, 0, 1])}, "sample 1"),
        ({"visible_ids": torch.tensor([0, 2, 1, 0])}, "sample 2"),
        ({"masked_ids": torch.tensor([1, 0, 3])}, "sample 1"),
    ],
)
def test_validate_finds_a_mask_that_does_not_fit_its_grids(change, message):
    example().validate()
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(example(), **change).validate()


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RaggedMask.from_bool([torch.zeros(2)]), TypeError, "boolean.*float32"),
        (lambda: RaggedMask.from_bool([]), ValueError, "at least one"),
        (lambda: RaggedMask.cat([]), ValueError, "at least one"),
        (lambda: RaggedMask.from_bool([torch.tensor(True)]), ValueError, "grid"),
        (
            lambda: RaggedMask.from_visible_ids([torch.tensor([4])], [(2, 2)]),
            ValueError,
            "0, 4",
        ),
        (lambda: RaggedMask.from_visible_ids([torch.tensor([0])], []), ValueError, "got 0"),
        (lambda: example().split_masked(torch.zeros(4, 1)), ValueError, "got 4"),
        (lambda: draw(grids=[(2, 2)]), ValueError, "3 samples need 3 grids; got 1"),
        (lambda: draw(ratios=[0.5]), ValueError, "3 samples need 3 ratios; got 1"),
        (lambda: draw(num_masked=[1, 2]), ValueError, "3 samples need 3 num_masked; got 2"),
        (lambda: draw(ratios=0.5, num_masked=2), ValueError, "exactly one"),
        (lambda: draw(sampler=lambda key, grid, **_: 0, ratios=0.5), TypeError, "got int"),
    ],
)
def test_errors_repeat_what_was_passed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def draw(*, sampler=masking.uniform, grids=(2, 2), ratios=None, num_masked=None) -> RaggedMask:
    key = masking.key(range(3), seed=0)
    return masking.ragged(sampler, key, grids, ratios, num_masked=num_masked)


def test_the_repr_of_a_ragged_mask():
    assert repr(example()) == (
        "RaggedMask(grids=((1, 2), (3, 1), (1, 2)), num_visible=(1, 1, 2), "
        "num_masked=(1, 2, 0), device='cpu')"
    )
