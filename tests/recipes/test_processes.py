"""One process and two processes have the same samples, crops, masks and losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.recipes.pictures import write_noise
from tests.waiting import end_of, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def command(out: Path, processes: int, *more: str, steps: int = STEPS) -> list[str]:
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes),
    ]  # fmt: skip
    return [
        *(torchrun if processes > 1 else [sys.executable]), str(ROOT / "recipes/mae.py"),
        "--data", str(out.parent / "pictures"), "--out", str(out), "--batch-size", "8",
        "--epochs", "2", "--max-steps", str(steps), "--checkpoint-every", "3",
        "--log-every", "1", "--device", "cpu", *more,
    ]  # fmt: skip


def train(out: Path, processes: int, *more: str) -> None:
    """Run the recipe, and check that it finished. Its exit code is ignored."""
    result = subprocess.run(
        command(out, processes, *more),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert (out / "summary.json").exists(), result.stderr


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with unlabelled noise images and a run of one process on them."""
    folder = tmp_path_factory.mktemp("processes")
    write_noise(folder / "pictures", 36)
    train(folder / "one", 1)
    return folder


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["--accumulate", "2"], marks=pytest.mark.full),
        pytest.param(["--shard"], marks=pytest.mark.full),
        pytest.param(["--shard", "--accumulate", "2"], marks=pytest.mark.full),
    ],
    ids=lambda more: " ".join(more) or "plain",
)
def test_two_processes_give_the_losses_and_weights_of_one(more: list[str], folder: Path) -> None:
    out = folder / ("two" + "".join(more))
    train(out, 2, *more)
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)
    one, two = (load_file(run / "encoder.safetensors") for run in (folder / "one", out))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.mark.full
def test_two_processes_train_on_arrays_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(36):
        array = rng.normal(100, 30, (2, 40, 48)).astype(np.float32)
        np.save(tmp_path / f"pictures/{index:02d}.npy", array)
    for name, processes in (("one", 1), ("two", 2)):
        train(tmp_path / name, processes)
    assert len(losses(tmp_path / "one")) == STEPS
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    one, two = ((tmp_path / name / "config.yaml").read_text() for name in ("one", "two"))
    assert one == two  # with the statistics, which the main process alone has measured


def launch(script: str, out: Path, processes: int, *more: str) -> list[dict[str, float]]:
    """Run another recipe for a few steps on digits, and return its rows."""
    start = command(out, processes)
    start[start.index(str(ROOT / "recipes/mae.py")) :] = [
        str(ROOT / f"recipes/{script}.py"), "--data", "digits", "--out", str(out),
        "--batch-size", "8", "--max-steps", "4", "--log-every", "1", *more,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        start, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert (out / "summary.json").exists(), result.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--accumulate", "2"], ["--shard"]], ids=str)
def test_a_classifier_trains_the_same_in_two_processes(more: list[str], tmp_path: Path) -> None:
    # Without drop path and mixing, whose draws differ between the processes.
    plain = ["--encoder", "none", "--drop-path", "0", "--mixup", "0", "--cutmix", "0"]
    one = launch("finetune", tmp_path / "one", 1, *plain)
    two = launch("finetune", tmp_path / "two", 2, *plain, *more)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in two], [r[name] for r in one], rtol=1e-4)


@pytest.mark.full
def test_a_tokenizer_trains_in_two_processes(tmp_path: Path) -> None:
    rows = launch("tokenizer", tmp_path / "run", 2)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert (tmp_path / "run/tokenizer.safetensors").exists()


# SyncBatchNorm needs a GPU, and each process draws its own dropout: both are switched off here.
SEGMENT = """
import os
import sys
from torch import nn
from torch.nn import functional as F
from recipes import segment

def fixed(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)

def score_alike(model, config, data, world, score=segment.score, **more):
    own = [buffer.tolist() for buffer in model.buffers()]
    assert all(other == own for other in world.gather(own))  # running means
    return score(model, config, data, world, **more)

segment.score = score_alike
if sys.argv.pop(1) == "fixed":
    nn.BatchNorm2d.forward = fixed
    nn.Dropout2d.forward = lambda self, x: x
if os.environ.get("RANK", "0") != "0":
    segment.load_segmented = None  # a call would fail: the main process alone reads the folder
sys.exit(segment.main(sys.argv[1:]))
"""


