"""The four ways to start a recipe, and the messages after mistakes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recipes.engine import run
from recipes.mae import MAE, RECIPE

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--data", "digits", "--max-steps", "2", "--batch-size", "8"]


def start(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # One thread, because the machine may be busy and the runs are small.
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=env, check=False, timeout=600
    )


def test_a_run_writes_all_documented_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Small and fast probes; other tests check what they measure.
    monkeypatch.setattr("recipes.engine.data.digits.PROBE_PER_DIGIT", 10)
    monkeypatch.setattr("recipes.engine.data.digits.PROBE_TEST", 100)
    monkeypatch.setattr("recipes.engine.probes.ATTENTIVE_SAMPLES", 640)
    monkeypatch.chdir(tmp_path)
    assert run(RECIPE, "", SHORT) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mae-tiny-digits-")
    written = {path.name for path in folder.iterdir()}
    assert written >= {
        "config.yaml",
        "environment.json",
        "summary.json",
        "metrics.jsonl",
        "reconstructions.png",
        "curves.png",
        "encoder.safetensors",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["probes"].keys() == {"knn", "linear", "attentive"}
    for scores in summary["probes"].values():
        assert scores.keys() == {"trained", "untrained", "pixels"}
    assert summary["held_out"].keys() == {"loss", "zero", "mean_color", "nearest", "interpolated"}
    assert "raw pixels" in capfd.readouterr().out
    encoder = MAE(dataclasses.replace(RECIPE.presets["tiny"].model, in_channels=1)).encoder
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))


@pytest.mark.full  # the installed one below is started from another folder, too
def test_a_recipe_runs_as_a_script_from_any_folder(tmp_path: Path) -> None:
    script = [str(ROOT / "recipes/mae.py"), *SHORT, "--dry-run"]
    result = start([sys.executable, *script], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout


@pytest.mark.full
def test_output_that_nobody_reads_ends_a_command_in_one_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    command = [sys.executable, str(ROOT / "recipes" / "mae.py"), "--dry-run"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert ended.stderr == "error: the program that reads the output has ended\n"
    assert ended.returncode == 141


@pytest.mark.full  # test_processes.py starts torchrun
def test_a_recipe_runs_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    script = [str(ROOT / "recipes/mae.py"), *SHORT, "--dry-run"]
    result = start([*torchrun, *script], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "parameters" in result.stdout


def test_a_recipe_is_imported_from_the_root_without_side_effects() -> None:
    code = (
        "import os, sys; before = (dict(os.environ), list(sys.path)); import recipes.mae\n"
        "after = {k: v for k, v in os.environ.items() if k.startswith('OMP') or k in before[0]}\n"
        "assert after == before[0] and list(sys.path) == before[1]\n"
        "print(recipes.mae.MAE.__name__)"
    )
    result = start([sys.executable, "-c", code], ROOT)
    assert result.stdout == "MAE\n", result.stderr


@pytest.mark.full
def test_a_recipe_runs_after_a_plain_installation(tmp_path: Path) -> None:
    # The wheel as `pip install .` installs it, in a separate folder at the front of the path.
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(site), str(ROOT)],
        check=True,
    )  # fmt: skip
    script = [str(ROOT / "recipes/mae.py"), *SHORT, "--dry-run"]
    result = start([sys.executable, *script], tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    where = start(
        [sys.executable, "-c", "import mimkit, mimkit_kernels; print(mimkit.__file__)"],
        tmp_path,
        PYTHONPATH=str(site),
    )
    assert where.stdout.startswith(str(site))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mask-ratio", "0"], "--mask-ratio 0.0"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0"),
        (["--mask-ratio", "-0.5"], "--mask-ratio -0.5"),
        (["--mask-ratio", "nan"], "--mask-ratio nan"),
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["--mask-ratoi", "0.5"], "--mask-ratoi, 0.5. Perhaps you meant: --mask-ratio FLOAT"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--preset", "vit_tiny"], "vit_tiny"),
        (["--epochs", "0"], "--epochs 0"),
        (["--epochs", "ten"], "ten"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--batch-size", "100000"], "--batch-size 100000"),
        (["--max-steps", "-1"], "--max-steps -1"),
        (["--image-size", "30"], "(30, 30)"),
        (["--image-size", "0"], "--image-size 0 is too small"),
        (["--sampler", "gridwise", "--mask-ratio", "0.5"], "--sampler gridwise"),
        (["--views", "0"], "--views 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--device", "tpu"], "tpu"),
        (["--seed", "-1"], "--seed -1"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run(RECIPE, "", [*SHORT, *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("error: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
