"""A killed run resumes bit for bit, and existing runs are never overwritten."""

import dataclasses
import gc
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mimkit.masking import Mask
from recipes.engine import Recipe, loop, run
from recipes.engine.data.sets import Batch
from recipes.engine.run.checkpoint import Checkpoints
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.world import World
from recipes.mae import MAE, RECIPE, MAEOutput
from tests.recipes.command import config_for
from tests.recipes.damage import flip_a_bit
from tests.recipes.threads import single_thread
from tests.waiting import end_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def options(pictures: Path, out: Path, *more: str) -> list[str]:
    return [
        "--data", str(pictures), "--out", str(out), "--batch-size", "4", "--epochs", "8",
        "--max-steps", str(STEPS), "--checkpoint-every", "2", "--log-every", "1",
        "--deterministic", *more,
    ]  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0
    return out


def start(pictures: Path, out: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/mae.py"), *options(pictures, out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=stderr,
    )


def kill_at_random(pictures: Path, out: Path, rng: random.Random, *, least: int = 1) -> Checkpoints:
    """Kill a run at a random step, sometimes while it writes a checkpoint.

    Args:
        pictures: What to train on.
        out: Folder of the run.
        rng: Source of randomness.
        least: With 2, at least one checkpoint is complete.
    """
    process = start(pictures, out)
    wanted = 2 * rng.randrange(least, STEPS // 2)
    checkpoints = Checkpoints(out / "checkpoints", World())
    partial = checkpoints.folder / f"{checkpoints.path(wanted).name}.partial"

    def is_time() -> bool:
        steps = checkpoints.steps()
        return bool(steps and steps[-1] >= wanted) or (rng.random() < 0.5 and partial.exists())

    wait_until(is_time, f"checkpoint of step {wanted}", process, or_end=True)
    time.sleep(rng.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return checkpoints


def finish(pictures: Path, out: Path) -> None:
    """Let a killed run finish, in this process: importing takes most of the time of a new one."""
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert losses(one) == losses(other)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


def test_a_killed_run_ends_like_an_uninterrupted_one(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    kill_at_random(pictures, tmp_path / "run", random.Random(0))
    finish(pictures, tmp_path / "run")
    assert_equal_runs(tmp_path / "run", uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize("trial", range(20))
def test_twenty_killed_runs_every_second_with_a_flipped_bit_in_its_newest_checkpoint_end_alike(
    trial: int,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random()
    is_flipped = trial % 2 == 1
    out = tmp_path / "run"
    checkpoints = kill_at_random(pictures, out, rng, least=1 + is_flipped)
    if is_flipped:
        newest = checkpoints.path(checkpoints.steps()[-1])
        file = rng.choice(sorted(newest.iterdir()))
        flip_a_bit(file, rng)
        (out / "summary.json").unlink(missing_ok=True)  # had it ended before it was killed
    finish(pictures, out)
    printed = capfd.readouterr().err
    if is_flipped:
        assert "is damaged" in printed
        assert file.name in printed
    assert_equal_runs(out, uninterrupted)


@pytest.mark.parametrize("name", ["COMPLETE", ".metadata", "__0_0.distcp"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint_and_ends_alike(
    name: str,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    for file in ("summary.json", "encoder.safetensors"):
        (out / file).unlink()
    flip_a_bit(out / "checkpoints/step-00000024" / name, random.Random(0))
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0
    assert f"the checkpoint of step 24 is damaged ({name}: " in capfd.readouterr().err
    assert_equal_runs(out, uninterrupted)


@pytest.mark.full
def test_a_full_disk_gives_one_clear_line_and_loses_nothing(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(pictures, out, stderr=subprocess.PIPE)
    wait_until(Checkpoints(out / "checkpoints", World()).steps, "first checkpoint", process)
    # From now on no file may be larger than 64 kB: too small for checkpoints, enough for text.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (65_536, 65_536))
    code, printed = end_of(process)
    *_, error = printed.decode().splitlines()
    assert code == 2
    assert error.startswith("error: cannot write the checkpoint of step")
    assert "is safe" in error
    assert end_of(start(pictures, out))[0] == 0
    assert_equal_runs(out, uninterrupted)


def test_a_checkpoint_holds_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.weight.detach().clone()
    checkpoints = Checkpoints(tmp_path, World())
    checkpoints.save(1, model, optimizer)
    model.weight.data.zero_()  # while it is written
    checkpoints.finish()
    checkpoints.load(1, model, optimizer)
    assert torch.equal(model.weight, before)


def used_by_this_process() -> tuple[float, int, int]:
    """Resident memory in MB, open descriptors and threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    return memory, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.full
def test_memory_descriptors_and_threads_stay_flat_over_500_steps_with_25_checkpoints(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[tuple[float, int, int]] = []
    step = loop.Task.step

    def measured(self: loop.Task, batch: Batch, at: loop.Moment) -> loop.Step | None:
        if at.step % 100 == 99:
            seen.append(used_by_this_process())
        return step(self, batch, at)

    monkeypatch.setattr(loop.Task, "step", measured)
    long = ["--epochs", "100", "--max-steps", "500", "--checkpoint-every", "20"]
    with single_thread():
        assert run(RECIPE, "", options(pictures, tmp_path / "run", *long)) == 0
    with capsys.disabled():
        rows = (f"{memory:.1f} MB, {files} files, {n} threads" for memory, files, n in seen)
        print("", *rows, sep="\n")
    memory, files, threads = (list(column) for column in zip(*seen, strict=True))
    assert len(seen) == 5
    assert max(memory) - memory[0] < 0.02 * memory[0]
    assert max(files) <= files[0]
    assert max(threads) <= threads[0]


def test_only_the_last_two_checkpoints_and_those_of_keep_every_are_kept(
    pictures: Path, tmp_path: Path
) -> None:
    with single_thread():
        assert run(RECIPE, "", options(pictures, tmp_path / "run", "--keep-every", "10")) == 0
    assert Checkpoints(tmp_path / "run/checkpoints", World()).steps() == [10, 20, 22, 24]


def test_an_incomplete_checkpoint_is_ignored_and_removed(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "summary.json").unlink()
    checkpoints = Checkpoints(out / "checkpoints", World())
    (checkpoints.path(24) / "COMPLETE").unlink()
    checkpoints.path(24).rename(checkpoints.folder / "step-00000024.partial")
    assert checkpoints.steps() == [22]
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0
    assert_equal_runs(out, uninterrupted)
    assert checkpoints.steps() == [22, 24]
    assert not list(checkpoints.folder.glob("*.partial"))


def test_a_run_can_start_from_the_checkpoint_of_another_run(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    origin = uninterrupted / "checkpoints/step-00000022"
    with single_thread():
        assert run(RECIPE, "", options(pictures, tmp_path / "run", "--resume", str(origin))) == 0
    first, second = weights(tmp_path / "run"), weights(uninterrupted)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_accumulation_gives_the_same_losses(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    with single_thread():
        assert run(RECIPE, "", options(pictures, tmp_path / "run", "--accumulate", "2")) == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(uninterrupted), rtol=1e-4)


def test_recomputing_gives_the_same_weights(
    pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    with single_thread():
        assert run(RECIPE, "", options(pictures, tmp_path / "run", "--recompute")) == 0
    assert_equal_runs(tmp_path / "run", uninterrupted)


def test_steps_use_deterministic_algorithms_if_asked(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    compute = loop.Task._compute

    def look(*arguments: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return compute(*arguments)

    monkeypatch.setattr(loop.Task, "_compute", look)
    for name in ("--no-deterministic", "--deterministic"):
        arguments = options(pictures, tmp_path / name, name, "--max-steps", "1")
        assert run(RECIPE, "", arguments) == 0
    assert seen == [False, True]


def test_a_finished_run_prints_its_summary_again_and_does_not_train(
    pictures: Path, uninterrupted: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "metrics.jsonl").stat().st_mtime_ns
    assert run(RECIPE, "", options(pictures, uninterrupted)) == 0
    assert f"{STEPS} steps" in capfd.readouterr().out
    assert (uninterrupted / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seed", "1"], "seed"),
        (["--accumulate", "3"], "cannot be divided evenly among 1 processes with --accumulate 3"),
        (["--resume", "nowhere"], "--resume nowhere"),
    ],
    ids=["other-config", "accumulate", "resume"],
)
def test_options_that_do_not_fit_an_existing_run_are_refused(
    more: list[str],
    says: str,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "new" if "--resume" in more else uninterrupted
    assert run(RECIPE, "", options(pictures, out, *more)) == 2
    error = capfd.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_second_process_on_the_same_folder_is_refused(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = start(pictures, tmp_path / "run")
    try:
        wait_until((tmp_path / "run/config.yaml").exists, "config.yaml", first)
        assert run(RECIPE, "", options(pictures, tmp_path / "run")) == 2
        assert "another process" in capfd.readouterr().err
    finally:
        first.kill()
        first.wait()


def test_an_output_path_that_is_a_file_is_refused(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    assert run(RECIPE, "", options(pictures, tmp_path / "run")) == 2
    assert "cannot write to the output folder" in capfd.readouterr().err
    assert (tmp_path / "run").read_text() == "mine"


def test_a_checkpoint_of_another_model_is_refused(
    pictures: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = RECIPE.presets["tiny"]
    other = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, decoder_dim=32))
    recipe = dataclasses.replace(RECIPE, presets={"tiny": other})
    origin = uninterrupted / "checkpoints/step-00000022"
    assert run(recipe, "", options(pictures, tmp_path / "run", "--resume", str(origin))) == 2
    error = capfd.readouterr().err
    assert "is not of this model" in error
    assert error.count("\n") == 1


def test_an_unreadable_image_is_left_out_and_named_at_the_end(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "05.png").write_bytes(b"cut off")
    assert run(RECIPE, "", options(folder, tmp_path / "run")) == 0
    printed = capfd.readouterr().out
    assert "1 images could not be read" in printed
    assert "05.png" in printed
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["unreadable_images"] == [str(folder / "05.png")]


def test_an_unreadable_image_is_still_named_after_a_resume(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, folder)
    (folder / "05.png").write_bytes(b"cut off")
    assert run(RECIPE, "", options(folder, out)) == 0
    # As if the run had been killed after its last checkpoint.
    (out / "summary.json").unlink()
    assert run(RECIPE, "", options(folder, out)) == 0
    assert "05.png" in capfd.readouterr().out.rpartition("could not be read")[2]


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_does_not_go_on_with_other_images(
    is_finished: bool, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, folder)
    assert run(RECIPE, "", options(folder, out)) == 0
    if not is_finished:
        (out / "summary.json").unlink()
    shutil.copy(folder / "05.png", folder / "a-new-one.png")
    capfd.readouterr()
    assert run(RECIPE, "", options(folder, out)) == 2
    error = capfd.readouterr().err
    assert "20 + 4 images" in error
    assert "now 21 + 4 images" in error
    assert error.count("\n") == 1
    (folder / "a-new-one.png").unlink()
    assert run(RECIPE, "", options(folder, out)) == 0


@pytest.mark.full
def test_a_changed_set_that_is_accepted_begins_a_new_count_of_epochs_from_the_weights(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "run"
    shutil.copytree(pictures, folder)
    arguments = options(folder, out)
    assert run(RECIPE, "", arguments) == 0
    trained = (out / "encoder.safetensors").read_bytes()
    shutil.copy(folder / "05.png", folder / "a-new-one.png")
    capfd.readouterr()
    accepting = [*arguments, "--accept-changed-data"]
    assert run(RECIPE, "", [*accepting, "--max-steps", "1"]) == 2  # another change, too
    assert not (out / "before-1").exists()
    capfd.readouterr()
    assert run(RECIPE, "", accepting) == 0
    notes = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("note: the im")
    ]
    assert len(notes) == 1
    assert "20 + 4 images" in notes[0]
    assert "now 21 + 4 images" in notes[0]
    assert (out / "before-1/encoder.safetensors").read_bytes() == trained
    rows = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (out / "before-1", out)
    ]
    assert rows[0][0]["step"] == rows[1][0]["step"] == 1
    assert rows[0][-1]["step"] == rows[1][-1]["step"]
    assert rows[1][0]["loss"] < rows[0][0]["loss"]
    assert run(RECIPE, "", arguments) == 0  # finished, on these images
    assert not (out / "before-2").exists()


def test_moving_a_run_aside_that_was_killed_is_completed(tmp_path: Path) -> None:
    config = config_for(RECIPE, "--device", "cpu")
    before, now = config.with_data("1"), config.with_data("2")
    with RunFolder(tmp_path / "run", before):
        pass
    (tmp_path / "run/metrics.jsonl").write_text("")
    (tmp_path / "run/before-1").mkdir()  # killed after one file
    (tmp_path / "run/environment.json").rename(tmp_path / "run/before-1/environment.json")
    with RunFolder(tmp_path / "run", now, accept_changed=True) as folder:
        assert folder.earlier() == tmp_path / "run/before-1"
    names = {entry.name for entry in (tmp_path / "run/before-1").iterdir()}
    assert names >= {"config.yaml", "environment.json", "metrics.jsonl"}
    (tmp_path / "run/config.yaml").unlink()  # killed before the new one was written
    (tmp_path / "run/environment.json").unlink()
    with RunFolder(tmp_path / "run", now, accept_changed=True) as folder:
        assert folder.earlier() == tmp_path / "run/before-1"


def test_the_images_do_not_change_the_name_of_the_default_folder() -> None:
    config = config_for(RECIPE)
    assert config.with_data("20 + 4 images, 12345678").digest() == config.digest()
    assert config.with_data("1") != config.with_data("2")


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_train(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(RECIPE, "", options(pictures, tmp_path / "run")) == 0
    last = tmp_path / f"run/checkpoints/step-{STEPS:08d}"
    assert run(RECIPE, "", options(pictures, tmp_path / "new", "--resume", str(last))) == 2
    assert f"this run ends at step {STEPS}" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_trained_run_whose_rows_are_lost_says_so_and_how_to_go_on(
    uninterrupted: Path, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert run(RECIPE, "", options(pictures, tmp_path / "run")) == 2
    error = capfd.readouterr().err
    assert "their rows in metrics.jsonl are lost" in error
    assert error.count("\n") == 1


def test_a_damaged_configuration_is_named_in_the_message(
    pictures: Path, uninterrupted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("{ cut off")
    assert run(RECIPE, "", options(pictures, tmp_path / "run")) == 2
    assert "config.yaml is damaged" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "encoder.safetensors"])
def test_a_damaged_result_of_a_finished_run_is_made_again_from_its_last_checkpoint(
    name: str,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    flip_a_bit(out / name, random.Random(0))
    with single_thread():
        assert run(RECIPE, "", options(pictures, out)) == 0
    error = capfd.readouterr().err
    assert "summary.json is damaged" in error
    assert name in error
    assert (out / "summary.json").exists()
    assert_equal_runs(out, uninterrupted)


def spoiled_recipe(spoiled: set[int]) -> Recipe:
    """MAE whose loss is nan at the given forward passes."""
    calls = itertools.count()

    class Spoiled(MAE):
        def forward(self, images: torch.Tensor, mask: Mask) -> MAEOutput:
            output = super().forward(images, mask)
            factor = float("nan") if next(calls) in spoiled else 1.0
            return dataclasses.replace(output, loss=output.loss * factor)

    return dataclasses.replace(RECIPE, build=Spoiled)


def test_a_loss_that_is_not_finite_stops_the_run_and_loses_nothing(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(spoiled_recipe({5}), "", options(pictures, tmp_path / "run")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss of step 6 is nan")
    assert "the checkpoint of step 4 is safe" in error
    assert Checkpoints(tmp_path / "run/checkpoints", World()).steps() == [2, 4]


def test_a_run_rewinds_past_a_loss_that_is_not_finite_and_skips_its_batch(
    pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = options(pictures, out, "--non-finite", "rewind")
    assert run(spoiled_recipe({5}), "", arguments) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) if step != 6]
    assert json.loads((out / "skipped_steps.json").read_text()) == [5]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_a_run_gives_up_when_no_loss_is_finite(
    pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = options(pictures, tmp_path / "run", "--non-finite", "rewind")
    assert run(spoiled_recipe(set(range(100))), "", arguments) == 2
    assert "after 10 batches that were skipped" in capfd.readouterr().err
