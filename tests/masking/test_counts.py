"""The number of tokens that a ratio masks."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import num_masked
from tests.golden_files import golden
from tests.strategies import grids

# Strings, because the exact value is the decimal, not the binary float.
RATIOS = [f"{percent / 100:.2f}" for percent in range(0, 101, 5)] + ["0.333", "0.125", "0.9999"]


@pytest.mark.parametrize("ratio", RATIOS)
def test_nearest_is_exact_for_every_length_up_to_512(ratio):
    for length in range(2, 513):
        exact = math.floor(length * Fraction(ratio) + Fraction(1, 2))
        expected = min(max(exact, 1), length - 1)
        assert num_masked(length, float(ratio)) == expected, (length, ratio)


@pytest.mark.full
def test_nearest_is_exact_for_every_thousandth():
    for thousandths in range(1001):
        ratio = thousandths / 1000
        for length in range(2, 1025, 7):
            exact = (2 * length * thousandths + 1000) // 2000
            expected = min(max(exact, 1), length - 1)
            assert num_masked(length, ratio) == expected, (length, ratio)


@given(length=st.integers(2, 65536), ratio=st.floats(0, 1))
def test_nearest_leaves_one_visible_and_one_masked(length, ratio):
    assert 1 <= num_masked(length, ratio) <= length - 1


@given(length=st.integers(2, 512), ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_higher_ratio_never_masks_fewer(length, ratios):
    low, high = sorted(ratios)
    for rounding in ("nearest", "mae", "simmim"):
        assert num_masked(length, low, rounding=rounding) <= num_masked(
            length, high, rounding=rounding
        )


def test_the_mae_rule_equals_the_official_table():
    table = golden("mae_random_masking")["len_keep_table"]
    for length, ratio, kept in table:
        assert int(length) - num_masked(int(length), float(ratio), rounding="mae") == int(kept)


def test_the_official_table_distinguishes_the_rules():
    table = golden("mae_random_masking")["len_keep_table"]
    assert any(
        int(length) - num_masked(int(length), float(ratio)) != int(kept)
        for length, ratio, kept in table
    )


def test_the_simmim_rule_rounds_the_float_product_up():
    # 100 * 0.55 is 55.00000000000001 in floats: the authors mask 56.
    assert num_masked(100, 0.55, rounding="simmim") == 56
    for length in range(1, 513):
        for ratio in map(float, RATIOS):
            expected = int(np.ceil(length * ratio))
            assert num_masked(length, ratio, rounding="simmim") == expected


@pytest.mark.parametrize("ratio", [0.75, np.float64(0.75), Fraction(3, 4)])
def test_ratios_of_any_number_type_give_the_same_count(ratio):
    assert num_masked(10, ratio) == 8


@given(
    grid=grids(min_tokens=2),
    ratio=st.sampled_from([float(ratio) for ratio in RATIOS]),
    rounding=st.sampled_from(["nearest", "mae", "simmim"]),
)
def test_every_row_of_uniform_masks_num_masked_tokens(grid, ratio, rounding):
    mask = masking.uniform(masking.key(range(3), seed=0), grid, ratio, rounding=rounding)
    expected = num_masked(math.prod(grid), ratio, rounding=rounding)
    assert mask.is_masked.flatten(1).sum(dim=1).tolist() == [expected] * 3


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "got 0"),
        ((4, 1.5), "got 1.5"),
        ((4, -0.1), "got -0.1"),
        ((4, float("nan")), "got nan"),
        ((1, 0.5), "num_masked="),
    ],
)
def test_errors_repeat_what_was_passed(arguments, message):
    with pytest.raises(ValueError, match=message):
        num_masked(*arguments)


@pytest.mark.untyped
def test_an_unknown_rounding_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"nearest.*mae.*simmim.*'floor'"):
        num_masked(4, 0.5, rounding="floor")
