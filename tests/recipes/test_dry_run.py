"""The dry run of every preset, and mistakes that are found before training."""

import re
from pathlib import Path

import pytest
import torch

from mimkit import masking
from recipes import cae, convmae, mae, simmim, tokenizer, vit_mpp
from recipes.engine import Recipe, dry_run, run
from recipes.engine.data.load import load_data
from tests.recipes.command import config_for

RECIPES = {recipe.RECIPE.name: recipe.RECIPE for recipe in (cae, convmae, mae, simmim, vit_mpp)}
# MAE's first large preset; the others in the long tier.
PRESETS = [
    pytest.param(name, preset, marks=[] if (name, number) == ("mae", 1) else pytest.mark.full)
    for name, recipe in RECIPES.items()
    for number, preset in enumerate(recipe.presets)
]


def arguments(recipe: Recipe, pictures: Path, *more: str) -> list[str]:
    return ["--data", str(pictures), "--batch-size", "4", *more]


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_dry_run_prints_the_cost_of_every_preset(
    name, preset, pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    # Also where the data set is smaller than a batch, and where the tokenizer's file is missing.
    options = ["--data", str(pictures), "--preset", preset, "--dry-run"]
    assert run(RECIPES[name], "", options) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("parameters", "FLOPs", "memory", "checkpoint"))
    assert [line.split()[0] for line in printed.splitlines()[-4:]] == ["1", "8", "64", "512"]
    assert not list(tmp_path.iterdir())


def memory(printed: str) -> float:
    line = next(line for line in printed.splitlines() if line.startswith("memory"))
    return float(line.split("about ")[1].split()[0].replace(",", ""))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name",
    [name if name == "mae" else pytest.param(name, marks=pytest.mark.full) for name in RECIPES],
)
def test_the_memory_of_an_image_is_what_a_step_keeps(name, precision):
    recipe, data = RECIPES[name], load_data("digits", image_size=(32, 32), seed=0)
    more = ["--tokenizer", "patches"] if name == "cae" else []
    config = config_for(recipe, "--data", "digits", "--precision", precision, *more).for_data(data)
    with torch.device("meta"):
        planned = recipe.build(config.model).train()
    _, estimated = dry_run.measure(config, data, planned)
    model = recipe.build(config.model).train()
    kept = []
    for number in (1, 2):
        masks = config.masking.draw(masking.key(range(number), seed=0), model.encoder.grid)
        kept.append(dry_run.count_step(config, data, model, masks, num_images=number)[1])
    assert estimated == pytest.approx(kept[1] - kept[0], rel=0.01)


def test_gradient_accumulation_takes_less_memory(pictures, capsys):
    estimates = []
    for parts in ("1", "4"):
        options = ["--preset", "vit_base", "--accumulate", parts, "--dry-run"]
        assert run(mae.RECIPE, "", arguments(mae.RECIPE, pictures, *options)) == 0
        estimates.append(memory(capsys.readouterr().out))
    assert estimates[1] < estimates[0]


@pytest.mark.parametrize("recipe", [mae, pytest.param(simmim, marks=pytest.mark.full)])
def test_recomputing_takes_less_memory_and_more_operations(recipe, pictures, capsys):
    memories, flops = [], []
    for more in ([], ["--recompute"]):
        options = ["--preset", "swin_base" if recipe is simmim else "vit_base", *more, "--dry-run"]
        assert run(recipe.RECIPE, "", arguments(recipe.RECIPE, pictures, *options)) == 0
        printed = capsys.readouterr().out
        memories.append(memory(printed))
        flops.append(float(printed.split("FLOPs ")[1].split()[0].replace(",", "")))
    assert memories[1] < memories[0]
    assert 1.05 * flops[0] < flops[1] < 1.4 * flops[0]  # the forward pass is a third


def test_the_plan_by_gpus_is_consistent(pictures, capsys):
    options = ["--data", str(pictures), "--preset", "vit_base", "--precision", "bf16", "--dry-run"]
    assert run(mae.RECIPE, "", options) == 0
    printed = capsys.readouterr().out
    rows = [[float(n.replace(",", "")) for n in line.split()] for line in printed.splitlines()[-4:]]
    for gpus, images, ddp, shard, all_ddp, all_shard, _, _ in rows:
        assert images == 4096 / gpus
        assert shard <= ddp
        assert all_ddp == pytest.approx(gpus * ddp, rel=0.05)
        assert all_shard == pytest.approx(gpus * shard, rel=0.05)
    assert rows[0][2] == pytest.approx(memory(printed), abs=0.1)
    per_second, hours = rows[0][6:]
    assert 800 * 312 * 4096 / per_second / 3600 == pytest.approx(hours, rel=0.01)
    assert "249,600 steps and the learning rate of 0.0024" in printed


