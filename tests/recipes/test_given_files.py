"""Files given on the command line: hostile, damaged or odd ones get one sentence."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from recipes import simmim
from recipes.engine import run
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import build_encoder, fill_encoder, load_encoder
from recipes.engine.pretrained.export import export
from recipes.engine.pretrained.export import main as export_command
from recipes.engine.pretrained.shapes import ViTShape
from recipes.engine.pretrained.teachers import load_teacher
from recipes.engine.pretrained.tokenizers import load_tokenizer
from recipes.engine.run.folder import RunFolder
from recipes.finetune import main as finetune
from recipes.mae import MAE, RECIPE
from tests import hostile
from tests.recipes.command import config_for, options_for
from tests.recipes.damage import flip_a_bit

DOORS: dict[str, Callable[[Path], object]] = {
    "--encoder": lambda path: load_encoder(path, ViTShape()),
    "--tokenizer": lambda path: load_tokenizer(path, 32, 8, 3),
    "--teacher": lambda path: load_teacher(str(path), 32, 4, 3),
}
KINDS = {
    **{f"{write.__name__}.pth": write for write in hostile.PYTORCH},
    **{f"{name}.safetensors": write for name, write in hostile.SAFETENSORS.items()},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", KINDS)
def test_hostile_files_get_one_sentence_at_every_door(name: str, door: str, tmp_path: Path) -> None:
    file = tmp_path / name
    KINDS[name](file)
    with pytest.raises(UserError) as caught:
        DOORS[door](file)
    assert str(caught.value).startswith(door)
    assert str(caught.value).isprintable()
    assert not hostile.trap(file).exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder of a finished run, not to be changed."""
    config = config_for(RECIPE)
    path = tmp_path_factory.mktemp("run") / "run"
    with RunFolder(path, config) as folder:
        folder.write_weights("encoder.safetensors", MAE(config.model).encoder)
        folder.write_summary({"steps": 1})
    return path / "encoder.safetensors"


@pytest.fixture
def copied(encoder: Path, tmp_path: Path) -> Path:
    shutil.copytree(encoder.parent, tmp_path / "run")
    return tmp_path / "run" / encoder.name


def test_a_flipped_bit_in_an_encoder_is_noticed(copied: Path) -> None:
    assert load_encoder(copied, ViTShape()).weights
    flip_a_bit(copied, random.Random(0))
    with pytest.raises(UserError, match=r"(does not have the digest|cannot be read)"):
        load_encoder(copied, ViTShape())


def test_an_encoder_alone_has_no_digest_and_a_damaged_summary_is_said(
    copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "encoder.safetensors"
    shutil.copy(copied, alone)
    shutil.copy(copied.with_name("config.yaml"), tmp_path)
    load_encoder(alone, ViTShape())
    assert capfd.readouterr().err == ""
    copied.with_name("summary.json").write_text("{}")
    load_encoder(copied, ViTShape())
    assert "cannot be compared with its digest" in capfd.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_encoder_with_numbers_that_are_not_finite_is_refused(value: float, copied: Path) -> None:
    weights = load_file(copied)
    weights["blocks.0.norm1.weight"][0] = value
    save_file(weights, copied.with_name("other.safetensors"))
    with pytest.raises(UserError, match=r"blocks.0.norm1.weight has values that are not finite"):
        load_encoder(copied.with_name("other.safetensors"), ViTShape())


def test_a_plain_vit_does_not_take_what_a_detector_trained_with_windows(copied: Path) -> None:
    config = copied.with_name("config.yaml")
    written = yaml.safe_load(config.read_text())
    for detector, fits in ((None, True), ({"window": 0}, True), ({"window": 4}, False)):
        config.write_text(yaml.safe_dump(written | {"detector": detector}))
        file = load_encoder(copied, ViTShape())
        with nullcontext() if fits else pytest.raises(UserError, match="windows of 4 tokens"):
            fill_encoder(build_encoder(file.shape, seed=0), file)


@pytest.fixture
def folder(encoder: Path, tmp_path: Path) -> Path:
    """The encoder of a finished run, exported for Hugging Face."""
    receipt = export(encoder.parent, tmp_path / "exported")
    assert (receipt.model, receipt.not_equal) == ("ViTModel", ())
    return tmp_path / "exported"


def test_an_exported_encoder_comes_back_with_its_weights_and_shape(
    encoder: Path, folder: Path
) -> None:
    own, back = load_encoder(encoder, ViTShape()), load_encoder(folder, ViTShape())
    assert back.shape == own.shape
    assert back.weights.keys() == own.weights.keys()
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in own.weights.items())


def test_an_export_is_refused_where_it_would_lose_something(
    encoder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(encoder.parent), str(folder)], "has content: give a new or empty folder"),
        ([str(tmp_path), str(tmp_path / "new")], "holds no finished run"),
        ([str(encoder.parent), str(encoder)], "is a file: give a new or empty folder"),
    ):
        assert export_command(arguments) == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert captured.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert export_command([str(encoder), str(tmp_path / "new")]) == 0


