"""Run launches of kernels in the emulator of compiled code: `pytest -p tests.kernels.emulated`.

With this plugin, the tests marked `launches` compile each launch for sm_80 and execute it with
`tests.kernels.ptx`, which finds races.
"""

import os
from typing import Any

# The launchers then take CPU tensors; but Triton, imported later, must compile.
os.environ["TRITON_INTERPRET"] = "1"
import mimkit_kernels  # noqa: E402, F401

os.environ["TRITON_INTERPRET"] = "0"

from torch import Tensor  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from tests.kernels import ptx  # noqa: E402
from tests.kernels.aot import Launch, as_launch, compiled  # noqa: E402

TARGET = "sm_80"  # the fewest special instructions


def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
    """Compile a launch and execute it; replaces Triton's own."""
    execute(as_launch(kernel, arguments, named), grid)


def execute(launch: Launch, grid: Any) -> None:
    """Compile a launch and execute it."""
    binary = compiled(launch, TARGET)
    given = [
        value
        for parameter in launch.kernel.params
        if not parameter.is_constexpr
        for value in leaves(launch.arguments[parameter.name], parameter.do_not_specialize)
    ]
    ptx.execute(binary.asm["ptx"], grid, given, binary.metadata.shared)


def leaves(value: Any, plain: bool = False) -> list[Any]:
    """Return the tensors and numbers of an argument that are not compiled in."""
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in leaves(part, plain)]
    is_constant = value is None or (
        not isinstance(value, Tensor | float) and value == 1 and not plain
    )
    return [] if is_constant else [value]


JITFunction.run = run
