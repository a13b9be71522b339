"""The papers' figures of finished runs, and partial fine-tuning."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mimkit import nn
from recipes import cae, convmae, figures, finetune, mae, simmim
from recipes.engine import Recipe, page, run
from recipes.engine import pictures as side_by_side
from recipes.engine.figures import draw_partial_fine_tuning, last_attention
from recipes.engine.pretrained.shapes import ViTShape
from recipes.engine.run.cli import parse_options
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.world import World
from tests.nn import plain
from tests.recipes.command import config_for

QUICK = ("--device", "cpu", "--batch-size", "8", "--max-steps", "1")
CLASSES = 3
VIT = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}


# Attention


@pytest.mark.parametrize(
    "options", [{}, {"qkv_bias": "qv", "relative_positions": "block", "absolute_positions": False}]
)
@torch.no_grad()
def test_attention_weights_are_those_that_the_last_block_uses(options):
    encoder = nn.ViT(**VIT, **options).eval()
    plain.randomize(encoder)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module, arguments, output):
        seen.append((arguments[0], module.attention_weights(arguments[0], arguments[2]), output))

    encoder.blocks[-1].attn.register_forward_hook(keep)
    images = torch.randn(3, 3, 16, 16)
    encoder(images)
    tokens, weights, output = seen[0]
    attention = encoder.blocks[-1].attn
    bias = 0 if attention.q_bias is None else torch.cat([torch.zeros(32), attention.v_bias])
    value = tokens @ attention.qkv.weight.T + (
        attention.qkv.bias if attention.q_bias is None else bias
    )
    value = value[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)
    mixed = (weights @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention.proj(mixed), output, rtol=1e-4, atol=1e-5)
    found = last_attention(encoder, images)
    torch.testing.assert_close(found, weights[:, :, 0, 1:].unflatten(2, (4, 4)))


@torch.no_grad()
def test_without_a_class_token_it_is_the_mean_over_all_patches():
    encoder = nn.ConvViT(
        image_size=16, patch_sizes=(2, 2, 2), dim=(8, 8, 16), depth=(1, 1, 2), heads=2
    )
    found = last_attention(encoder.eval(), torch.randn(3, 3, 16, 16))
    assert found.shape == (3, 2, 2, 2)
    torch.testing.assert_close(found.sum(dim=(2, 3)), torch.ones(3, 2))


# Partial fine-tuning


def labelled(root: Path) -> Path:
    """A labelled tree: noise of another brightness in each class."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4)):
        for label in range(CLASSES):
            (root / part / f"class-{label}").mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(80 * label, 80 * label + 90, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / f"class-{label}" / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_frozen_parameters_have_neither_a_gradient_nor_a_state_of_the_optimizer(blocks, images):
    line = ["--encoder", "none", "--data", str(images), "--blocks", "0", "1", "2", *QUICK]
    options = parse_options(finetune.OPTIONS, line, program="", description="")
    config, _ = finetune.resolve_fine_tuning(options)
    assert isinstance(config, finetune.PartialConfig)
    small = ViTShape(**VIT, in_channels=3)
    training = dataclasses.replace(config, model=small).training_of(blocks)
    data = finetune.load_images(training, None, options, World())
    task = finetune.make_task(training, None, data, options, World())
    named = dict(task.model.encoder.named_parameters())
    wanted = {
        name
        for name in named
        if blocks == 2 or name.startswith(("head.", "fc_norm.", *["blocks.1."] * blocks))
    }
    task.model(torch.randn(4, 3, 16, 16)).square().sum().backward()
    task.optimizer.step()
    has_gradient = {name for name, parameter in named.items() if parameter.grad is not None}
    has_state = {name for name, parameter in named.items() if task.optimizer.state.get(parameter)}
    assert has_gradient == has_state == wanted


def partial_run(images: Path, out: Path, *more: str) -> None:
    line = ["--encoder", "none", "--data", str(images), "--image-size", "16", "--max-steps", "4"]
    line += ["--checkpoint-every", "2", "--device", "cpu", "--batch-size", "8", "--out", str(out)]
    assert finetune.main([*line, *more]) == 0


@pytest.mark.full
def test_each_number_of_blocks_is_trained_as_by_itself_and_drawn(images, tmp_path, capsys):
    out = tmp_path / "partial"
    partial_run(images, out, "--blocks", "4", "0", "1")
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["accuracy"]) == ["0", "1", "4"]
    printed = capsys.readouterr().out
    assert "trained blocks                    0     1     4" in printed
    assert all(f"{accuracy:6.1f}" in printed for accuracy in summary["accuracy"].values())
    for number, more in ((1, ["--trained-blocks", "1"]), (4, [])):
        partial_run(images, tmp_path / str(number), *more)
        alone, inside = (
            load_file(folder / "model.safetensors")
            for folder in (tmp_path / str(number), out / f"blocks-{number}")
        )
        assert all(torch.equal(alone[name], inside[name]) for name in alone)
    capsys.readouterr()
    picture = (out / "partial-fine-tuning.png").read_bytes()
    partial_run(images, out, "--blocks", "0", "1", "4")  # finished: the summary again
    assert capsys.readouterr().out == printed
    assert figures.main([str(out), str(out)]) == 0  # curves of two runs
    assert capsys.readouterr().out.strip() == str(out / "partial-fine-tuning.png")
    assert (out / "partial-fine-tuning.png").read_bytes() != picture
    assert figures.main([str(out)]) == 0
    assert (out / "partial-fine-tuning.png").read_bytes() == picture


