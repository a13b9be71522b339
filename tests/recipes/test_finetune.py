"""Fine-tuning and probing, end to end on a few noise images, and what they say of mistakes."""

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimkit.interop import to_official
from mimkit.nn import ViT
from mimkit.patches import interpolate_positions
from recipes import finetune, probe
from recipes.engine.data.augment import Augmentation, rand_augment, random_box, random_erase
from recipes.engine.data.labelled import StoredImages, load_labelled
from recipes.engine.errors import UserError
from recipes.engine.paper_probes import FrozenProbe, linear_head
from recipes.engine.pretrained.encoders import build_encoder, fill_encoder, load_encoder
from recipes.engine.pretrained.shapes import ViTShape
from recipes.engine.run.cli import parse_options
from recipes.engine.run.loader import held_out_batches
from recipes.engine.run.world import World
from recipes.mae import MAE, MAEConfig

ROOT = Path(__file__).resolve().parents[2]

SHAPE = ViTShape(image_size=16, patch_size=4, in_channels=3, dim=16, depth=2, heads=2)
CLASSES = 3
QUICK = ["--batch-size", "8", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_encoder(folder: Path, shape: ViTShape = SHAPE, *, config: bool = True) -> Path:
    """What a finished run leaves behind."""
    folder.mkdir(parents=True)
    torch.manual_seed(5)
    encoder = ViT(**dataclasses.asdict(shape))
    with torch.no_grad():
        encoder.pos_embed += torch.randn_like(encoder.pos_embed)
    save_file(encoder.state_dict(), folder / "encoder.safetensors")
    if config:
        model = {**dataclasses.asdict(shape), "decoder_dim": 8}
        (folder / "config.yaml").write_text(yaml.safe_dump({"recipe": "mae", "model": model}))
    return folder / "encoder.safetensors"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("run") / "mae")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled tree: noise of another brightness in each class."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, number in (("train", 8), ("val", 4)):
        for label in range(CLASSES):
            folder = root / part / f"class-{label}"
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(80 * label, 80 * label + 90, (20, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def fine_tune(encoder: Path | str, images: Path, out: Path, *more: str) -> dict[str, Tensor]:
    """Run the script for a few steps, and return the weights that it wrote."""
    arguments = ["--encoder", str(encoder), "--data", str(images), "--out", str(out)]
    assert finetune.main([*arguments, *QUICK, *more]) == 0
    return load_file(out / "model.safetensors")


# Fine-tuning


def test_fine_tuning_learns_and_shows_training_from_scratch(encoder, images, tmp_path, capsys):
    out = tmp_path / "out"
    more = ["--epochs", "20", "--scratch", "always", "--mixup", "0", "--cutmix", "0"]
    fine_tune(encoder, images, out, *more)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 60
    assert summary["accuracy"] > 60  # a third by chance
    assert summary["from_scratch"] == json.loads(
        (out / "scratch" / "summary.json").read_text()
    )["accuracy"]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"{summary['accuracy']:.1f}" in printed
    assert "from scratch, same budget" in printed
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert yaml.safe_load((out / "scratch" / "config.yaml").read_text()) == {
        **config, "encoder": "none",
    }  # fmt: skip

    fine_tune(encoder, images, out, *more)  # finished: the summary again
    assert capsys.readouterr().out == printed


@pytest.mark.full
@pytest.mark.parametrize("script", ["finetune.py", "probe.py"])
def test_two_processes_train_as_one_does(script, encoder, images, tmp_path):
    more = ["--encoder", str(encoder), "--data", str(images), *QUICK, "--max-steps", "3"]
    more += ["--log-every", "1"]
    same = ["--mixup", "0", "--cutmix", "0", "--drop-path", "0"]  # drawn for each process
    more += same if script == "finetune.py" else ["--protocol", "paper", "--epochs", "20"]
    losses = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", str(processes), str(ROOT / "recipes" / script),
            *more, "--out", str(out),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (out / "summary.json").exists(), result.stderr
        run = out if script == "finetune.py" else out / "linear-trained"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        losses.append([row["loss"] for row in rows])
    if script == "finetune.py":  # batch norm looks at each process's share
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) == len(losses[1]) == 3


def test_a_run_goes_on_bit_for_bit(encoder, images, tmp_path):
    more = ["--max-steps", "6", "--checkpoint-every", "2", "--drop-path", "0.5"]
    whole = fine_tune(encoder, images, tmp_path / "whole", *more)
    # Back to what a run that was killed after step 4 leaves behind.
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    (killed / "summary.json").unlink()
    (killed / "model.safetensors").unlink()
    shutil.rmtree(killed / "checkpoints" / "step-00000006")
    resumed = fine_tune(encoder, images, killed, *more)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other_seed = fine_tune(encoder, images, tmp_path / "other", *more, "--seed", "1")
    assert not torch.equal(
        whole["blocks.0.attn.qkv.weight"], other_seed["blocks.0.attn.qkv.weight"]
    )


@pytest.mark.parametrize("trained_blocks", [0, 1])
def test_frozen_weights_stay_bit_for_bit(trained_blocks, encoder, images, tmp_path):
    weights = fine_tune(
        encoder, images, tmp_path / "out", "--max-steps", "4", "--checkpoint-every", "2",
        "--trained-blocks", str(trained_blocks),
    )  # fmt: skip
    before = load_file(encoder)
    trained = ["head.", "fc_norm.", *(f"blocks.{1 - i}." for i in range(trained_blocks))]
    shared = weights.keys() & before.keys()
    assert {"cls_token", "pos_embed", "blocks.0.mlp.fc1.weight"} <= shared
    for name in shared:
        changed = not torch.equal(weights[name], before[name])
        assert changed == name.startswith(tuple(trained)), name
    assert weights["fc_norm.bias"].abs().max() > 0
    assert weights["head.bias"].abs().max() > 0


def test_without_partial_fine_tuning_everything_is_trained(encoder, images, tmp_path):
    weights = fine_tune(encoder, images, tmp_path / "out", "--max-steps", "3")
    before = load_file(encoder)
    assert "norm.weight" not in weights  # it is pre-training's
    for name in weights.keys() & before.keys() - {"cls_token"}:
        assert not torch.equal(weights[name], before[name]), name


def test_training_from_scratch_needs_no_file(images, tmp_path):
    weights = fine_tune(
        "none", images, tmp_path / "out", "--max-steps", "1", "--trained-blocks", "0"
    )
    assert weights["head.weight"].shape == (CLASSES, 128)


def test_a_new_head_is_almost_zero(encoder):
    arguments = ["--encoder", str(encoder), "--data", "digits"]
    options = parse_options(finetune.OPTIONS, arguments, program="", description="")
    config, file = finetune.resolve_fine_tuning(options)
    model = finetune.build_model(config, file, 1000)
    assert model.encoder.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model.encoder.head.bias.abs().max() == 0


def test_the_full_presets_are_the_authors():
    base, large, huge = (finetune.PRESETS[f"vit_{name}"] for name in ("base", "large", "huge"))
    assert [preset.training.epochs for preset in (base, large, huge)] == [100, 50, 50]
    assert [preset.training.layer_decay for preset in (base, large, huge)] == [0.65, 0.75, 0.75]
    assert [preset.training.drop_path for preset in (base, large, huge)] == [0.1, 0.2, 0.3]
    for preset, rate in ((base, 2e-3), (large, 4e-3), (huge, 4e-3)):
        assert preset.training.scaled_lr == pytest.approx(rate)
    assert probe.LINEAR.scaled_lr == pytest.approx(6.4)
    assert probe.ATTENTIVE.scaled_lr == pytest.approx(0.4)


def test_a_dry_run_writes_nothing(encoder, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--encoder", str(encoder), "--data", str(images), *QUICK, "--dry-run"]
    assert finetune.main([*arguments, "--trained-blocks", "0"]) == 0
    assert f"({32 + 17 * CLASSES:,} trained)" in capsys.readouterr().out
    assert probe.main(arguments) == 0
    assert not list(tmp_path.iterdir())


def test_images_of_three_axes_are_refused_in_one_line(images, capsys):
    arguments = ["--encoder", "none", "--data", str(images), "--image-size", "32", "32", "32"]
    assert finetune.main(arguments) == 2
    assert "must have two axes" in capsys.readouterr().err


# Encoders


def test_an_official_checkpoint_is_the_same_encoder(tmp_path):
    torch.manual_seed(0)
    known = {field.name for field in dataclasses.fields(MAEConfig)}
    shape = {name: value for name, value in vars(SHAPE).items() if name in known}
    model = MAE(MAEConfig(**shape, decoder_dim=8, decoder_depth=1, decoder_heads=2))
    official = {
        "model": dict(to_official("mae", model.state_dict())),
        "epoch": 3,
        "args": argparse.Namespace(model="mae_vit_base_patch16"),
    }
    torch.save(official, tmp_path / "checkpoint.pth")
    ours = tmp_path / "run" / "encoder.safetensors"
    ours.parent.mkdir()
    save_file(model.encoder.state_dict(), ours)
    loaded = []
    for path in (tmp_path / "checkpoint.pth", ours):
        encoder = build_encoder(SHAPE, seed=1)
        fill_encoder(encoder, load_encoder(path, SHAPE))
        loaded.append(encoder.state_dict())
    for name, weight in model.encoder.state_dict().items():
        assert torch.equal(loaded[0][name], weight), name
        assert torch.equal(loaded[1][name], weight), name


def test_the_shape_is_that_of_the_run(encoder):
    wrong = ViTShape(dim=32, heads=4)
    assert load_encoder(encoder, wrong).shape == SHAPE


def test_the_activation_and_the_epsilon_are_those_of_the_run(tmp_path):
    config = MAEConfig(
        image_size=16, patch_size=8, dim=32, depth=1, heads=4, norm_eps=1e-3, act="gelu_tanh"
    )
    save_file(MAE(config).encoder.state_dict(), tmp_path / "encoder.safetensors")
    model = dataclasses.asdict(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    shape = load_encoder(tmp_path / "encoder.safetensors", SHAPE).shape
    assert (shape.norm_eps, shape.act) == (1e-3, "gelu_tanh")
    for name in ("norm_eps", "act"):  # as in runs of recipes that have no such field
        del model[name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    shape = load_encoder(tmp_path / "encoder.safetensors", SHAPE).shape
    assert (shape.norm_eps, shape.act) == (1e-6, "gelu")


def test_positions_are_resampled_for_another_image_size(encoder, images, tmp_path):
    weights = fine_tune(
        encoder, images, tmp_path / "out", "--max-steps", "1", "--image-size", "24",
        "--trained-blocks", "0",
    )  # fmt: skip
    table = load_file(encoder)["pos_embed"][0]
    expected = interpolate_positions(table, (4, 4), (6, 6), num_prefix=1)
    torch.testing.assert_close(weights["pos_embed"][0], expected)


# Probing


@pytest.mark.parametrize("protocol", ["small", "paper"])
def test_probes_show_trained_untrained_and_pixels(
    protocol, encoder, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("recipes.engine.probes.ATTENTIVE_SAMPLES", 640)
    arguments = ["--encoder", str(encoder), "--data", str(images), "--out", str(tmp_path / "out")]
    arguments += [*QUICK, "--protocol", protocol, "--epochs", "12"]
    assert probe.main(arguments) == 0
    probes = json.loads((tmp_path / "out" / "summary.json").read_text())["probes"]
    assert probes.keys() == {"knn", "linear", "attentive"}
    for scores in probes.values():
        assert scores.keys() == {"trained", "untrained", "pixels"}
        assert all(0 <= score <= 100 for score in scores.values())
    printed = capsys.readouterr().out
    assert "untrained" in printed
    assert f"{probes['linear']['trained']:.1f}" in printed
    assert probe.main(arguments) == 0  # finished: the summary again
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out" / "linear-pixels").is_dir() == (protocol == "paper")


def test_a_probe_trains_its_head_alone():
    features = torch.nn.Linear(4, 4)
    head = linear_head(4, 3)
    model = FrozenProbe(lambda x: (features(x), features(x)[:, None]), head, on_tokens=False)
    names = [name for name, _ in model.named_parameters()]
    assert names == ["head.1.weight", "head.1.bias"]
    model(torch.randn(8, 4)).square().sum().backward()
    assert features.weight.grad is None
    norm = model.head[0]
    assert (norm.affine, norm.eps) == (False, 1e-6)


# What a user can get wrong


def test_a_fine_tuned_classifier_is_no_encoder_to_probe(encoder, images, tmp_path, capfd):
    weights = load_file(encoder)
    weights |= {f"fc_{name}": weights.pop(name) for name in ("norm.weight", "norm.bias")}
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(encoder.with_name("config.yaml"), tmp_path)
    arguments = ["--encoder", str(tmp_path / "model.safetensors"), "--data", str(images)]
    assert probe.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "is a fine-tuned classifier" in capfd.readouterr().err


def test_a_probe_that_normalises_needs_a_batch(encoder, images, tmp_path, capfd):
    arguments = ["--encoder", str(encoder), "--data", str(images), "--protocol", "paper"]
    assert probe.main([*arguments, "--batch-size", "1", "--out", str(tmp_path / "out")]) == 2
    assert "--batch-size 1: these probes normalise over a batch" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--encoder", "missing.pth"], "missing.pth is not a file"),
        (["--encoder", "garbage.pth"], "garbage.pth cannot be read"),
        (["--encoder", "garbage.safetensors"], "garbage.safetensors cannot be read"),
        (["--encoder", "empty.pth"], "holds no encoder: expected a Vision Transformer or"),
        (["--encoder", "small/encoder.safetensors"], "has shape (16,) instead of (128,)"),
        (["--encoder", "deep/encoder.safetensors"], "blocks.4"),
        (["--data", "digits"], "for images of 3 channels, those of digits have 1"),
        (["--data", "flat"], "flat has no labels"),
        (["--preset", "vit_tiny"], "vit_tiny"),
        (["--batch-size", "1000"], "--batch-size 1000"),
        (["--lr", "nan"], "--lr nan"),
        (["--no-such-flag", "3"], "--no-such-flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("script", [finetune, probe])
def test_a_mistake_gets_one_clear_line_and_exit_code_2(
    script, arguments, says, encoder, images, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    Path("garbage.pth").write_bytes(b"garbage")
    Path("garbage.safetensors").write_bytes(b"garbage" * 9)
    torch.save({"model": {"weight": torch.zeros(2)}}, "empty.pth")
    write_encoder(Path("small"), dataclasses.replace(SHAPE, depth=4), config=False)
    deep = dataclasses.replace(finetune.PRESETS["tiny"].model, depth=5)
    write_encoder(Path("deep"), deep, config=False)
    Path("flat").mkdir()
    for index in range(3):
        shutil.copy(images / "train" / "class-0" / f"{index}.png", "flat")
    before = sorted(tmp_path.rglob("*"))
    given = ["--encoder", str(encoder), "--data", str(images), *QUICK, "--protocol", "paper"]
    if script is finetune:
        given = given[:-2]
    assert script.main([*given, *arguments]) == 2
    printed = capfd.readouterr()
    assert printed.err.startswith("error: ")
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trained-blocks", "3"], "--trained-blocks 3 is out of range: give 0 to 2"),
        (["--mixup", "-1"], "--mixup -1.0"),
        (["--smoothing", "nan"], "--smoothing nan"),
        (["--image-size", "18"], "18"),
        (["--augment", "randaugment"], "pip install timm"),
        (["--config", "bad.yaml"], "unknown key 'mask_ratio'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_fine_tuning_is_named(
    arguments, says, encoder, images, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    for module in ("timm", "timm.data", "timm.data.auto_augment", "torchvision"):
        monkeypatch.setitem(sys.modules, module, None)
    Path("bad.yaml").write_text("mask_ratio: 0.5\n")
    given = ["--encoder", str(encoder), "--data", str(images), *QUICK]
    assert finetune.main([*given, *arguments]) == 2
    printed = capfd.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1


def test_another_configuration_does_not_overwrite_a_run(encoder, images, tmp_path, capfd):
    fine_tune(encoder, images, tmp_path / "out", "--max-steps", "1")
    given = ["--encoder", str(encoder), "--data", str(images), "--out", str(tmp_path / "out")]
    assert finetune.main([*given, *QUICK, "--max-steps", "2"]) == 2
    assert "max_steps" in capfd.readouterr().err


def test_probing_needs_an_encoder(capfd):
    assert probe.main(["--encoder", "none"]) == 2
    assert "nothing to probe" in capfd.readouterr().err


# Labelled images


def test_images_of_a_folder_are_a_function_of_seed_epoch_and_id(images):
    def load(seed: int):
        return load_labelled(
            str(images), image_size=(16, 16), augmentation=Augmentation(erase=0.5), seed=seed
        )

    data = load(0)
    assert data.train_labels.tolist() == [label for label in range(CLASSES) for _ in range(8)]
    assert data.num_classes == CLASSES
    drawn = [data.images.train[epoch, 3][0] for epoch in range(3)]
    drawn.append(load(1).images.train[0, 3][0])
    assert torch.equal(drawn[0], load(0).images.train[0, 3][0])
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    scored = torch.cat(
        [
            batch.sample_ids
            for batch in held_out_batches(data.test, World(), batch_size=5, workers=0)
        ]
    )
    assert scored.tolist() == list(range(4 * CLASSES))
    shares = [
        batch.sample_ids.tolist()
        for rank in range(2)
        for batch in held_out_batches(data.test, World(rank, 2), batch_size=99, workers=0)
    ]
    assert sorted(sum(shares, [])) == list(range(4 * CLASSES))


def test_stored_photos_are_mirrored_and_digits_are_not():
    inputs = torch.rand(1, 3, 4, 4)
    flips = [
        [
            not torch.equal(StoredImages(inputs, flip, 0)[epoch, 0][0], inputs[0])
            for epoch in range(40)
        ]
        for flip in (True, False)
    ]
    assert 8 < sum(flips[0]) < 32
    assert not any(flips[1])


def test_a_policy_is_seeded_by_sample(images, monkeypatch):
    # A stand-in for timm, which draws from Python's and NumPy's generators.
    def transform(config: str, settings: dict[str, object]):
        assert config == "rand-m9-mstd0.5-inc1"
        return lambda image: image.rotate(random.uniform(0, 90) + np.random.uniform(0, 90))

    module = types.ModuleType("timm.data.auto_augment")
    module.rand_augment_transform = transform
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "timm.data.auto_augment", module)
    augmentation = Augmentation(policy=rand_augment((16, 16)))
    data = load_labelled(str(images), image_size=(16, 16), augmentation=augmentation, seed=0)
    first = data.images.train[0, 3][0]
    assert not torch.equal(first, data.images.train[1, 3][0])
    assert torch.equal(first, data.images.train[0, 3][0])


@given(
    width=st.integers(1, 500),
    height=st.integers(1, 500),
    attempts=st.sampled_from([1, 10]),
    seed=st.integers(0, 1000),
)
def test_a_random_box_lies_inside(width, height, attempts, seed):
    left, top, right, bottom = random_box(
        width, height, np.random.default_rng(seed), attempts=attempts
    )
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_erasing_replaces_one_box(height, width, seed):
    inputs = torch.full((3, height, width), 100, dtype=torch.uint8)
    changed = (random_erase(inputs, np.random.default_rng(seed)) != 100).any(dim=0)
    rows, columns = changed.any(dim=1), changed.any(dim=0)
    box = rows[:, None] & columns[None, :]
    assert changed.sum() >= 0.9 * box.sum() - 1  # noise can happen to be 100
    assert changed.sum() <= 0.45 * height * width + 4
    assert (inputs == 100).all()


def test_a_folder_of_one_class_is_refused(images, tmp_path):
    kept, *_ = sorted((images / "train").iterdir())
    shutil.copytree(kept, tmp_path / "train" / kept.name)
    with pytest.raises(UserError, match=f"has one class \\({kept.name}\\): a classifier needs two"):
        load_labelled(str(tmp_path), image_size=(8, 8), augmentation=Augmentation(), seed=0)


def test_a_folder_without_labels_is_refused(images):
    with pytest.raises(UserError, match="has no labels"):
        load_labelled(str(images / "val"), image_size=(8, 8), augmentation=Augmentation(), seed=0)
