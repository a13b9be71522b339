"""Run the tests that launch kernels in Triton's interpreter, in a child process.

The interpreter must be chosen before Triton is imported, and it checks no bounds: a crash should
not end the session.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


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
