"""Static figures of the compiled kernels: `python -m tests.kernels.figures [KERNEL ...]`.

The command compiles the launches of all kernels, or of some, for several GPUs and records figures
in `recorded/triton-<version>.csv`. Each version of Triton has its own file.

A test file `test_<kernel>.py` lists its launches in `LAUNCHES`: a name, and a call of the launcher
on meta tensors. The quick tier compiles the first one.
"""

import csv
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.kernels.aot import MORE_TARGETS, TARGETS, Figures, compile_launch, record

NEWEST = "3.9"  # the version that CI installs
RECORDED = Path(__file__).parent / "recorded"
QUICK_TARGETS = ("sm_90", "gfx942")
# Figures of patch releases of Triton and of its compilers differ by up to this factor.
SLACK = 1.2


class Key(NamedTuple):
    """Names a compiled launch; the first columns of a file of figures."""

    kernel: str
    launch: str
    case: str
    target: str


def figures_file() -> Path:
    """Return the file of figures of the installed version of Triton."""
    import triton

    return RECORDED / f"triton-{'.'.join(triton.__version__.split('.')[:2])}.csv"


@cache
def read_figures() -> dict[Key, Figures]:
    """Return the recorded figures; those of the newest Triton where this version has none."""
    newest = RECORDED / f"triton-{NEWEST}.csv"
    files = [newest, figures_file()] if figures_file().exists() else [newest]
    return {key: found for file in files for key, found in read_file(file).items()}


def read_file(file: Path) -> dict[Key, Figures]:
    """Return the figures in a file."""
    with file.open(newline="") as lines:
        _, *rows = csv.reader(lines)
    return {
        Key(*row[:4]): Figures(
            registers=int(row[4]), local=0, load_bits=int(row[5]), store_bits=int(row[6])
        )
        for row in rows
    }


@cache
def all_launches() -> dict[tuple[str, str], Callable[[], Any]]:
    """Return every listed launch by (kernel, case), in the order of files and lists."""
    launches = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.kernels.{path.stem}")
        for case, call in getattr(module, "LAUNCHES", {}).items():
            launches[path.stem.removeprefix("test_"), case] = call
    return launches


def compiled_cases(launches: Mapping[str, Any]) -> list[Any]:
    """Return pairs of case and target to compile; all but the first case only in the long tier."""
    first = next(iter(launches))
    return [
        pytest.param(
            case,
            target,
            id=f"{case}-{target}",
            marks=() if case == first and target in QUICK_TARGETS else pytest.mark.full,
        )
        for case in launches
        for target in targets_of(launches, case)
    ]


def targets_of(launches: Iterable[str], case: str) -> tuple[str, ...]:
    """Return the targets of a case; where cases are listed by dtype, one dtype has all targets."""
    return TARGETS + (MORE_TARGETS if list(launches).index(case) % 3 == 0 else ())


def measure(kernel: str, case: str, target: str) -> Iterator[tuple[Key, Figures]]:
    """Compile all launches of a case for a target."""
    for launch in record(all_launches()[kernel, case]):
        yield Key(kernel, launch.name, case, target), compile_launch(launch, target)


def check_case(kernel: str, case: str, target: str) -> None:
    """Assert that no figure of a case is worse than recorded."""
    for key, figures in measure(kernel, case, target):
        recorded = read_figures().get(key)
        assert recorded is not None, f"no figures of {key}: run python -m tests.kernels.figures"
        check_figures(key, figures, recorded)


def check_figures(key: Key, figures: Figures, recorded: Figures) -> None:
    """Assert that figures are not worse than the recorded ones, and that nothing is spilled."""
    assert figures.local == 0, f"{key} uses the stack or local memory: {figures}"
    assert figures.registers <= recorded.registers * SLACK + 4, (key, figures, recorded)
    assert figures.load_bits >= recorded.load_bits, (key, figures, recorded)
    assert figures.store_bits >= recorded.store_bits, (key, figures, recorded)


def write_figures(kernels: Iterable[str]) -> None:
    """Compile all launches of some kernels for every target, and replace their rows of the file."""
    kernels = set(kernels)
    names = [kernel for kernel, _ in all_launches()]
    found = {
        key: figures
        for key, figures in (read_file(figures_file()) if figures_file().exists() else {}).items()
        if key.kernel in names and key.kernel not in kernels
    }
    for kernel, case in all_launches():
        cases = [other for name, other in all_launches() if name == kernel]
        for target in targets_of(cases, case) if kernel in kernels else ():
            for key, figures in measure(kernel, case, target):
                assert figures.local == 0, f"{key} uses the stack or local memory: {figures}"
                found[key] = figures
                print(*key, figures, flush=True)
    RECORDED.mkdir(exist_ok=True)
    with figures_file().open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Key._fields, "registers", "load_bits", "store_bits"])
        for key in sorted(found, key=lambda key: names.index(key.kernel)):
            figures = found[key]
            writer.writerow([*key, figures.registers, figures.load_bits, figures.store_bits])


if __name__ == "__main__":
    write_figures(sys.argv[1:] or {kernel for kernel, _ in all_launches()})
