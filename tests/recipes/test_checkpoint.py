"""Checkpoints: damage is noticed, code in them never runs, nothing foreign is touched."""

import gc
import json
import os
import pickle
import random
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader

from recipes.engine.errors import UserError
from recipes.engine.reading import seal
from recipes.engine.run.checkpoint import (
    Checkpoints,
    check_checkpoints,
    find_damage,
    find_origin,
    start_from,
)
from recipes.engine.run.world import World
from tests import hostile
from tests.recipes.damage import flip_a_bit

STEPS = (3, 6)


def task() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Make a small model whose optimizer has a state."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    groups = [{"params": list(model.parameters()), "lr_scale": 0.5}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()


def fill(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder, World())
    model, optimizer = task()
    for number in STEPS:
        checkpoints.save(number, model, optimizer)
        step(model, optimizer)
    checkpoints.finish()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    fill(folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Checkpoints:
    shutil.copytree(saved, tmp_path / "checkpoints")
    return Checkpoints(tmp_path / "checkpoints", World())


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_state_is_loaded_as_it_was_saved(saved: Path) -> None:
    model, optimizer = task()
    wanted = {**model.state_dict()}, optimizer.state_dict()
    wanted_state = [value.clone() for value in wanted[1]["state"][0].values()]
    wanted_model = {name: value.clone() for name, value in wanted[0].items()}
    for _ in range(3):
        step(model, optimizer)
    Checkpoints(saved, World()).load(STEPS[0], model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted_model[name])
    for value, expected in zip(
        optimizer.state_dict()["state"][0].values(), wanted_state, strict=True
    ):
        assert torch.equal(value, expected)
    assert optimizer.state_dict()["param_groups"] == wanted[1]["param_groups"]
    assert isinstance(optimizer.param_groups[0]["betas"], tuple)


@given(st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_a_flipped_bit_in_any_file_is_noticed_and_the_file_is_named(
    saved: Path, rng: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000006"
        shutil.copytree(saved / path.name, path)
        assert find_damage(path) is None
        file = rng.choice(files_of(path))
        flip_a_bit(file, rng)
        damage = find_damage(path)
        assert damage is not None
        assert damage.startswith(f"{file.name}: ")


HARM: dict[str, Callable[[Path], None]] = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file))[0],
    "a folder": lambda file: (file.unlink(), file.mkdir())[0],
    "endless": lambda file: os.truncate(file, 2**40),
    "a device": lambda file: (file.unlink(), file.symlink_to("/dev/zero"))[0],
}


