"""Each script that is stopped by a signal ends like one that was not, after the same command."""

import json
import signal
from pathlib import Path

import pytest

from tests.recipes.stopping import assert_equal_runs, finish, losses, start
from tests.waiting import end_of, wait_until

OTHERS = {"finetune": "model", "tokenizer": "tokenizer", "vit_mpp": "encoder", "probe": None}
OTHER_CELLS = [
    *((recipe, phase) for recipe in OTHERS for phase in ("start-up", "step", "checkpoint")),
    ("segment", "step"),  # detection is among the tests of the peers
]
SCENES = [
    "--data", "scenes", "--encoder", "none", "--scratch", "never", "--runs", "1",
    "--image-size", "32", "--head-dim", "8",
]  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    finish(pictures, out)
    return out / "encoder.safetensors"


@pytest.mark.full
@pytest.mark.parametrize(("recipe", "phase"), OTHER_CELLS)
def test_other_recipes_stop_and_continue_in_the_same_way(
    recipe: str, phase: str, labelled: Path, pretrained: Path, tmp_path: Path
) -> None:
    more = {
        "finetune": ["--encoder", "none"],
        "probe": ["--encoder", str(pretrained), "--protocol", "paper"],
        "segment": SCENES,
    }.get(recipe, [])
    runs = {name: tmp_path / name for name in ("stopped", "undisturbed")}
    process = start(phase, recipe, labelled, runs["stopped"], *more)
    wait_until(runs["stopped"].with_suffix(".reached").exists, phase, process)
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process)
    assert code == 143
    assert printed.count("stopped by SIGTERM") == 1
    assert "Traceback" not in printed
    for out in runs.values():
        code, printed = end_of(start("none", recipe, labelled, out, *more))
        assert code == 0, printed
    if recipe != "probe":
        weights = OTHERS.get(recipe, "model")
        assert_equal_runs(*runs.values(), weights=f"{weights}.safetensors")
    else:  # six classifiers, each with a folder in it
        one, other = (json.loads((out / "summary.json").read_text()) for out in runs.values())
        assert one["probes"] == other["probes"]
        folders = sorted(out.name for out in runs["stopped"].glob("*-*/"))
        assert len(folders) == 6
        for name in folders:
            assert losses(runs["stopped"] / name) == losses(runs["undisturbed"] / name)
