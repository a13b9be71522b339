"""The examples of docs/trainers.md run: Lightning, transformers' Trainer, accelerate."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.peers.two_processes import run_in_two_processes
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


def test_accelerate_trains_in_two_processes() -> None:
    script = Path("train.py")
    script.write_text(ACCELERATE[1])
    printed = run_in_two_processes(script)
    losses = [float(loss) for loss in re.findall(r"loss (\S+), 8 masks", printed)]
    assert len(losses) == 2
    assert all(0 < loss < 3 for loss in losses)


def test_the_exporter_of_the_guide_takes_another_mask() -> None:
    names: dict[str, Any] = {"__name__": "trainers"}
    for block in (ACCELERATE, EXPORT):
        run_block(PAGE, *block, names)
    assert names["exported_shape"] == (5, 5, 32)
