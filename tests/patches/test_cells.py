"""Packed cells and their neighbors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit.masking import Mask
from mimkit.patches import neighbors, pack_cells, unpack_cells
from tests.strategies import masked_maps, masks


@given(masked_maps())
def test_cells_hold_the_visible_positions_row_by_row(drawn):
    feature_map, mask, (height, width) = drawn
    cells = pack_cells(feature_map, mask)
    for sample, row in enumerate(mask.visible_ids.tolist()):
        for slot, token in enumerate(row):
            y, x = divmod(token, mask.grid[1])
            here = feature_map[
                sample, :, y * height : (y + 1) * height, x * width : (x + 1) * width
            ]
            assert torch.equal(cells[sample, slot], here.flatten(1).T)


@given(masked_maps())
def test_unpacking_gives_the_map_with_zeros_at_masked_positions(drawn):
    feature_map, mask, cell = drawn
    hidden = mask.refine(cell).is_masked.unsqueeze(1)
    back = unpack_cells(pack_cells(feature_map, mask), mask, cell=cell)
    assert torch.equal(back, feature_map.masked_fill(hidden, 0))


@given(masked_maps())
def test_packing_and_unpacking_are_adjoint(drawn):
    feature_map, mask, cell = drawn
    cells = torch.randn_like(pack_cells(feature_map, mask))
    torch.testing.assert_close(
        (pack_cells(feature_map, mask) * cells).sum(),
        (feature_map * unpack_cells(cells, mask, cell=cell)).sum(),
    )


@given(masks(grid=(4, 5)), st.integers(0, 3))
def test_neighbors_are_indices_into_the_visible_ids(mask, reach):
    found = neighbors(mask, reach=reach)
    assert found.dtype == torch.int32
    height, width = mask.grid
    offsets = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
    for sample, row in enumerate(mask.visible_ids.tolist()):
        slots = {token: slot for slot, token in enumerate(row)}
        for slot, token in enumerate(row):
            y, x = divmod(token, width)
            expected = [
                slots.get((y + dy) * width + x + dx, -1)
                if 0 <= y + dy < height and 0 <= x + dx < width
                else -1
                for dy, dx in offsets
            ]
            assert found[sample, slot].tolist() == expected


@given(masks(grid=(3, 4)))
def test_neighbors_are_symmetric(mask):
    found = neighbors(mask, reach=1)
    for sample, slot, place in (found >= 0).nonzero().tolist():
        other = int(found[sample, slot, place])
        assert int(found[sample, other, 8 - place]) == slot


MASK = Mask.from_visible_ids(torch.tensor([[0, 3], [1, 2]]), (2, 2))
LINE = Mask.from_visible_ids(torch.tensor([[0]]), (4,))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_cells(torch.zeros(2, 1, 4, 5), MASK), r"\(4, 5\).*\(2, 2\)"),
        (lambda: pack_cells(torch.zeros(1, 1, 4, 4), MASK), "2 samples.* has 1"),
        (lambda: pack_cells(torch.zeros(1, 1, 4, 4), LINE), r"\(4, 4\)|\(4,\)"),
        (lambda: unpack_cells(torch.zeros(2, 2, 6, 1), MASK), r"4 positions.*\(2, 2\).*got 6"),
        (lambda: unpack_cells(torch.zeros(2, 3, 4, 1), MASK), r"visible = 2.*got \(2, 3, 4, 1\)"),
        (
            lambda: unpack_cells(torch.zeros(2, 2, 4, 1), MASK, cell=(1, 2)),
            r"2 positions.*\(1, 2\).*got 4",
        ),
        (lambda: neighbors(LINE), r"two axes.*\(4,\)"),
        (lambda: neighbors(MASK, reach=-1), "reach.*-1"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
