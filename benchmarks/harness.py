"""The benchmark harness: check every variant, time them in turn, print one table per benchmark.

    pytest benchmarks/                    # check, time, print the tables
    pytest benchmarks/ --seconds 0.5      # less timing: seconds per pass of a case
    pytest benchmarks/ --save             # also append the rows to benchmarks/results/
    pytest benchmarks/ --rows FILE        # append them to FILE instead
    pytest benchmarks/ --rows FILE --resume    # and measure only what FILE does not have yet

Results are written only if asked for, so that other runs leave the checkout clean; each row as soon
as it is measured. Speed is never asserted: a benchmark fails only if a variant differs from the
reference.
"""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

import mimkit
from mimkit_kernels import Backend

Pass = Literal["forward", "backward", "both"]

RESULTS = Path(__file__).parent / "results"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MIN_REPEATS = 1 if INTERPRETED else 5
FLUSH_BYTES = 256 << 20  # several times the largest L2 cache of a GPU
SPIN_CYCLES = 4_000_000  # 2 ms on an H200: longer than Python takes to launch a kernel
# Triton's interpreter stands in for a GPU: every line runs, with tiny shapes and no meaning.
STAND_IN = INTERPRETED
# Of a training step. On a GPU, launches take their part of the small one.
STEP_BATCHES = (64, 256) if torch.cuda.is_available() else (1,) if STAND_IN else (8,)
# Fields that say what was measured, where, and of which code; the others are what came out.
IDENTITY = (
    "bench", "kind", "case", "variant", "pass", "dtype", "ratio", "kernel", "device", "torch",
    "commit",
)  # fmt: skip


def output_and_gradients(output: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Compare the output and every gradient unchanged."""
    return output, *gradients


@dataclass(frozen=True)
class Variant:
    """One implementation to time.

    Attributes:
        name: Name of the row.
        function: Called with `inputs`; must return one tensor if there are `leaves`.
        inputs: Arguments.
        leaves: Tensors to differentiate with respect to, in the same order in all variants; empty
            for forward only.
        view: Maps (output, gradients) to the tensors that must agree with the reference.
        is_baseline: Whether this is an authors' variant; speedups are relative to the fastest one.
        is_compiled: Whether the first call compiles; its duration is then reported.
        upstream: Gradient of the output, for variants whose outputs differ in form; `None` for the
            same noise (1 for a loss) in all variants.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...] = ()
    leaves: tuple[Tensor, ...] = ()
    view: Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]] = output_and_gradients
    is_baseline: bool = False
    is_compiled: bool = False
    upstream: Tensor | tuple[Tensor, ...] | None = None

    def compiled(self, *, fullgraph: bool = True) -> "Variant":
        """Return the same variant with `torch.compile`, in one graph or as many as it needs."""
        backend = "aot_eager" if STAND_IN else "inductor"
        function = torch.compile(self.function, fullgraph=fullgraph, dynamic=False, backend=backend)
        name = f"{self.name}, torch.compile"
        return replace(self, name=name, function=function, is_compiled=True)

    def forward(self) -> Any:
        """Run the forward pass."""
        return self.function(*self.inputs)

    def backward(self, output: Any) -> tuple[Tensor, ...]:
        """Run the backward pass with the same output gradient in every variant."""
        if not self.leaves:
            return ()
        upstream = upstream_gradient(output) if self.upstream is None else self.upstream
        return torch.autograd.grad(output, self.leaves, upstream)


def with_compiled(variants: Iterable[Variant]) -> list[Variant]:
    """Return the variants, eager and with `torch.compile`."""
    eager = list(variants)
    return [*eager, *(variant.compiled() for variant in eager)]


