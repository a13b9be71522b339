"""Run everything that needs a GPU, in parts; started by `run_gpu.sh`.

Each call works for at most eight minutes, then says what is left: call it again until nothing is.
A step that is done is not repeated, one that fails or is out of time is tried once more, and a row
that is there is not measured again. A signal ends the call like its time. All output is in the
output folder: `rows.jsonl` (each row as soon as it is measured), `steps.json`, `environment.json`
and `log.txt`, which has what each step printed at each try.

    benchmarks/run_gpu.sh FOLDER [--part tests] [--minutes 8] [--jobs N] [--stand-in]

`--jobs` is how many tests run at once (8, or one a core if there are fewer); what is timed runs
alone. Wheels in the folder `wheels`
are unpacked and used.

With `--stand-in`, Triton's interpreter takes the place of the GPU, with tiny shapes, so that every
step can be tried on a CPU. Its figures mean nothing.
"""

import argparse
import ctypes
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Compilation ahead of time and the interpreter need no GPU.
LEFT_OUT = ("test_static", "test_races", "test_ownership")
# `kernels` has steps of its own, `house` needs linters, and `peers` their packages.
ELSEWHERE = ("kernels", "house", "peers")
COMPILED = "training or compiled or compile"
STEPS = ("mae", "convmae", "cae", "simmim")
TRIES = 2
LEAST = 20  # seconds, with which a step is still begun
PATIENCE = 15  # seconds that a step has to end when it is stopped
STOP = threading.Event()  # set by signals
LIBC = ctypes.CDLL(None)
PARTS = ("smoke", "tests", "quick", "kernels", "steps", "sweep", "loader")
RECIPES = ("tests", "quick", "steps", "loader")
# What parts need beside PyTorch and Triton: package, module, parts (none if it is optional).
PACKAGES = {
    "jaxtyping": ("jaxtyping", PARTS),
    "wadler-lindig": ("wadler_lindig", PARTS),
    "einops": ("einops", PARTS),
    "pytest": ("pytest", PARTS),
    "hypothesis": ("hypothesis", ("tests", "quick")),
    "pytest-xdist": ("xdist", ("quick",)),
    "execnet": ("execnet", ("quick",)),
    "tyro": ("tyro", RECIPES),
    "typeguard": ("typeguard", RECIPES),
    "docstring-parser": ("docstring_parser", RECIPES),
    "pyyaml": ("yaml", RECIPES),
    "tqdm": ("tqdm", RECIPES),
    "safetensors": ("safetensors", RECIPES),
    "pillow": ("PIL", RECIPES),
    "matplotlib": ("matplotlib", RECIPES),
    "scikit-image": ("skimage", RECIPES),
    "scikit-learn": ("sklearn", RECIPES),
    "simplejpeg": ("simplejpeg", ()),
}
# pytest selects nothing where a file has no test for this device.
NOTHING_SELECTED = 5


@dataclass(frozen=True)
class Step:
    """A command: its part, a name, and the most minutes it may take."""

    part: str
    name: str
    command: list[str]
    minutes: float = 8.0

    @property
    def full_name(self) -> str:
        """The name of the step with its part."""
        return f"{self.part}/{self.name}"


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
    bench = [python, "-m", "pytest", *options, "-s", "--seconds", seconds, *rows, "--resume"]
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
    sweep = [python, "-m", "benchmarks.sweep_launches", *rows, "--jobs", str(jobs)]
    yield Step("sweep", "sweep", sweep)
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


def missing(parts: Iterable[str]) -> list[str]:
    """Return which packages parts need and cannot import, each with the reason."""
    found = []
    for name, (module, users) in PACKAGES.items():
        # Of what is optional, an installation that is broken counts.
        is_wanted = any(part in users for part in parts) if users else find_spec(module) is not None
        if is_wanted:
            try:
                import_module(module)
            except Exception as error:  # a package that is not made for this Python, say
                found.append(f"{name} ({', '.join(users) or 'not needed: remove it'}): {error}")
    return found


def unpack(wheels: Path) -> None:
    """Unpack wheels into `wheels/unpacked`: afresh, since a killed call may have left half.

    Raises:
        ValueError: If a wheel is damaged.
    """
    shutil.rmtree(wheels / "unpacked", ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        try:
            with zipfile.ZipFile(wheel) as files:
                files.extractall(wheels / "unpacked")
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{wheel} cannot be unpacked ({error}): copy it again") from error
    invalidate_caches()


def has_commit() -> bool:
    """Return whether rows can say which commit they measure."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return (
            bool(os.environ.get("MIMKIT_COMMIT"))
            or not subprocess.run(git, capture_output=True, check=False).returncode
        )
    except OSError:  # no git
        return False


class Results:
    """What each step has come to, in `steps.json`; several threads may write it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.lock = folder, folder / "steps.json", threading.Lock()
        self.steps: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            try:
                self.steps = dict(json.loads(self.file.read_text()))
            except (TypeError, ValueError):
                kept = self.file.replace(folder / "steps.damaged.json")
                print(f"steps.json is damaged: kept as {kept.name}; no step counts as done")

    def of(self, step: Step) -> dict[str, Any]:
        """Return the result of a step."""
        return self.steps.get(step.full_name, {"tries": 0, "exit_code": None})

    def keep(self, step: Step, result: dict[str, Any], output: Path, title: str) -> None:
        """Save the result of a step, and add its output to `log.txt`."""
        with self.lock:
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"\n==== {title}\n{output.read_text(errors='replace')}")
            output.unlink()
            self.steps[step.full_name] = result
            # In one move, so that a call that is killed leaves a whole file.
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(self.steps, indent=1))
            new.replace(self.file)


