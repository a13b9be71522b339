"""Estimate the time of each kernel on an H200 from its compiled code: no GPU is needed.

    python -m benchmarks.estimate [KERNEL ...]
    python -m benchmarks.estimate --rows FILE [KERNEL ...]      # beside what was measured

A launch takes at least as long as its bytes take at the rate of a copy, and as its instructions
take to issue. The estimate is the longer of the two. For the instructions, the last wave of
programs counts as a full one; programs that all run at once take as long as the scheduler with the
most warps. It leaves out latency: with few warps a kernel is slower than this.
With `--rows`, rows that were measured on a GPU stand beside the estimate of today's code, which is
the sum of our launches in that pass. PyTorch's launches in it are not estimated.

Instructions are those of sm_90. A loop counts as often as it runs, which `trips` states; what is
jumped over counts with its probability, which `skipped` states.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from benchmarks.harness import read_records
from tests.kernels import aot
from tests.kernels.figures import all_launches

# H200: 132 multiprocessors, each with 4 schedulers at 1.75 GHz; GPU.md, section 2.
MULTIPROCESSORS = 132
SCHEDULERS = MULTIPROCESSORS * 4
ISSUED_PER_US = 1750  # by a scheduler; also the most of one warp
COPIED_PER_US = 4.3e6  # bytes read and written; a copy of n bytes moves 2 n
WARPS, REGISTERS, PROGRAMS, SHARED = 64, 65536, 32, 227 << 10  # of a multiprocessor

BATCH, VISIBLE, MASKED, TOKENS = 256, 49, 147, 196
VALUES = 768  # of a patch of 16 x 16 pixels


class Case(NamedTuple):
    """One launch to estimate.

    Attributes:
        kernel: Name of the kernel's file.
        case: Name of the call in the `LAUNCHES` of its test.
        launch: Name of the kernel's function in that call.
        must: Bytes that any implementation moves.
        extra: Bytes that ours moves beyond that.
        trips: How often each loop runs, in the order of the jumps back.
        skipped: Probability of each other conditional jump, in order; 0 for those not listed.
    """

    kernel: str
    case: str
    launch: str
    must: float
    extra: float = 0
    trips: Sequence[float] = ()
    skipped: Sequence[float] = ()


def conv_cases() -> list[Case]:
    """Return ConvMAE-B's convolutions; three quarters of the cells are masked at random."""
    absent = MASKED / TOKENS
    around = [absent, absent, absent, absent, 0, absent, absent, absent, absent]
    cases = []
    for stage, channels, positions, tiles in (("stage 1", 256, 16, 25), ("stage 2", 384, 4, 37)):
        data = 2 * BATCH * VISIBLE * positions * channels
        # Partial sums are written and read.
        partial = 2 * 4 * (BATCH * VISIBLE / tiles) * 25 * channels
        case = f"{stage}, bfloat16"
        cases += [
            Case("packed_depthwise_conv", case, "conv", 2 * data, 0, [8], around),
            Case(
                "packed_depthwise_conv",
                f"filter's gradient, {case}",
                "weight_gradient",
                2 * data,
                partial,
                [tiles],
                [0, *around],
            ),
        ]
    return cases


