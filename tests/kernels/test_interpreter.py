"""All tests that launch kernels, in Triton's interpreter: correctness without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_child(selection: str) -> None:
    """Run marked tests where a crash (the interpreter checks no bounds) ends no session."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",  # must be set before Triton is imported
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    }
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-m", selection]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/kernels", *options],
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


def test_every_kernel_is_right_in_the_interpreter():
    run_child("launches and not full")


@pytest.mark.full
def test_every_kernel_is_right_in_the_interpreter_on_many_shapes():
    run_child("launches and (full or not full)")
