"""Converted files load into the real classes, whose outputs are the same."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mimkit.interop import Converted, convert_file, to_official
from recipes.mae import MAE, MAEConfig
from tests.nn import plain

VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 3
}  # fmt: skip
TIMM: dict[str, Any] = {
    "vit": lambda: VisionTransformer(**VIT),
    "vit, pooled": lambda: VisionTransformer(**VIT, global_pool="avg"),
    "registers": lambda: VisionTransformer(
        **VIT | {"num_classes": 0}, reg_tokens=2, no_embed_class=True, init_values=0.1
    ),
    "beit": lambda: Beit(**VIT, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "swin": lambda: SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_timms_weights_go_to_hugging_face_and_back(name: str, tmp_path: Path) -> None:
    model: nn.Module = TIMM[name]().eval()
    plain.randomize(model)
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    there = convert_file(
        tmp_path / "timm.safetensors", tmp_path / "hf", from_format="timm", to_format="hf", heads=2
    )
    assert there.compared == "timm and transformers"
    assert there.difference is not None
    assert there.difference < 2e-6
    back = convert_file(
        tmp_path / "hf", tmp_path / "back.safetensors", from_format="hf", to_format="timm"
    )
    assert back.compared == "transformers and timm"
    assert back.difference is not None
    assert back.difference < 2e-6
    again = load_file(tmp_path / "back.safetensors")
    for key, tensor in model.state_dict().items():
        if "relative_position_index" in key:
            continue
        if key.endswith("qkv.bias") and name == "vit, pooled":  # BEiT has no bias of keys
            assert key in there.not_equal
            continue
        assert torch.equal(again[key], tensor), key


def test_a_checkpoint_of_mae_becomes_a_model_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "dim": 192, "depth": 1, "heads": 3}
    model = MAE(MAEConfig(**shape, decoder_dim=32, decoder_depth=1, decoder_heads=2))
    theirs = to_official("mae", model.state_dict())
    torch.save({"model": dict(theirs)}, tmp_path / "mae.pth")
    out = tmp_path / "timm.safetensors"
    receipt = convert_file(tmp_path / "mae.pth", out, from_format="mae", to_format="timm")
    assert receipt.compared == "mimkit and timm"
    assert receipt.difference is not None
    assert receipt.difference < 2e-6
    assert "decoder.mask_token" in receipt.dropped
    loaded = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0
    )
    loaded.load_state_dict(load_file(out))


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "Dinov2Model"])
def test_folders_of_hugging_face_are_compared_with_mimkits_class(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    cls: Any = getattr(hf, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**sizes))
    model.save_pretrained(tmp_path / "hf")
    receipt = convert_file(
        tmp_path / "hf", tmp_path / "ours.safetensors", from_format="hf", to_format="timm"
    )
    assert receipt.compared == "transformers and timm"
    assert receipt.difference is not None
    assert receipt.difference < 2e-6


def test_weights_that_the_targets_class_does_not_load_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reshaped(theirs: Converted) -> Converted:
        return Converted({**theirs, "norm.weight": theirs["norm.weight"][None]}, ())

    monkeypatch.setattr("mimkit.interop._timm._to_their_positions", reshaped)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=32))
    model.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match="timm's VisionTransformer does not load them"):
        convert_file(tmp_path / "hf", tmp_path / "out.pth", from_format="hf", to_format="timm")
    assert not (tmp_path / "out.pth").exists()
