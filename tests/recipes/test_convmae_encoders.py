"""ConvMAE's encoder in fine-tuning and probing."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimkit.interop import to_official
from mimkit.nn import ConvViT
from mimkit.patches import interpolate_positions
from recipes import finetune
from recipes.convmae import ConvMAE, ConvMAEConfig
from recipes.engine.errors import UserError
from recipes.engine.optim import layer_decay_groups
from recipes.engine.pretrained.encoders import (
    build_classifier,
    build_encoder,
    fill_encoder,
    load_encoder,
)
from recipes.engine.pretrained.shapes import ConvViTShape, ViTShape
from tests.nn import plain

SIZES = {
    "image_size": (16, 24),
    "patch_sizes": (2, 2, 2),
    "in_channels": 2,
    "dim": (4, 8, 16),
    "depth": (1, 2, 3),
    "heads": 2,
}
SHAPE = ConvViTShape(**SIZES)
IMAGES = torch.randn(2, 2, 16, 24, generator=torch.Generator().manual_seed(0))


def trained(**changes: object) -> ConvMAE:
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    model = ConvMAE(ConvMAEConfig(**(SIZES | decoder | changes)))
    plain.randomize(model)
    return model


@pytest.mark.parametrize("decoder", ["multi-scale", "single-scale"])
@torch.no_grad()
def test_a_run_and_the_authors_checkpoint_give_the_pre_trained_encoder(
    decoder: str, tmp_path: Path
):
    model = trained(decoder=decoder)
    paths = tmp_path / "encoder.safetensors", tmp_path / "checkpoint.pth"
    save_file(model.encoder.state_dict(), paths[0])
    torch.save({"model": dict(to_official("convmae", model.state_dict()))}, paths[1])
    for path in paths:
        file = load_encoder(path, SHAPE)
        assert file.shape == ConvViTShape(**SIZES, multi_scale=decoder == "multi-scale")
        encoder = build_encoder(file.shape, seed=1)
        fill_encoder(encoder, file)
        assert torch.equal(encoder(IMAGES), model.encoder(IMAGES))


@torch.no_grad()
def test_fine_tuning_classifies_the_mean_of_the_last_stage(tmp_path: Path):
    model = trained()
    save_file(model.encoder.state_dict(), tmp_path / "encoder.safetensors")
    file = load_encoder(tmp_path / "encoder.safetensors", SHAPE)
    encoder = build_classifier(file.shape, seed=0, num_classes=5, drop_path=0.1).eval()
    fill_encoder(encoder, file)
    last_stage = ConvViT(**SIZES, pool_norm=True)
    weights = model.encoder.state_dict()
    last_stage.load_state_dict(
        {n: weights.get(n, torch.zeros_like(own)) for n, own in last_stage.state_dict().items()}
    )
    assert torch.equal(encoder(IMAGES), last_stage(IMAGES))
    assert encoder.pos_embed.requires_grad
    assert encoder.head.weight.abs().max() < 1e-3
    logits = encoder.head(encoder.pool(encoder(IMAGES)))
    assert logits.shape == (2, 5)


def test_layers_are_counted_as_the_authors_count_them():
    encoder = build_classifier(SHAPE, seed=0, num_classes=5, drop_path=0.0)
    groups = layer_decay_groups(encoder, SHAPE, weight_decay=0.05, layer_decay=0.5)
    by_id = {id(p): g for g in groups for p in g["params"]}
    names = dict(encoder.named_parameters())
    theirs = to_official("convmae_vit", names)
    assert len(theirs) == len(names)
    for name, tensor in theirs.items():
        group = by_id[id(next(p for p in names.values() if p.data_ptr() == tensor.data_ptr()))]
        block = re.match(r"blocks3\.(\d+)\.", name)
        is_first = name.startswith(("patch_embed", "blocks1", "blocks2", "pos_embed"))
        layer = 0 if is_first else int(block[1]) + 1 if block else 4
        assert group["lr_scale"] == 0.5 ** (4 - layer), name
        is_plain = name.endswith(".bias") or "norm" in name or name == "pos_embed"
        assert group["weight_decay"] == (0.0 if is_plain else 0.05), name


def test_positions_are_resampled_for_another_image_size(tmp_path: Path):
    model = trained()
    save_file(model.encoder.state_dict(), tmp_path / "encoder.safetensors")
    file = load_encoder(tmp_path / "encoder.safetensors", SHAPE)
    larger = ConvViTShape(**(SIZES | {"image_size": (32, 40)}))
    encoder = build_classifier(larger, seed=0, num_classes=5, drop_path=0.0)
    fill_encoder(encoder, file)
    table = model.encoder.pos_embed[0]
    torch.testing.assert_close(
        encoder.pos_embed[0], interpolate_positions(table, (2, 3), (4, 5), num_prefix=0)
    )


def test_a_convvit_needs_the_shape_of_one(tmp_path: Path):
    save_file(trained().encoder.state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="holds a ConvViT: give a --preset with the shape"):
        load_encoder(tmp_path / "encoder.safetensors", ViTShape())


def test_the_full_preset_is_the_authors():
    preset = finetune.PRESETS["convmae_base"]
    training = preset.training
    assert (training.epochs, training.batch_size, training.warmup_epochs) == (100, 1024, 5)
    assert (training.layer_decay, training.drop_path, training.min_lr) == (0.65, 0.1, 1e-6)
    assert training.scaled_lr == pytest.approx(2e-3)
    assert preset.model == ConvViTShape()
