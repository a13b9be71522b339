"""Waiting for another process with a deadline: a failure says what did not come."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

SECONDS = 300.0  # far more than any of these waits takes, even on a busy machine


def wait_until(
    true: Callable[[], object],
    what: str,
    process: subprocess.Popen[Any],
    *,
    seconds: float = SECONDS,
    or_end: bool = False,
) -> None:
    """Wait until something is true of a process's work, or (`or_end`) until the process ends."""
    deadline = time.monotonic() + seconds
    while not true():
        code = process.poll()
        if code is not None and or_end:
            return
        if code is not None:
            errors = process.stderr.read() if process.stderr else "(not kept)"
            pytest.fail(f"the process ended with code {code}, without {what}; errors: {errors}")
        if time.monotonic() > deadline:
            stop(process)
            pytest.fail(f"after {seconds:g} s there was still no {what}; the process was stopped")
        time.sleep(0.002)


def end_of(process: subprocess.Popen[Any], *, seconds: float = SECONDS) -> tuple[int, Any]:
    """Wait for the end of a process: its exit code, and its errors if `stderr` is a pipe."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        stop(process)
        pytest.fail(f"the process still ran after {seconds:g} s and was stopped: {process.args!r}")
    return process.returncode, errors


def stop(process: subprocess.Popen[Any]) -> None:
    """Gently, so that `torchrun` takes its own processes along; if that does not help, by force."""
    process.terminate()
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