@pytest.mark.full
def test_a_killed_run_goes_on_with_the_number_of_blocks_that_it_was_at(images, tmp_path, capfd):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    partial_run(images, whole, "--blocks", "0", "1", "4")
    shutil.copytree(whole, killed)
    for name in ("summary.json", "blocks-1/summary.json", "blocks-1/model.safetensors"):
        (killed / name).unlink()
    shutil.rmtree(killed / "blocks-1" / "checkpoints" / "step-00000004")
    shutil.rmtree(killed / "blocks-4")
    first = (killed / "blocks-0" / "model.safetensors").stat().st_mtime_ns
    capfd.readouterr()
    partial_run(images, killed, "--blocks", "0", "1", "4")
    assert "step 2/4" in capfd.readouterr().err
    assert (killed / "blocks-0" / "model.safetensors").stat().st_mtime_ns == first
    for number in (1, 4):
        ended, expected = (
            load_file(folder / f"blocks-{number}" / "model.safetensors")
            for folder in (killed, whole)
        )
        assert all(torch.equal(ended[name], expected[name]) for name in expected)
    assert (killed / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--blocks", "0", "5"], "--blocks 0 5: 5 is out of range, give 0 to 4"),
        (["--blocks", "1", "0", "1"], "--blocks 1 0 1 has a number twice"),
        (["--blocks", "1", "--trained-blocks", "1"], "--blocks 1 and --trained-blocks 1"),
        (["--blocks"], "--blocks has no value"),
        (["--blocks", "-1"], "--blocks"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_of_blocks_that_do_not_fit_are_refused_in_one_line(more, says, tmp_path, capsys):
    out = tmp_path / "out"
    assert finetune.main(["--encoder", "none", "--data", "digits", "--out", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not out.exists()


# Figures of runs


@pytest.fixture(autouse=True)
def _few_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.engine.figures._SCENES", 40)
    monkeypatch.setattr("recipes.engine.figures._PATCHES", 12)
    monkeypatch.setattr("recipes.engine.probes.ATTENTIVE_SAMPLES", 640)


VIT_OF_SIMMIM = dataclasses.replace(
    simmim.RECIPE.presets["tiny"],
    model=simmim.SimMIMConfig(32, encoder="vit", patch_size=4, dim=32, depth=2, heads=2),
)
METHODS: dict[str, tuple[Recipe, list[str]]] = {
    "mae": (mae.RECIPE, []),
    "simmim, swin": (simmim.RECIPE, []),
    "simmim": (dataclasses.replace(simmim.RECIPE, presets={"tiny": VIT_OF_SIMMIM}), []),
    "cae": (cae.RECIPE, []),
    "convmae": (convmae.RECIPE, []),
    "fastconvmae": (convmae.RECIPE, ["--parts", "4"]),
    "grid-wise": (mae.RECIPE, ["--sampler", "gridwise"]),
}
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def draw(images, pictures, tmp_path_factory) -> Callable[..., tuple[Path, Files, str]]:
    """Return what trains a step, draws twice, and returns folder, pictures and output."""

    def of(recipe: Recipe, more: list[str], data: Path, capsys) -> tuple[Path, Files, str]:
        out = tmp_path_factory.mktemp("run") / "run"
        assert run(recipe, "", ["--data", str(data), *QUICK, *more, "--out", str(out)]) == 0
        before = {file.name for file in out.iterdir()}
        capsys.readouterr()
        found = []
        for _ in range(2):
            assert figures.main([str(out)]) == 0
            new = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
            found.append({name: content for name, content in new.items() if name not in before})
        printed = capsys.readouterr().out
        assert found[0] == found[1]  # deterministic
        assert printed[: len(printed) // 2] * 2 == printed
        assert all(str(out / name) in printed for name in found[0])
        return out, found[0], printed

    return of


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_is_drawn_the_same_each_time(method, draw, pictures, capsys):
    recipe, more = METHODS[method]
    _, files, printed = draw(recipe, more, pictures, capsys)
    wanted = {"tsne.png", "mask-ratios.png", "encoder-attention.png"}
    if method == "simmim, swin":
        wanted.remove("encoder-attention.png")
        assert (
            "encoder-attention.png is not drawn: a Swin Transformer attends in windows" in printed
        )
    assert files.keys() == wanted
    assert "chance 9.1): trained " in printed


@pytest.mark.full
def test_a_run_that_was_probed_has_the_attentive_probe_too(draw, images, capsys):
    out, files, _ = draw(mae.RECIPE, [], images, capsys)
    assert "attention.png" in files
    shutil.rmtree(out / "checkpoints")
    (out / "mask-ratios.png").unlink()
    assert figures.main([str(out)]) == 0
    assert "mask-ratios.png is not drawn" in capsys.readouterr().out
    assert not (out / "mask-ratios.png").exists()


@pytest.mark.full
def test_the_encoder_of_a_dense_run_is_drawn_on_photographs(tmp_path, capsys):
    shape = ViTShape(**VIT, in_channels=3)
    config = config_for(mae.RECIPE, "--device", "cpu")
    config = dataclasses.replace(config, recipe="segment", data="scenes", model=shape, masking=None)
    with RunFolder(tmp_path / "run", config) as folder:
        folder.write_weights("encoder.safetensors", shape.build())
        folder.write_summary({"miou": {"scratch": [20.0]}})
    assert figures.main([str(tmp_path / "run")]) == 0
    drawn = {file.name for file in (tmp_path / "run").glob("*.png")}
    assert drawn == {"tsne.png", "encoder-attention.png"}
    assert "k-NN of patches" in capsys.readouterr().out


@pytest.mark.full
def test_what_does_not_fit_a_run_is_refused_in_one_line(draw, pictures, capsys):
    out, files, _ = draw(mae.RECIPE, [], pictures, capsys)
    for name in files:
        (out / name).unlink()
    (part,) = (out / "checkpoints").glob("*/__0_0.distcp")
    part.write_bytes(part.read_bytes()[:-1])
    assert_refused([str(out)], "is damaged", capsys)
    assert_refused([str(out), "--ratios", "1.5"], "--ratios", capsys)
    (out / "encoder.safetensors").write_bytes(b"garbage")
    assert_refused([str(out)], "encoder.safetensors", capsys)
    assert not any((out / name).exists() for name in files)


@pytest.mark.parametrize("command", [figures, page, side_by_side])
def test_a_command_without_a_run_says_so_in_one_line(command, capsys):
    assert command.main([]) == 2
    error = capsys.readouterr().err
    assert "give the folder" in error
    assert error.count("\n") == 1


def assert_refused(line: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert figures.main(line) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_folder_that_is_no_finished_run_is_refused_in_one_line(tmp_path, capsys):
    run = tmp_path / "run"
    assert_refused([str(run)], "is not the folder of a finished run", capsys)
    run.mkdir()
    assert_refused([str(run)], "is not the folder of a finished run", capsys)
    (run / "summary.json").write_text("{}")
    assert_refused([str(run)], "holds a damaged file", capsys)
    (tmp_path / "file").write_text("")
    assert_refused([str(tmp_path / "file")], "is not the folder of a finished run", capsys)


def test_names_of_runs_of_any_letters_are_drawn(tmp_path):
    curves = {name: {"0": 1.0, "4": 2.0} for name in ("$\\frac{$", "\udcff", "a\x1b[2J")}
    assert draw_partial_fine_tuning(curves, tmp_path).is_file()


def test_an_encoder_for_other_channels_than_the_images_is_one_line(tmp_path, capfd):
    config = config_for(mae.RECIPE).for_images(1, (32, 32))
    with RunFolder(tmp_path / "run", config) as folder:
        folder.write_weights("encoder.safetensors", mae.MAE(config.model).encoder)
        folder.write_summary({"steps": 1})
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("recipe: mae", "recipe: another"))
    assert figures.main([str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert "is for images of 1 channels" in error
    assert error.count("\n") == 1
