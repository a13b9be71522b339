"""Fields that are one of a few names."""

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_choices(config: object) -> None:
    """Check every field of a dataclass whose type is `Literal`, or that or None.

    From a command line only these names come; from Python a misspelled one would train another
    model in silence.

    Raises:
        ValueError: A field with another value.
    """
    for name, kind in get_type_hints(type(config)).items():
        choices = _choices(kind)
        value = getattr(config, name)
        if choices and value not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {value!r}")


def _choices(kind: Any) -> tuple[Any, ...]:
    """Return what a type with names in it allows; nothing for other types."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    names = tuple(n for part in parts if get_origin(part) is Literal for n in get_args(part))
    return (*names, None) if names and NoneType in parts else names
