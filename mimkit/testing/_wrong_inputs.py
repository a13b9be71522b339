"""A fuzz of one function: one argument at a time is made wrong, and the function must notice."""

import dis
import inspect
import math
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mimkit._settings import use
from mimkit.masking import Key, Mask, RaggedMask

# "refusal": the call must raise. "same": it must give the result of the valid call (or of the call
# with a stand-in). "same or refusal": either. "finite": it may raise or work, without NaN. "nan
# or refusal": it may raise, or show the NaN in a result of floats. "meta or refusal": it may raise,
# or give a result on the meta device.
Wanted = Literal[
    "refusal", "same", "same or refusal", "finite", "nan or refusal", "meta or refusal"
]

_DTYPES = (torch.int64, torch.int32, torch.bool, torch.complex64, torch.float64, torch.float16)
_ROUNDING = 1e-4  # relative to the largest value; another layout may sum in another order
_SECONDS = 60  # after which a call counts as endless


@dataclass(frozen=True)
class Mutation:
    """One wrong, or merely unusual, value of an argument."""

    label: str
    make: Callable[[], Any]
    wanted: Wanted
    stand_in: Callable[[], Any] | None = None
    checks_values: bool = False  # under `mimkit.use(check=True)`


@dataclass(frozen=True)
class Fault:
    """What a function did wrong with one mutation of one argument."""

    argument: str
    label: str
    kind: Literal["inside", "unnamed", "silent", "endless"]
    text: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.label}: {self.text}"


@dataclass
class Findings:
    """Number of calls of a fuzz, the faults that it found, and the mutations that it skipped."""

    calls: int = 0
    faults: list[Fault] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)