def kernel_variants(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    leaves: tuple[Tensor, ...],
    device: torch.device,
) -> list[Variant]:
    """Return variants of a mimkit function: reference and kernel, each eager and compiled.

    On a CPU there is no kernel; its rows then time the function with the default settings.
    """

    def through(backend: Backend, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            with mimkit.use(backend):
                return function(*inputs)

        return call

    launches = device.type == "cuda" or STAND_IN
    kernel: Backend = "triton" if launches else "auto"
    name = "mimkit kernel" if launches else "mimkit"
    compiled = Variant("", function).compiled().function
    return [
        Variant("eager", through("reference", function), inputs, leaves, is_baseline=True),
        Variant(
            "torch.compile",
            through("reference", compiled),
            inputs,
            leaves,
            is_baseline=True,
            is_compiled=True,
        ),
        Variant(name, through(kernel, function), inputs, leaves),
        Variant(
            f"{name}, torch.compile", through(kernel, compiled), inputs, leaves, is_compiled=True
        ),
    ]


@dataclass(frozen=True)
class Row:
    """One row of a table and of the results file."""

    bench: str
    case: str
    variant: str
    pass_: Pass
    dtype: str
    repeats: int
    min_ms: float
    median_ms: float
    speedup: float | None
    paired_speedup: float | None = None
    moved_bytes: int | None = None
    share_of_copy: float | None = None
    peak_bytes: int | None = None
    first_call_s: float | None = None

    def as_record(self) -> dict[str, Any]:
        """Return the row with the field names of the results file."""
        record = asdict(self)
        return {name.rstrip("_"): value for name, value in record.items()}

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> "Row":
        """Return the row of a record that `as_record` has made."""
        names = (item.name for item in fields(Row))
        return Row(**{name: record[name.rstrip("_")] for name in names})


def read_records(file: Path) -> Iterator[dict[str, Any]]:
    """Return the measurements of a file; lines that a killed run left unfinished are skipped."""
    for line in file.read_text().splitlines() if file.exists() else ():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a measurement from others."""
    return tuple(record.get(name) for name in IDENTITY)


@dataclass
class Report:
    """All measurements of a session; with `resume`, what the file has already is not added."""

    rows: list[Row] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    file: Path | None = None
    resume: bool = False

    @cached_property
    def earlier(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """The measurements of earlier sessions to go on from."""
        records = read_records(self.file) if self.resume and self.file is not None else ()
        return {identity(record): record for record in records}

    def find(self, **record: Any) -> dict[str, Any] | None:
        """Return the same measurement of an earlier session, of the same code on this machine."""
        return self.earlier.get(identity(record | describe_environment()))

    def add(self, row: Row) -> None:
        """Keep a row, and save it."""
        self.rows.append(row)
        self.save(row.as_record())

    def lines(self) -> list[str]:
        """Return the tables, one per benchmark, with their notes."""
        names = dict.fromkeys([*(row.bench for row in self.rows), *self.notes])
        lines = []
        for name in names:
            rows = [row for row in self.rows if row.bench == name]
            lines += ["", name, *format_table(rows), *self.notes.get(name, [])]
        return lines

    def save(self, record: dict[str, Any]) -> None:
        """Append a measurement to the file, if there is one."""
        if self.file is None or self.find(**record) is not None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            # A killed run may have left an unfinished line.
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write(json.dumps(record | describe_environment()).encode() + b"\n")


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def results_file() -> Path:
    """Return today's results file of this machine."""
    environment = describe_environment()
    slug = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    date, version = environment["date"][:10], environment["torch"]
    return RESULTS / f"{date}-{slug}-torch{version}.jsonl"


@dataclass(frozen=True)
class Bench:
    """The fixture of a benchmark function.

    Attributes:
        name: Title of the table.
        device: The GPU if there is one, else the CPU.
        seconds: Timing budget of one pass of a case, in seconds.
        report: Collects rows and notes.
        only: Regular expression of the names of variants to run; `None` for all.
    """

    name: str
    device: torch.device
    seconds: float
    report: Report
    only: str | None = None

    def compare(
        self,
        case: str,
        variants: Sequence[Variant],
        *,
        dtype: torch.dtype,
        tolerance: float,
        passes: Sequence[Pass] = ("forward",),
        moved: Mapping[Pass, int] | None = None,
        min_repeats: int = MIN_REPEATS,
        graphs: bool = False,
    ) -> None:
        """Check every variant against the first one, then time them all in turn.

        Args:
            case: Description of the case, with shapes.
            variants: The first one is the reference.
            dtype: Shown in the table.
            tolerance: Largest norm of a difference over the norm of the reference.
            passes: Passes to time.
            moved: Bytes that each pass must at least read and write; a copy of the same number of
                bytes is then timed as well.
            min_repeats: Minimum number of calls of each variant, even if they exceed the budget.
            graphs: Whether a GPU also replays mimkit's eager variants as CUDA graphs, forward and
                backward. (Some authors' code reads values, which cannot be captured.)

        Raises:
            AssertionError: If a variant differs from the reference; nothing is timed then. Or if
                one cannot be captured; the others are timed.
            ValueError: If no variant is selected for timing.
        """
        if self.device.type == "cpu" and any(v.name == "mimkit" for v in variants):
            self.note_once(describe_kernel_rows())
        reference, *_ = variants
        variants = self.chosen(variants)
        own: list[Variant] = []
        if graphs and (self.device.type == "cuda" or STAND_IN):
            own = [v for v in variants if "authors" not in v.name and not v.is_compiled]
        replayed = [graph_name(variant) for variant in own]
        names = [*(variant.name for variant in variants), *replayed]
        passes = [pass_ for pass_ in passes if not self._take_earlier(case, names, pass_, dtype)]
        if not passes:
            return
        checked = variants if reference in variants else [reference, *variants]
        first_call = check_variants(checked, tolerance)
        failures = []
        for variant in own:
            try:
                variants = [*variants, graphed(variant)]
            except RuntimeError as error:  # raised at the end: the others are timed first
                failures.append(f"{graph_name(variant)!r} cannot be captured: {error}")
        for pass_ in passes:
            timed = {v.name: timer(v, pass_, self.device) for v in variants}
            moved_bytes = (moved or {}).get(pass_)
            if moved_bytes is not None:
                timed["copy"] = timer(
                    copy_variant(moved_bytes, self.device), "forward", self.device
                )
            times = alternate(timed, self.seconds, 1 if STAND_IN else min_repeats)
            baselines = (times[v.name] for v in variants if v.is_baseline)
            best = min(baselines, key=min, default=None)
            for variant in variants:
                fastest = min(times[variant.name])
                share = min(times["copy"]) / fastest if moved_bytes is not None else None
                # The memory of a graph is taken when it is captured, not when it is replayed.
                has_peak = pass_ == "both" and variant.name not in replayed
                row = Row(
                    bench=self.name,
                    case=case,
                    variant=variant.name,
                    pass_=pass_,
                    dtype=_dtype_name(dtype),
                    repeats=len(times[variant.name]),
                    min_ms=1e3 * fastest,
                    median_ms=1e3 * statistics.median(times[variant.name]),
                    speedup=None if best is None else min(best) / fastest,
                    paired_speedup=None if best is None else paired(best, times[variant.name]),
                    moved_bytes=moved_bytes,
                    share_of_copy=share,
                    peak_bytes=peak_bytes(variant) if has_peak else None,
                    first_call_s=first_call.get(variant.name) if variant.is_compiled else None,
                )
                self.report.add(row)
        if failures:
            raise AssertionError("; ".join(failures))

    def _take_earlier(
        self, case: str, names: Iterable[str], pass_: Pass, dtype: torch.dtype
    ) -> bool:
        """Take the rows of an earlier session if all are there; return whether they were."""
        common = {"bench": self.name, "case": case, "pass": pass_, "dtype": _dtype_name(dtype)}
        found = [self.report.find(variant=name, **common) for name in names]
        records = [record for record in found if record is not None]
        if len(records) < len(found):
            return False
        self.report.rows += map(Row.of_record, records)
        return True

    def batch(self, on_gpu: int, on_cpu: int) -> int:
        """Return the batch size for the device; 1 for the stand-in."""
        return on_gpu if self.device.type == "cuda" else 1 if STAND_IN else on_cpu

    def chosen(self, variants: Sequence[Variant]) -> list[Variant]:
        """Return the variants to time.

        Raises:
            ValueError: If there are none.
        """
        chosen = [v for v in variants if self.only is None or re.search(self.only, v.name)]
        if not chosen:
            names = [variant.name for variant in variants]
            raise ValueError(f"--variants {self.only!r} matches none of the names {names}")
        return chosen

    def note_once(self, line: str) -> None:
        """Print a line below the table, unless it is already there."""
        if line not in self.report.notes.get(self.name, []):
            self.note([line])

    def with_seconds(self, seconds: float) -> "Bench":
        """Return the same benchmark with another timing budget."""
        return replace(self, seconds=seconds)

    def note(self, lines: Sequence[str], **record: Any) -> None:
        """Print lines below the table; also save `record` to the results, if given."""
        self.report.notes.setdefault(self.name, []).extend(lines)
        if record:
            self.report.save({"bench": self.name, **record})


def check_variants(variants: Sequence[Variant], tolerance: float) -> dict[str, float]:
    """Compare every variant with the first one; return the duration of each first call in seconds.

    Raises:
        AssertionError: If a variant differs.
    """
    seconds: dict[str, float] = {}
    expected: tuple[Tensor, ...] = ()
    for variant in variants:
        start = time.perf_counter()
        output = variant.forward()
        gradients = variant.backward(output)
        _synchronize()
        seconds[variant.name] = time.perf_counter() - start
        results = tuple(result.detach() for result in variant.view(output, gradients))
        expected = expected or results
        for i, (result, reference) in enumerate(zip(results, expected, strict=True)):
            assert_close(f"result {i} of '{variant.name}'", result, reference, tolerance)
    return seconds


def assert_close(name: str, result: Tensor, reference: Tensor, tolerance: float) -> None:
    """Check the norm of the difference relative to the norm of the reference."""
    if result.shape != reference.shape:
        raise AssertionError(
            f"{name} has shape {tuple(result.shape)}; expected {tuple(reference.shape)}"
        )
    error = float((result.double() - reference.double()).norm())
    bound = tolerance * float(reference.double().norm())
    if not error <= bound:  # also catches nan
        raise AssertionError(f"{name} is off by {error:.3g}; at most {bound:.3g} is rounding")


def peak_bytes(variant: Variant) -> int | None:
    """Return the peak memory of forward and backward on a GPU.

    Weights and inputs are not counted: those of all variants are there at the same time.
    """
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.backward(variant.forward())
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timer(variant: Variant, pass_: Pass, device: torch.device) -> Callable[[], float]:
    """Return a function that runs one pass of a variant and returns its duration in seconds."""
    clock = time_on_gpu if device.type == "cuda" else time_on_cpu

    def forward() -> float:
        return clock(variant.forward)

    def backward() -> float:
        output = variant.forward()  # not timed
        return clock(lambda: variant.backward(output))

    def both() -> float:
        return clock(lambda: variant.backward(variant.forward()))

    return {"forward": forward, "backward": backward, "both": both}[pass_]


def graph_name(variant: Variant) -> str:
    """Return the name of the row of a variant's CUDA graph."""
    return f"{variant.name}, CUDA graph"


def graphed(variant: Variant) -> Variant:
    """Return the forward and backward pass of a variant as a CUDA graph, which is replayed."""

    def run() -> None:
        variant.backward(variant.forward())

    name = graph_name(variant)
    if not torch.cuda.is_available():  # the stand-in
        return Variant(name, run)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Variant(name, graph.replay)


def time_on_cpu(run: Callable[[], Any]) -> float:
    """Return the duration of one call in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def time_on_gpu(run: Callable[[], Any]) -> float:
    """Return the GPU time of one call in seconds, starting with a cold L2 cache."""
    torch.cuda.synchronize()
    _flush_buffer().zero_()
    # The host queues the call while the device spins, so that the time of Python is hidden.
    torch.cuda._sleep(SPIN_CYCLES)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def alternate(
    timed: Mapping[str, Callable[[], float]], seconds: float, min_repeats: int
) -> dict[str, list[float]]:
    """Time the callables in turn, A B C A B C ..., so that machine noise affects all of them.

    They need no warm-up: `check_variants` has called each.
    """
    times: dict[str, list[float]] = {name: [] for name in timed}
    start, repeats = time.perf_counter(), 0
    while repeats < min_repeats or time.perf_counter() - start < seconds:
        for name, run in timed.items():
            times[name].append(run())
        repeats += 1
    return times


def paired(baseline: Sequence[float], times: Sequence[float]) -> float:
    """Return the median over turns of the ratio of two variants' times in the same turn.

    A slow-down of the machine over several turns affects both, and a single fast call has no
    effect.
    """
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, times, strict=True))


def copy_variant(moved_bytes: int, device: torch.device) -> Variant:
    """Return a copy that reads half of `moved_bytes` and writes the other half."""
    size = max(moved_bytes // 2, 1)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return Variant("copy", target.copy_, (source,))


def upstream_gradient(output: Tensor) -> Tensor:
    """Return the gradient of the output: fixed noise, or 1 for a loss."""
    return torch.ones_like(output) if output.ndim == 0 else _noise(output.shape, output)


def nbytes(*tensors: Tensor) -> int:
    """Return the size of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def format_table(rows: Sequence[Row]) -> list[str]:
    """Format rows as a table."""
    if not rows:
        return []
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row.case,
        "dtype": lambda row: row.dtype,
        "pass": lambda row: row.pass_,
        "variant": lambda row: row.variant,
        "min ms": lambda row: f"{row.min_ms:.3f}",
        "median ms": lambda row: f"{row.median_ms:.3f}",
        "n": lambda row: str(row.repeats),
        "x authors": lambda row: _format(row.speedup, "{:.2f}"),
        "paired": lambda row: _format(row.paired_speedup, "{:.2f}"),
        "MB moved": lambda row: _format(row.moved_bytes, "{:.2f}", 1e-6),
        "of copy": lambda row: _format(row.share_of_copy, "{:.0%}"),
        "peak MiB": lambda row: _format(row.peak_bytes, "{:.0f}", 2**-20),
        "compile s": lambda row: _format(row.first_call_s, "{:.1f}"),
    }
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        texts, numbers = (
            zip(line[:4], widths[:4], strict=True),
            zip(line[4:], widths[4:], strict=True),
        )
        aligned = [*(c.ljust(w) for c, w in texts), *(c.rjust(w) for c, w in numbers)]
        lines.append("  ".join(aligned))
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


