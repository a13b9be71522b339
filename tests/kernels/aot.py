"""Compile launches ahead of time, without a GPU, and read figures from the compiled code.

`record` runs a launcher on meta tensors and keeps its launches. They are compiled with the same
specialization as at run time: alignment, divisibility by 16, arguments equal to 1, constants.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
MORE_TARGETS = ("sm_120", "gfx950", "gfx1100", "gfx1201")  # for one case in three
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
    """A launch: kernel, arguments, compile options and programs along each axis."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the kernel's function, without underscore and `_kernel`."""
        return str(self.kernel.fn.__name__).strip("_").removesuffix("_kernel")


@dataclass(frozen=True)
class Figures:
    """Static figures of a compiled launch.

    Attributes:
        registers: Registers of a thread (vector registers on AMD).
        local: Bytes of stack, plus the number of instructions that access local memory.
        load_bits: Width of a thread's widest load from global memory.
        store_bits: Width of a thread's widest store to global memory.
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
        launched.append(as_launch(kernel, grid, arguments, named))

    with mock.patch.object(JITFunction, "run", keep):
        call()
    return launched


def as_launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], named: dict[str, Any]
) -> Launch:
    """Return a launch, given what Triton's `JITFunction.run` takes."""
    names = kernel.arg_names
    values = dict(zip(names, arguments, strict=False))
    values |= {name: value for name, value in named.items() if name in names}
    options = {name: value for name, value in named.items() if name not in names}
    return Launch(kernel, values, options, grid)


def compile_launch(launch: Launch, target: str, *, aligned: bool = True) -> Figures:
    """Compile one launch for "sm_<n>" or "gfx<n>", and return its figures."""
    code = compiled(launch, target, aligned=aligned).asm
    return _read_cubin(code["cubin"]) if "cubin" in code else _read_amdgcn(code["amdgcn"])


def memory_order(launch: Launch, target: str) -> list[tuple[str, int]]:
    """Return a compiled launch's accesses to global memory and its barriers, in program order.

    Returns:
        Pairs of "load", "store" or "barrier" and the bits that one thread moves (0 for a barrier).
    """
    code = compiled(launch, target).asm
    if "cubin" in code:
        patterns = {"load": r"\bLDG\S*", "store": r"\bSTG\S*", "barrier": r"\bBAR\.SYNC"}
        text, width = _disassemble(code["cubin"], "-sass"), _width
    else:
        patterns = {
            "load": r"\b(?:global|buffer|s)_load_\w+",
            "store": r"\b(?:global|buffer)_store_\w+",
            "barrier": r"\bs_barrier\b",
        }
        text, width = code["amdgcn"], _width_amd
    found = [
        (match.start(), kind, 0 if kind == "barrier" else width(match.group()))
        for kind, pattern in patterns.items()
        for match in re.finditer(pattern, text)
    ]
    return [(kind, bits) for _, kind, bits in sorted(found)]


def compiled(launch: Launch, target: str, *, aligned: bool = True) -> Any:
    """Compile one launch; `.asm` of the result has the code after each stage of the compiler.

    Args:
        launch: The launch.
        target: "sm_<n>" or "gfx<n>".
        aligned: Whether meta tensors count as aligned to 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *specialization(launch, aligned=aligned))
    if target.startswith("sm_"):
        gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        gpu = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    return triton.compile(source, target=gpu, options=launch.options)


def specialization(
    launch: Launch, *, aligned: bool = True
) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Return what a launch is compiled for: types, constants, and divisibility by 16.

    Launches that differ in nothing else share their code.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def describe(value: Any, path: tuple[int, ...], specialized: bool) -> Any:
        """Return the type of an argument; record constants and divisibility by 16."""
        if isinstance(value, tuple):
            parts = [describe(part, (*path, i), specialized) for i, part in enumerate(value)]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if value is None or (isinstance(value, int) and value == 1 and specialized):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor):
            is_aligned = aligned if value.is_meta else value.data_ptr() % 16 == 0
        else:
            is_aligned = specialized and _divides(16, value)
        if is_aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return _type_of(value)

    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            specialized = not parameter.do_not_specialize
            signature[parameter.name] = describe(value, (i,), specialized)
    return signature, constants, attributes


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
    usage, sass = (_disassemble(cubin, flag) for flag in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # A kernel that spills may report few registers, so accesses to local memory count too.
    local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Figures(
        registers,
        stack + local,
        _widest(_width, r"\bLDG\S*", sass),
        _widest(_width, r"\bSTG\S*", sass),
    )


def _disassemble(cubin: bytes, flag: str) -> str:
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
    return result.stdout


def _width(instruction: str) -> int:
    width = re.search(r"\.(?:[US]?(8|16|64|128|256))\b", instruction)
    return int(width.group(1)) if width else 32


def _read_amdgcn(assembly: str) -> Figures:
    def count(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    spilled = count("vgpr_spill_count") + count("sgpr_spill_count")
    private = count("private_segment_fixed_size")
    return Figures(
        count("vgpr_count"),
        spilled + private,
        _widest(_width_amd, r"(?:global|buffer)_load_\w+", assembly),
        _widest(_width_amd, r"(?:global|buffer)_store_\w+", assembly),
    )


def _width_amd(instruction: str) -> int:
    if words := re.search(r"_dword(?:x(\d+))?$", instruction):
        return 32 * int(words.group(1) or 1)
    if bits := re.search(r"_[bui](\d+)$", instruction):  # gfx11 and later
        return int(bits.group(1))
    return 8 if "byte" in instruction else 16


def _widest(width: Callable[[str], int], pattern: str, code: str) -> int:
    return max(map(width, re.findall(pattern, code)), default=0)