@pytest.mark.parametrize("name", ["COMPLETE", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("harm", HARM)
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_one_named(
    harm: str, name: str, copied: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    HARM[harm](copied.path(6) / name)
    model, optimizer = task()
    assert start_from("auto", copied, model, optimizer, 100) == 3
    warning = capfd.readouterr().err
    assert warning.count("\n") == 1
    assert "the checkpoint of step 6 is damaged" in warning
    assert name in warning
    assert "going on from step 3" in warning
    assert (copied.folder / "step-00000006.damaged-1").is_dir()
    copied.save(6, model, optimizer)
    copied.finish()
    assert find_damage(copied.path(6)) is None


def test_a_link_in_a_checkpoint_is_damage_even_to_the_same_content(
    copied: Checkpoints, tmp_path: Path
) -> None:
    file = copied.path(6) / "__0_0.distcp"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    damage = find_damage(copied.path(6))
    assert damage is not None
    assert damage.startswith("__0_0.distcp: ")


def test_without_a_whole_checkpoint_the_run_starts_again(
    copied: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in STEPS:
        flip_a_bit(copied.path(number) / ".metadata", random.Random(0))
    assert copied.safe() == "no checkpoint is whole"
    assert start_from("auto", copied, *task(), 100) == 0
    assert capfd.readouterr().err.count("no whole one is left: starting again") == 2


def test_a_message_calls_only_a_verified_checkpoint_safe(copied: Checkpoints) -> None:
    assert copied.safe() == "the checkpoint of step 6 is safe"
    flip_a_bit(copied.path(6) / "__0_0.distcp", random.Random(0))
    assert copied.safe() == "the checkpoint of step 3 is safe"


def test_a_damaged_checkpoint_of_another_run_is_refused_and_left_as_it_is(
    copied: Checkpoints,
) -> None:
    flip_a_bit(copied.path(6) / "__0_0.distcp", random.Random(0))
    before = files_of(copied.folder)
    with pytest.raises(UserError, match=r"is damaged \(__0_0.distcp: its content"):
        find_origin(str(copied.path(6)), World(), 100)
    assert files_of(copied.folder) == before


def test_a_checkpoint_without_digests_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "step-00000006"
    path.mkdir()
    (path / "COMPLETE").touch()
    with pytest.raises(UserError, match="of an earlier version of mimkit"):
        find_origin(str(path), World(), 100)


def test_pickles_in_a_checkpoint_never_run(
    copied: Checkpoints, capfd: pytest.CaptureFixture[str]
) -> None:
    path = copied.path(6)
    trap = copied.folder.parent / "ran code"
    content = pickle.dumps(hostile.RunsCode(trap))
    for name in (".metadata", "__0_0.distcp", "COMPLETE", ".mimkit"):
        (path / name).write_bytes(content)
    model, optimizer = task()
    with pytest.raises(UserError, match="is not of this model"):
        copied.load(6, model, optimizer)  # even if the digests were not compared
    assert start_from("auto", copied, model, optimizer, 100) == 3
    assert not trap.exists()
    # Without the protection, the same file does run code.
    with pytest.raises(AttributeError):
        FileSystemReader(copied.folder / "step-00000006.damaged-1").read_metadata()
    assert trap.exists()


def seal_again(path: Path) -> None:
    """Give a changed checkpoint digests that agree, as an attacker would."""
    from recipes.engine.run.storage import FileDigest

    marker = json.loads((path / "COMPLETE").read_text())
    del marker["sha256"]
    for name in marker["files"]:
        digest = FileDigest.of((path / name).read_bytes())
        marker["files"][name] = [digest.size, digest.sha256]
    (path / "COMPLETE").write_text(json.dumps(seal(marker)))


def set_in(metadata: dict, kind: str, change: Callable[[list], object]) -> None:
    change(next(iter(metadata[kind].values())))


FORGED: dict[str, Callable[[dict], object]] = {
    "outside file": lambda m: set_in(m, "tensors", lambda t: t[2][0].__setitem__(2, "../x")),
    "absolute file": lambda m: set_in(m, "values", lambda v: v.__setitem__(0, "/etc/passwd")),
    "huge shape": lambda m: set_in(m, "tensors", lambda t: t[2][0].__setitem__(1, [2**40])),
    "negative start": lambda m: set_in(m, "tensors", lambda t: t[2][0].__setitem__(3, -8)),
    "late start": lambda m: set_in(m, "tensors", lambda t: t[2][0].__setitem__(3, 2**50)),
    "no type": lambda m: set_in(m, "tensors", lambda t: t.__setitem__(0, "load")),
    "other type": lambda m: set_in(m, "tensors", lambda t: t.__setitem__(0, "int32")),
    "huge value": lambda m: set_in(m, "values", lambda v: v.__setitem__(2, 2**40)),
    "value not JSON": lambda m: set_in(m, "values", lambda v: v.__setitem__(1, v[1] + 1)),
    "no tensors": lambda m: m.pop("tensors"),
    "other names": lambda m: m["tensors"].clear(),
    "no pieces": lambda m: set_in(m, "tensors", lambda t: t[2].clear()),
    "wrong kinds": lambda m: m.__setitem__("values", [1]),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_metadata_with_right_digests_is_refused_in_one_line(
    kind: str, copied: Checkpoints
) -> None:
    path = copied.path(6)
    metadata = json.loads((path / ".metadata").read_text())
    FORGED[kind](metadata)
    (path / ".metadata").write_text(json.dumps(metadata))
    seal_again(path)
    assert find_damage(path) is None
    with pytest.raises(UserError) as caught:
        copied.load(6, *task())
    assert str(caught.value).isprintable()


SIZES = ["1", -1, 1.5, True, None, 10**400, [1]]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: repr(size)[:8])
def test_a_size_in_a_marker_that_is_none_is_damage(size: object, copied: Checkpoints) -> None:
    marker = json.loads((copied.path(6) / "COMPLETE").read_text())
    del marker["sha256"]
    marker["files"][".metadata"][0] = size
    (copied.path(6) / "COMPLETE").write_text(json.dumps(seal(marker)))
    damage = find_damage(copied.path(6))
    assert damage is not None
    assert len(damage) < 200
    assert copied.newest() == 3


def test_a_folder_named_in_other_digits_is_no_checkpoint(copied: Checkpoints) -> None:
    copied.path(6).rename(copied.folder / "step-0000000\u0666")
    assert copied.newest() == 3


@pytest.mark.parametrize("name", ["best-model/model.pt", "epoch_3/model.pt", "notes.txt"])
def test_other_content_beside_checkpoints_is_left_alone(name: str, copied: Checkpoints) -> None:
    file = copied.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    check_checkpoints(copied.folder)
    for number in (9, 12, 15):
        copied.save(number, *task())
    copied.finish()
    assert file.read_text() == "mine"
    assert copied.steps() == [12, 15]


@pytest.mark.parametrize(
    "name", ["step-00000100/model.pt", "step-00000100.partial/__0_0.distcp", "step-00000100"]
)
def test_foreign_content_with_the_name_of_a_checkpoint_is_refused(
    name: str, copied: Checkpoints
) -> None:
    file = copied.folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="is not a checkpoint of this run"):
        check_checkpoints(copied.folder)
    copied.clean()
    assert file.read_text() == "mine"
    assert copied.steps() == [3, 6]


def test_partial_checkpoints_of_ours_are_removed_and_foreign_files_in_them_are_not(
    copied: Checkpoints,
) -> None:
    for number in (9, 12):
        partial = copied.folder / f"step-{number:08d}.partial"
        partial.mkdir()
        (partial / ".mimkit").touch()
        (partial / "__0_0.distcp").write_bytes(b"half")
    (partial / "notes.txt").write_text("mine")
    copied.clean()
    assert (partial / "notes.txt").read_text() == "mine"
    assert [path.name for path in copied.folder.glob("*.partial")] == [partial.name]


def test_links_are_never_followed_when_something_is_removed(
    copied: Checkpoints, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(copied.path(3), elsewhere)
    partial = copied.folder / "step-00000009.partial"
    partial.symlink_to(elsewhere)
    copied.clean()
    assert partial.is_symlink()
    assert len(files_of(elsewhere)) == 4
    partial.unlink()
    whole = tmp_path / "linked"
    whole.symlink_to(copied.folder)
    with pytest.raises(UserError, match="is not a folder"):
        check_checkpoints(whole)


def test_descriptors_and_threads_stay_the_same_over_many_checkpoints(tmp_path: Path) -> None:
    checkpoints, (model, optimizer) = Checkpoints(tmp_path, World()), task()
    used = []
    for number in range(1, 26):
        checkpoints.save(number, model, optimizer)
        checkpoints.finish()
        if number in (5, 25):
            gc.collect()
            used.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert used[0] == used[1]
    assert checkpoints.steps() == [24, 25]


@pytest.mark.full
def test_two_hundred_flipped_bits_are_noticed_and_two_hundred_runs_recover(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    names = ["COMPLETE", ".metadata", "__0_0.distcp", ".mimkit"]
    for trial in range(200):
        folder = tmp_path / str(trial)
        shutil.copytree(saved, folder)
        checkpoints = Checkpoints(folder, World())
        flip_a_bit(checkpoints.path(6) / names[trial % len(names)], rng)
        assert checkpoints.newest() == 3
        assert names[trial % len(names)] in capfd.readouterr().err
        shutil.rmtree(folder)
