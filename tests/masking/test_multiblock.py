"""Multi-block masks: fixed counts, disjoint context and targets, and the documented format."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from mimkit import masking
from mimkit.masking import Key, Mask, MultiBlock
from mimkit.testing import assert_sampler_conforms
from tests.masking.test_format import word
from tests.strategies import grids, keys

# Enough tokens for four targets and a context.
GRIDS = [(20,), (9, 8), (5, 14), (2, 6, 6)]


@given(key=keys(), grid=grids(min_tokens=8, max_tokens=120), data=st.data())
def test_context_and_targets_are_disjoint_and_counts_depend_on_the_grid_only(key, grid, data):
    plane = math.prod(grid[-2:])
    assume(plane >= 2)
    num_targets, ratio = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0.1, 0.175]))
    area = masking.num_masked(plane, ratio)
    assume(plane > num_targets * area)
    blocks = masking.multiblock(key, grid, num_targets=num_targets, target_ratio=ratio)
    depth = math.prod(grid) // plane
    assert len(blocks.targets) == num_targets
    assert blocks.context.num_visible == depth * (plane - num_targets * area)
    for mask in (blocks.context, *blocks.targets):
        mask.validate()
        assert mask.grid == grid
    for target in blocks.targets:
        assert target.num_masked == depth * area
        assert not (target.is_masked & ~blocks.context.is_masked).any()


@given(key=keys(), grid=st.sampled_from([(9, 8), (5, 14)]))
def test_a_target_is_a_rectangle_except_for_one_end_of_an_outer_column(key, grid):
    for target in masking.multiblock(key, grid).targets:
        for is_masked in target.is_masked:
            rows, columns = is_masked.nonzero().unbind(1)
            box = is_masked[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box[:, 1:-1].all()
            outer = [box[:, 0], box[:, -1]]
            assert sum(bool(column.all()) for column in outer) >= min(1, box.shape[1] - 1)
            for column in outer:
                assert (column.long().diff() != 0).sum() <= 1


@pytest.mark.untyped
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("part", ["context", 0, 3])
def test_context_and_targets_conform(grid, part):
    """Every position can be inside and outside of both, and neither depends on the batch."""

    def draw(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
        blocks = masking.multiblock(key, grid)
        return blocks.context if part == "context" else blocks.targets[part]

    plane = math.prod(grid[-2:])
    area = masking.num_masked(plane, 0.175)
    count = 4 * area if part == "context" else area
    assert_sampler_conforms(draw, grid, 0.5, num_masked=count * math.prod(grid) // plane)


@given(sample_id=st.integers(-(1 << 63), (1 << 63) - 1), seed=st.integers(0, (1 << 64) - 1))
def test_masks_follow_the_documented_format(sample_id, seed):
    """Draw one sample, token by token, as the format is documented."""
    height, width = 9, 8
    blocks = masking.multiblock(masking.key([sample_id], seed=seed, epoch=3).view(2), (9, 8))

    def words(sampler: int, first: int, count: int) -> list[int]:
        state = {"seed": seed, "epoch": 3, "view": 2, "sample_id": sample_id}
        return [word(**state, sampler=sampler, token=first + i) for i in range(count)]

    area, in_target = 13, torch.zeros(height, width, dtype=torch.bool)
    for n, target in enumerate(blocks.targets):
        aspect_word, top_word, left_word, corner = words(7, 4 * n, 4)
        step = (math.log(1.5) - math.log(0.75)) / 256
        aspect = math.exp(math.log(0.75) + ((aspect_word >> 24) + 0.5) * step)
        h = min(max(round(math.sqrt(area * aspect)), -(-area // width)), height)
        w = -(-area // h)
        top, left = top_word * (height - h + 1) >> 32, left_word * (width - w + 1) >> 32
        rows, columns = list(range(top, top + h)), list(range(left, left + w))
        if corner & 1:
            rows.reverse()
        if corner & 2:
            columns.reverse()
        inside = [(row, column) for column in columns for row in rows][:area]
        expected = torch.zeros(height, width, dtype=torch.bool)
        expected[tuple(zip(*inside, strict=True))] = True
        assert torch.equal(target.is_masked[0], expected)
        in_target |= expected
    scale_word, top_word, left_word = words(8, 0, 3)
    root = math.sqrt(0.85 + ((scale_word >> 24) + 0.5) * 0.15 / 256)
    h, w = round(height * root), round(width * root)
    top, left = top_word * (height - h + 1) >> 32, left_word * (width - w + 1) >> 32
    outside = torch.ones(height, width, dtype=torch.long)
    outside[top : top + h, left : left + w] = 0
    free = (~in_target).flatten().nonzero().squeeze(1).tolist()
    order = words(9, 0, height * width)
    kept = sorted(free, key=lambda t: (int(outside.flatten()[t]), order[t], t))[: 72 - 4 * area]
    assert blocks.context.visible_ids.tolist() == [sorted(kept)]


def test_marginals_are_symmetric():
    """The published masks are not symmetric: they never use the last row and column."""
    drawn = 6000
    blocks = masking.multiblock(masking.key(range(drawn), seed=0), (8, 8))
    shares = [blocks.context.is_masked, *(target.is_masked for target in blocks.targets)]
    for share in (mask.double().mean(dim=0) for mask in shares):
        for flipped in (share.flip(0), share.flip(1)):
            bound = 5 * (2 * share * (1 - share) / drawn).sqrt() + 1 / drawn
            assert ((share - flipped).abs() < bound).all()


def test_aspect_ratios_and_positions_are_independent_within_and_between_targets():
    drawn = 4000
    blocks = masking.multiblock(masking.key(range(drawn), seed=0), (14, 14))
    columns = []
    for target in blocks.targets[:2]:
        rows = target.is_masked.any(dim=2)
        height = rows.sum(dim=1).double()
        # Position relative to the range that this height allows.
        columns += [height, rows.double().argmax(dim=1) / (14 - height).clamp(min=1)]
    correlation = torch.corrcoef(torch.stack(columns))
    assert (correlation - torch.eye(4)).abs().max() < 5 / math.sqrt(drawn)
    assert len(set(columns[0].tolist())) > 1


def test_context_tokens_come_from_the_context_block_first():
    """A context that fits into its block lies inside of it."""
    blocks = masking.multiblock(
        masking.key(range(200), seed=0), (12, 12), context_scale=(0.5, 0.5), num_context=10,
        num_targets=1,
    )  # fmt: skip
    for seen in ~blocks.context.is_masked:
        rows, columns = seen.nonzero().unbind(1)
        assert rows.max() - rows.min() < 9
        assert columns.max() - columns.min() < 9


def test_blocks_are_a_pytree_of_masks():
    blocks = masking.multiblock(masking.key([0, 1], seed=0), (8, 8))
    leaves, spec = pytree.tree_flatten(blocks)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, MultiBlock)
    assert len(leaves) == 10
    assert again.context.equal(blocks.context)


@pytest.mark.untyped
@pytest.mark.full
def test_blocks_are_drawn_inside_a_compiled_graph():
    draw = torch.compile(
        lambda key: masking.multiblock(key, (8, 8)), fullgraph=True, backend="aot_eager"
    )
    key = masking.key([3, 1 << 40], seed=-5)
    assert draw(key).context.equal(masking.multiblock(key, (8, 8)).context)


KEY = masking.key([0, 1], seed=0)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ((2, 2), {}, "4 targets of 1 of 4 tokens may leave only 0"),
        ((14, 14), {"target_ratio": 0.3}, "pass fewer or smaller targets"),
        ((14, 14), {"num_context": 61}, "only 60 for the context, which needs 61"),
        ((14, 14), {"num_targets": 0}, "num_targets must be at least 1.*got 0"),
        ((14, 14), {"aspect": (2.0, 1.0)}, r"\(2.0, 1.0\)"),
        ((14, 14), {"context_scale": (0.5, 1.5)}, r"\(0.5, 1.5\)"),
        ((300, 300), {}, "65536"),
    ],
)
def test_errors_repeat_what_was_passed(grid, options, message):
    with pytest.raises(ValueError, match=message):
        masking.multiblock(KEY, grid, **options)