@pytest.mark.parametrize(
    ("preset", "epochs", "says"),
    [
        ("swin_base", "100", "100 epochs end before the rate falls, at epoch 700"),
        pytest.param(
            "swin_base",
            "5",
            "5 epochs end within the 10 epochs in which the rate rises",
            marks=pytest.mark.full,
        ),
        pytest.param("swin_base", "800", None, marks=pytest.mark.full),
    ],
)
def test_a_run_that_is_too_short_for_its_schedule_gets_a_warning(
    preset, epochs, says, pictures, capsys
):
    options = ["--preset", preset, "--epochs", epochs, "--dry-run"]
    assert run(simmim.RECIPE, "", arguments(simmim.RECIPE, pictures, *options)) == 0
    error = capsys.readouterr().err
    assert (says in error) if says else ("epochs" not in error)


MISTAKES = [
    ("mae", ["--shard"], "torchrun --nproc-per-node"),
    ("mae", ["--accumulate", "3"], "multiple of 3"),
    ("simmim", ["--unit", "1", "--target", "pixels_8x"], "give --unit 2 or a multiple"),
    ("simmim", ["--unit", "16"], "--unit 16 does not divide the 8x8 patches"),
    ("simmim", ["--teacher", "none.pt"], "a teacher is for target"),
    ("cae", ["--alignment-weight", "-1"], "--alignment-weight -1.0 is too small"),
    ("cae", ["--decoder-depth", "-1"], "--decoder-depth -1 is too small"),
]


@pytest.mark.parametrize(("name", "options", "says"), MISTAKES)
def test_options_that_do_not_fit_give_one_line(name, options, says, pictures, capsys):
    assert run(RECIPES[name], "", arguments(RECIPES[name], pictures, *options, "--dry-run")) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert says in error[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--groups", "0"], "--groups 0 is too small"),
        (["--vocabulary-size", "0"], "--vocabulary-size 0 is too small"),
        (
            ["--divergence-weight", "nan"],
            "--divergence-weight nan is out of range: give 0 or a positive number",
        ),
        (["--resume", "elsewhere"], "--resume elsewhere is not a complete checkpoint"),
    ],
)
def test_tokenizer_options_that_do_not_fit_give_one_line(options, says, pictures, tmp_path, capsys):
    common = ["--data", str(pictures), "--batch-size", "4", "--out", str(tmp_path / "run")]
    assert tokenizer.main([*common, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"recompute: maybe\n", "recompute must be true or false; got 'maybe'"),
        (b"\xff\xfe", "is not YAML"),
    ],
)
def test_a_file_of_options_is_checked_too(content, says, pictures, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_bytes(content)
    options = arguments(mae.RECIPE, pictures, "--config", str(file), "--dry-run")
    assert run(mae.RECIPE, "", options) == 2
    assert says in capsys.readouterr().err


def test_a_dry_run_says_how_many_cores_feed_a_gpu(pictures, capsys):
    options = ["--data", str(pictures), "--preset", "vit_base", "--precision", "bf16", "--dry-run"]
    assert run(mae.RECIPE, "", options) == 0
    lines = capsys.readouterr().out.splitlines()
    (loading,) = (line for line in lines if line.startswith("loading "))
    (needs,) = (line for line in lines if line.startswith("GPUs need "))
    rate = float(loading.split()[1].replace(",", ""))
    for name in ("A100", "H100", "RTX 4090"):
        need, cores = re.search(rf"{name} ([\d,]+) \(([\d,]+) cores\)", needs).groups()
        need, cores = float(need.replace(",", "")), int(cores.replace(",", ""))
        assert rate > 0
        assert (cores - 1) * rate <= 1.1 * need + rate
        assert need <= 1.1 * cores * (rate + 1)


def test_loading_of_drawn_images_is_not_measured(capsys):
    assert run(mae.RECIPE, "", ["--data", "digits", "--dry-run"]) == 0
    assert "loading " not in capsys.readouterr().out
