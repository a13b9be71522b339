"""Encoders that SimMIM has trained, as fine-tuning and probing read them."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mimkit import masking
from mimkit.interop import to_official
from mimkit.patches import gather_masked, interpolate_relative_positions, patchify
from recipes import finetune, probe
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import (
    build_classifier,
    build_encoder,
    fill_encoder,
    load_encoder,
)
from recipes.engine.pretrained.shapes import SwinShape, ViTShape
from recipes.simmim import RECIPE, SimMIM, SimMIMConfig
from tests.nn import plain

SHAPE = ViTShape(image_size=32, patch_size=8, dim=16, depth=2, heads=2)


def trained(**changes: object) -> SimMIM:
    shape = {"image_size": 32, "patch_size": 8, "dim": 16, "depth": 2, "heads": 2}
    model = SimMIM(SimMIMConfig(**(shape | changes))).eval()
    plain.randomize(model)
    return model


@pytest.mark.parametrize("kind", ["ours", "authors"])
def test_the_encoder_is_the_same_with_a_table_in_each_block(kind, tmp_path: Path):
    model = trained()
    path = tmp_path / "encoder.safetensors"
    weights = model.encoder.state_dict()
    if kind == "authors":
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": dict(to_official("simmim_vit", model.state_dict()))}, path)
    else:
        save_file(weights, path)
    file = load_encoder(path, SHAPE)
    encoder = build_encoder(file.shape, seed=0).eval()
    fill_encoder(encoder, file)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(images), model.encoder(images))
    assert len(encoder.rel_pos_bias) == 2


def test_tables_are_resampled_for_another_image_size(tmp_path: Path):
    path = tmp_path / "encoder.safetensors"
    save_file(trained().encoder.state_dict(), path)
    file = load_encoder(path, SHAPE)
    larger = ViTShape(**(vars(file.shape) | {"image_size": (48, 64)}))
    encoder = build_classifier(larger, seed=0, num_classes=3, drop_path=0.0)
    fill_encoder(encoder, file)
    table = file.weights["rel_pos_bias.0.table"]
    assert encoder.rel_pos_bias[1].table.shape == (11 * 15 + 3, 2)
    assert torch.equal(encoder.rel_pos_bias[1].table[-3:], table[-3:])


def test_a_swin_needs_the_shape_of_one(tmp_path: Path):
    path = tmp_path / "encoder.safetensors"
    swin = trained(encoder="swin", patch_size=4, depth=(1, 1), heads=(1, 2), window=4)
    save_file(swin.encoder.state_dict(), path)
    with pytest.raises(UserError, match="holds a Swin Transformer: give a --preset with the shape"):
        load_encoder(path, SHAPE)


def test_a_table_learns_as_fast_as_its_block():
    assert SHAPE.layer_id("rel_pos_bias.1.table") == SHAPE.layer_id("blocks.1.mlp.fc1.bias") == 2


# Swin.

SWIN = {"encoder": "swin", "patch_size": 4, "depth": (2, 1), "heads": (1, 2), "window": 4}
SWIN_SHAPE = SwinShape(
    image_size=32, patch_size=4, dim=16, depth=(2, 1), heads=(1, 2), window=4
)  # fmt: skip


def write_run(folder: Path, model: SimMIM) -> Path:
    """What a finished run of SimMIM leaves behind."""
    folder.mkdir()
    save_file(model.encoder.state_dict(), folder / "encoder.safetensors")
    config = {"model": json.loads(json.dumps(vars(model.config)))}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "encoder.safetensors"


def test_features_of_a_teacher_are_predicted_where_patches_are_masked(tmp_path: Path):
    shape = {"image_size": 16, "encoder": "vit", "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
    known = SimMIM(SimMIMConfig(**shape))
    teacher = str(write_run(tmp_path / "teacher", known))
    model = SimMIM(
        SimMIMConfig(16, **(SWIN | {"dim": 16}), target="features", teacher=teacher)
    ).train()
    images = torch.randn(3, 3, 16, 16)
    mask = masking.uniform(masking.key(range(3), seed=0), (4, 4), 0.5, unit=2)
    features = gather_masked(known.eval().encoder(images)[:, 1:], mask)
    expected = F.layer_norm(features, (16,))
    torch.testing.assert_close(model.target(images, mask), expected)
    output = model(images, mask)
    cosine = F.cosine_similarity(output.prediction, expected, dim=2)
    torch.testing.assert_close(output.loss, 1 - cosine.mean())
    output.loss.backward()
    assert all(weight.grad is None for weight in model.target.teacher.parameters())
    assert RECIPE.baselines(model, images, mask)["mean"] > 0
    drawn = RECIPE.reconstruct(model, images, mask)
    assert not gather_masked(patchify(drawn, 4), mask).any(), "features have no way back"
    with pytest.raises(UserError, match=r"patches of \(4, 4\) pixels and 3 channels where"):
        SimMIM(
            SimMIMConfig(16, "vit", 8, dim=16, depth=1, heads=2, target="features", teacher=teacher)
        )


@pytest.mark.parametrize("kind", ["ours", "authors", "authors' fine-tuned"])
def test_a_swin_is_the_same_whoever_wrote_it(kind, tmp_path: Path):
    model = trained(**SWIN)
    path = tmp_path / "checkpoint.pth"
    weights = model.state_dict()
    if kind == "ours":
        path = write_run(tmp_path / "run", model)
    elif kind == "authors":
        torch.save({"model": dict(to_official("simmim_swin", weights))}, path)
    else:
        encoder = to_official("simmim_swin_finetune", model.encoder.state_dict())
        torch.save({"model": {**encoder, "head.weight": torch.ones(9, 32)}}, path)
    file = load_encoder(path, SHAPE if kind == "ours" else SWIN_SHAPE)
    assert file.shape == SWIN_SHAPE
    images = torch.randn(2, 3, 32, 32)
    for encoder in (
        build_encoder(file.shape, seed=0),
        build_classifier(file.shape, seed=0, num_classes=3, drop_path=0.0),
    ):
        fill_encoder(encoder, file)
        torch.testing.assert_close(encoder.eval()(images), model.encoder(images))


def test_a_swins_tables_are_resampled_for_other_windows(tmp_path: Path):
    model = trained(**SWIN)
    file = load_encoder(write_run(tmp_path / "run", model), SWIN_SHAPE)
    larger = dataclasses.replace(SWIN_SHAPE, image_size=(48, 96), window=6)
    encoder = build_classifier(larger, seed=0, num_classes=3, drop_path=0.0)
    fill_encoder(encoder, file)
    name = "layers.1.blocks.0.attn.rel_pos_bias.table"
    expected = interpolate_relative_positions(file.weights[name], (4, 4), (6, 6))
    assert torch.equal(encoder.state_dict()[name], expected)
    assert not torch.equal(expected, torch.zeros_like(expected))


def test_a_swin_has_no_class_token(tmp_path: Path):
    with pytest.raises(UserError, match="Swin Transformer has no class token"):
        build_encoder(SWIN_SHAPE, seed=0, pool="token")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled tree: noise of another brightness in each class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, label in itertools.product(("train", "val"), range(2)):
        folder = root / part / f"class-{label}"
        folder.mkdir(parents=True)
        for index in range(8):
            pixels = rng.integers(120 * label, 120 * label + 90, (32, 32, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_a_swin_is_fine_tuned_and_probed(images, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.engine.probes.ATTENTIVE_SAMPLES", 640)
    encoder = write_run(tmp_path / "run", trained(**SWIN))
    common = ["--encoder", str(encoder), "--data", str(images), "--batch-size", "8"]
    out = tmp_path / "tuned"
    more = ["--image-size", "48", "--window", "6", "--trained-blocks", "1", "--max-steps", "3"]
    assert finetune.main([*common, "--out", str(out), *more]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())["model"]
    assert (config["image_size"], config["window"], config["depth"]) == (48, 6, [2, 1])
    tuned, before = load_file(out / "model.safetensors"), load_file(encoder)
    changed = {name for name in before if tuned[name].shape == before[name].shape}
    changed = {name for name in changed if not torch.equal(tuned[name], before[name])}
    assert {name.split(".blocks")[0] for name in changed} == {
        "layers.1",
        "norm.weight",
        "norm.bias",
    }
    capsys.readouterr()
    assert probe.main([*common, "--out", str(tmp_path / "probed"), "--protocol", "paper",
                       "--epochs", "1"]) == 0  # fmt: skip
    assert "untrained" in capsys.readouterr().out
    assert (tmp_path / "probed" / "attention.png").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (finetune, ["--trained-blocks", "4"], "--trained-blocks 4 is out of range: give 0 to 3"),
        (finetune, ["--encoder", "none", "--window", "4"], "a Vision Transformer has no windows"),
        (probe, ["--pool", "token"], "has no class token"),
        (probe, ["--encoder", "bare/encoder.safetensors"], "holds a Swin Transformer: give a"),
    ],
)
def test_what_does_not_fit_a_swin_is_one_line(
    script, arguments, says, images, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    encoder = write_run(tmp_path / "run", trained(**SWIN))
    (tmp_path / "bare").mkdir()
    shutil.copy(encoder, "bare")
    given = ["--encoder", str(encoder), "--data", str(images), "--batch-size", "8"]
    assert script.main([*given, "--out", "out", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("preset", "decay", "drop_path"),
    [("simmim_vit_base", 0.65, 0.1), ("swin_base", 0.8, 0.1), ("swin_large", 0.7, 0.2)],
)
def test_the_full_presets_are_simmims(preset, decay, drop_path):
    training = finetune.PRESETS[preset].training
    assert (training.layer_decay, training.drop_path) == (decay, drop_path)
    assert training.scaled_lr == pytest.approx(1.25e-3 * 4)
    assert (training.epochs, training.batch_size, training.warmup_epochs) == (100, 2048, 20)
    assert (training.warmup_lr, training.min_lr, training.clip_grad) == (1e-6, 1e-6, 5.0)
