"""The last lines of a run."""

import json
from pathlib import Path

import pytest

from recipes.engine.run.closing import print_closing

ROW = {"step": 1, "loss": 1.0, "images_per_s": 9.0}


def write_rows(folder: Path, *rows: dict[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_time_of_all_trainings_is_added_and_the_files_that_exist_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, ROW | {"seconds": 60.4}, ROW | {"step": 2, "seconds": 2.0})
    write_rows(tmp_path / "scratch", ROW | {"seconds": 9.0})
    for name in ("curves.png", "own picture.png", "model.safetensors", "summary.json"):
        (tmp_path / name).touch()
    print_closing(tmp_path)
    first, *files, last = capsys.readouterr().out.splitlines()
    assert first == "training time  01:11 (min:s)"
    assert [line.split("  ")[1] for line in files[1:]] == [
        "curves.png", "own picture.png", "model.safetensors", "summary.json"
    ]  # fmt: skip
    assert last.endswith(f"mimkit report {tmp_path}")


def test_a_run_of_an_earlier_version_has_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, ROW)
    print_closing(tmp_path)
    assert "training time" not in capsys.readouterr().out