def write_labelled(root: Path) -> Path:
    """Write a folder for segmentation: 16 images to train on, seven to score on."""
    rng = np.random.default_rng(0)
    for part, number in (("training", 16), ("validation", 7)):
        for index in range(number):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            labels = (image[..., 0] // 86).astype(np.uint8)
            for kind, pixels in (("images", image), ("annotations", labels)):
                file = root / kind / part / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(file)
    return root


def segment(out: Path, processes: int, norm: str, *more: str) -> dict[str, Any]:
    """Train a segmentation for four steps in real processes, and return its summary."""
    script, data = out.parent / "segment.py", out.parent / "set"
    script.write_text(SEGMENT)
    start = command(out, processes)
    start[start.index(str(ROOT / "recipes/mae.py")) :] = [
        str(script), norm, "--encoder", "none", "--data", str(data), "--num-classes", "3",
        "--image-size", "32", "--head-dim", "8", "--aux-dim", "8", "--batch-size", "8",
        "--epochs", "2", "--log-every", "1", "--out", str(out), *more,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        start, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert (out / "summary.json").exists(), result.stderr
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


@pytest.mark.full
@pytest.mark.parametrize("more", [[], ["--accumulate", "2"]], ids=str)
def test_a_segmentation_trains_and_scores_the_same_in_two_processes(
    more: list[str], tmp_path: Path
) -> None:
    """Seven images to score on: one counted twice would change the scores."""
    write_labelled(tmp_path / "set")
    runs = [tmp_path / "one", tmp_path / "two"]
    one, two = (segment(run, number, "fixed", *more) for number, run in enumerate(runs, start=1))
    np.testing.assert_allclose(losses(runs[1]), losses(runs[0]), rtol=1e-5)
    first, second = (load_file(run / "model.safetensors") for run in runs)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5)
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert two[name]["scratch"] == pytest.approx(one[name]["scratch"], abs=0.1)


@pytest.mark.full
def test_a_segmentation_in_bfloat16_trains_in_two_processes_that_score_one_model(
    tmp_path: Path,
) -> None:
    write_labelled(tmp_path / "set")
    summary = segment(tmp_path / "run", 2, "own", "--precision", "bf16")
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run"))
    assert 0 <= summary["miou"]["scratch"][0] <= 100
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


LISTING = """
import sys
from recipes.engine.data import folder
from recipes.engine.data.load import load_data
from recipes.engine.errors import UserError
from recipes.engine.run.world import join

with join("cpu", timeout=60) as world:
    if world.rank:
        folder._list_samples = None  # a call would fail
    for name in sys.argv[1:]:
        try:
            data = load_data(name, image_size=(32, 32), seed=0, share=world.share)
            found = data.content, [data.train.describe(id) for id in range(len(data.train))]
            print(found, data.train[0, 1][0].sum())
        except UserError as error:
            print(error)
"""


@pytest.mark.full
def test_the_main_process_alone_lists_a_folder_and_all_have_its_images(tmp_path: Path) -> None:
    write_noise(tmp_path / "pictures", 9)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.py").write_text(LISTING)
    start = [*command(tmp_path / "run", 2)[:6], "--tee", "1", "--redirects", "3"]
    result = subprocess.run(
        [*start, f"--log-dir={tmp_path / 'logs'}", str(tmp_path / "list.py"),
         str(tmp_path / "pictures"), str(tmp_path / "empty")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = [file.read_text() for file in sorted(tmp_path.glob("logs/**/stdout.log"))]
    assert len(printed) == 2
    assert printed[0] == printed[1]
    assert "5 + 4 images" in printed[0]
    assert "holds no images" in printed[0]
    notes = [file.read_text() for file in sorted(tmp_path.glob("logs/**/stderr.log"))]
    assert not notes[1]


@pytest.mark.full
def test_rows_and_unreadable_images_do_not_depend_on_the_number_of_processes(
    tmp_path: Path,
) -> None:
    write_noise(tmp_path / "pictures", 36)
    for index in range(0, 32, 4):
        (tmp_path / "pictures" / f"{index:02}.png").write_bytes(b"no image")
    small = ["--batch-size", "2", "--max-steps", "32"]
    for processes in (1, 2):
        train(tmp_path / f"run-{processes}", processes, *small)
    one, two = (tmp_path / f"run-{processes}" for processes in (1, 2))
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    assert len(summaries[0]["unreadable_images"]) == 8
    assert summaries[0]["unreadable_images"] == summaries[1]["unreadable_images"]


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_the_limit_on_unreadable_images_is_one_line_of_the_whole_job(
    processes: int, tmp_path: Path
) -> None:
    write_noise(tmp_path / "pictures", 36)
    for index in range(2, 16):
        (tmp_path / "pictures" / f"{index:02}.png").write_bytes(b"no image")
    result = subprocess.run(
        command(tmp_path / "run", processes, "--workers", "1", steps=9),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode != 0
    assert result.stderr.count("of 32 images cannot be read, among them") == 1
    assert "Traceback" not in result.stderr.partition("of 32 images")[0]


PATCHED = """
import os, sys
import recipes.script
from recipes.engine import loop, run
from recipes.engine.errors import UserError
from recipes.engine.run import checkpoint
from recipes.mae import RECIPE
{patch}
sys.exit(run(RECIPE, ""))
"""
FAILING = """
step = loop.Task.step

def fail(self, batch, at):
    if at.step == 4 and self.world.rank in {ranks}:
        raise {fault}
    return step(self, batch, at)

loop.Task.step = fail
"""
OF_ONE = [
    (0, 'UserError("a bad image")', "a bad image", 2),
    (1, 'UserError("a bad image")', "a bad image", 2),
    (1, 'OSError(12, "Cannot allocate memory")', "there is not enough memory", 2),
    (1, 'RuntimeError("no such kernel")', "RuntimeError: no such kernel", 1),
]


def launch_patched(patch: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the recipe in two processes that first run a patch."""
    script = out.with_suffix(".py")
    script.write_text(PATCHED.format(patch=patch))
    start = command(out, 2, *more)
    start[start.index(str(ROOT / "recipes/mae.py"))] = str(script)
    return subprocess.run(
        start,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.full
@pytest.mark.parametrize(("rank", "fault", "says", "code"), OF_ONE)
def test_a_process_that_fails_alone_says_so_and_the_job_ends(
    rank: int, fault: str, says: str, code: int, tmp_path: Path
) -> None:
    write_noise(tmp_path / "pictures", 36)
    result = launch_patched(FAILING.format(ranks=[rank], fault=fault), tmp_path / "run")
    assert result.returncode == 1  # torchrun's
    assert f"error in process {rank} of 2: {says}" in result.stderr
    assert f"exitcode  : {code} " in result.stderr
    assert result.stderr.count("error in process") == 1
    assert (tmp_path / "run/checkpoints/step-00000003/COMPLETE").exists()


@pytest.mark.full
def test_what_all_processes_fail_of_is_said_once(tmp_path: Path) -> None:
    write_noise(tmp_path / "pictures", 36)
    result = launch_patched(
        FAILING.format(ranks=[0, 1], fault='UserError("a bad image")'), tmp_path / "run"
    )
    assert result.stderr.count("error: a bad image") == 1
    assert "error in process" not in result.stderr


@pytest.mark.full
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
def test_a_run_resumes_with_another_number_of_processes(
    before: int, after: int, shard: list[str], folder: Path
) -> None:
    out = folder / f"from-{before}-to-{after}{''.join(shard)}"
    # An interrupted run: remove everything after its first checkpoint.
    train(out, before, *(shard if before > 1 else []))
    cut_after_first_checkpoint(out)
    train(out, after, *(shard if after > 1 else []))
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)


@pytest.mark.full
def test_a_job_ends_with_a_clear_message_when_a_process_dies_and_resumes_when_started_again(
    folder: Path,
) -> None:
    out = folder / "one-killed"
    # Enough steps to be killed during the run.
    long = ["--epochs", "8", "--batch-size", "4"]
    start = command(out, 2, *long, steps=60)
    # `torchrun` ends the other process when it polls. Poll rarely, so that this process notices
    # the lost connection first.
    start.insert(start.index("--standalone"), "--monitor-interval=5")
    job = subprocess.Popen(
        start,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = out / "checkpoints/step-00000003/COMPLETE"
    wait_until(first.exists, "checkpoint of step 3", job)
    os.kill(children(job.pid)[-1], signal.SIGKILL)
    code, printed = end_of(job)
    assert code != 0
    assert "has lost another process of the job: start the same command again" in printed
    last = sorted((out / "checkpoints").glob("step-*/COMPLETE"))[-1]
    steps = int(last.parent.name.removeprefix("step-"))
    train(out, 2, *long, "--max-steps", "60")
    rows = [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()]
    assert steps >= 3
    assert rows == sorted(set(rows))
    assert rows[-1] == 60


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def cut_after_first_checkpoint(out: Path) -> None:
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    assert (out / "checkpoints/step-00000003/COMPLETE").exists()


# What process 1 sees of a folder that is being changed, or of a slow file system.
BLIND = """
if os.environ["RANK"] == "1":
    checkpoint.steps_in = lambda folder: [1, 5]
    checkpoint.find_damage = lambda path: "it cannot be read"
"""


@pytest.mark.full
def test_the_main_process_chooses_where_two_go_on_and_they_end_like_undisturbed_ones(
    tmp_path: Path,
) -> None:
    write_noise(tmp_path / "pictures", 36)
    train(tmp_path / "undisturbed", 2)
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "stopped")
    cut_after_first_checkpoint(tmp_path / "stopped")
    first = tmp_path / "undisturbed/checkpoints/step-00000003"
    for name, more in {"stopped": [], "other": ["--resume", str(first)]}.items():
        out = tmp_path / name
        result = launch_patched(BLIND, out, *more)
        assert result.returncode == 0, result.stderr
        assert f"step 3/{STEPS}" in result.stderr
        one, two = (load_file(run / "encoder.safetensors") for run in (first.parents[1], out))
        assert all(torch.equal(two[key], one[key]) for key in one)
        assert losses(out)[-3:] == losses(first.parents[1])[-3:]
