"""The folder of a run: foreign content is refused, state files are checked and repaired."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.engine.errors import UserError
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.state import read_metrics
from recipes.mae import RECIPE
from tests.recipes.command import config_for
from tests.recipes.damage import flip_a_bit

ROWS = [{"step": n, "loss": 1 / n, "images_per_s": 9.0, "baselines": {"mean": 1}} for n in (1, 2)]


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return config_for(RECIPE)


@pytest.fixture
def finished(config: RunConfig, tmp_path: Path) -> Path:
    """The folder of a small finished run."""
    with RunFolder(tmp_path / "run", config) as folder:
        folder.repair(num_samples=10, num_steps=5)
        for row in ROWS:
            folder.append_metrics(row)
        folder.write_skipped([4])
        folder.note_unreadable([7])
        folder.write_weights("encoder.safetensors", torch.nn.Linear(2, 2))
        folder.write_summary({"steps": 2, "loss": float("nan"), "pair": (1, 2)})
    (tmp_path / "run/checkpoints/step-00000002").mkdir(parents=True)
    return tmp_path / "run"


def read(path: Path, config: RunConfig) -> tuple[object, ...]:
    with RunFolder(path, config) as folder:
        folder.repair(num_samples=10, num_steps=5)
        return (
            folder.read_summary(),
            folder.read_metrics(),
            folder.read_skipped(),
            folder.read_unreadable(),
        )


def test_what_a_run_writes_is_read_again(
    finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    summary, metrics, skipped, unreadable = read(finished, config)
    assert str(summary) == "{'steps': 2, 'loss': nan, 'pair': [1, 2]}"
    assert (metrics, skipped, unreadable) == (ROWS, [4], [7])
    assert capfd.readouterr().err == ""


BAD_ROWS = [
    b'{"step": 3, "lo\n', b"\0" * 300 + b"\n", b"[]\n", b"null\n", b'{"step": 3}\n',
    b'{"step": "3", "loss": 1, "images_per_s": 1}\n', b'{"step": 3, "loss": 1, "step": 3}\n',
    b'{"step": 3, "loss": NaN, "images_per_s": 1}\n', b"[" * 100_000 + b"\n", b"\xff\n",
    b'{"step": 3, "loss": ' + b"9" * 5_000 + b', "images_per_s": 1}\n', b"x" * 2_000_000 + b"\n",
    b'{"step": 2, "loss": 1, "images_per_s": 1}\n',
    b'{"step": 3, "loss": 1, "images_per_s": 1, "baselines": [1]}\n',
    b'{"step": 3, "loss": 1' + b"0" * 400 + b', "images_per_s": 1}\n',
    b'{"step": 3, "loss": 1, "images_per_s": 1, "baselines": {"a": 1' + b"0" * 400 + b"}}\n",
    b'{"step": 3, "loss": 1, "images_per_s": 1, "seconds": NaN}\n',
    b'{"step": 5000, "loss": 1, "images_per_s": 1}\n',
    b'{"step": 5, "loss": 1, "images_per_s": 1}\n',
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_damaged_rows_of_metrics_are_left_out(
    bad: bytes, finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    file = finished / "metrics.jsonl"
    content = file.read_bytes() + bad + json.dumps({**ROWS[1], "step": 4}).encode() + b"\n"
    file.write_bytes(content)
    rows = read(finished, config)[1]
    assert rows == [*ROWS, {**ROWS[1], "step": 4}]
    assert capfd.readouterr().err.count("\n") == 1
    assert (finished / "metrics.jsonl.damaged-1").read_bytes() == content
    assert read(finished, config)[1] == rows
    assert capfd.readouterr().err == ""


def test_a_row_with_a_wrong_step_costs_no_other_row(tmp_path: Path) -> None:
    steps = [1, 20, 9**20, 40, 2, 60, 80]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({**ROWS[0], "step": step}) + "\n" for step in steps)
    )
    rows, damaged = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 20, 40, 60, 80]
    assert damaged == 2


def test_a_last_line_that_a_killed_run_has_not_finished_is_no_damage(
    finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    with (finished / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert read(finished, config)[1] == ROWS
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("text", ["{}", "null", "[]", "", '{"steps": 2', '{"steps": 3}', "\0\0"])
def test_a_damaged_summary_is_put_aside_and_the_run_goes_on(
    text: str, finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (finished / "summary.json").write_text(text)
    assert read(finished, config)[0] is None
    warning = capfd.readouterr().err
    assert "summary.json is damaged" in warning
    assert warning.count("\n") == 1
    assert (finished / "summary.json.damaged-1").read_text() == text


@pytest.mark.parametrize("name", ["summary.json", "encoder.safetensors"])
def test_a_damaged_result_without_a_checkpoint_to_make_it_from_is_refused_and_kept(
    name: str, finished: Path, config: RunConfig
) -> None:
    (finished / "checkpoints/step-00000002").rmdir()
    flip_a_bit(finished / name, random.Random(0))
    before = {file.name: file.read_bytes() for file in finished.iterdir() if file.is_file()}
    with pytest.raises(UserError, match="no checkpoint to make it again from"):
        read(finished, config)
    assert before == {f.name: f.read_bytes() for f in finished.iterdir() if f.is_file()}


def test_damaged_weights_of_a_finished_run_are_written_again(
    finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    file = finished / "encoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert read(finished, config)[0] is None
    assert "encoder.safetensors does not have the digest" in capfd.readouterr().err


BAD_NUMBERS = ["null", "{}", '{"a": 1}', "3", "[true]", "[1.5]", '["1"]', "[-1]", "[10]", "[7, 7]",
               "[[7]]", "[7", "", "\0", "[" * 9_999, "[" + "9" * 5_000 + "]"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_NUMBERS, ids=lambda text: text[:12])
@pytest.mark.parametrize("name", ["unreadable.0.json", "skipped_steps.json"])
def test_damaged_lists_of_numbers_are_repaired_before_training(
    name: str, text: str, finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (finished / name).write_text(text)
    expected = [7] if (name, text) == ("unreadable.0.json", "[7, 7]") else []
    assert read(finished, config)[2 if name.startswith("skipped") else 3] == expected
    warning = capfd.readouterr().err
    assert f"{name} was repaired" in warning
    assert warning.count("\n") == 1
    assert (finished / f"{name}.damaged-1").read_text() == text


@pytest.mark.parametrize("text", ["null", "[]", "{", ""])
def test_a_damaged_environment_is_written_again(
    text: str, finished: Path, config: RunConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    (finished / "environment.json").write_text(text)
    read(finished, config)
    assert "environment.json was written again" in capfd.readouterr().err
    assert json.loads((finished / "environment.json").read_text())["command"]


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a file": lambda run: (run / "notes.txt").write_text("mine"),
    "a summary": lambda run: (run / "summary.json").write_text("{}"),
    "a configuration": lambda run: (run / "config.yaml").write_text("lr: 1\n"),
    "a list": lambda run: (run / "config.yaml").write_text("- 1\n"),
    "checkpoints": lambda run: (run / "checkpoints/epoch_3").mkdir(parents=True),
    "a checkpoint": lambda run: (run / "checkpoints/step-00000100").mkdir(parents=True),
    "a link": lambda run: (run / "checkpoints").symlink_to(run),
    "hidden": lambda run: (run / ".git").mkdir(),
    "a linked lock": lambda run: (run / ".lock").symlink_to(run / "victim"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_with_foreign_content_is_refused_before_a_byte_is_written(
    kind: str, config: RunConfig, tmp_path: Path
) -> None:
    FOREIGN[kind](tmp_path)
    before = listing(tmp_path)
    with pytest.raises(UserError, match="choose") as caught, RunFolder(tmp_path, config):
        pass
    assert str(caught.value).isprintable()
    assert listing(tmp_path) == before


def listing(folder: Path) -> dict[str, object]:
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_an_empty_folder_and_what_a_killed_start_leaves_are_taken(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "config.yaml.partial").write_text("recipe: m")
    with RunFolder(tmp_path, config):
        pass
    assert not (tmp_path / "config.yaml.partial").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json.partial", "unreadable.3.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_and_pipes_with_the_names_of_state_files_are_refused(
    kind: str, name: str, finished: Path, config: RunConfig, tmp_path: Path
) -> None:
    file, victim = finished / name, tmp_path / "victim"
    victim.write_text("mine")
    file.unlink(missing_ok=True)
    {
        "link": lambda: file.symlink_to(victim),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[kind]()
    with pytest.raises(UserError, match="is a link or not a file"):
        read(finished, config)
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["encoder.safetensors", "curves.png", "curves.png.partial"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_in_the_way_of_a_result_is_refused_before_training(
    kind: str, name: str, finished: Path, config: RunConfig
) -> None:
    (finished / name).unlink(missing_ok=True)
    os.mkfifo(finished / name) if kind == "pipe" else (finished / name).mkdir()
    with pytest.raises(UserError, match="is a link or not a file"):
        read(finished, config)
    assert (finished / name).exists()


def test_a_folder_that_is_removed_while_it_is_in_use_is_one_line(
    finished: Path, config: RunConfig
) -> None:
    def remove_and_write() -> None:
        with RunFolder(finished, config) as folder:
            shutil.rmtree(finished)
            folder.append_metrics({"step": 1})

    with pytest.raises(UserError, match=f"output folder {finished}: No such file"):
        remove_and_write()


def test_a_linked_picture_or_weight_is_replaced_and_its_target_left_alone(
    finished: Path, config: RunConfig, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (finished / "encoder.safetensors").unlink()
    for name in ("encoder.safetensors", "encoder.safetensors.partial"):
        (finished / name).symlink_to(victim)
    (finished / "summary.json").unlink()
    with RunFolder(finished, config) as folder:
        folder.write_weights("encoder.safetensors", torch.nn.Linear(2, 2))
    assert victim.read_text() == "mine"
    assert not (finished / "encoder.safetensors").is_symlink()
