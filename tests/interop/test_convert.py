"""Names: from the authors' checkpoints to mimkit's, and back."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit.interop import from_official, from_timm, to_official, to_timm
from mimkit.nn import ConvViT, ViT
from recipes.mae import MAE, MAEConfig
from tests.golden_files import golden
from tests.strategies import generators

FINE_TUNED = golden("mae_finetune_vit_A")
CAE_FINE_TUNED = golden("cae_finetune_vit_A")
NOT_WEIGHTS = ("relative_position_index", "num_batches_tracked")


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if not name.endswith(NOT_WEIGHTS)}


CAE_PROBE = {
    name: value
    for name, value in weights(CAE_FINE_TUNED.tensors("attentive/param/")).items()
    if name.startswith(("query_token", "attentive_blocks.", "fc_norm.", "head."))
}
CONVMAE_FINE_TUNED = golden("convmae_finetune_A").tensors("global_pool/param/")
OFFICIAL = {
    "mae": golden("mae_A").tensors("param/"),
    "mae_vit": FINE_TUNED.tensors("global_pool/param/") | FINE_TUNED.tensors("cls/param/"),
    "cae": golden("cae_A").tensors("param/"),
    "cae_vit": weights(CAE_FINE_TUNED.tensors("finetune/param/")),
    "cae_probe": CAE_PROBE,
    "dalle": golden("dalle_encoder_A").tensors("param/"),
    "dalle_decoder": golden("dalle_encoder_A").tensors("param/"),
    "convmae": golden("convmae_A").tensors("param/"),
    "fastconvmae": golden("fastconvmae_A").tensors("param/"),
    "convmae_vit": CONVMAE_FINE_TUNED
    | {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)},
    "convmae_det": golden("convmae_det_A").tensors("param/"),
}

CONVERTERS = {
    **{
        method: (partial(from_official, method), partial(to_official, method))
        for method in OFFICIAL
    },
    "timm": (from_timm, to_timm),
}
OFFICIAL["timm"] = OFFICIAL["mae_vit"]
methods = st.sampled_from(sorted(CONVERTERS))


def inner(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    assert left.keys() == right.keys()
    return sum((left[name].double() * right[name].double()).sum() for name in left)


@st.composite
def parts(draw: st.DrawFn, names: list[str]) -> list[str]:
    return draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names)))


@given(methods, st.data())
def test_any_part_goes_in_and_comes_out_as_it_was(method, data):
    come, go = CONVERTERS[method]
    official = OFFICIAL[method]
    part = {name: official[name] for name in data.draw(parts(sorted(official)))}
    converted = come(part)
    assert converted.dropped == ()
    back = go(converted)
    assert back.dropped == ()
    assert list(back) == list(part)
    assert all(torch.equal(back[name], part[name]) for name in part)


@given(methods, generators(), st.data())
def test_converters_are_each_others_adjoint(method, generator, data):
    """`<from(x), y> == <x, to(y)>`: what renames weights renames gradients."""
    come, go = CONVERTERS[method]
    official = OFFICIAL[method]
    names = data.draw(parts(sorted(official)))
    x = {name: torch.randn(official[name].shape, generator=generator) for name in names}
    y = {name: torch.randn(value.shape, generator=generator) for name, value in come(x).items()}
    torch.testing.assert_close(inner(come(x), y), inner(x, go(y)))


def test_the_official_names_load_into_the_model_and_nothing_is_left():
    model = MAE(
        MAEConfig(
            image_size=64,
            patch_size=8,
            dim=48,
            depth=2,
            heads=3,
            decoder_dim=32,
            decoder_depth=1,
            decoder_heads=2,
        )
    )
    converted = from_official("mae", OFFICIAL["mae"])
    assert converted.keys() == model.state_dict().keys()
    assert to_official("mae", model.state_dict()).keys() == OFFICIAL["mae"].keys()


def test_what_is_left_out_has_the_name_that_it_came_with():
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    alone = from_official("simmim_vit_finetune", {table: torch.zeros(9, 2)})
    assert (dict(alone), alone.dropped) == ({}, (table,))
    names = ["encoder.mask_token", "encoder.norm.weight", "decoder.0.bias"]
    for method in ("simmim_vit_finetune", "simmim_swin_finetune", "cae_vit"):
        converted = from_official(method, {name: torch.zeros(2) for name in names})
        assert list(converted) == ["norm.weight"]
        assert converted.dropped == ("encoder.mask_token", "decoder.0.bias")


def test_a_pre_training_checkpoint_gives_its_encoder():
    converted = from_official("mae_vit", OFFICIAL["mae"])
    encoder = ViT(image_size=64, patch_size=8, dim=48, depth=2, heads=3)
    encoder.load_state_dict(converted)
    assert torch.equal(encoder.cls_token, OFFICIAL["mae"]["cls_token"])
    assert set(converted.dropped) == {
        name for name in OFFICIAL["mae"] if name.startswith("decoder") or name == "mask_token"
    }


@pytest.mark.parametrize("method", ["mae", "mae_vit"])
def test_names_without_counterpart_are_dropped_and_named(method):
    known = next(iter(OFFICIAL[method]))
    extra = {"optimizer_state": torch.zeros(1), "normal.weight": torch.zeros(1)}
    converted = from_official(method, {known: torch.zeros(1)} | extra)
    assert len(converted) == 1
    assert converted.dropped == ("optimizer_state", "normal.weight")
    assert to_official(method, extra).dropped == ("optimizer_state", "normal.weight")


@pytest.mark.parametrize("method", sorted(CONVERTERS))
def test_the_model_is_taken_out_of_its_checkpoint(method):
    come, go = CONVERTERS[method]
    weights = OFFICIAL[method]
    expected = come(weights)
    for checkpoint in (
        {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
        {"model": {"model": weights}},
    ):
        converted = come(checkpoint)
        assert converted.dropped == ()
        assert converted.keys() == expected.keys()
    assert go({"model": expected}).keys() == weights.keys()


def test_converting_leaves_the_input_and_its_values_alone():
    weights = dict(OFFICIAL["mae"])
    names = list(weights)
    converted = from_official("mae", weights)
    assert list(weights) == names
    assert converted["encoder.cls_token"] is weights["cls_token"]


@pytest.mark.untyped
@pytest.mark.parametrize("convert", [from_official, to_official])
def test_an_unknown_method_is_named_with_the_known_ones(convert):
    with pytest.raises(ValueError, match=r"'mae'.*'mae_vit'.*'beit'"):
        convert("beit", {})


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.ls1.gamma",
        "blocks.11.attn.q_norm.weight",
        "norm_pre.weight",
        "reg_token",
        "blocks.0.mlp.norm.weight",
    ],
)
def test_timm_models_that_compute_something_else_are_refused(name):
    with pytest.raises(ValueError, match=name):
        from_timm(OFFICIAL["timm"] | {name: torch.zeros(1)})


def test_a_convmae_checkpoint_gives_its_fine_tuning_encoder():
    """Without what the authors drop: decoder and fusions of scales."""
    official = OFFICIAL["convmae"]
    converted = from_official("convmae_vit", official)
    encoder = ConvViT(image_size=64, dim=(16, 24, 40), depth=(2, 2, 2), heads=4)
    encoder.load_state_dict(converted)
    gone = ("decoder", "mask_token", "stage1_output_decode", "stage2_output_decode")
    assert set(converted.dropped) == {name for name in official if name.startswith(gone)}


def test_a_detectors_index_buffer_is_dropped_and_named():
    name = "windowed_rel_pos_bias.relative_position_index"
    converted = from_official("convmae_det", OFFICIAL["convmae_det"] | {name: torch.zeros(16, 16)})
    assert converted.dropped == (name,)
