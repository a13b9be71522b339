"""Encoders of segmentation and detection go out again, to Hugging Face and to timm."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers as hf
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer

from mimkit.interop import to_timm
from recipes import detect, figures, finetune, segment
from recipes.engine.pretrained.encoders import build_encoder, fill_encoder, load_encoder
from recipes.engine.pretrained.export import main as export
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, SwinShape, ViTShape
from tests.nn import plain
from tests.recipes.coco_folder import write_coco

SHAPES: dict[str, EncoderShape] = {
    "vit": ViTShape(image_size=32, patch_size=8, dim=16, depth=2, heads=2),
    "beit": ViTShape(
        image_size=32, patch_size=8, dim=16, depth=2, heads=2, layer_scale=0.1, qkv_bias="qv",
        absolute_positions=False, relative_positions="block",
    ),
    "swin": SwinShape(
        image_size=32, patch_size=2, dim=8, depth=(1,) * 4, heads=(1,) * 4, window=2
    ),
    "convvit": ConvViTShape(
        image_size=32, patch_sizes=(2, 2, 2), dim=(8, 8, 16), depth=(1, 1, 2), heads=2
    ),
}  # fmt: skip
Runs = Callable[..., Path]


def write_labels(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for part in ("training", "validation"):
        for name, top, shape in (("images", 256, (32, 32, 3)), ("annotations", 3, (32, 32))):
            (root / name / part).mkdir(parents=True)
            for index in range(2):
                pixels = rng.integers(0, top, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / name / part / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return what makes the folder of a finished run of two steps, from an encoder of a kind."""
    root = tmp_path_factory.mktemp("dense")
    labels, coco = write_labels(root / "labels"), write_coco(root / "coco")

    def run(script: str, kind: str, window: int = 4) -> Path:
        out = root / f"{script}-{kind}-{window}"
        given = root / kind
        if not given.exists():
            given.mkdir()
            encoder = build_encoder(SHAPES[kind], seed=0)
            plain.randomize(encoder)
            save_file(encoder.state_dict(), given / "encoder.safetensors")
            model = dataclasses.asdict(SHAPES[kind])
            (given / "config.yaml").write_text(yaml.safe_dump({"recipe": "x", "model": model}))
        line = ["--encoder", str(given), "--image-size", "32", "--batch-size", "2", "--epochs", "2"]
        line += ["--scratch", "never", "--device", "cpu", "--out", str(out)]
        if script == "segment":
            sizes = ["--num-classes", "3", "--head-dim", "8", "--aux-dim", "8"]
            assert segment.main([*line, *sizes, "--data", str(labels)]) == 0
            return out
        preset = detect.PRESETS["tiny"]
        detector = dataclasses.replace(preset.detector, window=window, global_blocks=(0,))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(detect.PRESETS, "tiny", dataclasses.replace(preset, detector=detector))
            assert detect.main([*line, "--data", str(coco)]) == 0
        return out

    return run


CARRIED = [
    ("segment", "vit", 0, "ViTModel"),
    ("segment", "beit", 0, "BeitModel"),
    ("segment", "swin", 0, "SwinModel"),
    ("detect", "vit", 0, "ViTModel"),
    ("detect", "swin", 4, "SwinModel"),
]


@pytest.mark.parametrize(("script", "kind", "window", "architecture"), CARRIED)
def test_the_trained_encoder_computes_the_same_in_the_other_libraries(
    script, kind, window, architecture, runs, tmp_path, capsys
):
    folder = runs(script, kind, window)
    file = load_encoder(folder, ViTShape())
    encoder = build_encoder(file.shape, seed=0)
    fill_encoder(encoder, file)
    before = load_file(folder.parent / kind / "encoder.safetensors")
    assert any(not torch.equal(t, before[n]) for n, t in encoder.state_dict().items())  # trained
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = encoder.eval()(images).detach()
    scale = expected.abs().max()

    assert export([str(folder), str(tmp_path / "out")]) == 0
    assert architecture in capsys.readouterr().out
    theirs = hf.AutoModel.from_pretrained(tmp_path / "out").eval()
    found = theirs(images).last_hidden_state
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=5e-6)

    converted = to_timm(load_file(folder / "encoder.safetensors"))
    assert converted.dropped == ()
    sizes = {"img_size": 32, "num_classes": 0}
    if kind == "swin":
        model = TimmSwin(
            **sizes, patch_size=2, embed_dim=8, depths=(1,) * 4, num_heads=(1,) * 4, window_size=2
        )
    elif kind == "beit":
        model = timm.models.beit.Beit(
            **sizes, patch_size=8, embed_dim=16, depth=2, num_heads=2, init_values=0.1,
            use_abs_pos_emb=False, use_rel_pos_bias=True, global_pool="",
        )  # fmt: skip
    else:
        model = VisionTransformer(
            **sizes, patch_size=8, embed_dim=16, depth=2, num_heads=2, global_pool=""
        )
    model.load_state_dict(converted)
    found = model.eval().forward_features(images).reshape(expected.shape)
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=5e-6)


REFUSED = [
    ("detect", "vit", "trained in a detector with attention windows of 4 tokens"),
    ("detect", "convvit", "no class for a ConvViT"),
    ("segment", "convvit", "no class for a ConvViT"),
]


@pytest.mark.parametrize(("script", "kind", "says"), REFUSED)
def test_an_encoder_that_cannot_be_carried_is_refused_in_one_line(
    script, kind, says, runs, tmp_path, capsys
):
    folder = runs(script, kind)
    capsys.readouterr()
    assert export([str(folder), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_convvit_of_a_detector_is_refused_where_its_tables_are_not_used(runs, tmp_path, capsys):
    folder = runs("detect", "convvit")
    given = ["--encoder", str(folder), "--data", "photos", "--out", str(tmp_path / "out")]
    for line in (lambda: finetune.main(given), lambda: figures.main([str(folder)])):
        capsys.readouterr()
        assert line() == 2
        error = capsys.readouterr().err
        assert "with tables of relative positions (global_bias.table, window_bias.table)" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figures_of_an_encoder_of_windows_are_refused_in_one_line(runs, capsys):
    folder = runs("detect", "vit")
    before = sorted(folder.iterdir())
    capsys.readouterr()
    assert figures.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "attention windows of 4 tokens" in error
    assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before
