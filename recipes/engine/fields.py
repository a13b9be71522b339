"""Ranges of configuration fields. The type of a field contains its range.

    depth: Depth = 12
    mask_ratio: OpenFraction = 0.75

A configuration calls `check_fields(self)` in its `__post_init__`. The command line checks its
options in the same way.
"""

import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


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
PositiveInt = Annotated[int, Within(1, _MOST, "1 or more, and at most 1,000,000,000")]
NonNegativeInt = Annotated[int, Within(0, _MOST, "0 or more, and at most 1,000,000,000")]
Seed = Annotated[int, Within(0, 2**63 - 1, "0 or more, and less than 2**63")]
Pixels = Annotated[int, Within(1, 2**24)]
Width = Annotated[int, Within(1, 2**17)]
Depth = Annotated[int, Within(0, 1_000)]
Seconds = Annotated[float, Within(1, 604_800, "1 to 604,800 seconds, which is a week")]
Workers = Annotated[int, Within(0, 1_024)]
PositiveFloat = Annotated[float, Within(0, math.inf, "a positive number", is_open=True)]
NonNegativeFloat = Annotated[float, Within(0, 1e300, "0 or a positive number")]
Fraction = Annotated[float, Within(0, 1, "a fraction from 0 to 1")]
OpenFraction = Annotated[float, Within(0, 1, "a fraction between 0 and 1", is_open=True)]


class FieldError(ValueError):
    """A configuration field has a value that does not fit.

    Args:
        name: Name of the field.
        value: Its value.
        fits: Description of what would fit.
        fault: "too small", "too large" or "out of range".
    """

    def __init__(self, name: str, value: object, fits: str, fault: str = "out of range") -> None:
        super().__init__(f"{name} must be {fits}; got {shown(value)}")
        self.fits = fits
        self.fault = fault
        self.flag = f"--{name.replace('_', '-')} {shown(value)}"


def check_fields(config: Any) -> None:
    """Check the values of a dataclass against the types of its fields.

    Ranges, `Literal`, numbers, strings, booleans, tuples and unions of these are checked; other
    types are not. The command line rejects a misspelled name itself. From Python, an unchecked one
    would silently train another model.

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
        recipes.engine.fields.FieldError: depth must be 0 to 1,000; got -3
        >>> check_fields(Config(decoder="none"))
        Traceback (most recent call last):
        recipes.engine.fields.FieldError: decoder must be one of ('self', 'cross'); got 'none'
    """
    kinds = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        kinds[field.name] = _bare(kinds[field.name])
        if not _admits(kinds[field.name], value):
            kind = kinds[field.name]
            raise FieldError(field.name, value, _fits(kind, value), _fault(kind, value))


def _bare(kind: Any) -> Any:
    """Remove annotations that are not ranges, such as an option's help text."""
    is_range = any(isinstance(part, Within) for part in get_args(kind)[1:])
    return get_args(kind)[0] if get_origin(kind) is Annotated and not is_range else kind


def _admits(kind: Any, value: object) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        ranges = (part for part in parts[1:] if isinstance(part, Within))
        return _admits(parts[0], value) and all(value in each for each in ranges)  # type: ignore[operator]
    if origin in (Union, UnionType):
        return any(_admits(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(_admits, parts, value))
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (str, bool, NoneType) else True


def _fits(kind: Any, value: object) -> str:
    """Describe what a type allows instead of a value."""
    choices = tuple(_choices(kind))
    if choices:
        return f"one of {choices}"
    described = list(dict.fromkeys(_describe(kind, value)))
    return " or ".join(described) or "of another type"


def _fault(kind: Any, value: object) -> str:
    """Return "too small", "too large" or "out of range"."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    ranges = [r for part in parts for r in get_args(part) if isinstance(r, Within)]
    if ranges and isinstance(value, int | float) and not ranges[0].is_open:
        if value < ranges[0].low:
            return "too small"
        if value > ranges[0].high:
            return "too large"
    return "out of range"


def _choices(kind: Any) -> Iterator[object]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in (Union, UnionType) and any(map(_is_literal, get_args(kind))):
        for part in get_args(kind):
            yield from [None] if part is NoneType else _choices(part)


def _is_literal(kind: Any) -> bool:
    return get_origin(kind) is Literal


def _describe(kind: Any, value: object) -> Iterator[str]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        is_fraction = parts[0] is int and is_number and not _admits(int, value)
        if not is_number or is_fraction:
            yield from _describe(parts[0], value)
        else:
            yield from (part.describe() for part in parts[1:] if isinstance(part, Within))
    elif origin in (Union, UnionType):
        is_plain = not isinstance(value, tuple)
        tuples = [part for part in parts if get_origin(part) is tuple]
        others = [part for part in parts if part not in tuples and part is not NoneType]
        for part in others if is_plain and others else tuples or others:
            yield from _describe(part, value)
    elif origin is tuple:
        inner = parts[0] if isinstance(value, tuple) and value else None
        wrong = [v for v in value if not _admits(inner, v)] if isinstance(value, tuple) else []
        each = " or ".join(_describe(inner, wrong[0])) if wrong else "fitting"
        count = "values" if parts[-1] is Ellipsis else f"{len(parts)} values"
        yield f"a tuple of {count}, each {each}" if wrong else f"a tuple of {count}"
    elif kind in _PLAIN:
        yield _PLAIN[kind]


def shown(value: object) -> str:
    """Return the representation of a value, shortened to 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
