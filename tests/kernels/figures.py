"""The static figures of the kernels: `python -m tests.kernels.figures [KERNEL ...]` records them.

Those of CI's Triton are in `kernels/README.md`; an older Triton has a file of its own beside it.

A test file `test_<kernel>.py` lists its launches in `LAUNCHES`: a name, and a call of the launcher
on meta tensors. The first one is compiled in the quick tier.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.kernels.aot import TARGETS, Figures, compile_launch, record

NEWEST = "3.9"  # CI's Triton
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
START, END = "<!-- figures -->", "<!-- end of figures -->"


def table_file() -> Path:
    """Return the file of the installed Triton's table."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    return KERNELS / ("README.md" if version == NEWEST else f"figures_triton_{version}.md")


@cache
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
    """Return the recorded figures by (kernel, launch, case) and target.

    Those of the newest Triton, where the installed one has none of its own.
    """
    file = table_file() if table_file().exists() else KERNELS / "README.md"
    text = file.read_text().split(START)[1].split(END)[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    table = {}
    for kernel, launch, case, *cells in rows:
        figures = {}
        for target, cell in zip(TARGETS, cells, strict=True):
            registers, load, store = map(int, re.findall(r"\d+", cell))
            figures[target] = Figures(registers, 0, load, store)
        table[kernel.strip("` "), launch.strip(), case.strip()] = figures
    return table


def write_table(kernels: Sequence[str]) -> None:
    """Compile all launches of some kernels for every target, and renew their rows of the table."""
    file = table_file()
    rows: dict[tuple[str, ...], list[str]] = {}
    for kernel, case in all_launches():
        for target in TARGETS if kernel in kernels else ():
            for (_, launch, _), figures in measure(kernel, case, target):
                assert figures.local == 0, f"{kernel}, {case}, {target}: local memory, {figures}"
                cell = f"{figures.registers}, {figures.load_bits}, {figures.store_bits}"
                rows.setdefault((f"`{kernel}`", launch, case), []).append(cell)
    if not file.exists():
        title = f"# Static figures, {file.stem.removeprefix('figures_').replace('_', ' ')}"
        file.write_text(f"{title}\n\nAs explained in `README.md`.\n\n{START}\n{END}\n")
    before, rest = file.read_text().split(START)
    table, after = rest.split(END)
    for line in table.splitlines():
        if line.startswith("| `"):
            *names, _, _, _, _ = cells = line.strip("| ").split(" | ")
            if names[0].strip("`") not in kernels:
                rows[tuple(names)] = cells[len(names) :]
    header = ["kernel", "launch", "case", *TARGETS]
    order = [f"`{kernel}`" for kernel, _ in all_launches()]
    kept = sorted((row for row in rows if row[0] in order), key=lambda row: order.index(row[0]))
    lines = [header, ["---"] * len(header), *([*row, *rows[row]] for row in kept)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    file.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    write_table(sys.argv[1:] or sorted({kernel for kernel, _ in all_launches()}))
