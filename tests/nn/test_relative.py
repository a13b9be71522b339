"""`RelativePositionBias`: gathered by an index, or for large grids spread without one."""

import pytest
import torch
from torch import Tensor

from mimkit.masking import Mask
from mimkit.nn import RelativePositionBias, _relative

GRIDS = [(5,), (1,), (3, 4), (4, 1), (2, 3, 2)]


def made(grid: tuple[int, ...], class_token: bool = False) -> RelativePositionBias:
    bias = RelativePositionBias(grid=grid, heads=3, class_token=class_token)
    torch.nn.init.normal_(bias.table, generator=torch.Generator().manual_seed(0))
    return bias


def bias_by_definition(bias: RelativePositionBias) -> Tensor:
    """One table row for every query and key, found by their coordinates."""
    places = list(torch.cartesian_prod(*map(torch.arange, bias.grid)).view(-1, len(bias.grid)))
    count, prefix = len(places), bias.num_prefix
    rows = torch.full((count + prefix, count + prefix), len(bias.table) - 3)
    rows[prefix:, 0] += 1 * prefix
    rows[0, 0] += 2 * prefix
    for q, query in enumerate(places, start=prefix):
        for k, key in enumerate(places, start=prefix):
            row = 0
            for axis, size in enumerate(bias.grid):
                row = row * (2 * size - 1) + int(query[axis] - key[axis]) + size - 1
            rows[q, k] = row
    return bias.table[rows].movedim(-1, 0)[None]


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("most_indexed", [0, 1024], ids=["spread", "gathered"])
def test_the_bias_of_two_tokens_is_the_row_of_their_offset(
    monkeypatch, most_indexed, grid, class_token
):
    monkeypatch.setattr(_relative, "_MOST_INDEXED", most_indexed)
    bias = made(grid, class_token)
    ours, expected = bias(), bias_by_definition(bias)
    assert torch.equal(ours, expected)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((out * weights).sum(), bias.table) for out in (ours, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("class_token", [False, True])
def test_with_a_mask_it_is_the_bias_of_the_visible_tokens(class_token):
    bias = made((3, 4), class_token)
    mask = Mask.from_visible_ids(torch.tensor([[0, 5, 11], [2, 3, 4]]), (3, 4))
    for sample, ids in enumerate(mask.visible_ids):
        kept = torch.cat([torch.zeros(bias.num_prefix, dtype=torch.int64), ids + bias.num_prefix])
        expected = bias()[0][:, kept][:, :, kept]
        assert torch.equal(bias(mask)[sample], expected)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("class_token", [False, True])
def test_where_nothing_is_visible_it_is_the_bias_of_the_class_token(class_token, batch):
    mask = Mask.from_visible_ids(torch.zeros(batch, 0, dtype=torch.int64), (2, 3))
    bias = made((2, 3), class_token)
    assert bias(mask).shape == (batch, bias.table.shape[1], bias.num_prefix, bias.num_prefix)


def test_a_large_grid_needs_no_index(monkeypatch):
    def refuse(*_args: object) -> Tensor:
        raise AssertionError("an index of all pairs of tokens")

    bias = made((40, 40))
    assert not any(buffer.numel() > 1600 for buffer in bias.buffers())
    monkeypatch.setattr(RelativePositionBias, "_index", refuse)
    assert bias().shape == (1, 3, 1600, 1600)
    with pytest.raises(AssertionError, match="all pairs"):
        made((4, 4))()