FOREIGN_CONFIGS = {
    "text": "vit", "list": [1], "nothing": {}, "kind": {"model_type": "bert"},
    "depth": {"num_hidden_layers": 10**9}, "size": {"image_size": "32"}, "act": {"hidden_act": {}},
    "swin": {"model_type": "swin"}, "none": {"patch_size": None}, "width": 64,
    "type": {"model_type": [1]}, "missing": {"layer_norm_eps": None},
    "heads": {"num_attention_heads": 0}, "zero": {"hidden_size": 0}, "ratio": {"hidden_size": "8"},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN_CONFIGS)
def test_a_wrong_configuration_of_hugging_face_gets_one_sentence(kind: str, folder: Path) -> None:
    file, change = folder / "config.json", FOREIGN_CONFIGS[kind]
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps({**config, **change} if isinstance(change, dict) and change else change)
    )
    with pytest.raises(UserError) as caught:
        load_encoder(folder, ViTShape())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_of_hugging_face_without_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"{")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_encoder(folder, ViTShape())
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"is a folder without {name}"):
        load_encoder(folder, ViTShape())


SHAPES = {
    "text": {"dim": "128"}, "null": {"image_size": None}, "deep": {"depth": 1_000_000},
    "thousand": {"depth": 1_000}, "wide": {"dim": 131_072, "heads": 1},
    "large images": {"image_size": 2**24}, "negative": {"depth": -1}, "fraction": {"depth": 1.5},
    "list": {"dim": [1, 2]}, "dictionary": {"dim": {}}, "true": {"depth": True},
    "ratio": {"mlp_ratio": 1e300}, "nan": {"mlp_ratio": float("nan")}, "zero": {"patch_size": 0},
    "heads": {"heads": 7}, "channels": {"in_channels": 4}, 
}  # fmt: skip


@pytest.mark.parametrize("kind", SHAPES)
def test_a_wrong_shape_beside_an_encoder_is_refused_before_anything_is_built(
    kind: str, copied: Path
) -> None:
    file = copied.with_name("config.yaml")
    config = yaml.safe_load(file.read_text())
    config["model"].update(SHAPES[kind])
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="config.yaml") as caught:
        load_encoder(copied, ViTShape())
    assert str(caught.value).isprintable()


CONFIGS: dict[str, str | bytes | Callable[[Path], None]] = {
    "braces": "{" * 5_000,
    "brackets": "a: " + "[" * 5_000,
    "indented": "\n".join(" " * n + "a:" for n in range(2_000)),
    "digits": "lr: " + "9" * 5_000,
    "key of digits": "9" * 5_000 + ": 1",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nseed: [*b, *b]",
    "own alias": "seed: &a [*a]",
    "merge": "a: &a {seed: 1}\n<<: *a",
    "duplicate keys": "seed: 1\nseed: 2",
    "many keys": "".join(f"k{n}: 1\n" for n in range(9_000)),
    "tag": "seed: !!python/object/apply:os.system [true]",
    "dates": "seed: 2024-99-99",
    "binary": b"\xff\xfe\x00",
    "zeros": b"\0" * 1_000,
    "large": "# " + "x" * 200_000,
    "list": "- 1",
    "unhashable": "? [a]\n: 1",
    "device": hostile.a_link_to_a_device,
    "pipe": hostile.a_pipe,
    "folder": hostile.a_folder,
    "endless": hostile.endless_zeros,
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_hostile_configurations_get_one_sentence(kind: str, tmp_path: Path) -> None:
    file, content = tmp_path / "config.yaml", CONFIGS[kind]
    if callable(content):
        content(file)
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        options_for(RECIPE, "--config", str(file))
    message = " ".join(str(caught.value).split())
    assert message.isprintable()
    assert len(message) < 1_000


def test_a_command_with_a_hostile_file_ends_with_code_2_and_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hostile.code(tmp_path / "a.pth")
    assert finetune(["--encoder", str(tmp_path / "a.pth"), "--out", str(tmp_path / "out")]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: --encoder ")
    assert error.count("\n") == 1
    assert "which weights do not need" in error
    assert not (tmp_path / "out").exists()


def test_a_summary_has_the_digest_of_its_weights(encoder: Path) -> None:
    summary = json.loads(encoder.with_name("summary.json").read_text())
    digest = hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert summary["digests"] == {"encoder.safetensors": digest}


def test_a_tensor_that_is_no_weight_is_left_out(copied: Path, tmp_path: Path) -> None:
    contents = {"model": {**load_file(copied), "epoch": 3}}
    torch.save(contents, copied.with_name("weights.pth"))
    assert "epoch" not in load_encoder(copied.with_name("weights.pth"), ViTShape()).weights


def test_the_cost_of_a_run_with_a_teacher_from_a_file_is_printed(
    encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--target", "features", "--teacher", str(encoder), "--dry-run"]
    assert run(simmim.RECIPE, "", given) == 0
    assert "FLOPs" in capsys.readouterr().out
