"""Grids and sizes: helpers for integers per axis, shared by all rooms."""

import math
import operator
from collections.abc import Sequence
from typing import Any

Grid = tuple[int, ...]
MAX_AXES = 3
MAX_SIZE = (1 << 31) - 1
# Rows that a class token adds to a table of relative positions: class to patch, patch to class,
# class to class.
NUM_CLASS_ROWS = 3


def as_sizes(name: str, value: int | Sequence[int]) -> Grid:
    """Check that `value` is one to three positive integers, and return them as a tuple.

    Args:
        name: Name of the argument, for the error message.
        value: One integer (one axis) or one integer per axis.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If there are no axes or more than three, or a size is below 1.

    Example:
        >>> as_sizes("grid", [14, 14])
        (14, 14)
    """
    try:
        sizes = tuple(map(operator.index, value if isinstance(value, Sequence) else (value,)))
    except TypeError:
        raise TypeError(f"{name} must be integers, one per axis; got {value!r}") from None
    if not 1 <= len(sizes) <= MAX_AXES or min(sizes) < 1:
        raise ValueError(f"{name} must be one to three positive integers; got {value!r}")
    if max(sizes) > MAX_SIZE:
        raise ValueError(f"{name} must be at most {MAX_SIZE} on each axis; got {value!r}")
    return sizes


def sides_of(name: str, value: int | Sequence[int]) -> Grid:
    """Return the size per axis of an image or a patch; an integer is the side of a square.

    Example:
        >>> sides_of("image_size", 224), sides_of("image_size", (16000,))
        ((224, 224), (16000,))
    """
    sizes = as_sizes(name, value)
    return sizes if isinstance(value, Sequence) else sizes * 2


def per_axis(name: str, value: int | Sequence[int], num_axes: int) -> Grid:
    """Repeat an integer for each of `num_axes` axes, or check that a sequence has one per axis.

    Raises:
        ValueError: A sequence of the wrong length, or a size below 1.

    Example:
        >>> per_axis("patch_size", 16, 2), per_axis("patch_size", (2, 16, 16), 3)
        ((16, 16), (2, 16, 16))
    """
    sizes = as_sizes(name, value)
    if not isinstance(value, Sequence):
        sizes = sizes * num_axes
    if len(sizes) != num_axes:
        raise ValueError(f"{name}={value!r} has {len(sizes)} axes, but {num_axes} are needed")
    return sizes


def divide(name: str, sizes: Sequence[int], by: int | Sequence[int], by_name: str) -> Grid:
    """Divide sizes axis by axis, without remainder.

    Raises:
        ValueError: An axis that is not divisible; the message names the nearest sizes that are.

    Example:
        >>> divide("image size", (224, 192), 16, "patch size")
        (14, 12)
    """
    divisors = per_axis(by_name, by, len(sizes))
    if any(size % d for size, d in zip(sizes, divisors, strict=True)):
        below = tuple(max(size // d, 1) * d for size, d in zip(sizes, divisors, strict=True))
        above = tuple(-(-size // d) * d for size, d in zip(sizes, divisors, strict=True))
        raise ValueError(
            f"{name} {tuple(sizes)} is not divisible by {by_name} {divisors}; "
            f"{below} or {above} would fit"
        )
    return tuple(size // d for size, d in zip(sizes, divisors, strict=True))


def as_integer(name: str, value: Any) -> int:
    """Check that `value` is an integer (numpy's included), and return a Python integer.

    Raises:
        TypeError: Anything else, booleans included.

    Example:
        >>> as_integer("num_masked", 3)
        3
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # checked first: a symbolic integer of a traced graph stays symbolic
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    return operator.index(value)


def reach_of(radius: Sequence[int], cell: Sequence[int]) -> int:
    """Return how many cells away a filter reads: its radius in cells, rounded up.

    Example:
        >>> reach_of((2, 2), (4, 4)), reach_of((3, 3), (2, 2))
        (1, 2)
    """
    return max(-(-r // size) for r, size in zip(radius, cell, strict=True))


def count_tokens(grid: Sequence[int]) -> int:
    """Return the number of positions of a grid."""
    return math.prod(grid)
