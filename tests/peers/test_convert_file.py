"""Converted files load into the real classes, whose outputs are the same."""

from dataclasses import replace
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
from mimkit.interop._formats import FORMATS
from mimkit.nn import DiscreteVAE, ViT
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIM, SimMIMConfig
from tests.nn import plain

VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 3
}  # fmt: skip
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 1}
DECODER: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 1}
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "dim": 16, "depth": (2, 2), "heads": (2, 4), "window": 4
}  # fmt: skip
HF_SIZES: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 256, "hidden_act": "gelu_pytorch_tanh",
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
    cls: Any = getattr(hf, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**HF_SIZES))
    model.save_pretrained(tmp_path / "hf")
    receipt = convert_file(
        tmp_path / "hf", tmp_path / "ours.safetensors", from_format="hf", to_format="timm"
    )
    assert receipt.compared == "transformers and timm"
    assert receipt.difference is not None
    assert receipt.difference < 2e-6


WHOLE: dict[str, tuple[nn.Module, str, str]] = {
    "MAE": (MAE(MAEConfig(**SIZES, **DECODER)), "mae", "ViTMAEForPreTraining"),
    "SimMIM": (
        SimMIM(SimMIMConfig(**SIZES, positions="absolute", qkv_bias=True, layer_scale=None)),
        "mimkit",
        "ViTForMaskedImageModeling",
    ),
    "SimMIM, relative": (
        SimMIM(SimMIMConfig(**SIZES)), "simmim_vit", "BeitForMaskedImageModeling"
    ),
    "SimMIM, Swin": (
        SimMIM(SimMIMConfig(encoder="swin", **SWIN)), "simmim_swin", "SwinForMaskedImageModeling"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_predicts_the_same_as_a_class_of_transformers(
    name: str, tmp_path: Path
) -> None:
    model, names, architecture = WHOLE[name]
    plain.randomize(model)
    theirs = model.state_dict() if names == "mimkit" else to_official(names, model.state_dict())
    torch.save({"model": dict(theirs)}, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    there = convert_file(tmp_path / "in.pth", out, from_format=names, to_format=architecture)
    assert there.compared == "mimkit and transformers"
    assert there.difference is not None
    assert there.difference < 2e-6
    back = convert_file(out, tmp_path / "back.pth", from_format=architecture, to_format=names)
    assert back.compared == "transformers and mimkit, converted back"
    assert back.difference is not None
    assert back.difference < 2e-6


def test_a_pretrained_model_of_transformers_becomes_a_checkpoint_of_mae(tmp_path: Path) -> None:
    decoder = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    sizes = HF_SIZES | {f"decoder_{name}": value for name, value in decoder.items()}
    config = hf.ViTMAEConfig(**sizes, decoder_intermediate_size=4 * 48)
    model = hf.ViTMAEForPreTraining(config)
    model.save_pretrained(tmp_path / "hf")
    receipt = convert_file(tmp_path / "hf", tmp_path / "mae.pth", from_format="hf", to_format="mae")
    assert receipt.model == "MAE"
    assert receipt.compared == "transformers and mimkit, converted back"
    assert receipt.difference is not None
    assert receipt.difference < 2e-6


@pytest.mark.parametrize("name", ["Dinov2Model", "BeitModel", "Data2VecVisionModel", "ViTMAEModel"])
def test_the_class_that_was_asked_for_is_the_one_that_is_built(name: str, tmp_path: Path) -> None:
    encoder = ViT(**SIZES)
    plain.randomize(encoder)
    torch.save(encoder.state_dict(), tmp_path / "in.pth")
    receipt = convert_file(
        tmp_path / "in.pth", tmp_path / "out.pth", from_format="mimkit", to_format=name
    )
    assert receipt.compared == "mimkit and transformers"
    assert receipt.difference is not None
    assert receipt.difference < 2e-6


@pytest.mark.parametrize("half", ["dalle", "dalle_decoder"])
def test_openais_package_computes_what_the_discrete_vae_does(half: str, tmp_path: Path) -> None:
    vae = DiscreteVAE(in_channels=2, dim=64, depth=1, stem_dim=16, vocabulary_size=512)
    plain.randomize(vae)
    torch.save(vae.state_dict(), tmp_path / "in.pth")
    out = tmp_path / "out.pth"
    there = convert_file(tmp_path / "in.pth", out, from_format="mimkit", to_format=half)
    assert (there.compared, there.not_built) == ("mimkit and dall_e", "")
    back = convert_file(out, tmp_path / "back.pth", from_format=half, to_format="mimkit")
    assert (back.compared, back.not_built) == ("dall_e and mimkit, converted back", "")
    for receipt in (there, back):
        assert receipt.difference is not None
        assert receipt.difference < 2e-6


def test_sizes_that_openais_classes_lack_are_said_in_the_receipt(tmp_path: Path) -> None:
    vae = DiscreteVAE(dim=8, groups=3, depth=1, stem_dim=8, vocabulary_size=8)
    torch.save(vae.state_dict(), tmp_path / "in.pth")
    receipt = convert_file(
        tmp_path / "in.pth", tmp_path / "out.pth", from_format="mimkit", to_format="dalle"
    )
    assert receipt.difference == 0
    assert "dall_e's Encoder does not load them" in receipt.not_built


def test_a_damaged_conversion_shows_in_the_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FORMATS["ViTMAEForPreTraining"]

    def swapped(tensors: Any) -> Converted:
        """Queries and values swapped: every tensor has its shape."""
        theirs = dict(right.to_theirs(tensors))
        for name in [name for name in theirs if "q_proj" in name]:
            other = name.replace("q_proj", "v_proj")
            theirs[name], theirs[other] = theirs[other], theirs[name]
        return Converted(theirs, ())

    wrong = replace(right, to_theirs=swapped)
    monkeypatch.setitem(FORMATS, "ViTMAEForPreTraining", wrong)
    model = MAE(MAEConfig(**SIZES, **DECODER))
    plain.randomize(model)
    torch.save(model.state_dict(), tmp_path / "in.pth")
    receipt = convert_file(
        tmp_path / "in.pth",
        tmp_path / "out.pth",
        from_format="mimkit",
        to_format="ViTMAEForPreTraining",
    )
    assert receipt.difference is not None
    assert receipt.difference > 1e-3


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
