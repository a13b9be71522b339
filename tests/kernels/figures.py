"""The static figures of every kernel: `python -m tests.kernels.figures` writes them to the README.

A test file `test_<kernel>.py` lists its launches in `LAUNCHES`: a name, and a call of the launcher
on meta tensors. The first one is compiled in the quick tier.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.kernels.aot import TARGETS, Figures, compile_launch, record

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
START, END = "<!-- figures -->", "<!-- end of figures -->"


def all_launches() -> dict[tuple[str, str], Callable[[], Any]]:
    """Return every listed launch by (kernel, case), in the order of files and lists."""
    launches = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(f"tests.kernels.{path.stem}")
        for case, call in getattr(module, "LAUNCHES", {}).items():
            launches[path.stem.removeprefix("test_"), case] = call
    return launches


def quick_launches() -> list[tuple[str, str]]:
    """Return the first case of every kernel."""
    first: dict[str, tuple[str, str]] = {}
    for kernel, case in all_launches():
        first.setdefault(kernel, (kernel, case))
    return list(first.values())


def measure(kernel: str, case: str, target: str) -> Iterator[tuple[tuple[str, str, str], Figures]]:
    """Compile all launches of a case, and yield ((kernel, launch, case), figures)."""
    for launch in record(all_launches()[kernel, case]):
        yield (kernel, launch.name, case), compile_launch(launch, target)


def read_table() -> dict[tuple[str, str, str], dict[str, Figures]]:
    """Return the recorded figures by (kernel, launch, case) and target."""
    text = README.read_text().split(START)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {}
    for kernel, launch, case, *cells in rows:
        figures = {}
        for target, cell in zip(TARGETS, cells, strict=True):
            registers, load, store = map(int, re.findall(r"\d+", cell))
            figures[target] = Figures(registers, 0, load, store)
        table[kernel.strip("` "), launch.strip(), case.strip()] = figures
    return table


def write_table() -> None:
    """Compile everything for every target, and replace the table in the README."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for kernel, case in all_launches():
        for target in TARGETS:
            for key, figures in measure(kernel, case, target):
                assert figures.local == 0, f"{key} uses local memory on {target}: {figures}"
                cell = f"{figures.registers}, {figures.load_bits}, {figures.store_bits}"
                rows.setdefault(key, []).append(cell)
    header = ["kernel", "launch", "case", *TARGETS]
    lines = [header, ["---"] * len(header)]
    lines += [
        [f"`{kernel}`", launch, case, *cells] for (kernel, launch, case), cells in rows.items()
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, rest = README.read_text().split(START)
    README.write_text(f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write_table()
