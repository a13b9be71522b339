"""Execute launches with the emulator of compiled code (`ptx.py`), on CPU tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tests.kernels import ptx
from tests.kernels.aot import as_launch, compiled

TARGET = "sm_80"  # the fewest special instructions


@contextmanager
def emulated_launches() -> Iterator[None]:
    """Compile launches for `TARGET` and execute them; a race is an error."""
    from triton.runtime.jit import JITFunction

    with mock.patch.object(JITFunction, "run", run):
        yield


def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Compile and execute a launch; replaces Triton's `JITFunction.run`."""
    launch = as_launch(kernel, grid, arguments, named)
    binary = compiled(launch, TARGET)
    given = [
        value
        for parameter in kernel.params
        if not parameter.is_constexpr
        for value in leaves(launch.arguments[parameter.name], not parameter.do_not_specialize)
    ]
    ptx.execute(binary.asm["ptx"], grid, given, binary.metadata.shared)


def leaves(value: Any, specialized: bool) -> list[Any]:
    """Return the tensors and numbers of an argument that are not compiled in."""
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part, specialized)]
    is_one = not isinstance(value, Tensor | float) and value == 1
    return [] if value is None or (is_one and specialized) else [value]
