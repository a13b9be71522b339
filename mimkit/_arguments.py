"""`checked`: compare the arguments of a public function or class with its annotations.

The error names the argument, repeats it and says what would fit. Types, shapes, dtypes, devices and
numbers are checked, but no value of a tensor, so nothing synchronises a GPU. Nothing is checked
while `torch.compile` traces.
"""

import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import AbstractArray
from torch import Tensor, nn

from mimkit._settings import settings

F = TypeVar("F", bound=Callable[..., Any])

_KINDS = {"Float": "floats", "Int": "integers", "Integer": "integers", "Bool": "boolean"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ABOUT_TYPES = re.compile(
    "dtype|scalar type|Input type|same device|different device|expected device"
)
_MASK_SIZES = {"batch": "batch_size", "visible": "num_visible", "masked": "num_masked"}
# Axes that hold the values of one sample, token or row: results would be NaN, or without sense.
_NEVER_EMPTY = {"channels", "classes", "columns", "dim", "patch", "height", "width"}
_NEVER_EMPTY |= {"*grid", "*spatial"}
_CONTAINERS = ("Mask", "RaggedMask", "Key")
_SOURCES = {
    "Mask": ", from a sampler or Mask.from_bool",
    "Key": ", such as masking.key(ids, seed=0)",
}


# Numbers that PyTorch computes with. A Fraction or a Decimal is none of them.
_INTEGERS = (numbers.Integral, torch.SymInt)
_NUMBERS = (*_INTEGERS, float, np.floating, torch.SymFloat)


@dataclass(frozen=True)
class Range:
    """Range of a number, in an `Annotated` type."""

    low: int | float
    high: int | float
    fits: str


_MOST = 1 << 24
Size = Annotated[int, Range(1, _MOST, f"at least 1 and at most {_MOST}")]
Count = Annotated[int, Range(0, _MOST, f"at least 0 and at most {_MOST}")]
Depth = Annotated[int, Range(0, 1000, "at least 0 and at most 1000")]
Seed = Annotated[int, Range(-(1 << 63), (1 << 64) - 1, "of at most 64 bits")]
Positive = Annotated[float, Range(5e-324, math.inf, "above 0")]
Ratio = Annotated[float, Range(5e-324, 1024, "above 0 and at most 1024")]
NotNegative = Annotated[float, Range(0, math.inf, "of 0 or more")]
Share = Annotated[float, Range(0, 1, "in [0, 1]")]
DropRate = Annotated[float, Range(0, math.nextafter(1, 0), "in [0, 1)")]
Scales = Sequence[Annotated[float, Range(1e-30, 1e30, "from 1e-30 to 1e30")]]


def describe(value: object) -> str:
    """Describe an argument in a few words, for an error message.

    Example:
        >>> describe(torch.zeros(2, 3)), describe("a word")
        ('a tensor of torch.float32 and shape (2, 3)', "str 'a word'")
    """
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    return f"{type(value).__name__} {' '.join(repr(value).split()):.60}"


def uses_autocast(x: Tensor) -> bool:
    """Whether autocast converts this tensor in a convolution or a linear layer."""
    device = x.device.type
    return x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def checked(function: F) -> F:
    """Check every call of a function, or of the constructor of a class, before it is made.

    Tensors of one call must be on one device, and an axis must have one size wherever its name
    stands. "batch", "visible" and "masked" are also sizes of a mask. A module tells the sizes that
    it takes in `axis_sizes`. Only axes that count samples, tokens or rows may be empty.
    Docstrings of checked functions do not repeat these errors: their "Raises" says what is refused
    beyond them (docs/api/mimkit.md).

    Raises:
        TypeError: In a call: an argument has a wrong type or dtype.
        ValueError: In a call: an argument has a wrong shape or device, or is out of range.

    Example:
        >>> @checked
        ... def grow(by: Positive) -> float:
        ...     return 1 + by
        >>> grow(float("nan"))
        Traceback (most recent call last):
        ValueError: by must be a finite number above 0; got nan
    """
    if inspect.isclass(function):
        setattr(function, "__init__", checked(function.__init__))  # noqa: B010
        return function
    parameters = inspect.signature(function).parameters
    positional = [name for name, parameter in parameters.items() if parameter.kind in _POSITIONAL]
    if list(parameters) in ([], ["self"], ["cls"]):
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        module = args[0] if args and isinstance(args[0], nn.Module) else None
        given = dict(zip(positional, args, strict=False)) | kwargs
        _check(_rules_of(function), given, module)
        try:
            return function(*args, **kwargs)
        except (RuntimeError, _WeightsError) as error:
            if module is not None and _is_about_types(error):
                _explain(given, module, error)
            raise

    return call  # type: ignore[return-value]


def _check(
    rules: "Mapping[str, _Rule]", arguments: Mapping[str, Any], module: nn.Module | None
) -> None:
    sizes: dict[str, int] = {} if module is None else dict(getattr(module, "axis_sizes", ()))
    place: torch.device | None = None
    first = ""
    for name, rule in rules.items():
        if name not in arguments:
            continue
        value = arguments[name]
        axes = rule.check(name, value)
        if rule.has_device:
            device = getattr(value, "device", None) or _device_of_parts(name, value)
            if place is None:
                place, first = device, name
            elif device is not None and device != place:
                raise ValueError(
                    f"{name} is on {device}, but {first} is on {place}; they must be on one "
                    f"device; got {sorted((str(place), str(device)))}"
                )
        for axis, size in axes:
            if size != sizes.setdefault(axis, size) and axis:
                raise _other_size(rules, arguments, module, name, axis)


def _device_of_parts(name: str, value: Any) -> torch.device | None:
    parts = value if isinstance(value, list | tuple) else ()
    devices = {part.device: str(part.device) for part in parts if hasattr(part, "device")}
    if len(devices) > 1:
        raise ValueError(f"{name} must be on one device; got {sorted(devices.values())}")
    return next(iter(devices), None)


def _other_size(
    rules: "Mapping[str, _Rule]",
    arguments: Mapping[str, Any],
    module: nn.Module | None,
    name: str,
    axis: str,
) -> ValueError:
    """Return the error for an axis that has another size in the module or in an argument before."""
    given = {n: rules[n].check(n, arguments[n]) for n in rules if n in arguments}
    sizes = {"module": getattr(module, "axis_sizes", {})} | {n: dict(given[n]) for n in given}
    other = next(n for n in sizes if axis in sizes[n])
    expected, size = sizes[other][axis], sizes[name][axis]
    value, owner = arguments[name], arguments.get(other)
    if axis == "batch":
        return ValueError(
            f"{_with_shape(name, value)} and {_with_shape(other, owner)} must have one batch size: "
            f"the {other} has {expected} samples, but {name} has {size}"
        )
    like = f"this {type(module).__name__}" if other == "module" else _with_shape(other, owner)
    got = tuple(value.shape) if isinstance(value, Tensor) else size
    return ValueError(f"{name} must have {axis} = {expected}, as {like}; got {got}")


def _with_shape(name: str, value: Any) -> str:
    return f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name


class _WeightsError(TypeError):
    """An inner module has explained an error: an outer one may find its own argument."""


def _is_about_types(error: Exception) -> bool:
    """Whether PyTorch complains of tensors of two dtypes or devices: not of memory, not of others.

    Subclasses of `RuntimeError` (out of memory, distributed errors) have other reasons.
    """
    return type(error) in (RuntimeError, _WeightsError) and bool(_ABOUT_TYPES.search(str(error)))


def _explain(arguments: Mapping[str, Any], module: nn.Module, error: Exception) -> None:
    """Name the argument whose dtype or device is not that of the weights of a module.

    Only after an error: before, the weights may be elsewhere, or in pieces, as with FSDP. Under
    autocast other dtypes are usual, so they explain nothing.

    Raises:
        TypeError: There is such an argument.
    """
    weight = next(module.parameters(), None)
    for name, value in arguments.items():
        if weight is None or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        differs = value.dtype != weight.dtype and not uses_autocast(value)
        if differs or value.device != weight.device:
            cause = error.__cause__ or error
            raise _WeightsError(
                f"{name} is {value.dtype} on {value.device}, but the weights of this "
                f"{type(module).__name__} are {weight.dtype} on {weight.device}: {cause}"
            ) from cause


@cache
def _rules_of(function: Callable[..., Any]) -> "dict[str, _Rule]":
    """Return the rules of the annotated parameters, those of masks and keys first."""
    written = {
        name: parameter.annotation
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and parameter.annotation is not inspect.Parameter.empty
    }
    # A class of the parameters alone: names in the result's annotation need not exist at run time.
    parameters = type("Parameters", (), {"__annotations__": written})
    scope = inspect.unwrap(function).__globals__
    hints = get_type_hints(parameters, globalns=scope, include_extras=True)
    rules = {name: rule for name, hint in hints.items() if not (rule := _Rule(hint)).fits_all}
    named = {"batch", *(axis for rule in rules.values() for _, axes in rule.forms for axis in axes)}
    for rule in rules.values():
        if any(member.__name__ == "Mask" for member in rule.plain):
            rule.sizes = [(axis, size) for axis, size in _MASK_SIZES.items() if axis in named]
    return dict(sorted(rules.items(), key=lambda item: not item[1].takes_container))


class _Rule:
    """What the annotation of one argument allows."""

    def __init__(self, annotation: Any) -> None:
        members = list(_members(annotation))
        self.arrays = [m for m in members if _is_array(m)]
        self.others = [m for m in members if not _is_array(m)]
        self.forms = [(a.dtypes, tuple(a.dim_str.split())) for a in self.arrays]
        if torch.device in self.others:
            self.others.remove(str)  # any text is not a device
        classes = [m for m in self.others if inspect.isclass(m)]
        self.takes_container = any(m.__name__ in _CONTAINERS for m in classes)
        elements = [element for member in members for element in _elements(member)]
        self.has_device = self.takes_container or any(
            _is_array(m) or getattr(m, "__name__", "") in _CONTAINERS for m in members + elements
        )
        self.sizes = [("batch", "batch_size")]
        # What needs no further look: axes by dtype and number of axes, and types.
        self.axes: dict[tuple[torch.dtype, int], tuple[str, ...]] = {}
        self.plain = {m for m in classes if m is not float and get_origin(m) is None}
        self.tests = [_test_of(member) for member in self.others if _is_known(member)]
        self.fits_all = any(not _is_known(member) for member in self.others)

    def check(self, name: str, value: Any) -> Iterable[tuple[str, int]]:
        """Check one argument; return the sizes of its named axes."""
        if isinstance(value, Tensor) and self.forms:
            if not _is_dense(value):
                layout = "nested" if value.is_nested else str(value.layout)[6:]
                raise TypeError(f"{name} must be a dense tensor; got a tensor of layout {layout}")
            shape = value.shape
            kind = value.dtype, len(shape)
            if kind not in self.axes or 0 in shape:
                self.axes[kind] = self._find_axes(name, value)
            return zip(self.axes[kind], shape, strict=False)
        if type(value) in self.plain and not (settings.check and self.takes_container):
            return self._sizes_of(value) if self.takes_container else ()
        if not any(test(value) for test in self.tests):
            wrong = any(_test_of(member, loosely=True)(value) for member in self.others)
            wrong = wrong or (isinstance(value, str) and any(map(_is_literal, self.others)))
            shown = describe(value) if self.has_device else f"{value!r:.80}"
            if isinstance(value, Tensor):
                shown = describe(value)
            kinds = [_named(m, ranges=wrong) for m in self.others if m is not NoneType]
            if NoneType in self.others and _is_literal(self.others[0]):
                kinds[0] = ", ".join(f'"{option}"' for option in get_args(self.others[0]))
            kinds = (["a tensor"] if self.arrays else []) + kinds
            kinds += ["None"] if NoneType in self.others else []
            source = next((_SOURCES[k[2:]] for k in kinds if k[2:] in _SOURCES), "")
            if type(value).__name__ == "RaggedMask" and self.takes_container:
                source = ": this needs a Mask, of one grid and one count for all samples"
            error_type = ValueError if wrong else TypeError
            raise error_type(
                f"{name} must be {' or '.join(dict.fromkeys(kinds))}{source}; got {shown}"
            )
        if not self.takes_container:
            return ()
        if settings.check and hasattr(value, "validate"):
            try:
                value.validate()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self._sizes_of(value)

    def _sizes_of(self, container: Any) -> Iterable[tuple[str, int]]:
        batch_size = getattr(container, "batch_size", None)
        if batch_size is None or len(self.sizes) == 1:  # the usual cases, without a loop
            return () if batch_size is None else (("batch", batch_size),)
        sizes = [(axis, getattr(container, size)) for axis, size in self.sizes]
        return [pair for pair in sizes if isinstance(pair[1], int)]  # a RaggedMask has many

    def _find_axes(self, name: str, value: Tensor) -> tuple[str, ...]:
        """Check dtype and number of axes; return the names of the axes, if they are certain."""
        dtype = str(value.dtype)[6:]
        if value.is_quantized:
            raise TypeError(f"{name} must not be quantized; got {value.dtype}")
        # Nothing is computed in floats of 8 bits, which PyTorch only stores.
        is_stored = value.is_floating_point() and value.dtype.itemsize == 1
        forms = [
            axes
            for kinds, axes in self.forms
            if not isinstance(kinds, tuple) or (dtype in kinds and not is_stored)
        ]
        if not forms:
            names = [array.dtype.__name__ for array in self.arrays]
            kinds = dict.fromkeys(_KINDS.get(n, n.lower()) for n in names)
            raise TypeError(f"{name} must be {' or '.join(kinds)}; got {value.dtype}")
        fitting = [axes for axes in forms if _has_axes(value.ndim, axes)]
        if not fitting:
            wanted = " or ".join(dict.fromkeys(f"[{', '.join(axes)}]" for axes in forms))
            raise ValueError(f"{name} must be {wanted}; got {tuple(value.shape)}")
        if len(fitting) > 1:
            return ()
        aligned = _aligned(fitting[0], value.ndim)
        for axis, size in zip(aligned, value.shape, strict=True):
            if not size and axis in _NEVER_EMPTY:
                raise ValueError(
                    f"{name} must be [{', '.join(fitting[0])}] with at least one value per "
                    f"{axis.strip('*')}; got {tuple(value.shape)}"
                )
        return tuple(axis if axis[0].isalpha() else "" for axis in aligned)


def _members(annotation: Any) -> "list[Any]":
    """Return the alternatives of a union."""
    if get_origin(annotation) in (Union, UnionType):
        return [m for part in get_args(annotation) for m in _members(part)]
    return [NoneType if annotation is None else annotation]


def _elements(annotation: Any) -> "list[Any]":
    """Return the alternatives of the elements of a sequence."""
    origin = get_origin(annotation)
    is_sequence = inspect.isclass(origin) and issubclass(origin, Sequence)
    return _members(get_args(annotation)[0]) if is_sequence else []


def _is_array(annotation: Any) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, AbstractArray)


