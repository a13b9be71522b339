"""Compile launches ahead of time for GPUs that are not there, and read what came out.

`record` runs a launcher on meta tensors and keeps what it would have launched, with the very
specialisation of the run time: alignment, divisibility by 16, arguments equal to 1, constants.
"""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch that a launcher asked for."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel's function, without what all have in common."""
        return str(self.kernel.fn.__name__).strip("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Figures:
    """What the compiler made of a launch.

    Attributes:
        registers: Of a thread (vector registers on AMD).
        local: Bytes of stack plus instructions that access local memory.
        load_bits: Width of the widest load from global memory, per thread.
        store_bits: Width of the widest store to it.
    """

    registers: int
    local: int
    load_bits: int
    store_bits: int


def record(call: Callable[[], Any]) -> list[Launch]:
    """Run a launcher on meta tensors, and return its launches in order."""
    from triton.runtime.jit import JITFunction

    launched = []

    def keep(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, arguments, strict=False))
        values |= {name: value for name, value in named.items() if name in names}
        options = {name: value for name, value in named.items() if name not in names}
        launched.append(Launch(kernel, values, options))

    with mock.patch.object(JITFunction, "run", keep):
        call()
    return launched


def compile_launch(launch: Launch, target: str, *, aligned: bool = True) -> Figures:
    """Compile one launch for "sm_<n>" or "gfx<n>"."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = {parameter.name: parameter for parameter in launch.kernel.params}
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(parameters.items()):
        value, specialized = launch.arguments[name], not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specialized
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_of(value)
        is_aligned = aligned if isinstance(value, Tensor) else _divides(16, value) and specialized
        if is_aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        compiled = triton.compile(source, target=gpu, options=launch.options)
        return _read_cubin(compiled.asm["cubin"])
    compiled = triton.compile(source, target=GPUTarget("hip", target, 64), options=launch.options)
    return _read_amdgcn(compiled.asm["amdgcn"])


def _divides(divisor: int, value: Any) -> bool:
    return isinstance(value, int) and value % divisor == 0


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return "fp32"


def _read_cubin(cubin: bytes) -> Figures:
    import tempfile

    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups())
    # A spilling kernel may report few registers: count accesses to local memory too.
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass.stdout))
    return Figures(
        registers,
        stack + local,
        _widest(r"\bLDG\S*", sass.stdout),
        _widest(r"\bSTG\S*", sass.stdout),
    )


def _widest(pattern: str, sass: str) -> int:
    widths = [0]
    for instruction in re.findall(pattern, sass):
        width = re.search(r"\.(?:[US]?(8|16|64|128|256))\b", instruction)
        widths.append(int(width.group(1)) if width else 32)
    return max(widths)


def _read_amdgcn(assembly: str) -> Figures:
    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spilled = count("vgpr_spill_count") + count("sgpr_spill_count")
    private = count("private_segment_fixed_size")
    return Figures(
        count("vgpr_count"),
        spilled + private,
        _widest_amd("load", assembly),
        _widest_amd("store", assembly),
    )


def _widest_amd(kind: str, assembly: str) -> int:
    bits = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}
    bits |= {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "short": 16, "short_d16": 16}
    found = re.findall(rf"(?:global|buffer)_{kind}_(\w+)", assembly)
    return max((bits.get(width, 16) for width in found), default=0)
