"""Sine-cosine position embeddings, and interpolation of position tables."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit.patches import interpolate_positions, sincos_positions
from tests.golden_files import golden
from tests.strategies import generators, grids

GOLDEN = golden("sincos")
SQUARES = [(64, 6), (32, 4), (48, 8)]
FIRST_AXIS = {"mae": "column", "cae": "row"}


@pytest.mark.parametrize("method", FIRST_AXIS)
@pytest.mark.parametrize(("dim", "side"), SQUARES)
def test_tables_match_the_authors_on_square_grids(method, dim, side):
    theirs = GOLDEN.tensor(f"{method}/dim{dim}_grid{side}")
    ours = sincos_positions(dim, (side, side), first_axis=FIRST_AXIS[method])
    assert ours.dtype == torch.float32
    # MAE's are float64, CAE's computed in float32.
    tolerance = 6e-8 if method == "mae" else 2e-6
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance)


def test_the_two_orders_differ():
    assert not torch.equal(
        sincos_positions(8, (3, 4)), sincos_positions(8, (3, 4), first_axis="row")
    )


def test_the_authors_table_of_a_rectangle_is_transposed():
    """CAE's construction for height 3 and width 5 lays the tokens out as on a (5, 3) grid."""
    theirs = GOLDEN.tensor("cae/dim16_h3_w5_nonsquare")
    transposed = sincos_positions(16, (5, 3), first_axis="row")
    torch.testing.assert_close(transposed, theirs, rtol=0, atol=2e-6)
    assert not torch.allclose(sincos_positions(16, (3, 5), first_axis="row"), theirs, atol=0.1)


@given(
    grid=grids(max_tokens=60),
    waves=st.integers(1, 4),
    first_axis=st.sampled_from(["column", "row"]),
    temperature=st.sampled_from([10000.0, 100.0]),
)
def test_every_axis_has_its_own_sines_and_cosines_on_every_grid(
    grid, waves, first_axis, temperature
):
    axes = len(grid)
    table = sincos_positions(
        2 * axes * waves, grid, temperature=temperature, first_axis=first_axis
    ).numpy()
    for row, place in enumerate(np.ndindex(*grid)):
        coordinates = place[::-1] if first_axis == "column" else place
        expected = [
            wave(coordinate * temperature ** (-k / waves))
            for coordinate in coordinates
            for wave in (math.sin, math.cos)
            for k in range(waves)
        ]
        np.testing.assert_allclose(table[row], expected, rtol=0, atol=1e-7)


def test_no_two_positions_share_an_embedding():
    table = sincos_positions(32, (14, 9))
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


def test_rows_of_prefix_tokens_are_zero():
    table = sincos_positions(8, (2, 3), num_prefix=2)
    assert (table[:2] == 0).all()
    assert torch.equal(table[2:], sincos_positions(8, (2, 3)))


def test_interpolation_matches_the_authors():
    table, theirs = GOLDEN.tensor("interp/in")[0], GOLDEN.tensor("interp/out_6x6")[0]
    ours = interpolate_positions(table, (4, 4), (6, 6), num_prefix=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@given(
    old=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    new=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    generator=generators(),
)
def test_rectangles_are_resampled_bicubically(old, new, generator):
    table = torch.randn(math.prod(old), 3, generator=generator)
    image = table.T.reshape(1, 3, *old)
    expected = torch.nn.functional.interpolate(image, size=new, mode="bicubic", align_corners=False)
    ours = interpolate_positions(table, old, new)
    torch.testing.assert_close(ours, expected.flatten(2)[0].T, rtol=1e-4, atol=1e-5)


@given(
    old=grids(max_tokens=40),
    num_prefix=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    generator=generators(),
    data=st.data(),
)
def test_prefix_rows_and_dtype_are_kept(old, num_prefix, dtype, generator, data):
    new = data.draw(st.tuples(*[st.integers(1, 5)] * len(old)))
    table = torch.randn(num_prefix + math.prod(old), 3, generator=generator).to(dtype)
    resampled = interpolate_positions(table, old, new, num_prefix=num_prefix)
    assert resampled.shape == (num_prefix + math.prod(new), 3)
    assert resampled.dtype == dtype
    assert torch.equal(resampled[:num_prefix], table[:num_prefix])
    without = interpolate_positions(table[num_prefix:], old, new)
    assert torch.equal(resampled[num_prefix:], without)


@given(grid=grids(max_tokens=60), generator=generators())
def test_the_same_grid_returns_a_copy(grid, generator):
    table = torch.randn(1 + math.prod(grid), 3, generator=generator)
    same = interpolate_positions(table, grid, grid, num_prefix=1)
    assert torch.equal(same, table)
    assert same.data_ptr() != table.data_ptr()


@given(grid=grids(max_tokens=30), data=st.data())
def test_a_constant_table_stays_constant(grid, data):
    new = data.draw(st.tuples(*[st.integers(1, 6)] * len(grid)))
    resampled = interpolate_positions(torch.full((math.prod(grid), 2), 3.0), grid, new)
    torch.testing.assert_close(resampled, torch.full((math.prod(new), 2), 3.0))


def test_every_axis_of_a_volume_is_resampled_independently():
    line = torch.randn(4, 1)
    volume = line.view(1, 4, 1).expand(3, 4, 2).reshape(24, 1)
    resampled = interpolate_positions(volume, (3, 4, 2), (5, 6, 1)).view(5, 6, 1)
    expected = interpolate_positions(line, (4,), (6,)).view(1, 6, 1).expand(5, 6, 1)
    torch.testing.assert_close(resampled, expected)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sincos_positions(6, (2, 2)), r"multiple of 4 on grid \(2, 2\); got 6"),
        (lambda: sincos_positions(0, (2,)), "got 0"),
        (lambda: sincos_positions(8, (2, 0)), r"\(2, 0\)"),
        (lambda: sincos_positions(8, (2, 2), first_axis="depth"), "'depth'"),
        (lambda: interpolate_positions(torch.zeros(4, 2), (2, 2), (4,)), r"\(2, 2\) and \(4,\)"),
        (lambda: interpolate_positions(torch.zeros(4, 2), (2, 3), (3, 3)), r"\[6, dim\].*\(4, 2\)"),
        (
            lambda: interpolate_positions(torch.zeros(6, 2), (2, 3), (3, 3), num_prefix=1),
            r"\[7, dim\].* 1 prefix.*\(6, 2\)",
        ),
        (lambda: interpolate_positions(torch.zeros(1, 4, 2), (2, 2), (3, 3)), r"\(1, 4, 2\)"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
