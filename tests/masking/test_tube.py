"""Tube masks: constant along the shared axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.testing import assert_sampler_conforms
from tests.strategies import grids, keys


@given(key=keys(), data=st.data())
def test_a_tube_is_a_uniform_mask_repeated_along_the_shared_axes(key, data):
    grid = data.draw(grids(max_tokens=60))
    shared = data.draw(st.sets(st.integers(0, len(grid) - 1), min_size=1))
    flat = [1 if axis in shared else size for axis, size in enumerate(grid)]
    count = data.draw(st.integers(0, math.prod(flat)))
    length = math.prod(grid) // math.prod(flat)
    mask = masking.tube(key, grid, num_masked=count * length, shared_axes=sorted(shared))
    mask.validate()
    repeated = masking.uniform(key, flat, num_masked=count).is_masked.expand(-1, *grid)
    assert torch.equal(mask.is_masked, repeated)


@pytest.mark.untyped
@pytest.mark.parametrize(("grid", "axes", "count"), [((3, 4, 4), 0, 36), ((5, 6), -1, 24)])
def test_tubes_conform(grid, axes, count):
    def tubes(key, grid, ratio):
        return masking.tube(key, grid, ratio, shared_axes=axes)

    assert_sampler_conforms(tubes, grid, 0.75, num_masked=count)


def test_negative_axes_count_from_the_last():
    key = masking.key([0, 1], seed=0)
    last = masking.tube(key, (3, 4, 5), 0.5, shared_axes=(-1, 0))
    assert last.equal(masking.tube(key, (3, 4, 5), 0.5, shared_axes=(0, 2)))


@pytest.mark.parametrize("axes", [3, -4, (0, 0), (0, -3)])
def test_errors_repeat_what_was_passed(axes):
    with pytest.raises(ValueError, match=r"axes of grid \(2, 3, 4\); got"):
        masking.tube(masking.key([0], seed=0), (2, 3, 4), 0.5, shared_axes=axes)
