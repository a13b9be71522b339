"""`checked`: the arguments of public functions and classes are checked against their annotations.

A `TypeError` or `ValueError` names the argument, repeats it, and says what would fit. Only types,
shapes, dtypes and devices are read: no value of a tensor, so nothing synchronises a GPU. Nothing is
checked while `torch.compile` traces.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from jaxtyping import AbstractArray
from torch import Tensor

from mimkit._settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = {"Float": "floats", "Int": "integers", "Integer": "integers", "Bool": "boolean"}
_HOW_TO_MAKE = {
    "Mask": ", from a sampler or Mask.from_bool",
    "Key": ", such as masking.key(ids, seed=0)",
}


@dataclass(frozen=True)
class Range:
    """Range of a number, for `Annotated`; NaN and infinity are outside of every range."""

    low: float
    high: float = math.inf
    fits: str = ""

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high) and value != math.inf


_MOST = 1 << 24
Size = Annotated[int, Range(1, _MOST, f"from 1 to {_MOST}")]
Count = Annotated[int, Range(0, _MOST, f"from 0 to {_MOST}")]
Depth = Annotated[int, Range(0, 1000, "from 0 to 1000")]
Positive = Annotated[float, Range(5e-324, math.inf, "positive and finite")]
NotNegative = Annotated[float, Range(0, math.inf, "finite and not negative")]
Rate = Annotated[float, Range(0, 1, "in [0, 1]")]


def describe(value: object) -> str:
    """Describe an argument in a few words, for an error message.

    Example:
        >>> describe(torch.zeros(2, 3)), describe("a word")
        ('a tensor of torch.float32 and shape (2, 3)', "str 'a word'")
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


class _TensorRule:
    """What jaxtyping annotations of one argument allow: dtypes, and names of the axes."""

    def __init__(self, annotations: Sequence[Any]) -> None:
        self.forms = [(a.dtypes, tuple(a.dim_str.split())) for a in annotations]
        self.kinds = " or ".join(
            dict.fromkeys(_KINDS.get(a.dtype.__name__, a.dtype.__name__.lower()) for a in annotations)
        )
        self.axes = " or ".join(dict.fromkeys(f"[{', '.join(axes)}]" for _, axes in self.forms))

    def check(self, name: str, value: Tensor) -> tuple[str, ...] | None:
        """Return the names of the axes, or `None` if they are not certain."""
        dtype = str(value.dtype)[6:]
        fitting = [axes for dtypes, axes in self.forms if dtypes is _ANY or dtype in dtypes]
        if not fitting:
            raise TypeError(f"{name} must be {self.kinds}; got {value.dtype}")
        fitting = [axes for axes in fitting if _has_axes(value.ndim, axes)]
        if not fitting:
            raise ValueError(f"{name} must be {self.axes}; got {tuple(value.shape)}")
        return fitting[0] if len(fitting) == 1 else None


def _has_axes(ndim: int, axes: tuple[str, ...]) -> bool:
    fixed = sum(not axis.startswith(("*", "...")) for axis in axes)
    return ndim == fixed if fixed == len(axes) else ndim >= fixed