def assert_rejects_wrong_inputs(
    function: Callable[..., Any],
    valid_arguments: Mapping[str, Any] | Sequence[Any],
    *,
    skip: Mapping[str, str] | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Check that a function refuses wrong arguments with an error that names the argument.

    The valid call must work. Then one argument at a time gets another value, also those that have
    a default: tensors of another dtype, number of axes, size, device ("meta") or memory layout,
    sparse, empty or with a NaN; numbers that are NaN, infinite, negative, zero or huge; unknown
    words, unless the annotation is `str` or a sequence of `str`, so that any text fits; masks of
    another grid or batch; values of another type. Each call must either

    - raise a `ValueError` or `TypeError` by a `raise` statement of the function's own package, with
      a message that contains the name of the argument, or
    - work. It must then give the same result where the value means the same (another layout, a list
      for a tuple), and no NaN from finite inputs. Some values must be refused: NaN and infinity as
      numbers, texts instead of numbers, a batch of another size than that of the other arguments.

    Args:
        function: A function, class, bound method or `nn.Module`. The same arguments must give the
            same result; PyTorch's random state is the same in each call.
        valid_arguments: By name, or in order. Use different sizes for different axes, and at least
            two samples.
        skip: Calls that are not made, by "argument" or "argument: mutation" (as in the message),
            with the reason of each.
        packages: Further packages whose errors count as the function's own.

    Raises:
        AssertionError: If the valid call fails, or some calls have another outcome. The message has
            one line for each of these.
        ValueError: If a reason is empty, or an entry of `skip` fits no call.

    Source:
        mimkit's own.

    Example:
        >>> from mimkit import losses, masking
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
        >>> valid = {"prediction": torch.rand(2, 3, 5), "target": torch.rand(2, 3, 5), "mask": mask}
        >>> assert_rejects_wrong_inputs(losses.masked_mse, valid)
        >>> def loss(prediction, target):
        ...     return (prediction - target).square().mean()
        >>> assert_rejects_wrong_inputs(loss, [torch.rand(2, 5), torch.rand(2, 5)])
        Traceback (most recent call last):
        AssertionError: loss: ... of ... calls with one wrong argument went wrong
        ...
    """
    findings = find_faults(function, valid_arguments, skip=skip, packages=packages)
    if findings.faults:
        raise AssertionError(
            f"{_name_of(function)}: {len(findings.faults)} of {findings.calls} calls with one "
            "wrong argument went wrong\n" + "\n".join(map(str, findings.faults))
        )


def find_faults(
    function: Callable[..., Any],
    valid_arguments: Mapping[str, Any] | Sequence[Any],
    *,
    skip: Mapping[str, str] | None = None,
    packages: Sequence[str] = (),
) -> Findings:
    """Make the calls of `assert_rejects_wrong_inputs`, and return what they did wrong."""
    reasons = dict(skip or {})
    empty = [entry for entry, reason in reasons.items() if not reason]
    if empty:
        raise ValueError(f"skip needs a reason for each entry; got none for {empty}")
    target = function.forward if isinstance(function, nn.Module) else function
    signature = inspect.signature(target)
    if isinstance(valid_arguments, Mapping):
        bound = signature.bind(**valid_arguments)
    else:
        bound = signature.bind(*valid_arguments)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    run = _Runner(function, signature, arguments, (_package_of(target), *packages))
    try:
        plain = run({})
    except Exception as error:
        raise AssertionError(f"the valid call of {_name_of(function)} fails: {error}") from error
    findings = Findings()
    for name, value in arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        others = [other for key, other in arguments.items() if key != name]
        owner = getattr(target, "__self__", None)
        others += list(owner.parameters()) if isinstance(owner, nn.Module) else []
        any_text = str in (parameter.annotation, *get_args(parameter.annotation))
        for mutation in mutations(value, others):
            if any_text and mutation.label.endswith("another text"):
                continue
            skipped = {name, f"{name}: {mutation.label}"} & set(reasons)
            findings.skipped |= skipped
            if not skipped:
                findings.calls += 1
                findings.faults += run.judge(name, mutation, plain)
    if set(reasons) - findings.skipped:
        raise ValueError(f"skip fits no call: {sorted(set(reasons) - findings.skipped)}")
    return findings


class _Runner:
    """Calls one function with some arguments replaced, and judges the outcome."""

    def __init__(
        self,
        function: Callable[..., Any],
        signature: inspect.Signature,
        arguments: Mapping[str, Any],
        packages: Sequence[str],
    ) -> None:
        self.function = function
        self.signature = signature
        self.arguments = arguments
        self.packages = packages

    def __call__(self, replaced: Mapping[str, Any]) -> list[Any]:
        bound = self.signature.bind_partial()
        for name, value in self.arguments.items():
            bound.arguments[name] = replaced[name] if name in replaced else _copied(value)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _time_limit():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return _leaves(self.function(*bound.args, **bound.kwargs))

    def judge(self, name: str, mutation: Mutation, plain: list[Any]) -> list[Fault]:
        """Make one call; return its fault, if any."""
        try:
            value = mutation.make()
        except (TypeError, ValueError):
            return []  # a hand-made mask that its own constructor refuses
        try:
            with use(check=mutation.checks_values):
                result = self({name: value})
        except Exception as error:
            fault = self._fault_of_error(name, mutation, error)
        else:
            fault = self._fault_of_result(name, mutation, result, plain)
        return [] if fault is None else [Fault(name, mutation.label, *fault)]

    def _fault_of_error(self, name: str, mutation: Mutation, error: Exception) -> Any:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if isinstance(error, _EndlessError):
            return "endless", f"did not end within {_SECONDS} s"
        where = _raised_in(error)
        if where not in self.packages or not isinstance(error, ValueError | TypeError):
            return "inside", f"error from inside {where or 'PyTorch or Python'}: {text}"
        if mutation.wanted == "same":
            return "unnamed", f"refused, but must give the same result: {text}"
        words = name.removesuffix("s").replace("_", "[_ ]") + "s?"
        if not re.search(rf"(?<![a-z0-9]){words}(?![a-z0-9])", str(error), re.IGNORECASE):
            return "unnamed", f"the message does not name {name}: {text}"
        return None

    def _fault_of_result(
        self, name: str, mutation: Mutation, result: list[Any], plain: list[Any]
    ) -> Any:
        if mutation.wanted == "refusal":
            return "silent", "worked, but must be refused"
        if mutation.wanted == "meta or refusal":
            tensors = [value for value in result if isinstance(value, Tensor)]
            is_meta = bool(tensors) and all(value.is_meta for value in tensors)
            return None if is_meta else ("silent", "gave values from an input without values")
        if mutation.wanted == "nan or refusal":
            shows = any(isinstance(v, Tensor) and v.dtype.is_floating_point for v in result)
            shows = shows or not any(isinstance(v, Tensor) for v in result)
            return None if shows else ("silent", "NaN gave integers in silence")
        if _has_nan(result) and not _has_nan(plain):
            return "silent", "gave NaN from finite inputs"
        if mutation.wanted == "finite":
            return None
        if mutation.stand_in is not None:
            try:
                plain = self({name: mutation.stand_in()})
            except Exception:
                return "silent", "worked, but the same values in the valid dtype do not"
        if not _equal(result, plain):
            return "silent", "gave another result than the same values in the valid form"
        return None


def mutations(value: Any, others: Sequence[Any]) -> Iterator[Mutation]:
    """Yield what may be passed instead of `value`, given the other arguments."""
    if value is not None:
        yield Mutation("None", lambda: None, "finite")
    if not isinstance(value, str):
        yield Mutation("a text", lambda: "a text", "refusal")
    yield Mutation("an object", object, "refusal")
    if isinstance(value, Tensor):
        yield from _of_tensor(value, others)
    elif isinstance(value, Mask | RaggedMask | Key):
        yield from _of_container(value, others)
    elif isinstance(value, bool) or value is None:
        yield Mutation("nan", lambda: math.nan, "refusal")
    elif isinstance(value, int | float):
        yield from _of_number(value)
    elif isinstance(value, str):
        yield Mutation("another text", lambda: value + " or another", "refusal")
        yield Mutation("a number", lambda: 3, "refusal")
    elif isinstance(value, list | tuple):
        yield from _of_sequence(value)


def _of_number(value: float) -> Iterator[Mutation]:
    for label, number in (("nan", math.nan), ("infinity", math.inf), ("-infinity", -math.inf)):
        yield Mutation(label, partial(_itself, number), "refusal")
    huge = 1 << 62 if isinstance(value, int) else 1e300
    for label, number in (("negative", -abs(value) - 1), ("zero", type(value)(0)), ("huge", huge)):
        yield Mutation(label, partial(_itself, number), "finite")
    yield Mutation("a bool", lambda: True, "finite")
    yield Mutation("a number as text", lambda: str(value), "refusal")
    yield Mutation("complex", lambda: complex(value), "refusal")
    yield Mutation("a list", lambda: [value], "finite")
    yield Mutation("a tensor", lambda: torch.tensor(value), "same or refusal")
    yield Mutation("numpy", lambda: np.array(value)[()], "same or refusal")
    if isinstance(value, int):
        yield Mutation("a fraction", lambda: value + 0.5, "refusal")


def _of_sequence(value: Any) -> Iterator[Mutation]:
    kind: type[Any] = list if isinstance(value, tuple) else tuple
    yield Mutation(f"a {kind.__name__}", lambda: kind(value), "same or refusal")
    yield Mutation("empty", lambda: type(value)(), "finite")
    yield Mutation("one fewer", lambda: value[:-1], "finite")
    yield Mutation("one more", lambda: value + value[-1:], "finite")
    if not value:
        return
    rest = list(value[1:])
    inner = [m for m in mutations(value[0], []) if not m.checks_values]
    for mutation in inner:
        wanted: Wanted = "refusal" if mutation.wanted == "refusal" else "finite"
        if mutation.wanted == "nan or refusal":
            wanted = mutation.wanted
        yield Mutation(
            f"[0] {mutation.label}",
            partial(_with_first, type(value), mutation.make, rest),
            wanted,
        )


def _of_tensor(value: Tensor, others: Sequence[Any]) -> Iterator[Mutation]:
    yield from _other_dtypes(value)
    yield from _other_shapes(value, others)
    yield Mutation("meta", lambda: value.to("meta"), _wanted_of_meta(others))
    if value.ndim:
        axes = tuple(reversed(range(value.ndim)))
        turned = value.permute(axes).contiguous().permute(axes)
        yield Mutation("strides in another order", lambda: turned, "same")
        yield Mutation("every other value", lambda: torch.stack([value, value], -1)[..., 0], "same")
        yield Mutation("sparse", value.to_sparse, "finite")
    yield Mutation("numpy", lambda: value.detach().numpy(), "same or refusal")
    yield Mutation("nested lists", value.tolist, "same or refusal")
    if value.is_floating_point() and value.numel():
        yield Mutation("a NaN", lambda: _with_nan(value), "nan or refusal")


def _other_dtypes(value: Tensor) -> Iterator[Mutation]:
    for dtype in _DTYPES:
        if dtype == value.dtype:
            continue
        other = value.to(dtype)
        is_lossless = torch.equal(other.to(torch.complex128), value.to(torch.complex128))
        label = str(dtype)[6:]
        if value.is_floating_point() and dtype.is_floating_point:
            yield Mutation(label, other.clone, "finite")
        elif is_lossless:
            yield Mutation(label, other.clone, "same or refusal")
        elif value.is_floating_point():
            back = other.to(value.dtype)
            yield Mutation(label, other.clone, "same or refusal", back.clone)
        else:
            yield Mutation(label, other.clone, "refusal")


def _other_shapes(value: Tensor, others: Sequence[Any]) -> Iterator[Mutation]:
    shared = value.ndim and any(_batch_of(other) == len(value) for other in others)
    same = any(isinstance(other, Tensor) and other.shape == value.shape for other in others)
    wanted: Wanted = "refusal" if shared else "finite"
    yield Mutation("one axis more in front", lambda: value.unsqueeze(0), "finite")
    yield Mutation("one axis more at the end", lambda: value.unsqueeze(-1), "finite")
    if not value.ndim:
        return
    yield Mutation("one axis fewer", lambda: value[:1].squeeze(0), "finite")
    yield Mutation("no samples", lambda: value[:0], wanted if len(value) else "same")
    yield Mutation("an empty last axis", lambda: value[..., :0], "refusal" if same else "finite")
    if len(value) > 1:
        yield Mutation("one sample", lambda: value[:1], wanted)
    for axis in range(value.ndim):
        wanted = "refusal" if same or (shared and axis == 0) else "finite"
        if not value.shape[axis]:
            continue
        more = torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)
        yield Mutation(f"axis {axis} longer", more.clone, wanted)
        if value.shape[axis] > 1:
            less = value.narrow(axis, 0, value.shape[axis] - 1)
            yield Mutation(f"axis {axis} shorter", less.clone, wanted)


def _of_container(value: Mask | RaggedMask | Key, others: Sequence[Any]) -> Iterator[Mutation]:
    shared = any(_batch_of(other) == value.batch_size for other in others)
    meta = partial(_mapped, value, lambda leaf: leaf.to("meta"))
    yield Mutation("meta", meta, _wanted_of_meta(others))
    for dtype in (torch.int32, torch.float32, torch.bool, torch.complex64):
        yield Mutation(
            f"{str(dtype)[6:]} ids",
            partial(_made, value, partial(_as_dtype, dtype)),
            "refusal",
        )
    yield Mutation("numpy ids", lambda: _made(value, lambda ids: ids.numpy()), "refusal")
    yield Mutation("ids of another rank", lambda: _made(value, lambda i: i.unsqueeze(0)), "refusal")
    yield Mutation("a dictionary", lambda: dict(vars(value)), "refusal")
    if isinstance(value, Key):
        return
    yield Mutation("booleans", lambda: value.is_masked, "refusal")
    yield Mutation(
        "ids out of range", lambda: _mapped(value, lambda ids: ids + 1000), "refusal", None, True
    )
    if isinstance(value, Mask):
        more: Wanted = "refusal" if shared else "finite"
        yield Mutation("twice the samples", lambda: Mask.cat([value, value]), more)
        yield Mutation("one sample", lambda: value[:1], more if value.batch_size > 1 else "same")
        yield Mutation("a larger grid", lambda: value.refine(2), "finite")
        yield Mutation("a RaggedMask", lambda: RaggedMask.cat([value]), "finite")


def _itself(value: Any) -> Any:
    return value


def _as_dtype(dtype: torch.dtype, ids: Tensor) -> Tensor:
    return ids.to(dtype)


def _with_first(kind: type[Any], make: Callable[[], Any], rest: list[Any]) -> Any:
    return kind([make(), *rest])


def _made(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Call the constructor with changed tensors, as a user would by hand."""
    fields = {n: change(v) if isinstance(v, Tensor) else v for n, v in vars(value).items()}
    return type(value)(**fields)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map(change, value)


def _with_nan(value: Tensor) -> Tensor:
    wrong = value.detach().clone()
    wrong.view(-1)[0] = math.nan
    return wrong


def _batch_of(value: Any) -> int | None:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return len(value) if value.ndim else None
    return value.batch_size if isinstance(value, Mask | RaggedMask | Key) else None


def _wanted_of_meta(others: Sequence[Any]) -> Wanted:
    """Return what is wanted of an input without values, beside other arguments and parameters.

    A method that does not use the parameters of its module may work, or one of PyTorch's operators
    that take both.
    """
    if not any(map(_holds_tensors, others)):
        return "finite"
    is_refused = any(_holds_tensors(o) and not isinstance(o, nn.Parameter) for o in others)
    return "refusal" if is_refused else "meta or refusal"


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def _leaves(result: Any) -> list[Any]:
    """Return the tensors and numbers in a result: of containers, modules and plain objects."""
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, nn.Module):
            leaves += [value.detach() for value in leaf.state_dict().values()]
        elif isinstance(leaf, Tensor):
            leaves.append(leaf.detach())
        elif isinstance(leaf, int | float | str):
            leaves.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            leaves += [v for v in vars(leaf).values() if isinstance(v, Tensor | int | float | str)]
    return leaves