def run(step: Step, output: Path, environment: dict[str, str], seconds: float) -> int | None:
    """Run a step, its output added to a file; return its exit code, or `None` if stopped."""
    end = time.monotonic() + seconds
    with output.open("a") as file:
        process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            env=environment, start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
    while process.poll() is None and time.monotonic() < end and not STOP.wait(0.1):
        continue
    code = process.returncode
    if code is None:
        # pytest prints its report when interrupted.
        with suppress(subprocess.TimeoutExpired):
            process.send_signal(signal.SIGINT)
            process.wait(PATIENCE)
    with suppress(ProcessLookupError):  # what the step has started
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def _die_with_parent() -> None:
    """Let Linux kill this process if its parent is killed."""
    if sys.platform == "linux":
        LIBC.prctl(1, signal.SIGKILL)


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; whatever would waste a machine's time is an error at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.minutes >= 1:
        parser.error(f"--minutes {options.minutes:g}: at least 1, or there is time for no step")
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    options.folder = options.folder.resolve()
    options.part = ["smoke", *(options.part or PARTS)]
    if options.smoke:
        return options
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        options.log = (options.folder / "log.txt").open("a")  # holds the lock
        fcntl.flock(options.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unpack(ROOT / "wheels")
    except BlockingIOError:
        parser.error(f"another call works in {options.folder}: wait for it, or end it")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if absent := missing(options.part):
        lines = "\n".join(f"  {line}" for line in absent)
        parser.error(
            f"packages that cannot be imported:\n{lines}\nPut their wheels, and those of what they "
            f"need, into {ROOT / 'wheels'}, or choose other parts with --part"
        )
    if not (options.stand_in or has_commit()):
        parser.error("there is no git history here: set MIMKIT_COMMIT to the commit that rows name")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that are not done, for some minutes."""
    options = read_options(arguments)
    folder: Path = options.folder
    if options.smoke:
        smoke(folder)
        return 0
    results = Results(folder)
    if any(r["stand_in"] != options.stand_in for r in results.steps.values()):
        print(f"{folder} is of calls {'without' if options.stand_in else 'with'} --stand-in: "
              "give another folder", file=sys.stderr)  # fmt: skip
        return 2
    # Also if this call runs in the background, where the shell lets it ignore interrupts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: STOP.set())

    environment = os.environ | {"TRITON_INTERPRET": "1" if options.stand_in else "0"}
    if options.stand_in:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    end = time.monotonic() + 60 * options.minutes

    def attempt(step: Step) -> str | None:
        """Run a step that is not done; return its name if it is left."""
        result = dict(results.of(step))
        tries = math.inf if step.part == "smoke" else TRIES
        if result["exit_code"] == 0 or result["tries"] >= tries or step.part not in options.part:
            return None
        seconds = min(end - time.monotonic() - PATIENCE - 5, 60 * step.minutes)
        if seconds < LEAST or STOP.is_set():
            return step.full_name
        start, output = time.monotonic(), folder / f"{step.part}-{step.name}.txt"
        code = run(step, output, environment, seconds)
        code = 0 if code == NOTHING_SELECTED else code
        # A step that was stopped has had its try only if it had most of a call's time.
        had_time = code is not None or (not STOP.is_set() and seconds > 30 * options.minutes)
        took = round(time.monotonic() - start, 1)
        result |= {"tries": result["tries"] + had_time, "exit_code": code, "seconds": took}
        result["stand_in"] = options.stand_in
        what = f"exit code {code}" if code is not None else "stopped"
        what = f"{step.full_name}: {what} after {took} s"
        lines = output.read_text(errors="replace").split("\n") if code else []
        results.keep(step, result, output, what)
        print(": ".join([what, *[line for line in lines if line.strip()][-1:]]), flush=True)
        return step.full_name if code != 0 and result["tries"] < tries else None

    left: list[str] = []
    for part, group in groupby(steps(folder, options.stand_in, options.jobs), lambda s: s.part):
        with ThreadPoolExecutor(options.jobs if part == "tests" else 1) as pool:
            left += filter(None, pool.map(attempt, group))
        if part == "smoke" and left and not STOP.is_set():
            print("the smoke test has not passed, so nothing else was tried; see log.txt")
            return 1
    tried = {name: result for name, result in results.steps.items() if result["tries"]}
    bad = [name for name, result in tried.items() if result["exit_code"] != 0]
    print(f"failed or out of time: {', '.join(bad) or 'none'}")
    print(f"left: {', '.join(left) or 'nothing'}" + ("; call it again" if left else ""))
    return 3 if left else 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
