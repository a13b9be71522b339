"""Run the tests that launch kernels in Triton's interpreter, in a child process per kernel.

The interpreter must be chosen before Triton is imported, and it checks no bounds: a crash should
fail one test and not end the session.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.harness import HAS_TRITON, ON_GPU

ROOT = Path(__file__).resolve().parents[2]
_SELECTIONS = [
    pytest.param("launches and not full", id="quick"),
    pytest.param("launches and (full or not full)", id="full", marks=pytest.mark.full),
]


def interpreted(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test for the quick selection of launches, and in the long tier for all of them."""
    test = pytest.mark.parametrize("selection", _SELECTIONS)(test)
    test = pytest.mark.skipif(ON_GPU, reason="on a GPU, the tests launch the kernels there")(test)
    return pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")(test)


def run_in_interpreter(selection: str, *files: str | Path, plugins: Sequence[str] = ()) -> None:
    """Run the tests of some files that match a marker expression, in the interpreter.

    With the plugin `tests.kernels.emulate_launches`, they run in the emulator of compiled code.
    """
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-m", selection]
    options += [option for plugin in plugins for option in ("-p", plugin)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *map(str, files), *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    summary = (result.stdout.strip().splitlines() or ["no output"])[-1]
    print(f"in the interpreter: {summary}")
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-5000:]
    assert re.search(r"\d+ passed", summary), summary
