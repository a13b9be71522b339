"""Names of timm and Hugging Face, without the packages; tests/peers compares the real models."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit.interop import from_hf, from_timm, to_hf, to_official, to_timm
from mimkit.nn import ViT

SIZES = {"image_size": (8, 16), "patch_size": 4, "dim": 8, "depth": 1, "heads": 2}


def encoder(**options: object) -> ViT:
    """An encoder on a grid of 2 x 4 patches, with one class token 9: a square."""
    torch.manual_seed(0)
    model = ViT(**SIZES | options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("has_class_position", [True, False])
def test_timms_position_table_keeps_every_patch(class_token, num_registers, has_class_position):
    model = encoder(class_token=class_token, num_registers=num_registers)
    if class_token and not has_class_position:
        model.pos_embed.data[:, 0] = 0
    converted = to_timm(model)
    assert converted.dropped == ()
    rows = model.num_prefix_tokens if class_token and has_class_position else 0
    if not num_registers:
        rows = int(class_token)
    assert converted["pos_embed"].shape[1] == rows + 8
    assert torch.equal(converted["pos_embed"][:, rows:], model.pos_embed[:, int(class_token) :])
    assert same(from_timm(converted, grid=(2, 4)), model.state_dict())


def test_a_grid_tells_whether_the_class_token_has_a_position():
    tensors = {"cls_token": torch.ones(1, 1, 8), "pos_embed": torch.ones(1, 9, 8)}
    assert from_timm(tensors, grid=(2, 4))["pos_embed"].shape[1] == 9
    assert from_timm(tensors, grid=(3, 3))["pos_embed"][0, :, 0].tolist() == [0] + [1] * 9
    assert from_timm(tensors)["pos_embed"].shape[1] == 10
    with pytest.raises(ValueError, match=r"9 rows, .* grid \(4, 4\) with or without one"):
        from_timm(tensors, grid=(4, 4))
    with pytest.raises(ValueError, match=r"8 rows, .* square grid \(give grid=\)"):
        from_timm(tensors | {"reg_token": torch.ones(1, 2, 8), "pos_embed": torch.ones(1, 8, 8)})
    with pytest.raises(ValueError, match="'reg_token' .* are not zero"):
        from_timm(
            tensors | {"reg_token": torch.ones(1, 2, 8), "pos_embed": torch.ones(1, 11, 8)},
            grid=(2, 4),
        )


@pytest.mark.parametrize("version", [4, 5])
def test_registers_go_to_hugging_face_and_back(version):
    model = encoder(num_registers=2, layer_scale=0.1)
    architecture = "Dinov2WithRegistersModel"
    theirs = to_hf(model, architecture, version=version)
    assert torch.equal(theirs["embeddings.register_tokens"], model.reg_token)
    assert same(from_hf(dict(theirs), architecture=architecture), model.state_dict())
    assert same(from_hf(dict(theirs)), model.state_dict())


@pytest.mark.parametrize(
    ("options", "architecture", "name"),
    [
        ({"num_registers": 2}, "Dinov2Model", "reg_token"),
        ({"num_registers": 2}, "ViTMAEModel", "reg_token"),
        ({"layer_scale": 0.1}, "ViTModel", "blocks.0.gamma_1"),
        ({"relative_positions": "shared"}, "ViTModel", "rel_pos_bias.0.table"),
        ({"relative_positions": "block"}, "Dinov2Model", "rel_pos_bias.0.table"),
        ({"pool_norm": True}, "ViTForImageClassification", "fc_norm"),
    ],
)
def test_parts_that_a_class_of_hugging_face_lacks_are_refused(options, architecture, name):
    with pytest.raises(ValueError, match=rf"to_hf\(..., \"{architecture}\"\) .*'{name}"):
        to_hf(encoder(**options), architecture)


def test_a_head_is_dropped_where_their_class_has_none():
    assert to_hf(encoder(num_classes=3), "ViTModel").dropped == ("head.weight", "head.bias")
    assert "classifier.bias" in to_hf(encoder(num_classes=3), "ViTForImageClassification")


@pytest.mark.parametrize("kind", ["ViTModel", "BeitModel", "SwinModel", "Dinov2Model"])
@pytest.mark.parametrize("version", [4, 5])
@given(st.data())
def test_an_attention_weight_of_which_a_part_is_missing_is_refused(kind, version, data):
    ours = {"blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    if kind == "SwinModel":
        ours = {"layers.0.blocks.0.attn.qkv.weight": torch.ones(24, 8)}
    if kind in ("ViTModel", "Dinov2Model"):
        ours["blocks.0.attn.qkv.bias"] = torch.ones(24)
    parts = to_hf(ours, kind, version=version)
    missing = data.draw(st.sampled_from(sorted(parts)))
    assert same(from_hf(dict(parts), architecture=kind), ours)
    rest = {name: tensor for name, tensor in parts.items() if name != missing}
    with pytest.raises(ValueError, match=r"is 3 tensors of one shape, joined; got"):
        from_hf(rest, architecture=kind)
    smaller = {**parts, missing: parts[missing][:4]}
    with pytest.raises(ValueError, match=re.escape(f"{missing!r} {[4, 8][: parts[missing].ndim]}")):
        from_hf(smaller, architecture=kind)


def test_only_the_missing_key_bias_of_a_beit_is_no_fault():
    parts = {f"layers.0.attention.{part}_proj.weight": torch.ones(8, 8) for part in "qkv"}
    biases = {f"layers.0.attention.{part}_proj.bias": torch.ones(8) for part in "qv"}
    converted = from_hf(parts | biases)
    assert sorted(converted) == [f"blocks.0.attn.{n}" for n in ("q_bias", "qkv.weight", "v_bias")]
    with pytest.raises(ValueError, match="blocks.0.attn.qkv.bias"):
        from_hf(parts | biases, architecture="ViTModel")
    with pytest.raises(ValueError, match=r"'blocks.0.attn.qkv.weight' is 3 .* got \[25, 8\]"):
        to_hf({"blocks.0.attn.qkv.weight": torch.ones(25, 8)}, "ViTModel")


@pytest.mark.parametrize("method", ["simmim_vit_finetune", "cae_vit"])
def test_a_shared_table_goes_to_every_block_of_those_that_have_their_own(method):
    shared = encoder(depth=3, relative_positions="shared", qkv_bias="qv").state_dict()
    theirs = to_official(method, shared)
    names = [f"blocks.{i}.attn.relative_position_bias_table" for i in range(3)]
    assert list(theirs.filled) == names[1:]
    assert all(torch.equal(theirs[name], shared["rel_pos_bias.0.table"]) for name in names)
    only = {"rel_pos_bias.0.table": shared["rel_pos_bias.0.table"]}
    assert list(to_official(method, only)) == names[:1]


def test_a_vit_with_attention_windows_is_refused():
    vit = ViT(image_size=16, patch_size=4, dim=8, heads=2, depth=1, class_token=False, window=2)
    for convert in (to_timm, lambda model: to_hf(model, "ViTModel")):
        with pytest.raises(ValueError, match=r"takes no ViT with attention windows.*\(2, 2\)"):
            convert(vit)
