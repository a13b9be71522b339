"""Command-line options, fixtures and the report at the end of the session."""

from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    STAND_IN,
    Bench,
    Report,
    describe_environment,
    describe_kernel_rows,
    results_file,
)

REPORT = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    group = parser.getgroup("benchmarks")
    group.addoption(
        "--save", action="store_true", help="append the rows to benchmarks/results/ (JSON lines)"
    )
    group.addoption("--rows", type=Path, metavar="FILE", help="append the rows to this file")
    group.addoption(
        "--resume", action="store_true", help="measure only what the file of --rows does not have"
    )
    group.addoption(
        "--seconds", type=float, default=1.0, help="timing budget of one pass of a case (seconds)"
    )
    group.addoption(
        "--variants", metavar="PATTERN", help="time only variants whose names match this pattern"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty report, and record the machine's load before the benchmarks run."""
    describe_environment()
    if config.getoption("--resume") and config.getoption("--rows") is None:
        raise pytest.UsageError("--resume goes on from the file of --rows: add --rows FILE")
    file = results_file() if config.getoption("--save") else config.getoption("--rows")
    config.stash[REPORT] = Report(file=file, resume=config.getoption("--resume"))


@pytest.hookimpl(trylast=True)  # after `-k` has selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For the stand-in, keep the first case of each benchmark."""
    if STAND_IN:
        functions = [item.nodeid.split("[")[0] for item in items]
        items[:] = [item for i, item in enumerate(items) if functions[i] not in functions[:i]]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def bench(request: pytest.FixtureRequest, device: torch.device) -> Bench:
    """Return the harness of a benchmark function; seeds PyTorch and resets its compiler."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions
    torch.compiler.reset()  # earlier cases would count towards the recompilation limit
    seconds = request.config.getoption("--seconds")
    only = request.config.getoption("--variants")
    return Bench(request.function.__name__, device, seconds, request.config.stash[REPORT], only)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print one table per benchmark, and save the rows with `--save`."""
    report = config.stash[REPORT]
    if not (report.rows or report.notes):
        return
    terminalreporter.section("benchmarks")
    settings = (f"{name} {value}" for name, value in describe_environment().items())
    terminalreporter.write_line(", ".join(settings))
    terminalreporter.write_line(describe_kernel_rows())
    for line in report.lines():
        terminalreporter.write_line(line)
    if report.file is not None:
        terminalreporter.write_line(f"\nsaved to {report.file}")