@cache
def describe_environment() -> dict[str, Any]:
    """Return the machine, versions and commit that a result depends on."""
    # A copy of the tree without .git is told which commit it is.
    head = _git("rev-parse", "HEAD")
    # What git does not track may be wheels or results, and runs only through what it tracks.
    changes = None if head is None else _git("status", "--porcelain", "--untracked-files=no")
    return {
        "device": _device_name(),
        "threads": torch.get_num_threads(),
        # A load above the number of threads means that other programs ran too.
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": os.environ.get("MIMKIT_COMMIT") or head,
        "dirty": None if changes is None else bool(changes),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe_kernel_rows() -> str:
    """Return a line that says whether rows measure Triton kernels, and if not, why."""
    if not torch.cuda.is_available():
        return "kernel rows skipped: torch.cuda.is_available() is False; these are the CPU paths"
    package = Path(__file__).parent.parent / "kernels" / "mimkit_kernels"
    if not [path for path in package.glob("*.py") if not path.name.startswith("_")]:
        return "kernel rows skipped: mimkit_kernels has no kernels"
    return "kernel rows: mimkit's variants run on the GPU"


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 matrix products are fast on `device`, and not emulated."""
    return device.type != "cpu" or bool(
        not STAND_IN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _noise(shape: torch.Size, like: Tensor) -> Tensor:
    key = (tuple(shape), like.dtype, like.device)
    if key not in _noises:
        generator = torch.Generator(like.device).manual_seed(0)
        _noises[key] = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    return _noises[key]


_noises: dict[Any, Tensor] = {}


@cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _format(value: float | None, pattern: str, scale: float = 1.0) -> str:
    return "" if value is None else pattern.format(value * scale)


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.machine()} {os.cpu_count()} cpus"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
