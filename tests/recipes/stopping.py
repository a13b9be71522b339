"""Runs that are stopped by signals, and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipes.engine import run
from recipes.mae import RECIPE
from recipes.signals import EXIT_CODES
from tests.recipes.threads import single_thread
from tests.waiting import end_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def options(pictures: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", str(pictures), "--out", str(out), "--batch-size", "4", "--epochs", "8",
        "--max-steps", str(STEPS), "--checkpoint-every", "4", "--log-every", "1",
        "--deterministic", *more,
    ]  # fmt: skip


def start(phase: str, recipe: str, pictures: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    reached = out.with_suffix(".reached")
    command = [sys.executable, "-m", "tests.recipes.slow_phase", phase, str(reached), recipe]
    return subprocess.Popen(
        [*command, *options(pictures, out, *more)],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_in(phase: str, number: signal.Signals, recipe: str, pictures: Path, out: Path) -> str:
    """Signal a run in a phase, check exit code and messages, and return the line about the stop."""
    process = start(phase, recipe, pictures, out)
    wait_until(out.with_suffix(".reached").exists, phase, process)
    time.sleep(0.1)
    process.send_signal(number)
    code, printed = end_of(process)
    assert code == EXIT_CODES[number], printed
    progress = ("step ", "probing: ")
    lines = [line for line in printed.splitlines() if not line.startswith(progress)]
    assert len(lines) == 1, printed
    assert lines[0].startswith(f"stopped by {number.name} ")
    assert lines[0].endswith(("start the same command again", "for the rest"))
    return lines[0]


def finish(pictures: Path, out: Path) -> None:
    """Let a run of MAE finish, in this process: importing takes most of the time of a new one."""
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0


def assert_equal_runs(one: Path, other: Path, weights: str = "encoder.safetensors") -> None:
    first, second = load_file(one / weights), load_file(other / weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(one) == losses(other)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]