def _is_literal(annotation: Any) -> bool:
    return get_origin(annotation) is Literal


def _is_known(annotation: Any) -> bool:
    if inspect.isclass(annotation) and get_origin(annotation) is None:
        return annotation is not object
    origin = get_origin(annotation)
    if origin is Annotated or _is_literal(annotation) or origin is Callable:
        return True
    return inspect.isclass(origin) and issubclass(origin, Sequence | Mapping | Callable)


def _has_axes(ndim: int, axes: tuple[str, ...]) -> bool:
    fixed = sum(not axis.startswith(("*", "...")) for axis in axes)
    return ndim == fixed if fixed == len(axes) else ndim >= fixed


def _aligned(axes: tuple[str, ...], ndim: int) -> tuple[str, ...]:
    """Repeat the axis that stands for any number of axes, to one name per axis."""
    return tuple(
        axis
        for name in axes
        for axis in [name] * (ndim - len(axes) + 1 if name.startswith(("*", "...")) else 1)
    )


@cache
def _test_of(annotation: Any, loosely: bool = False) -> Callable[[Any], bool]:
    """Return a test for a type; `loosely` leaves ranges and the elements of sequences out."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        is_number = _test_of(arguments[0], loosely)
        low, high = arguments[1].low, arguments[1].high
        return is_number if loosely else lambda v: is_number(v) and bool(low <= v <= high)
    if origin is Literal:
        return lambda v: (
            isinstance(v, str | bool | int)
            and any(type(v) is type(option) and v == option for option in arguments)
        )
    if annotation is bool:
        return lambda v: isinstance(v, bool | np.bool_) or (isinstance(v, int) and v in (0, 1))
    if annotation is torch.device:
        return lambda v: isinstance(v, torch.device) or (isinstance(v, str) and _is_device(v))
    if annotation is int:
        return lambda v: type(v) is int or (isinstance(v, _INTEGERS) and not isinstance(v, bool))
    if annotation is float:
        return lambda v: (
            isinstance(v, _NUMBERS) and not isinstance(v, bool) and (loosely or _is_finite(v))
        )
    if _is_array(annotation) or annotation is Tensor:
        return lambda v: isinstance(v, Tensor) and _is_dense(v)
    if origin is None or not issubclass(origin, Sequence):
        return lambda v: isinstance(v, origin or annotation)
    inner = [_test_of(member, loosely) for member in _members(arguments[0])]
    # One number: the function itself says whether it takes that, or how many it needs.
    takes_one = arguments[0] in (int, float) or get_origin(arguments[0]) is Annotated

    def is_sequence(value: Any) -> bool:
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
            return takes_one and any(test(value) for test in inner)
        return all(any(test(v) for test in inner) for v in value)

    return is_sequence


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested


def _is_finite(value: Any) -> bool:
    return bool(abs(value) <= 1e30)  # any larger one overflows float32 in the next product


def _is_device(name: str) -> bool:
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def _named(annotation: Any, *, many: bool = False, ranges: bool = True) -> str:
    """Name a type in a message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    limits = f" {arguments[1].fits}" if origin is Annotated and ranges else ""
    plain = arguments[0] if origin is Annotated else annotation
    if plain is int:
        return (
            limits.strip()
            if limits and not many
            else ("integers" if many else "an integer") + limits
        )
    if plain is float:
        return ("finite numbers" if many else "a finite number") + limits
    if plain is bool:
        return "True or False"
    if origin is Literal:
        return f"one of {arguments}"
    if _is_array(plain) or plain is Tensor:
        return "tensors" if many else "a tensor"
    if origin is not None and issubclass(origin, Sequence):
        inner = " or ".join(_named(member, many=True) for member in _members(arguments[0]))
        return f"sequences of {inner}" if many else f"a sequence of {inner}"
    name = {"Callable": "function", "Mapping": "dictionary"}.get(
        getattr(origin or plain, "__name__", str(plain)), getattr(origin or plain, "__name__", "")
    )
    return f"{name}s" if many else f"a {name}"