def cases() -> list[Case]:
    """Return the launches of a step of MAE-B, CAE-B and ConvMAE-B that move the most."""
    patches, targets = BATCH * VISIBLE * VALUES, BATCH * MASKED * VALUES
    encoder, decoder = BATCH * (VISIBLE + 1) * VALUES, BATCH * (TOKENS + 1) * 512
    rows = 64 * 196 * 768  # CAE's regressor, batch 64
    found = []
    for order in ("c p1 p2", "p1 p2 c"):
        for dtype, image, made in (("bfloat16", 2, 2), ("float32", 4, 4), ("uint8", 1, 4)):
            moved = patches * (image + made)
            found.append(Case("gather_patches", f"{dtype}, {order}", "gather", moved))
        whole = BATCH * 3 * 224 * 224 * 2
        found.append(
            Case("gather_patches", f"gradient, bfloat16, {order}", "scatter", whole + 2 * patches)
        )
    for order in ("p1 p2 c", "c p1 p2"):
        for pixels, size in (("float32", 4), ("uint8", 1)):
            case = f"bfloat16, {pixels} images, {order}, normalized, l2"
            found += [
                Case("masked_pixel_loss", case, "forward", targets * (2 + size)),
                Case("masked_pixel_loss", case, "backward", targets * (4 + size)),
            ]
    # A sampler finds the 48 bits of a rank in rounds, of which the compiler unrolls 8, 6 or none.
    found += [
        Case("uniform_sample", f"{n} tokens", "sample", 8 * BATCH * n, trips=[48 / unrolled])
        for n, unrolled in ((196, 8), (784, 6), (4096, 1))
    ]
    # 16 blocks are drawn for a sample on average (15.8 of 2048 samples, with the reference).
    drawn = [16, 48 / 8]
    found.append(
        Case("blockwise_sample", "14x14 tokens", "blockwise", 8 * BATCH * 196, trips=drawn)
    )
    return found + [
        Case(
            "move_tokens",
            "restore, positions, bfloat16",
            "restore",
            2 * (decoder + BATCH * 50 * 512),
        ),
        Case("move_tokens", "gather, bfloat16", "gather", 2 * 2 * encoder),
        # Visible rows are written after the zeros.
        Case(
            "move_tokens",
            "scatter, bfloat16",
            "restore",
            2 * (encoder + BATCH * 197 * 768),
            2 * encoder,
        ),
        # 152 rows of a program, 8 at a time; the jumps go around divisions of 64 bits.
        Case(
            "move_tokens",
            "sum, bfloat16",
            "sum",
            2 * BATCH * MASKED * 512,
            trips=[19],
            skipped=[0, 1, 1],
        ),
        # Half of the tokens are visible: they and the queries have loads of their own.
        Case(
            "regressor_inputs",
            "width 768, bfloat16",
            "forward",
            rows * (8 + 2 * 2.5),
            skipped=[0.5],
        ),
        # Programs of 25 tokens. The second jump goes around a division of 64 bits.
        Case(
            "regressor_inputs",
            "width 768, bfloat16",
            "backward",
            rows * (8 + 2 * 2.5 + 4),
            trips=[25],
            skipped=[0, 1, 0.5],
        ),
        # 8192 words in blocks of 4096, twice.
        Case(
            "linear_cross_entropy",
            "bfloat16",
            "softmax_gradient",
            2 * 2 * 2048 * 8192,
            trips=[2, 2],
        ),
        *conv_cases(),
    ]


class Compiled(NamedTuple):
    """What the estimate needs of a compiled launch.

    Attributes:
        programs: Programs of the grid.
        warps: Warps of a program.
        registers: Registers of a thread.
        shared: Bytes of shared memory of a program.
        sass: Disassembled code.
    """

    programs: int
    warps: int
    registers: int
    shared: int
    sass: str


def compile_case(case: Case) -> Compiled:
    """Compile the launch of a case for sm_90."""
    from triton.runtime.jit import JITFunction

    grids: list[tuple[str, tuple[int, ...]]] = []
    call = all_launches()[case.kernel, case.case]
    record = JITFunction.run

    def keep(kernel: Any, *arguments: Any, grid: Any, **named: Any) -> None:
        grids.append((kernel.fn.__name__, tuple(grid)))

    with mock.patch.object(JITFunction, "run", keep):
        call()
    assert record is JITFunction.run
    for launch, (_, grid) in zip(aot.record(call), grids, strict=True):
        if launch.name == case.launch:
            code = aot.compiled(launch, "sm_90").asm
            usage = aot._disassemble(code["cubin"], "-res-usage")
            registers, shared = (
                int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("REG", "SHARED")
            )
            return Compiled(
                int(np.prod(grid)),
                launch.options["num_warps"],
                registers,
                shared,
                aot._disassemble(code["cubin"], "-sass"),
            )
    raise AssertionError(f"{case.kernel} has no launch {case.launch} in {case.case}")


