"""One process or two: the same samples, crops, masks and losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6


def train(out: Path, processes: int, *more: str, steps: int = STEPS) -> None:
    """Run the recipe; what counts is the files it leaves, not how the processes say goodbye."""
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", str(processes),
    ]  # fmt: skip
    command = [
        *(torchrun if processes > 1 else [sys.executable]), str(ROOT / "recipes/mae.py"),
        "--data", str(out.parent / "pictures"), "--out", str(out), "--batch-size", "8",
        "--epochs", "2", "--max-steps", str(steps), "--checkpoint-every", "3", *more,
    ]  # fmt: skip
    result = subprocess.run(
        command,
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
    """Unlabelled noise, and a run of one process on it."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("processes")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for index in range(36):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{index:02d}.png")
    train(folder / "one", 1)
    return folder


@pytest.mark.parametrize(
    "more",
    [
        [],
        pytest.param(["--accumulate", "2"], marks=pytest.mark.full),
        ["--shard"],
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
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["ddp", "fsdp"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)], ids=["2-to-1", "1-to-2"])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, shard: list[str], folder: Path
) -> None:
    out = folder / f"from-{before}-to-{after}{''.join(shard)}"
    # A run that was stopped half-way: the same configuration, cut at a checkpoint.
    train(out, before, *(shard if before > 1 else []))
    cut_after_first_checkpoint(out)
    train(out, after, *(shard if after > 1 else []))
    np.testing.assert_allclose(losses(out), losses(folder / "one"), rtol=1e-5)


def cut_after_first_checkpoint(out: Path) -> None:
    import shutil

    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:08d}")
    assert (out / "checkpoints/step-00000003/COMPLETE").exists()
