"""Run everything that needs a GPU, in parts; started by `run_gpu.sh`.

Each call works for at most eight minutes, then says what is left: call it again until nothing is.
A step that is done is not repeated. All output is in the output folder: `rows.jsonl` (each row as
soon as it is measured), one text file a step, `steps.json`.

    benchmarks/run_gpu.sh FOLDER [--part tests] [--minutes 8] [--jobs 8] [--stand-in]

`--jobs` is how many tests run at once; what is timed runs alone.

With `--stand-in`, Triton's interpreter takes the place of the GPU, with tiny shapes, so that every
step can be tried on a CPU. Its figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Compilation ahead of time and the interpreter need no GPU.
LEFT_OUT = ("test_static", "test_races", "test_ownership")
# `kernels` has steps of its own, `house` needs linters, and `peers` their packages.
ELSEWHERE = ("kernels", "house", "peers")
COMPILED = "training or compiled or compile"
STEPS = ("mae", "convmae", "cae", "simmim")
TRIES = 2
NOTHING_SELECTED = 5  # of pytest


@dataclass(frozen=True)
class Step:
    """A command: its part, a name, and the most minutes it may take."""

    part: str
    name: str
    command: list[str]
    minutes: float = 8.0


def steps(folder: Path, stand_in: bool, jobs: int) -> Iterator[Step]:
    """Return all steps in the order in which they are worth running."""
    python = sys.executable
    rows = ["--rows", str(folder / "rows.jsonl")]
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--continue-on-collection-errors"]
    marks = "launches and not full" if stand_in else "not full"
    test = [python, "-m", "pytest", *options, "-m", marks, "-k"]
    yield Step("smoke", "smoke", [python, "-m", "benchmarks.run_gpu", str(folder), "--smoke"], 3)

    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    files = [str(file) for file in files if file.stem not in LEFT_OUT]
    alone = "not static_figures and not in_the_interpreter"
    for file in files:
        yield Step("tests", Path(file).stem, [*test, f"{alone} and not ({COMPILED})", file])
    for file in files:
        name = f"{Path(file).stem}-compiled"
        yield Step("tests", name, [*test, f"{alone} and ({COMPILED})", file])
    # It imports the recipes, and so more packages than the others.
    ragged = [python, "-m", "pytest", *options, str(ROOT / "tests" / "nn" / "test_ragged.py")]
    yield Step("tests", "test_ragged", [*ragged, *(["-k", "empty"] if stand_in else [])])
    decoding = [python, "-m", "pytest", *options, "-s", "-k", "nvjpeg_gives"]
    yield Step(
        "tests", "test_on_gpu", [*decoding, str(ROOT / "tests" / "recipes" / "test_on_gpu.py")]
    )

    # All else: a machine with a GPU takes other paths, and recipes train on it.
    quick = [python, "-m", "pytest", *options, "-rfs", "-n", str(jobs), "--dist", "loadfile"]
    quick += [f"--ignore={ROOT / 'tests' / name}" for name in ELSEWHERE]
    quick += ["-m", "not full", str(ROOT / "tests" / ("masking" if stand_in else ""))]
    yield Step("quick", "quick", quick)

    seconds = "0" if stand_in else "0.2"
    bench = [python, "-m", "pytest", *options, "-s", "--seconds", seconds, *rows]
    kernels = [f"bench_kernel_{file[5:]}" for file in (Path(f).stem for f in files)]
    kernels = [name for name in [*kernels, "bench_depthwise"] if (_bench(name)).exists()]
    for kind, pattern in (("eager", "^(?!.*compile)"), ("compiled", "compile")):
        for name in kernels:
            if (name, kind) == ("bench_depthwise", "compiled"):
                continue  # it has no compiled variants
            command = [*bench, "--variants", pattern, str(_bench(name))]
            yield Step("kernels", f"{name}-{kind}", command)
    for kind, other, pattern in (
        ("eager", "compiled", "^(?!.*compile)"),
        ("compiled", "eager", "compile"),
    ):
        for name in STEPS:
            if stand_in and kind == "compiled":
                pattern = "mimkit.*compile"  # tracing the authors' models takes minutes on a CPU
            # Some have a case for each kind, others have variants of both.
            command = [*bench, "-k", f"bfloat16 and not {other}", "--variants", pattern]
            yield Step("steps", f"{name}-{kind}", [*command, str(_bench(f"bench_{name}_step"))])
    sweep = [python, "-m", "benchmarks.sweep_launches", *rows]
    yield Step("sweep", "sweep", sweep if stand_in else [*sweep, "--jobs", str(jobs)])
    small = ["--images", "16", "--batch-size", "4", "--workers", "1", "--size", "64"]
    loader = [python, "-m", "benchmarks.load_images", *rows, *(small if stand_in else [])]
    yield Step("loader", "loader", loader)


def _bench(name: str) -> Path:
    return ROOT / "benchmarks" / f"{name}.py"


def smoke(folder: Path) -> None:
    """Compile and run the smallest kernel, and record the machine."""
    import torch
    import triton
    import triton.language as tl

    from benchmarks.harness import STAND_IN, describe_environment

    @triton.jit
    def double(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        i = tl.arange(0, BLOCK)
        tl.store(x + i, tl.load(x + i) * 2)

    if not (STAND_IN or torch.cuda.is_available()):
        raise SystemExit("PyTorch sees no GPU here; --stand-in tries everything without one")
    x = torch.ones(64, device="cpu" if STAND_IN else "cuda")
    double[(1,)](x, BLOCK=64)
    assert bool((x == 2).all()), x
    environment = describe_environment()
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))
    print(environment)


def run(step: Step, folder: Path, environment: dict[str, str], seconds: float) -> int | None:
    """Run a step; return its exit code, or `None` if its time is over."""
    with (folder / f"{step.part}-{step.name}.txt").open("w") as output:
        process = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # pytest prints its report when interrupted.
            for number, patience in ((signal.SIGINT, 15), (signal.SIGKILL, 5)):
                os.killpg(process.pid, number)
                try:
                    process.wait(patience)
                    break
                except subprocess.TimeoutExpired:
                    continue
            return None


def main() -> int:
    """Run the steps that are not done, for some minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", action="append", help="only this part; may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if options.smoke:
        smoke(folder)
        return 0

    environment = dict(os.environ)
    if options.stand_in:
        environment["TRITON_INTERPRET"] = "1"
    record = folder / "steps.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    end = time.monotonic() + 60 * options.minutes

    def attempt(step: Step) -> str | None:
        """Run a step that is not done; return its name if it is left."""
        name = f"{step.part}/{step.name}"
        result = done.setdefault(name, {"tries": 0, "exit_code": None})
        is_done = result["exit_code"] == 0 or result["tries"] >= TRIES
        if is_done or (options.part and step.part not in options.part):
            return None
        seconds = min(end - time.monotonic() - 20, 60 * step.minutes)
        if seconds < 20:
            return name
        start = time.monotonic()
        code = run(step, folder, environment, seconds)
        # pytest selects nothing where a file has no test for this device.
        result["exit_code"] = code = 0 if code == NOTHING_SELECTED else code
        result["tries"] += 1
        result["seconds"] = round(time.monotonic() - start, 1)
        record.write_text(json.dumps(done.copy(), indent=1))
        what = f"exit code {code}" if code is not None else "stopped: out of time"
        print(f"{name}: {what} after {result['seconds']} s", flush=True)
        return name if code != 0 and result["tries"] < TRIES else None

    left: list[str] = []
    for part, group in groupby(steps(folder, options.stand_in, options.jobs), lambda s: s.part):
        with ThreadPoolExecutor(options.jobs if part == "tests" else 1) as pool:
            left += filter(None, pool.map(attempt, group))
        if part == "smoke" and done["smoke/smoke"]["exit_code"] not in (0, None):
            print((folder / "smoke-smoke.txt").read_text())
            return 1
    bad = [name for name, result in done.items() if result["tries"] and result["exit_code"] != 0]
    print(f"failed or out of time: {', '.join(bad) or 'none'}")
    print(f"left: {', '.join(left) or 'nothing'}" + ("; call it again" if left else ""))
    return 3 if left else 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