def count_instructions(sass: str, trips: Sequence[float], skipped: Sequence[float]) -> float:
    """Return the expected instructions of one warp.

    How often a block of code runs follows from the probabilities of the jumps, as the solution of a
    system of linear equations.
    """
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)
    ]
    addresses = {address: i for i, (address, _) in enumerate(code)}
    n = len(code)
    flow = np.zeros((n, n + 1))  # probability of going from one instruction to another; n: the end
    back, forward = list(trips), list(skipped)
    for i, (address, text) in enumerate(code):
        jump = re.match(r"(@!?U?P\d+ )?(?:\S*\s)*?BRA\S* .*?(0x[0-9a-f]+)", text)
        if jump is None:
            ends = re.match(r"(EXIT|RET)", text) is not None
            flow[i, n if ends else i + 1] = 1
            continue
        target = int(jump.group(2), 16)
        if target == address:  # what follows the end of a kernel
            flow[i, n] = 1
            continue
        if target < address:
            assert back, f"a loop from {target:#x} to {address:#x}: how often does it run?"
            taken = 1 - 1 / back.pop(0)
        elif jump.group(1):
            taken = forward.pop(0) if forward else 0
        else:
            taken = 1
        flow[i, addresses[target]] += taken
        # Before an unconditional jump back stands a conditional exit.
        leaves = n if target < address and not jump.group(1) else i + 1
        flow[i, leaves] += 1 - taken
    assert not back, f"the code has {len(trips) - len(back)} loops, not {len(trips)}"
    assert not forward, f"the code has fewer than {len(skipped)} conditional jumps"
    visits = np.linalg.solve(np.eye(n) - flow[:, :n].T, np.eye(n)[0])
    return float(visits.sum())