def _has_nan(leaves: Sequence[Any]) -> bool:
    return any(
        bool(leaf.to_dense().isnan().any()) if isinstance(leaf, Tensor) else leaf != leaf
        for leaf in leaves
        if not (isinstance(leaf, Tensor) and leaf.is_meta)
    )


def _equal(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(_close, some, others))


def _close(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(one == other)
    if one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    one, other = one.to(torch.complex128), other.to(torch.complex128)
    bound = _ROUNDING * float(other.abs().nan_to_num().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=bound, equal_nan=True)


def _raised_in(error: Exception) -> str | None:
    """Return the package whose `raise` statement made an error; `None` if it was none."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame, at = trace.tb_frame, trace.tb_lasti
    instruction = next(i for i in dis.get_instructions(frame.f_code) if i.offset == at)
    package: str = frame.f_globals.get("__name__", "").split(".")[0]
    return package if instruction.opname == "RAISE_VARARGS" else None


def _package_of(function: Callable[..., Any]) -> str:
    owner = inspect.unwrap(getattr(function, "func", function))
    return str(owner.__module__ or "").split(".")[0]


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


class _EndlessError(Exception):
    pass


@contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupt a call that takes too long; only possible in the main thread of POSIX systems."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def interrupt(*_: Any) -> None:
        raise _EndlessError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
