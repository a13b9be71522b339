"""The examples of docs/trainers.md run: Lightning, transformers' Trainer, accelerate."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import DOCS, blocks_of, run_block

PAGE = DOCS / "trainers.md"
LIGHTNING, TRAINER, ACCELERATE, EXPORT = blocks_of(PAGE)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(block: tuple[int, str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "trainers"}
    run_block(PAGE, *block, names)
    return names


def test_lightning_trains() -> None:
    names = run(LIGHTNING)
    assert names["lightning_steps"] == 4
    assert 0 < float(names["lightning_loss"]) < 3


def test_the_trainer_of_transformers_trains() -> None:
    result = run(TRAINER)["hf_result"]
    assert result.global_step == 4
    assert 0 < result.training_loss < 3


def launch(num_processes: int) -> str:
    Path("train.py").write_text(ACCELERATE[1] + EXPORT[1] * (num_processes == 1))
    root = str(DOCS.parent)
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root}/kernels"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--num_processes", str(num_processes), "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "train.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_accelerate_trains_in_two_processes_with_the_masks_of_one() -> None:
    two, one = launch(2), launch(1)
    assert "epoch 1: loss " in two
    assert "8 masks" in two
    assert "4 masks" in one
    losses = [
        float(line.split("loss ")[1].split(",")[0]) for line in two.splitlines() if "loss" in line
    ]
    assert all(0 < loss < 3 for loss in losses)