def occupancy(code: Compiled) -> int:
    """Return how many programs run on a multiprocessor at the same time."""
    per_warp = -(-code.registers // 8) * 8 * 32
    by_registers = REGISTERS // (per_warp * code.warps)
    by_shared = SHARED // (code.shared + 1024)
    return min(by_registers, by_shared, WARPS // code.warps, PROGRAMS)


def tail(code: Compiled, waves: float) -> float:
    """Return how much longer instructions take than if they were spread evenly."""
    if waves < 1:
        warps = code.programs * code.warps / SCHEDULERS
        return ceil(warps) / warps
    # A part of a last wave occupies the multiprocessors as long as a full one.
    return ceil(waves) / waves if waves < 4 else 1


class Estimate(NamedTuple):
    """What the model says of a launch; see `HEADER`."""

    instructions: float
    warps: int
    programs: int
    per_byte: float
    registers: int
    occupancy: float
    waves: float
    copy_us: float
    issue_us: float
    us: float


def estimate(case: Case) -> Estimate:
    """Estimate a launch."""
    code = compile_case(case)
    instructions = count_instructions(code.sass, case.trips, case.skipped)
    total = instructions * code.warps * code.programs
    at_once = occupancy(code)
    waves = code.programs / (at_once * MULTIPROCESSORS)
    bytes_us = (case.must + case.extra) / COPIED_PER_US
    issue_us = total / (SCHEDULERS * ISSUED_PER_US)
    return Estimate(
        instructions=instructions,
        warps=code.warps,
        programs=code.programs,
        per_byte=32 * total / case.must,
        registers=code.registers,
        occupancy=at_once * code.warps / WARPS,
        waves=waves,
        copy_us=case.must / COPIED_PER_US,
        issue_us=issue_us,
        us=max(bytes_us, issue_us * tail(code, waves)),
    )


def shown(number: float) -> str:
    """Return a number, with a decimal if it is below 1."""
    return f"{number:.0f}" if number >= 1 else f"{number:.1f}"


def line(*cells: str) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def estimate_line(case: Case) -> str:
    """Return the line of a case."""
    made = estimate(case)
    return line(
        case.kernel,
        case.launch,
        case.case,
        shown(case.must / 1e6),
        shown((case.must + case.extra) / 1e6),
        f"{made.instructions:.0f} x {made.warps} x {made.programs}",
        f"{made.per_byte:.2f}",
        f"{made.registers}",
        f"{made.occupancy:.0%}",
        f"{made.waves:.1f}",
        shown(made.copy_us),
        shown(made.issue_us),
        shown(made.us),
        f"{made.copy_us / made.us:.0%}",
    )


HEADER = (
    "kernel", "launch", "case", "MB", "MB moved", "instructions of a warp x warps x programs",
    "thread instructions a byte", "registers", "occupancy", "waves", "copy us", "issue us",
    "estimate us", "share of copy",
)  # fmt: skip


class Measured(NamedTuple):
    """Rows of one benchmark, and the launches in them.

    Attributes:
        bench: Name of the benchmark.
        case: What the case's description contains.
        pass_: The pass.
        dtype: The dtype.
        kernel: Name of the kernel's file.
        launches: Case and function of each launch.
        times: How much larger the rows' batch is.
    """

    bench: str
    case: str
    pass_: str
    dtype: str
    kernel: str
    launches: Sequence[tuple[str, str]]
    times: float = 1


def measured() -> Iterator[Measured]:
    """Return which rows the estimates predict."""
    name, bench = "gather_patches", "bench_kernel_gather_patches"
    for order in ("c p1 p2", "p1 p2 c"):
        for dtype in ("bfloat16", "float32", "uint8"):
            yield Measured(bench, order, "forward", dtype, name, [(f"{dtype}, {order}", "gather")])
        gradient = [(f"gradient, bfloat16, {order}", "scatter")]
        yield Measured(bench, order, "backward", "bfloat16", name, gradient)
    for order in ("c p1 p2", "p1 p2 c"):
        for pixels in ("float32", "uint8"):
            for pass_ in ("forward", "backward"):
                yield Measured(
                    "bench_kernel_masked_pixel_loss", f"{pixels}, {order}", pass_, "bfloat16",
                    "masked_pixel_loss",
                    [(f"bfloat16, {pixels} images, {order}, normalized, l2", pass_)],
                )  # fmt: skip
    for bench, pass_, launch in (
        ("gather", "forward", ("gather, bfloat16", "gather")),
        ("gather", "backward", ("scatter, bfloat16", "restore")),
        ("restore", "forward", ("restore, positions, bfloat16", "restore")),
    ):
        bench = f"bench_kernel_{bench}_tokens"
        yield Measured(bench, "", pass_, "bfloat16", "move_tokens", [launch])
    for pass_ in ("forward", "backward"):
        name, launch = "regressor_inputs", ("width 768, bfloat16", pass_)
        yield Measured(f"bench_kernel_{name}", "", pass_, "bfloat16", name, [launch], 256 / 64)
    for stage in ("stage 1", "stage 2"):
        name, conv = "packed_depthwise_conv", (f"{stage}, bfloat16", "conv")
        # The gradient of the input is a convolution, too.
        both = [conv, conv, (f"filter's gradient, {stage}, bfloat16", "weight_gradient")]
        yield Measured("bench_depthwise", stage, "forward", "bfloat16", name, [conv])
        yield Measured("bench_depthwise", stage, "both", "bfloat16", name, both)
    for tokens in (196, 784, 4096):
        name, launch = "uniform_sample", (f"{tokens} tokens", "sample")
        yield Measured(f"bench_kernel_{name}", f"L={tokens} ", "forward", "int64", name, [launch])


def find_rows(file: Path, wanted: Measured) -> list[dict[str, Any]]:
    """Return the rows of our kernel that a sum of estimates predicts."""
    ours = ("mimkit kernel", "mimkit, packed")
    key = (wanted.bench, wanted.pass_, wanted.dtype)
    return [
        record
        for record in read_records(file)
        if record.get("variant") in ours
        and (record["bench"], record["pass"], record["dtype"]) == key
        and wanted.case in record["case"]
    ]


def measured_lines(file: Path, kernels: Sequence[str]) -> Iterator[str]:
    """Return the line of each row that was measured, beside its estimate."""
    known = {(case.kernel, case.case, case.launch): case for case in cases()}
    us_of = cache(lambda *name: estimate(known[name]).us)
    for wanted in measured():
        for row in find_rows(file, wanted) if not kernels or wanted.kernel in kernels else ():
            us = wanted.times * sum(us_of(wanted.kernel, *launch) for launch in wanted.launches)
            took = 1e3 * row["min_ms"]
            yield line(
                wanted.kernel,
                f"{row['pass']}, {row['dtype']}, {row['case']}",
                shown(row["moved_bytes"] / 1e6),
                shown(us),
                shown(took),
                f"{took / us:.1f}",
                f"{row['share_of_copy']:.0%}",
                f"{row['commit']}"[:7],
            )


MEASURED_HEADER = (
    "kernel", "pass, dtype, case", "MB", "estimate us", "measured us", "measured / estimate",
    "of copy", "measured commit",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    names = sorted({case.kernel for case in cases()})
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(names)}")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="rows that were measured")
    options = parser.parse_args(arguments)
    for name in options.kernels:
        if name not in names:
            parser.error(f"there is no estimate of {name!r}; choose from {', '.join(names)}")
    if options.rows is None:
        header: Sequence[str] = HEADER
        chosen = [case for case in cases() if case.kernel in (options.kernels or names)]
        lines: Iterator[str] = map(estimate_line, chosen)
    else:
        header, lines = MEASURED_HEADER, measured_lines(options.rows, options.kernels)
    first = next(lines, None)
    if first is None:
        parser.error(f"{options.rows} has no row of a kernel that is estimated")
    print(line(*header), line(*("---" for _ in header)), first, sep="\n", flush=True)
    for text in lines:
        print(text, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
