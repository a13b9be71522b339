"""Resampling of relative position tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mimkit.patches import interpolate_relative_positions
from tests.strategies import generators

interpolate = pytest.importorskip("scipy.interpolate", reason="scipy comes with scikit-image")


def resampled_by_the_authors(table: np.ndarray, old: int, new: int) -> np.ndarray:
    """SimMIM's loop, with the spline that SciPy's removed `interp2d` fitted."""
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        growth = (left + right) / 2
        if (1 - growth ** (old // 2)) / (1 - growth) > new // 2:
            right = growth
        else:
            left = growth
    far = np.cumsum([growth**i for i in range(old // 2)])
    x = np.concatenate([-far[::-1], [0], far])
    wanted = np.clip(np.arange(new) - new // 2, x[0], x[-1])
    spline = interpolate.RectBivariateSpline(x, x, table.reshape(old, old))
    return spline(wanted, wanted)


@given(st.integers(3, 8), st.integers(2, 14), generators())
@settings(max_examples=30)
def test_a_square_table_is_resampled_as_the_authors_do(old, new, generator):
    old_size, new_size = 2 * old - 1, 2 * new - 1
    table = torch.randn(old_size**2, 1, generator=generator, dtype=torch.float64)
    resampled = interpolate_relative_positions(table, (old, old), (new, new))
    expected = resampled_by_the_authors(table.numpy(), old_size, new_size)
    if old == new:
        assert torch.equal(resampled, table)
    else:
        # The authors' search for the growth stops at 1e-6.
        np.testing.assert_allclose(
            resampled.view(new_size, new_size).numpy(), expected, rtol=1e-3, atol=1e-3
        )


@given(st.tuples(*[st.integers(1, 6)] * 2), st.tuples(*[st.integers(1, 9)] * 2), generators())
def test_the_center_and_extra_rows_are_kept(old, new, generator):
    sizes = [[2 * n - 1 for n in grid] for grid in (old, new)]
    table = torch.randn(math.prod(sizes[0]) + 3, 2, generator=generator)
    resampled = interpolate_relative_positions(table, old, new, num_extra=3)
    assert resampled.shape == (math.prod(sizes[1]) + 3, 2)
    assert torch.equal(resampled[-3:], table[-3:])
    centers = [math.prod(size) // 2 for size in sizes]
    torch.testing.assert_close(resampled[centers[1]], table[centers[0]], rtol=1e-4, atol=1e-4)


@given(st.integers(2, 6), st.integers(2, 9), st.integers(1, 3))
def test_a_constant_stays_constant(old, new, heads):
    table = torch.full(((2 * old - 1) ** 2, heads), 1.5)
    resampled = interpolate_relative_positions(table, (old, old), (new, new))
    torch.testing.assert_close(resampled, torch.full(((2 * new - 1) ** 2, heads), 1.5))


@pytest.mark.parametrize(
    ("rows", "old", "new", "message"),
    [
        (49, (4, 4), (4,), "different numbers of axes"),
        (48, (4, 4), (5, 5), r"table must be \[49, heads\]"),
        (49, (4, 0), (5, 5), "positive"),
    ],
)
def test_errors_repeat_what_was_passed(rows, old, new, message):
    with pytest.raises(ValueError, match=message):
        interpolate_relative_positions(torch.zeros(rows, 2), old, new)
