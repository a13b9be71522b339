"""`viz.half_mass` and `viz.show_attention`: the contour around half of the attention."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import viz
from tests.strategies import generators


@given(generators(), st.integers(1, 4), st.integers(1, 3), st.floats(0.05, 0.95))
def test_no_smaller_set_of_positions_has_the_same_share(generator, rows, columns, share):
    attention = torch.rand(1, rows, columns, generator=generator, dtype=torch.float64) + 1e-3
    inside = viz.half_mass(attention, share=share)
    total = attention.sum()
    assert attention[inside].sum() >= share * total - 1e-9
    values = attention.flatten().tolist()
    fewer = int(inside.sum()) - 1
    best = max((sum(some) for some in itertools.combinations(values, fewer)), default=0.0)
    assert best < share * total + 1e-9


def test_the_line_is_drawn_only_inside_the_selected_positions():
    attention = torch.zeros(1, 3, 3)
    attention[0, 1, 1] = 1.0
    images = torch.rand(1, 1, 12, 12) * 0.5
    shown = viz.show_attention(images, attention, color=(2.0, 2.0, 2.0), line=1)
    on_line = (shown == 2.0).all(dim=1)[0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:8, 4:8] = True
    expected[5:7, 5:7] = False
    assert torch.equal(on_line, expected)
    # The position with the most attention keeps its brightness, all others are darkened.
    torch.testing.assert_close(shown[0, :, 5:7, 5:7], images[0, :, 5:7, 5:7].expand(3, -1, -1))
    torch.testing.assert_close(shown[0, :, :4], 0.3 * images[0, :, :4].expand(3, -1, -1))


@pytest.mark.untyped
def test_images_not_divisible_by_the_grid_are_refused():
    with pytest.raises(
        ValueError, match=r"\(10, 12\) is not divisible by the attention grid \(3, 3\)"
    ):
        viz.show_attention(torch.zeros(1, 3, 10, 12), torch.zeros(1, 3, 3))
