"""Encoders saved for Hugging Face: `AutoModel` loads them offline and computes the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mimkit.interop import from_hf, save_hf
from mimkit.nn import ConvStem, ConvViT, SwinTransformer, ViT
from recipes import finetune, mae, probe, segment, simmim
from recipes.engine.data.images import NORMALIZE, CenterCrops, model_inputs
from recipes.engine.pretrain import build_model
from recipes.engine.pretrained.encoders import (
    build_classifier,
    build_encoder,
    fill_encoder,
    load_encoder,
)
from recipes.engine.pretrained.export import main as export
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, SwinShape, ViTShape
from recipes.engine.run.folder import RunFolder
from tests.nn import plain
from tests.recipes.command import config_for

SIZES = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}
SWIN = {"image_size": 32, "patch_size": 2, "dim": 16, "depth": (2, 2), "heads": (2, 4)}
ENCODERS: dict[str, tuple[type, dict[str, Any], str]] = {
    "plain": (ViT, {}, "ViTModel"),
    "tanh, eps": (ViT, {"act": "gelu_tanh", "norm_eps": 1e-3, "qkv_bias": False}, "ViTModel"),
    "rectangle": (ViT, {"image_size": (32, 16), "patch_size": (8, 4)}, "ViTModel"),
    "one channel": (ViT, {"in_channels": 1, "mlp_ratio": 2.7}, "ViTModel"),
    "head": (ViT, {"num_classes": 5, "pool": "token"}, "ViTForImageClassification"),
    "fine-tuned": (ViT, {"num_classes": 5, "pool_norm": True}, "BeitForImageClassification"),
    "pool norm": (ViT, {"pool_norm": True}, "BeitModel"),
    "layer scale": (ViT, {"layer_scale": 0.1}, "BeitModel"),
    "simmim": (
        ViT,
        {"layer_scale": 0.1, "qkv_bias": "qv", "relative_positions": "shared",
         "absolute_positions": False},
        "BeitModel",
    ),
    "tables": (ViT, {"relative_positions": "block", "qkv_bias": "qv"}, "BeitModel"),
    "no positions": (ViT, {"absolute_positions": False}, "BeitModel"),
    "registers": (ViT, {"num_registers": 3}, "Dinov2WithRegistersModel"),
    "registers, scale": (
        ViT,
        {"num_registers": 1, "layer_scale": 0.1, "mlp_ratio": 2, "act": "gelu_tanh"},
        "Dinov2WithRegistersModel",
    ),
    "swin": (SwinTransformer, {"window": 4}, "SwinModel"),
    "swin, widest window": (SwinTransformer, {"window": 8}, "SwinModel"),
    "swin rectangle": (
        SwinTransformer,
        {"window": 4, "image_size": (32, 16), "act": "gelu_tanh"},
        "SwinModel",
    ),
    "swin head": (
        SwinTransformer, {"window": 4, "num_classes": 5}, "SwinForImageClassification"
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    cls, options, _ = ENCODERS[name]
    torch.manual_seed(0)
    encoder: nn.Module = cls(**((SIZES if cls is ViT else SWIN) | options)).eval()
    plain.randomize(encoder)
    return encoder


def images(encoder: Any) -> Tensor:
    channels = encoder.patch_embed.proj.weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, *encoder.image_size, generator=generator)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_automodel_loads_a_saved_encoder_and_computes_the_same(name, version, tmp_path):
    encoder = build(name)
    architecture = save_hf(encoder, tmp_path / "out", version=version)
    assert architecture == ENCODERS[name][2]
    auto = hf.AutoModelForImageClassification if "Classification" in architecture else hf.AutoModel
    theirs, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs.eval()).__name__ == architecture
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {n for n in info["missing_keys"] if not n.startswith("pooler.dense.")} == set()
    output, tokens = theirs(images(encoder)), encoder(images(encoder))
    if "Classification" in architecture:
        found, expected = encoder.head(encoder.pool(tokens)), output.logits
    else:
        found, expected = tokens, output.last_hidden_state
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)
    if name == "pool norm":
        torch.testing.assert_close(encoder.pool(tokens), output.pooler_output)


REFUSED: dict[str, Any] = {
    "no class token": lambda: ViT(**SIZES, class_token=False),
    "a stem": lambda: ViT(
        **SIZES | {"patch_size": 2}, stem=ConvStem(in_channels=3, channels=(8, 8))
    ),
    "attention windows": lambda: ViT(**SIZES, class_token=False, window=2),
    "two axes": lambda: ViT(**SIZES | {"image_size": (32,)}),
    "qkv_bias=False": lambda: ViT(**SIZES, layer_scale=0.1, qkv_bias=False),
    "qkv_bias other than True": lambda: ViT(**SIZES, num_registers=1, qkv_bias="qv"),
    "registers and a head": lambda: ViT(**SIZES, num_registers=1, num_classes=3),
    "several sizes": lambda: SwinTransformer(**SWIN, window=16),
    "not square, as a Beit": lambda: ViT(
        **SIZES | {"image_size": (32, 16)}, relative_positions="block", absolute_positions=False
    ),
    "no integer": lambda: ViT(**SIZES, num_registers=1, mlp_ratio=2.5),
    "not square": lambda: ViT(**SIZES | {"image_size": (32, 16)}, layer_scale=0.1),
    'pool="mean" and pool_norm=False': lambda: ViT(**SIZES, num_classes=3),
    'pool="token" and pool_norm=True': lambda: ViT(**SIZES, pool="token", pool_norm=True),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_an_encoder_that_no_class_of_theirs_computes_is_refused(problem, tmp_path):
    with pytest.raises(ValueError, match=f"no model of Hugging Face .*{problem}"):
        save_hf(REFUSED[problem](), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.untyped
def test_other_modules_and_folders_with_content_are_refused(tmp_path):
    with pytest.raises(TypeError, match="got a ConvViT"):
        save_hf(ConvViT(image_size=32, dim=(8, 8, 8), depth=(1, 1, 1), heads=2), tmp_path / "out")
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(FileExistsError, match="has content"):
        save_hf(ViT(**SIZES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SMALL_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
# Class of a saved model -> configuration, the attribute of its encoder, the shape's kind.
SAVED: dict[str, tuple[dict[str, Any], str, type[EncoderShape]]] = {
    "ViTModel": (SMALL | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}, "", ViTShape),
    "ViTForMaskedImageModeling": (SMALL | {"encoder_stride": 8}, "vit", ViTShape),
    "ViTMAEForPreTraining": (SMALL | {"mask_ratio": 0.0}, "vit", ViTShape),
    "BeitForMaskedImageModeling": (
        SMALL | {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
        "beit",
        ViTShape,
    ),
    "BeitForImageClassification": (
        SMALL | {"use_relative_position_bias": True, "use_mean_pooling": False},
        "beit",
        ViTShape,
    ),
    "Dinov2Model": (
        {n: v for n, v in SMALL.items() if n != "intermediate_size"} | {"mlp_ratio": 2},
        "",
        ViTShape,
    ),
    "SwinModel": (SMALL_SWIN, "", SwinShape),
    "SwinForMaskedImageModeling": (SMALL_SWIN | {"encoder_stride": 4}, "swin", SwinShape),
}


@pytest.mark.parametrize("name", SAVED)
@torch.no_grad()
def test_a_folder_of_theirs_is_an_encoder_for_fine_tuning_and_probing(name, tmp_path):
    options, attribute, kind = SAVED[name]
    cls = getattr(hf, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**options)).eval()
    if name != "ViTMAEForPreTraining":  # its tables are constants
        plain.randomize(model)
    model.save_pretrained(tmp_path)
    file = load_encoder(tmp_path, ConvViTShape())  # whatever the preset's kind
    assert isinstance(file.shape, kind)
    encoder = build_encoder(file.shape, seed=0)
    fill_encoder(encoder, file)
    theirs = getattr(model, attribute) if attribute else model
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in name else {}
    expected, found = theirs(images, **given).last_hidden_state, encoder.eval()(images)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)
    classifier = build_classifier(file.shape, seed=0, num_classes=3, drop_path=0.0)
    fill_encoder(classifier, file)


@pytest.mark.parametrize("recipe", [mae.RECIPE, simmim.RECIPE], ids=["mae", "simmim"])
@torch.no_grad()
def test_a_finished_run_is_exported(recipe, tmp_path):
    config = config_for(recipe)
    model = build_model(recipe, config)
    plain.randomize(model.encoder)
    with RunFolder(tmp_path / "run", config) as folder:
        folder.write_weights("encoder.safetensors", model.encoder)
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    theirs = hf.AutoModel.from_pretrained(tmp_path / "out").eval()
    encoder = model.encoder.eval()
    images = torch.randn(2, 3, *encoder.image_size)
    expected, found = theirs(images).last_hidden_state, encoder(images)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)


def photo(height: int, width: int) -> np.ndarray:
    """A smooth picture with edges, of any size."""
    rows, columns = np.mgrid[0:height, 0:width] / 40
    waves = np.stack([np.sin(rows + 2 * columns), np.cos(3 * rows), np.sin(rows - columns)], -1)
    picture = (127.5 * (1 + waves)).round().astype(np.uint8)
    picture[height // 3 : height // 2, width // 3 : width // 2] = 255
    return picture


@pytest.mark.parametrize("shape", [(512, 512), (300, 451)])
def test_the_image_processor_of_an_exported_run_does_what_its_evaluation_does(shape, tmp_path):
    preset = {"image_size": 224, "patch_size": 32, "dim": 8, "depth": 1, "heads": 1}
    config = config_for(mae.RECIPE)
    config = replace(config, data="pictures", model=mae.MAEConfig(**preset))
    with RunFolder(tmp_path / "run", config) as folder:
        folder.write_weights("encoder.safetensors", build_model(mae.RECIPE, config).encoder)
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = photo(*shape)
    found = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    expected = model_inputs(CenterCrops()(pixels, (224, 224))[None], NORMALIZE)
    assert found.shape == expected.shape == (1, 3, 224, 224)
    levels = (found - expected).abs() * torch.tensor(NORMALIZE.std).view(1, -1, 1, 1) * 255
    if shape == (512, 512):  # no side is rounded: only the border, which ours does not look beyond
        assert levels[:, :, 4:-4, 4:-4].max() <= 1.01
    assert levels.mean() < 2  # of 255: a crop that is off by less than a pixel
    off = model_inputs(CenterCrops()(np.roll(pixels, 8, axis=1), (224, 224))[None], NORMALIZE)
    shifted = (found - off).abs() * torch.tensor(NORMALIZE.std).view(1, -1, 1, 1) * 255
    assert shifted.mean() > 4  # what the tolerance would catch


def test_an_export_of_a_run_on_photos_says_why_it_has_no_image_processor(tmp_path, capsys):
    config = config_for(mae.RECIPE)
    with RunFolder(tmp_path / "run", config) as folder:
        folder.write_weights("encoder.safetensors", build_model(mae.RECIPE, config).encoder)
    assert export([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    assert "no preprocessor_config.json" in capsys.readouterr().out


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("options", "mean", "std", "message"),
    [
        ({}, [0.5] * 3, None, "3 numbers each"),
        ({}, [0.5], [0.5], "3 numbers each"),
        ({}, [0.5] * 3, [0.5, 0, 0.5], "above 0"),
        ({"image_size": (32, 16)}, [0.5] * 3, [0.5] * 3, "square"),
    ],
)
def test_constants_that_do_not_fit_an_encoder_are_refused(options, mean, std, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_hf(ViT(**SIZES | options), tmp_path / "out", mean=mean, std=std)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pictures of two classes in folders, and the same with labels of their pixels."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for part, other in (("train", "training"), ("val", "validation")):
        for index in range(8):
            picture = Image.fromarray(rng.integers(0, 256, (36, 40, 3), dtype=np.uint8))
            labels = Image.fromarray(rng.integers(0, 2, (36, 40), dtype=np.uint8))
            for file, image in (
                (f"classes/{part}/{index % 2}/{index}.png", picture),
                (f"pixels/images/{other}/{index}.png", picture),
                (f"pixels/annotations/{other}/{index}.png", labels),
            ):
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                image.save(root / file)
    return root


SEGMENT = ["--num-classes", "2", "--head-dim", "8", "--aux-dim", "8"]
RECIPES: dict[str, tuple[Any, str, list[str], str]] = {
    "finetune": (finetune, "classes", ["--max-steps", "2"], "accuracy"),
    "probe": (probe, "classes", [], "probes"),
    "segment": (segment, "pixels", ["--max-steps", "2", *SEGMENT], "miou"),
}
TRAINED = (
    "ViTModel", "ViTMAEForPreTraining", "BeitForMaskedImageModeling", "Dinov2Model", "SwinModel"
)  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_folder_of_theirs_is_the_encoder_of_a_recipe(
    name, recipe, pictures, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr("recipes.engine.probes.ATTENTIVE_SAMPLES", 64)
    options, _, _ = SAVED[name]
    if name == "SwinModel":  # segmentation reads the third map
        options = options | {"depths": [1, 1, 1], "num_heads": [2, 2, 4]}
    cls = getattr(hf, name)
    torch.manual_seed(0)
    cls(cls.config_class(**options)).save_pretrained(tmp_path / "theirs")
    script, data, more, score = RECIPES[recipe]
    arguments = ["--encoder", str(tmp_path / "theirs"), "--data", str(pictures / data)]
    arguments += ["--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "run"), *more]
    assert script.main(arguments) == 0, capfd.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert score in summary
    for file in (tmp_path / "run").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_a_pretraining_model_that_they_saved_converts_whole(tmp_path):
    model = hf.ViTMAEForPreTraining(
        hf.ViTMAEConfig(**SMALL | {"decoder_hidden_size": 32, "decoder_intermediate_size": 64})
    )
    model.save_pretrained(tmp_path)
    saved = from_hf(load_file(tmp_path / "model.safetensors"), model.config)
    expected = from_hf(model)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
