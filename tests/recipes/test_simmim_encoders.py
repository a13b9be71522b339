"""Encoders that SimMIM has trained, as fine-tuning and probing read them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimkit.interop import to_official
from recipes.engine.encoder_kinds import ViTShape
from recipes.engine.encoders import build_classifier, build_encoder, fill_encoder, load_encoder
from recipes.engine.errors import UserError
from recipes.simmim import SimMIM, SimMIMConfig
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
