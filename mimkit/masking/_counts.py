"""From a masking ratio to a number of masked tokens."""

import math
import numbers
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, get_args

from mimkit._arguments import checked
from mimkit._grids import as_integer

Rounding = Literal["nearest", "mae", "simmim"]


@checked
def num_masked(num_tokens: int, ratio: float | Fraction, *, rounding: Rounding = "nearest") -> int:
    """Return the number of tokens that `ratio` masks.

    In a graph compiled with `fullgraph=True` the ratio must be a constant; a count may vary.

    Args:
        num_tokens: Tokens per sample, prefix tokens excluded.
        ratio: Fraction of tokens to mask, in [0, 1].
        rounding: "nearest" rounds the exact decimal that was typed, halves up, and leaves at least
            one token visible and one masked. "mae" and "simmim" are the authors' float expressions,
            which may leave no token visible (`num_masked(10, 0.9, rounding="mae")` is 10).

    Returns:
        The number of masked tokens.

    Raises:
        TypeError: If the ratio is not a number.
        ValueError: If the ratio is outside [0, 1], the rule is unknown, or there is a single token
            under "nearest".

    Source:
        "mae": facebookresearch/mae `int(L * (1 - ratio))` visible, by truncation. "simmim":
        microsoft/SimMIM `ceil(L * ratio)` masked. Both have float errors: of 100 tokens at ratio
        0.9, MAE keeps 9.

    Example:
        >>> num_masked(196, 0.75), num_masked(10, 0.9), num_masked(10, 0.9, rounding="mae")
        (147, 9, 10)
    """
    num_tokens = as_integer("num_tokens", num_tokens)
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1; got {num_tokens}")
    if not isinstance(ratio, numbers.Real):
        raise TypeError(f"ratio must be a number; got {ratio!r}")
    if not 0 <= ratio <= 1:  # also catches nan
        raise ValueError(f"ratio must be a fraction in [0, 1]; got {ratio}")
    match rounding:
        case "mae":
            return num_tokens - int(num_tokens * (1 - float(ratio)))
        case "simmim":
            return math.ceil(num_tokens * float(ratio))
        case "nearest":
            if num_tokens < 2:
                raise ValueError("one token cannot be both visible and masked; pass num_masked=")
            # str() gives the decimal that was typed, not the nearest binary float.
            nearest = math.floor(num_tokens * Fraction(str(ratio)) + Fraction(1, 2))
            return min(max(nearest, 1), num_tokens - 1)
    raise ValueError(f"rounding must be one of {get_args(Rounding)}; got {rounding!r}")


# The same as `torch.compiler.assume_constant_result`, which would import dynamo and triton. Dynamo
# cannot trace `Fraction`; with a constant ratio it need not.
num_masked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def resolve_count(
    num_tokens: int, ratio: float | Fraction | None, count: int | None, rounding: Rounding
) -> int:
    """Return the number of masked tokens from exactly one of a ratio and a count.

    Raises:
        TypeError: If the count is not an integer.
        ValueError: If both or neither are given, or the count is outside [0, num_tokens].
    """
    if (ratio is None) == (count is None):
        raise ValueError(
            f"pass exactly one of ratio and num_masked; got ratio={ratio}, num_masked={count}"
        )
    if count is None:
        assert ratio is not None
        return num_masked(num_tokens, ratio, rounding=rounding)
    count = as_integer("num_masked", count)
    if not 0 <= count <= num_tokens:
        raise ValueError(f"num_masked must be in [0, {num_tokens}]; got {count}")
    return count


# Largest ratio of sides or areas: a grid has at most this many tokens.
_LARGEST = 1 << 16


def check_interval(name: str, value: tuple[float, float], *, highest: int = _LARGEST) -> None:
    """Check the bounds of an aspect ratio or, with `highest=1`, of a fraction of the grid.

    Raises:
        ValueError: If it is not two numbers, or they are out of order or out of range.
    """
    is_pair = isinstance(value, Sequence) and len(value) == 2
    if not is_pair or not 1 / _LARGEST <= value[0] <= value[1] <= highest:
        raise ValueError(
            f"{name} must be two numbers from 1/{_LARGEST} to {highest}, smallest first; "
            f"got {value!r}"
        )
