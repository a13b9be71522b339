"""Dense transfer: where the encoder comes from, and which trainings are compared."""

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes import convmae, segment
from recipes.engine import transfer
from recipes.engine.errors import UserError
from recipes.engine.run.world import World
from recipes.engine.transfer import find_or_pretrain, newest_encoder, other_trainings


def write_run(folder: Path, recipe: str, age: int, *, finished: bool = True) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"recipe: {recipe}\n")
    (folder / "encoder.safetensors").write_bytes(b"")
    os.utime(folder / "encoder.safetensors", (age, age))
    if finished:
        (folder / "summary.json").write_text("{}")


def find(encoder: str = "auto", preset: str | None = None, dry_run: bool = False, size: int = 1,
         ) -> str:  # fmt: skip
    options = SimpleNamespace(encoder=encoder, preset=preset, dry_run=dry_run, device="cpu")
    return find_or_pretrain(segment.TRANSFER, options, World(0, size))


def test_the_newest_finished_run_of_a_fitting_recipe_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    assert newest_encoder(runs) is None
    write_run(runs / "old", "convmae", 0)
    write_run(runs / "new", "cae", 1)
    write_run(runs / "newest", "mae", 2)
    write_run(runs / "unfinished", "convmae", 3, finished=False)
    (runs / "broken").mkdir()
    (runs / "broken" / "config.yaml").write_text("[")
    assert newest_encoder(runs) == runs / "new"
    assert find() == find(size=2) == str(runs / "new")
    assert "taking runs/new" in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ["none", "given/encoder.safetensors"])
def test_an_encoder_that_is_given_is_taken_as_it_is(encoder: str) -> None:
    assert find(encoder, preset="mae_b_ade20k") == encoder


def test_without_a_run_one_is_pretrained_and_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def pretrain(recipe: Any, arguments: list[str]) -> None:
        assert recipe is convmae.RECIPE
        assert arguments == ["--device", "cpu"]
        write_run(Path("runs/made"), recipe.name, 0)

    monkeypatch.setattr(transfer, "pretrain", pretrain)
    assert find(dry_run=True) == "none"
    assert not Path("runs").exists()
    with pytest.raises(UserError, match="run convmae first"):
        find(size=2)
    assert find() == "runs/made"
    assert "pre-training convmae first" in capsys.readouterr().err


@given(st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_every_start_is_trained_once_with_every_seed(seed: int, runs: int, scratch: bool) -> None:
    options = segment.OPTIONS(encoder="none", runs=runs, seed=seed, device="cpu")
    config, _ = segment.resolve_segmentation(options)
    config = dataclasses.replace(config, encoder="digest", scratch=scratch)
    others = list(other_trainings(config))
    starts = ["pretrained", "scratch"] if scratch else ["pretrained"]
    trained = [(one.start, one.seed) for one in (config, *others)]
    assert sorted(trained) == [(start, s) for start in starts for s in range(seed, seed + runs)]
    folders = {segment.folder_of(config, other) for other in others}
    assert len(folders) == len(others)
    assert all((one.runs, one.scratch) == (1, False) for one in others)
