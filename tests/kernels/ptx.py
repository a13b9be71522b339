"""Run compiled kernels (PTX) on a CPU, and find races.

Triton's interpreter runs a program as one thread, so it cannot show that two warps race. This
module executes the code that the compiler made, all threads of a program at once, from barrier to
barrier. It records for each byte of memory who accessed it: program, warp, and number of barriers
passed. Two accesses, one of which writes, are a race if they are

- of different programs of a launch, which nothing orders; or
- of different warps of a program, with no barrier between them; or
- of two lanes of a warp in one instruction that write different values.

Races in shared memory are found too. An access outside all tensors of the launch is an error, and
so is an instruction that none of our kernels has (atomic operations, asynchronous copies).

What it does not see: lanes of one warp are taken to run in step, and it stops if they diverge at an
access to memory; races in code that the values of a test do not reach; AMD's code, and what the
assembler makes of the PTX (which must keep the order that PTX defines).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

LANES = 32
MOST_BYTES = 1 << 26  # 24 more are kept for each
PREDICATE = np.dtype(bool)
Lanes = np.ndarray  # one value per thread of a program
Step = Callable[["Program", Lanes], None]


class Race(AssertionError):
    """Two accesses to the same address that nothing orders."""


# Memory


class Memory:
    """Bytes at an address, and who accessed each of them last.

    Attributes:
        data: The bytes.
        base: Address of the first one.
        name: Name, for messages.
    """

    def __init__(self, data: np.ndarray, base: int, name: str) -> None:
        if len(data) > MOST_BYTES:
            raise MemoryError(f"{name} has {len(data)} bytes; {MOST_BYTES} can be watched at most")
        self.data, self.base, self.name = data, base, name
        # Of the last write and the last read: barriers passed by then, warp, program.
        shape = (2, len(data))
        self.epoch, self.warp, self.program = (np.full(shape, -1, np.int32) for _ in range(3))

    def access(self, program: "Program", places: np.ndarray, warps: np.ndarray, kind: int) -> None:
        """Record an access to some bytes, and raise if it races with an earlier one.

        Args:
            program: The program.
            places: Indices of bytes: [threads, bytes].
            warps: Warp of each thread: [threads, 1].
            kind: 0 to write, 1 to read.
        """
        warps = np.broadcast_to(warps, places.shape)
        for earlier in (0, 1) if kind == 0 else (0,):
            other = self.program[earlier][places]
            if ((other != -1) & (other != program.number)).any():
                self._raise(program, "programs", kind, earlier)
            unordered = self.epoch[earlier][places] == program.epoch
            if (unordered & (self.warp[earlier][places] != warps)).any():
                self._raise(program, "warps", kind, earlier)
        several = -2  # differs from every warp and program
        was, warp = self.epoch[kind][places], self.warp[kind][places]
        shared = (was == program.epoch) & (warp != warps)
        self.epoch[kind][places] = program.epoch
        self.warp[kind][places] = warps
        shared |= self.warp[kind][places] != warps
        # Triton lets several warps write what they all have, the same value, to shared memory.
        if kind == 0 and shared.any() and self is not program.shared:
            self._raise(program, "warps", 0, 0)
        self.warp[kind][places[shared]] = several
        others = ~np.isin(self.program[kind][places], (-1, program.number))
        self.program[kind][places] = np.where(others, several, program.number)

    def _raise(self, program: "Program", who: str, now: int, earlier: int) -> None:
        pair = " and ".join(sorted(("write", "read")[k] for k in (now, earlier)))
        raise Race(f"{pair} of {self.name} by two {who}, unordered, at {program.place}")


# Threads


@dataclass
class Kernel:
    """A kernel's code.

    Attributes:
        name: Name of the function.
        parameters: Names of the parameters.
        registers: Type of each register, by the prefix of its name.
        steps: Instructions.
        starts: Instructions that follow a label.
        lines: Position in the Python source of each instruction.
        threads: Threads of a program.
    """

    name: str
    parameters: list[str]
    registers: dict[str, np.dtype]
    steps: list[tuple[str, Step | None, Any]]
    starts: set[int]
    lines: list[str]
    threads: int


class Program:
    """The threads of one program while they run."""

    def __init__(
        self,
        kernel: Kernel,
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
        arguments: Mapping[str, Any],
        memories: Sequence[Memory],
        shared: Memory,
        number: int,
        epoch: int,
    ) -> None:
        self.kernel, self.arguments, self.memories = kernel, arguments, memories
        self.shared, self.number, self.epoch = shared, number, epoch
        self.bases = np.array([memory.base for memory in memories], np.uint64)
        self.values: dict[str, Lanes] = {}
        thread = np.arange(kernel.threads, dtype=np.uint32)
        self.warps = (thread // LANES).astype(np.int32)
        self.set_all("%tid.x", thread)
        for axis, (number_of, total) in zip("xyz", zip(place, grid, strict=True), strict=True):
            self.set_all(f"%ctaid.{axis}", np.full(kernel.threads, number_of, np.uint32))
            self.set_all(f"%nctaid.{axis}", np.full(kernel.threads, total, np.uint32))
            self.set_all(f"%ntid.{axis}", np.full(kernel.threads, 1, np.uint32))
        self.set_all("%ntid.x", np.full(kernel.threads, kernel.threads, np.uint32))
        self.set_all("%laneid", thread % LANES)
        self.at, self.diverged = 0, False

    @property
    def place(self) -> str:
        """Where the current instruction comes from."""
        return f"{self.kernel.name}, {self.kernel.lines[self.at]}"

    def set_all(self, name: str, values: Lanes) -> None:
        """Set a register of all threads."""
        self.values[name] = values

    def run(self) -> int:
        """Run to the end, and return the number of barriers passed before or by this program."""
        kernel = self.kernel
        end = len(kernel.steps)
        counter = np.zeros(kernel.threads, np.int64)
        waits = np.zeros(kernel.threads, bool)
        while True:
            running = (counter < end) & ~waits
            if not running.any():
                if not waits.any():
                    return self.epoch + 1
                if (waits != (counter < end)).any() or len(set(counter[waits])) > 1:
                    raise Race(f"some threads do not reach the barrier at {self.place}")
                self.epoch += 1
                counter[waits] += 1
                waits[:] = False
                continue
            # Those that are behind go first, so that threads meet again after a branch.
            self.at = int(counter[running].min())
            active = running & (counter == self.at)
            kind, step, target = kernel.steps[self.at]
            if kind == "barrier":
                waits |= active
            elif kind == "branch":
                taken = active if step is None else active & step(self, active)
                counter[active] += 1
                counter[taken] = target
            elif kind == "return":
                counter[active] = end
            else:
                everyone = bool(active.all())
                in_warp = active.reshape(-1, LANES)
                self.diverged = bool((in_warp.any(axis=1) != in_warp.all(axis=1)).any())
                while kind == "step":
                    step(self, None if everyone else active)
                    self.at += 1
                    if self.at == end or self.at in kernel.starts:
                        break
                    kind, step, target = kernel.steps[self.at]
                counter[active] = self.at

    # Registers

    def dtype_of(self, name: str) -> np.dtype:
        """Return the unsigned type, or bool, of a register."""
        return self.kernel.registers[name.rstrip("0123456789")]

    def read(self, operand: str, dtype: np.dtype) -> Lanes:
        """Return an operand of all threads as `dtype`."""
        if operand[0] == "%":
            values = self.values.get(operand)
            if values is None:
                values = np.zeros(self.kernel.threads, self.dtype_of(operand))
                self.values[operand] = values
            if values.dtype == dtype or dtype == PREDICATE:
                return values.astype(dtype, copy=False)
            if values.dtype.itemsize == dtype.itemsize:
                return values.view(dtype)
            unsigned = np.dtype(f"u{dtype.itemsize}")
            return values.astype(unsigned).view(dtype)
        return literal(operand, dtype)

    def write(self, name: str, values: Lanes, active: Lanes | None) -> None:
        """Write a register of the active threads."""
        if name == "_":
            return
        kind = self.dtype_of(name)
        if kind != PREDICATE:
            values = values.view(f"u{values.dtype.itemsize}").astype(kind)
        values = np.broadcast_to(values, self.kernel.threads)
        if active is not None:
            values = np.where(active, values, self.read(name, kind))
        self.values[name] = values

    # Memory

    def addresses(self, text: str, space: str) -> Lanes:
        """Return the address of each thread, given as `[register + number]`."""
        register, _, offset = text.strip("[] ").partition("+")
        value = self.read(register.strip(), TYPES["u32" if space == "shared" else "u64"])
        start = np.broadcast_to(value, self.kernel.threads).astype(np.uint64)
        return start + np.uint64(int(offset or 0) % (1 << 64))

    def locate(self, space: str, addresses: np.ndarray) -> tuple[Memory, np.ndarray]:
        """Return the memory of some addresses, and the indices of their first bytes."""
        if space == "shared":
            return self.shared, addresses.astype(np.int64)
        number = int(np.searchsorted(self.bases, addresses[0], "right")) - 1
        memory = self.memories[max(number, 0)]
        return memory, addresses.astype(np.int64) - memory.base

    def forbid_divergence(self) -> None:
        """Raise if some lanes of a warp are elsewhere in the code."""
        if self.diverged:
            raise NotImplementedError(f"lanes of a warp have diverged at {self.place}")

    def touch(
        self, space: str, address: Lanes, size: int, active: Lanes | None, kind: int
    ) -> list[tuple[Lanes, Memory, np.ndarray]]:
        """Check and record an access.

        Returns:
            Threads, memory and indices of bytes; one for each memory that is accessed.
        """
        self.forbid_divergence()
        threads = np.arange(len(address)) if active is None else active.nonzero()[0]
        found = []
        while len(threads):
            memory, first = self.locate(space, address[threads])
            inside = (first >= 0) & (first + size <= len(memory.data))
            if not inside[0]:
                raise IndexError(f"{self.place} accesses memory outside the arguments")
            if (address[threads[inside]] % np.uint64(min(size, 16))).any():
                raise IndexError(f"{self.place} accesses {size} bytes that are not aligned")
            places = first[inside][:, None] + np.arange(size)
            memory.access(self, places, self.warps[threads[inside]][:, None], kind)
            found.append((threads[inside], memory, places))
            threads = threads[~inside]
        return found


def literal(text: str, dtype: np.dtype) -> Any:
    """Return a number in the code, as `dtype`."""
    if text == "global_smem":
        return dtype.type(0)
    if match := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return np.array(int(match.group(1), 16), f"u{dtype.itemsize}").view(dtype)[()]
    number = int(text.rstrip("U"), 0)
    if dtype == PREDICATE:
        return np.bool_(number != 0)
    size = 8 * dtype.itemsize
    return np.array(number % (1 << size), f"u{dtype.itemsize}").view(dtype)[()]


# Instructions

TYPES = {f"{kind}{8 * n}": np.dtype(f"{'u' if kind == 'b' else kind}{n}".replace("s", "i"))
         for kind in "bsu" for n in (1, 2, 4, 8)}  # fmt: skip
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}
TYPES |= {"pred": np.dtype(bool), "bf16": np.dtype("u2")}

COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "neu": np.not_equal,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
}  # fmt: skip


def divide(a: Lanes, b: Lanes) -> Lanes:
    """Divide; integers are rounded toward zero."""
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        return a / b
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a) // np.abs(b) if a.dtype.kind == "i" else a // b
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def larger(a: Lanes, b: Lanes) -> Lanes:
    """Return the maximum; a number instead of NaN."""
    return np.fmax(a, b) if np.asarray(a).dtype.kind == "f" else np.maximum(a, b)


def smaller(a: Lanes, b: Lanes) -> Lanes:
    """Return the minimum; a number instead of NaN."""
    return np.fmin(a, b) if np.asarray(a).dtype.kind == "f" else np.minimum(a, b)


def shift_left(a: Lanes, n: Lanes) -> Lanes:
    """Shift; by the width or more gives 0."""
    bits = 8 * a.dtype.itemsize
    return np.where(n < bits, a << (n % bits).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: Lanes, n: Lanes) -> Lanes:
    """Shift; by the width or more gives 0, or the sign."""
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n < bits, a >> (n % bits).astype(a.dtype), 0).astype(a.dtype)


def extract(a: Lanes, start: Lanes, length: Lanes) -> Lanes:
    """Extract a field of bits, with its sign if the type has one."""
    width = 8 * a.dtype.itemsize
    unsigned = a.view(f"u{a.dtype.itemsize}").astype(np.uint64)
    length = np.minimum(length, width - start).astype(np.uint64)
    field = (unsigned >> start.astype(np.uint64)) & ((np.uint64(1) << length) - np.uint64(1))
    if a.dtype.kind == "i":
        sign = np.uint64(1) << (length - np.uint64(1))
        field = (field ^ sign) - sign
    return field.astype(f"u{a.dtype.itemsize}").view(a.dtype)


def permute_bytes(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Select four of the eight bytes of two words."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    out = np.zeros(np.broadcast(a, selector).shape, np.uint32)
    for i in range(4):
        code = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((code & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        byte = np.where(code & 8, np.where(byte & np.uint64(128), 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def to_bfloat16(x: Lanes) -> Lanes:
    """Round float32 to the bits of bfloat16, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bfloat16(bits: Lanes) -> Lanes:
    """Convert the bits of bfloat16 to float32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def convert(x: Lanes, source: str, target: str, modifiers: Sequence[str]) -> Lanes:
    """Convert between types."""
    if source == "bf16":
        x, source = from_bfloat16(x), "f32"
    if target == "bf16":
        return to_bfloat16(x)
    kind = TYPES[target]
    if x.dtype.kind == "f" and kind.kind in "iu":
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        (rounding,) = (whole[m] for m in modifiers if m in whole)
        limits = np.iinfo(kind)
        return np.clip(
            np.nan_to_num(rounding(x.astype(np.float64))), limits.min, limits.max
        ).astype(kind)
    if x.dtype.kind in "iu" and kind.kind in "iu" and "sat" not in modifiers:
        return x.astype(kind)
    return x.astype(kind)


ARITHMETIC: dict[str, Callable[..., Lanes]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": abs,
    "mov": lambda a: a,
    "max": larger,
    "min": smaller,
    "div": divide,
    "rem": lambda a, b: a - divide(a, b) * b,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "rcp": lambda a: 1 / a,
    "ex2": np.exp2,
    "lg2": np.log2,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "prmt": permute_bytes,
}


def parse_step(opcode: str, operands: list[str]) -> Step:
    """Return a function that executes one instruction."""
    name, *modifiers = opcode.replace("::", "_").split(".")
    if name in ("ld", "st"):
        return parse_memory(name, modifiers, operands)
    if name in ("shfl", "redux", "bar", "ldmatrix"):
        return parse_warp(name, modifiers, operands)
    target, *sources = operands
    kind = TYPES.get(modifiers[-1])
    if name == "mov" and (target[0] == "{" or sources[0][0] == "{"):
        return parse_packing(target, sources[0])
    if name == "cvt" and modifiers[-2].endswith("x2"):  # two numbers to one register
        half = modifiers[-2][:-2]

        def pack(p: Program, active: Lanes | None) -> None:
            high, low = (convert(p.read(s, kind), "f32", half, ()).view(np.uint16) for s in sources)
            p.write(target, (high.astype(np.uint32) << np.uint32(16)) | low, active)

        return pack
    if name == "cvt":
        to = modifiers[-2]

        def cast(p: Program, active: Lanes | None) -> None:
            values = np.asarray(p.read(sources[0], kind))
            p.write(target, convert(values, modifiers[-1], to, modifiers), active)

        return cast
    if name == "setp":
        compare = COMPARISONS[modifiers[0]]

        def decide(p: Program, active: Lanes | None) -> None:
            p.write(target, compare(*(p.read(s, kind) for s in sources)), active)

        return decide
    if name == "selp":

        def select(p: Program, active: Lanes | None) -> None:
            a, b = (p.read(s, kind) for s in sources[:2])
            p.write(target, np.where(p.read(sources[2], TYPES["pred"]), a, b), active)

        return select
    if name == "popc":

        def count(p: Program, active: Lanes | None) -> None:
            values = np.bitwise_count(np.asarray(p.read(sources[0], kind)))
            p.write(target, np.asarray(values, TYPES["u32"]), active)

        return count
    if name in ("shl", "shr", "bfe"):
        function: Any = {"shl": shift_left, "shr": shift_right, "bfe": extract}[name]

        def shift(p: Program, active: Lanes | None) -> None:
            first = np.broadcast_to(np.asarray(p.read(sources[0], kind)), p.kernel.threads)
            rest = (np.asarray(p.read(s, TYPES["u32"])) for s in sources[1:])
            p.write(target, function(first.copy(), *rest), active)

        return shift
    if name in ("mul", "mad") and kind.kind in "iu":
        return parse_product(modifiers[0], kind, target, sources)
    if name not in ARITHMETIC:  # among them atomic operations and asynchronous copies
        raise NotImplementedError(f"the instruction {opcode} is not executed")
    function = ARITHMETIC[name]

    def compute(p: Program, active: Lanes | None) -> None:
        values = function(*(np.asarray(p.read(s, kind)) for s in sources))
        p.write(target, np.asarray(values, kind), active)

    return compute


def parse_product(part: str, kind: np.dtype, target: str, sources: list[str]) -> Step:
    """Return the low, high or whole product of integers, plus a third operand if there is one."""
    wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}") if kind.itemsize < 8 else None

    def compute(p: Program, active: Lanes | None) -> None:
        a, b = (np.asarray(p.read(s, kind)) for s in sources[:2])
        result = kind
        if part == "lo":
            product = a * b
        elif wide is not None:
            product = a.astype(wide) * b.astype(wide)
            if part == "hi":
                product = (product >> wide.type(8 * kind.itemsize)).astype(kind)
            else:
                result = wide
        else:
            pairs = zip(*np.broadcast_arrays(a, b), strict=True)
            high = [(int(x) * int(y) >> 64) % (1 << 64) for x, y in pairs]
            product = np.array(high, np.uint64).view(kind)
        if len(sources) == 3:
            product = product + p.read(sources[2], result)
        p.write(target, np.asarray(product), active)

    return compute


def parse_packing(target: str, source: str) -> Step:
    """Return a move between one register and several of half its width or less."""
    unpacks = target[0] == "{"
    parts, whole = split(target if unpacks else source), source if unpacks else target

    def move(p: Program, active: Lanes | None) -> None:
        kind = p.dtype_of(whole)
        size = kind.itemsize * 8 // len(parts)
        small = np.dtype(f"u{size // 8}")
        if unpacks:
            value = p.read(whole, kind)
            for i, part in enumerate(parts):
                p.write(part, (value >> kind.type(i * size)).astype(small), active)
        else:
            value = sum(
                np.asarray(p.read(part, small)).astype(kind) << kind.type(i * size)
                for i, part in enumerate(parts)
            )
            p.write(whole, np.asarray(value, kind), active)

    return move


def parse_memory(name: str, modifiers: list[str], operands: list[str]) -> Step:
    """Return a load or store."""
    kind = TYPES[modifiers[-1]]
    if modifiers[0] == "param":
        target, parameter = operands[0], operands[1].strip("[] ")

        def load_argument(p: Program, active: Lanes | None) -> None:
            value = p.arguments[parameter]
            as_kind = (
                np.array(value, "f4")
                if isinstance(value, float)
                else literal(str(int(value)), kind)
            )
            p.write(target, np.full(p.kernel.threads, np.asarray(as_kind).view(kind)), active)

        return load_argument
    space = modifiers[0].split("_")[0]
    address, registers = operands if name == "st" else operands[::-1]
    parts = split(registers)
    size = kind.itemsize * len(parts)

    def access(p: Program, active: Lanes | None) -> None:
        where = p.addresses(address, space)
        raw = np.zeros((p.kernel.threads, size), np.uint8)
        if name == "st":
            for i, part in enumerate(parts):
                values = np.broadcast_to(p.read(part, kind), p.kernel.threads)
                raw[:, i * kind.itemsize : (i + 1) * kind.itemsize] = as_bytes(values)
        found = p.touch(space, where, size, active, 0 if name == "st" else 1)
        for threads, memory, places in found:
            if name == "st":
                memory.data[places] = raw[threads]
                if (memory.data[places] != raw[threads]).any():
                    raise Race(f"two lanes write different values to {memory.name} at {p.place}")
            else:
                raw[threads] = memory.data[places]
        if name == "ld":
            values = raw.view(kind)
            for i, part in enumerate(parts):
                p.write(part, values[:, i].copy(), active)

    return access


def as_bytes(values: Lanes) -> np.ndarray:
    """Return the bytes of each value: [threads, bytes]."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def parse_warp(name: str, modifiers: list[str], operands: list[str]) -> Step:
    """Return an instruction by which the lanes of a warp exchange values."""
    if name == "bar":
        if modifiers != ["warp", "sync"]:
            raise NotImplementedError("barriers of some warps are not executed")
        return lambda p, active: None  # lanes run in step anyway
    if name == "ldmatrix":
        parts, address = split(operands[0]), operands[1]
        return lambda p, active: load_matrices(p, parts, address)
    kind = TYPES[modifiers[-1]]
    target, source = operands[0].split("|")[0], operands[1]

    def exchange(p: Program, active: Lanes | None) -> None:
        p.forbid_divergence()
        values = np.broadcast_to(p.read(source, kind), p.kernel.threads).reshape(-1, LANES)
        if name == "redux":
            names = {"add": np.add, "min": np.minimum, "max": np.maximum}
            reduce = names | {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
            total = reduce[modifiers[1]].reduce(values, axis=1, keepdims=True, dtype=kind)
            result = np.broadcast_to(total, values.shape)
        else:
            lane = np.arange(LANES)
            by = np.broadcast_to(p.read(operands[2], TYPES["u32"]), p.kernel.threads)
            by = by.reshape(-1, LANES).astype(np.int64)
            from_lane = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": by}
            place = from_lane[modifiers[1]]
            place = np.where((place < 0) | (place >= LANES), lane, place)
            result = np.take_along_axis(values, place, axis=1)
        p.write(target, result.reshape(-1).copy(), active)

    return exchange


def load_matrices(p: Program, parts: list[str], address: str) -> None:
    """Load 8 x 8 matrices of 16 bits: lane l of a warp gives the address of row l % 8."""
    rows = p.addresses(address, "shared").reshape(-1, LANES)
    lane = np.arange(LANES)
    for i, part in enumerate(parts):
        words = rows[:, 8 * i + lane // 4] + np.uint64(4) * (lane % 4).astype(np.uint64)
        ((_, memory, places),) = p.touch("shared", words.reshape(-1), 4, None, 1)
        p.write(part, memory.data[places].view(np.uint32).reshape(-1), None)


# Parsing


def split(text: str) -> list[str]:
    """Split a list of operands, at commas outside brackets."""
    text = text.strip()
    if text[:1] == "{" and text[-1:] == "}" and text.count("{") == 1:
        text = text[1:-1]
    return [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]


@cache
def parse(code: str) -> Kernel:
    """Parse a kernel's PTX."""
    header, body = re.search(r"\.entry (.*?)\n\{\n(.*?)\n\}", code, re.S).groups()
    name = header.split("(")[0]
    parameters = re.findall(rf"\b{re.escape(name)}_param_\d+", header)
    threads = int(re.search(r"\.reqntid (\d+)", header).group(1))
    registers = {
        match[1]: TYPES[match[0]] for match in re.findall(r"\.reg \.(\w+)\s+(%[a-z]+)<", body)
    }
    steps: list[tuple[str, Step | None, Any]] = []
    labels: dict[str, int] = {}
    lines: list[str] = []
    line = "?"
    for raw in body.splitlines():
        text = raw.split("//")[0].strip()
        if match := re.match(r"\.loc\s+\d+ (\d+) (\d+)", text):
            where = re.search(r"// (\S+:\d+:\d+)", raw)
            line = where.group(1) if where else ":".join(match.groups())
        elif match := re.fullmatch(r"(\$\w+):", text):
            labels[match.group(1)] = len(steps)
        elif text and text[0] not in ".{}":
            steps.append(parse_line(text.rstrip(";")))
            lines.append(line)
    jumps = [(kind, step, labels.get(target, target)) for kind, step, target in steps]
    starts = set(labels.values())
    return Kernel(name, parameters, registers, jumps, starts, [*lines, "end"], threads)


def parse_line(text: str) -> tuple[str, Step | None, Any]:
    """Parse one instruction: its kind, what it does, and where a branch goes."""
    guard, instruction = re.fullmatch(r"(?:@(!?%p\d+)\s+)?(.*)", text).groups()
    opcode, _, rest = instruction.replace("\t", " ").partition(" ")
    operands = split(rest)
    if opcode == "ret":
        return "return", None, None
    condition = None if guard is None else guarded(guard)
    if opcode in ("bra", "bra.uni"):
        return "branch", condition, operands[0]
    if opcode in ("bar.sync", "barrier.sync") and guard is None and operands == ["0"]:
        return "barrier", None, None
    step = parse_step(opcode, operands)
    if condition is None:
        return "step", step, None

    def run_if(p: Program, active: Lanes | None) -> None:
        chosen = condition(p, active)
        chosen = chosen if active is None else chosen & active
        if chosen.any():
            step(p, chosen)

    return "step", run_if, None


def guarded(guard: str) -> Callable[[Program, Lanes | None], Lanes]:
    """Return which threads a guard lets through."""
    name = guard.lstrip("!")

    def condition(p: Program, active: Lanes | None) -> Lanes:
        values = p.read(name, TYPES["pred"])
        return ~values if guard[0] == "!" else values

    return condition


# Launches


def execute(code: str, grid: Sequence[int], arguments: Sequence[Any], shared_bytes: int) -> None:
    """Run all programs of a launch one after another, and raise `Race` if any two accesses race.

    Args:
        code: PTX of the kernel.
        grid: Programs along each axis.
        arguments: Tensors and numbers that are no constants.
        shared_bytes: Shared memory of a program.
    """
    kernel = parse(code)
    sizes = (*grid, 1, 1)[:3]
    values = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments]
    values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, which is not used
    named = dict(zip(kernel.parameters, values, strict=True))
    shared = Memory(np.zeros(max(shared_bytes, 1), np.uint8), 0, "shared memory")
    inside = memories_of(arguments)
    epoch = number = 0
    with np.errstate(all="ignore"):
        for z in range(sizes[2]):
            for y in range(sizes[1]):
                for x in range(sizes[0]):
                    shared.program[:] = -1
                    program = Program(
                        kernel, (x, y, z), sizes, named, inside, shared, number, epoch
                    )
                    epoch = program.run() + 1
                    number += 1


def memories_of(arguments: Sequence[Any]) -> list[Memory]:
    """Return the memory from the first to the last value of each tensor, in order of addresses.

    Tensors that overlap share one memory.
    """
    spans = []
    for number, argument in enumerate(arguments):
        if hasattr(argument, "data_ptr") and argument.numel():
            axes = zip(argument.shape, argument.stride(), strict=True)
            values = 1 + sum((size - 1) * stride for size, stride in axes)
            start = argument.data_ptr()
            spans.append((start, start + values * argument.element_size(), number))
    found: list[tuple[int, int, int]] = []
    for start, end, number in sorted(spans):
        if found and start < found[-1][1]:
            first, last, other = found.pop()
            start, end, number = first, max(last, end), min(other, number)
        found.append((start, end, number))
    return [
        Memory(bytes_at(start, end), start, f"argument {number}") for start, end, number in found
    ]


def bytes_at(start: int, end: int) -> np.ndarray:
    """Return the bytes between two addresses, without a copy."""
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * (end - start)).from_address(start), np.uint8)
