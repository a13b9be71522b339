"""The reader's own recipe of docs/recipes.md: trained, stopped, resumed and reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.test_docs import DOCS, blocks_of, run_block

PAGE = DOCS / "recipes.md"
OUT = Path("runs/stripes")


@pytest.fixture
def own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, Any]]:
    """Run the page's block in an empty folder; return its code and its names."""
    monkeypatch.chdir(tmp_path)
    (code,) = (code for _, code in blocks_of(PAGE) if "class Stripes" in code)
    names: dict[str, Any] = {"__name__": "page"}
    run_block(PAGE, 0, code, names)
    return code, names


def test_it_takes_at_most_forty_lines(own_recipe: tuple[str, dict[str, Any]]) -> None:
    code, _ = own_recipe
    assert len(code.splitlines()) <= 40


def test_it_is_trained_and_reported(own_recipe: tuple[str, dict[str, Any]]) -> None:
    written = {path.name for path in OUT.iterdir()}
    assert written >= {"config.yaml", "summary.json", "encoder.safetensors", "curves.png"}
    rows = [json.loads(line) for line in (OUT / "metrics.jsonl").open()]
    assert rows[-1]["loss"] < rows[-1]["baselines"]["zero"]
    assert load_file(OUT / "encoder.safetensors")["pos_embed"].shape[-1] == 48  # --dim 48


def test_it_resumes_bit_for_bit(own_recipe: tuple[str, dict[str, Any]]) -> None:
    _, names = own_recipe
    whole = load_file(OUT / "encoder.safetensors")
    # What a run that was killed after step 72 of 80 leaves.
    shutil.rmtree(OUT / "checkpoints/step-00000080")
    for name in ("summary.json", "encoder.safetensors"):
        (OUT / name).unlink()
    assert names["run"](names["recipe"], "", names["arguments"], data=names["data"]) == 0
    resumed = load_file(OUT / "encoder.safetensors")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
