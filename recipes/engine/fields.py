"""Ranges of configuration fields. The type of a field contains its range.

    depth: Depth = 12
    mask_ratio: OpenFraction = 0.75

A configuration calls `check_fields(self)` in its `__post_init__`. The command line checks its
options in the same way.
"""

import math
import numbers
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {
    int: "an integer",
    float: "a number",
    str: "a name or a path",
    bool: "true or false",
    Path: "a path",
}


@dataclass(frozen=True)
class Within:
    """Range of a number. NaN is outside of every range.

    Attributes:
        low: Least value.
        high: Largest value.
        fits: Description of the range for messages; by default "low to high".
        is_open: Whether `low` and `high` themselves are excluded.
    """

    low: float
    high: float
    fits: str = ""
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        if self.is_open:
            return bool(self.low < value < self.high)
        return bool(self.low <= value <= self.high)

    def describe(self) -> str:
        """Return the description for messages."""
        return self.fits or f"{self.low:,} to {self.high:,}"


_MOST = 10**9
_LARGEST = 1e30  # weights and losses are float32, which ends at 3e38
PositiveInt = Annotated[int, Within(1, _MOST, "1 or more, and at most 1,000,000,000")]
NonNegativeInt = Annotated[int, Within(0, _MOST, "0 or more, and at most 1,000,000,000")]
Seed = Annotated[int, Within(0, 2**63 - 1, "0 or more, and less than 2**63")]
Pixels = Annotated[int, Within(1, 2**24)]
Tokens = Annotated[int, Within(2, 65_536)]  # of an image with a mask
Width = Annotated[int, Within(1, 2**17)]
Depth = Annotated[int, Within(0, 1_000)]
Seconds = Annotated[float, Within(1, 604_800, "1 to 604,800 seconds, which is a week")]
Workers = Annotated[int, Within(0, 1_024)]
Epochs = Annotated[float, Within(0, _MOST, "0 or a positive number, and at most 1,000,000,000")]
PositiveFloat = Annotated[
    float, Within(0, _LARGEST, "a positive number, and less than 1e30", is_open=True)
]
NonNegativeFloat = Annotated[float, Within(0, _LARGEST, "0 or a positive number, and at most 1e30")]
Fraction = Annotated[float, Within(0, 1, "a fraction from 0 to 1")]
PositiveFraction = Annotated[
    float, Within(math.nextafter(0, 1), 1, "a fraction of more than 0, and at most 1")
]
Beta = Annotated[float, Within(0, math.nextafter(1, 0), "a fraction of 0 or more, and less than 1")]
OpenFraction = Annotated[float, Within(0, 1, "a fraction between 0 and 1", is_open=True)]


class FieldError(ValueError):
    """A configuration field has a value that does not fit.

    Args:
        name: Name of the field.
        value: Its value.
        fits: Description of what would fit.
        fault: "too small", "too large", "empty" or "out of range".
    """

    def __init__(self, name: str, value: object, fits: str, fault: str = "out of range") -> None:
        super().__init__(f"{name} must be {fits}; got {shown(value)}")
        self.fits = fits
        self.fault = fault
        self.flag = f"--{name.replace('_', '-')} {shown(value)}"


def check_fields(config: Any) -> None:
    """Check the values of a dataclass against the types of its fields.

    Ranges, `Literal`, numbers, strings, paths, booleans, tuples and unions of these are checked;
    other types are not. The command line rejects a misspelled name itself. From Python, an
    unchecked one would silently train another model.

    Raises:
        FieldError: If the value of a field does not fit.

    Example:
        >>> @dataclass(frozen=True)
        ... class Config:
        ...     depth: Depth = 12
        ...     decoder: Literal["self", "cross"] = "self"
        >>> check_fields(Config(depth=4))
        >>> check_fields(Config(depth=-3))
        Traceback (most recent call last):
        recipes.engine.fields.FieldError: depth must be 0 to 1,000 (an integer); got -3
        >>> check_fields(Config(decoder="none"))
        Traceback (most recent call last):
        recipes.engine.fields.FieldError: decoder must be one of ('self', 'cross'); got 'none'
    """
    kinds = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        kind, value = kinds[field.name], getattr(config, field.name)
        if not admits(kind, value):
            raise FieldError(field.name, value, describe(kind), _fault(kind, value))


def admits(kind: Any, value: object) -> bool:
    """Whether a value is of a type and within its range.

    Example:
        >>> admits(Depth | None, 3), admits(Depth | None, -3), admits(tuple[Depth, ...], (1, 2))
        (True, False, True)
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = (part for part in parts[1:] if isinstance(part, Within))
        return admits(parts[0], value) and all(value in each for each in ranges)  # type: ignore[operator]
    if origin in (Union, UnionType):
        return any(admits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(admits, parts, value))
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and value != "" and _can_name_a_file(value)
    if kind is Path:
        return isinstance(value, Path) and _can_name_a_file(str(value))
    return isinstance(value, kind) if kind in (bool, NoneType) else True


def _can_name_a_file(text: str) -> bool:
    """Whether file systems take it: no null character, and no part of more than 255 bytes."""
    parts = text.encode("utf-8", "surrogatepass").split(b"/")
    return "\0" not in text and all(len(part) <= 255 for part in parts) and len(text) < 4_096


def describe(kind: Any) -> str:
    """Describe what fits a type.

    Example:
        >>> describe(Literal["one", "two"] | None), describe(tuple[bool, bool])
        ("one of ('one', 'two')", 'a tuple of 2 values, each true or false')
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = [part.describe() for part in parts[1:] if isinstance(part, Within)]
        is_whole = parts[0] is int
        return f"{ranges[0]}{' (an integer)' * is_whole}" if ranges else describe(parts[0])
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return f"one of {parts}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple:
        count = "values" if parts[-1] is Ellipsis else f"{len(parts)} values"
        return f"a tuple of {count}, each {describe(parts[0])}"
    return _PLAIN.get(kind, "of another type")


def _fault(kind: Any, value: object) -> str:
    """Return "too small", "too large", "empty" or "out of range"."""
    ranges = _ranges(kind)
    if ranges and isinstance(value, int | float):
        if all(value < each.low for each in ranges):
            return "too small"
        if all(value > each.high for each in ranges):
            return "too large"
    return "empty" if value == "" else "out of range"


def _ranges(kind: Any) -> list[Within]:
    parts = get_args(kind)
    inner = [each for part in parts for each in _ranges(part)]
    return [part for part in parts if isinstance(part, Within)] + inner


def shown(value: object) -> str:
    """Return the representation of a value, shortened to 60 characters."""
    try:
        text = repr(str(value) if isinstance(value, Path) else value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
