"""Conversion of checkpoints: from the authors' names to mimkit's, and back."""

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
def subsets(draw: st.DrawFn, names: list[str]) -> list[str]:
    return draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names)))


@given(methods, st.data())
def test_any_subset_of_a_state_dict_round_trips(method, data):
    to_ours, to_theirs = CONVERTERS[method]
    official = OFFICIAL[method]
    subset = {name: official[name] for name in data.draw(subsets(sorted(official)))}
    converted = to_ours(subset)
    assert converted.dropped == ()
    back = to_theirs(converted)
    assert back.dropped == ()
    assert list(back) == list(subset)
    assert all(torch.equal(back[name], subset[name]) for name in subset)


def test_a_table_in_a_part_of_a_state_dict_is_not_taken_for_one_that_blocks_share():
    names = ["blocks.0.attn.relative_position_bias_table", "blocks.1.attn.proj.bias"]
    part = {name: OFFICIAL["cae_vit"][name] for name in names}
    back = to_official("cae_vit", from_official("cae_vit", part))
    assert list(back) == names
    assert back.filled == ()


@given(methods, generators(), st.data())
def test_converters_are_each_others_adjoint(method, generator, data):
    """`<from(x), y> == <x, to(y)>`, so converters also apply to gradients."""
    to_ours, to_theirs = CONVERTERS[method]
    official = OFFICIAL[method]
    names = data.draw(subsets(sorted(official)))
    x = {name: torch.randn(official[name].shape, generator=generator) for name in names}
    ours = to_ours(x)
    y = {name: torch.randn(value.shape, generator=generator) for name, value in ours.items()}
    torch.testing.assert_close(inner(ours, y), inner(x, to_theirs(y)))


def test_an_official_checkpoint_has_all_parameters_of_the_model_and_no_others():
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


def test_dropped_tensors_are_listed_with_their_original_names():
    table = "encoder.rel_pos_bias.relative_position_bias_table"
    alone = from_official("simmim_vit_finetune", {table: torch.zeros(9, 2)})
    assert (dict(alone), alone.dropped) == ({}, (table,))
    names = ["encoder.mask_token", "encoder.norm.weight", "decoder.0.bias"]
    for method in ("simmim_vit_finetune", "simmim_swin_finetune", "cae_vit"):
        converted = from_official(method, {name: torch.zeros(2) for name in names})
        assert list(converted) == ["norm.weight"]
        assert converted.dropped == ("encoder.mask_token", "decoder.0.bias")


def test_a_pre_training_checkpoint_loads_into_the_encoder():
    converted = from_official("mae_vit", OFFICIAL["mae"])
    encoder = ViT(image_size=64, patch_size=8, dim=48, depth=2, heads=3)
    encoder.load_state_dict(converted)
    assert torch.equal(encoder.cls_token, OFFICIAL["mae"]["cls_token"])
    assert set(converted.dropped) == {
        name for name in OFFICIAL["mae"] if name.startswith("decoder") or name == "mask_token"
    }


@pytest.mark.parametrize("method", ["mae", "mae_vit"])
def test_names_without_counterpart_are_dropped_and_listed(method):
    extra = {"optimizer_state": torch.zeros(1), "normal.weight": torch.zeros(1), "epoch": 3}
    converted = from_official(method, OFFICIAL[method] | extra)
    assert converted.dropped == tuple(extra)
    assert to_official(method, converted | extra).dropped == tuple(extra)


@pytest.mark.parametrize("method", sorted(OFFICIAL))
def test_a_state_dict_of_which_little_is_known_is_refused(method):
    to_ours, to_theirs = CONVERTERS[method]
    few = dict(list(OFFICIAL[method].items())[:6])
    extra = {f"other.{i}.kernel": torch.zeros(1) for i in range(len(few))}
    with pytest.raises(ValueError, match="does not know 6 of 12 tensors, such as 'other.0.kernel'"):
        to_ours(few | extra)
    if method != "cae_probe":  # mimkit's names there are any names
        with pytest.raises(ValueError, match="does not know 6 of 12 tensors"):
            to_theirs(dict(to_ours(few)) | extra)


def test_the_error_says_what_it_looks_like_and_what_takes_it():
    with pytest.raises(ValueError, match=r'like a CAE; .*official\("cae", .* takes them'):
        from_official("convmae", OFFICIAL["cae"])
    with pytest.raises(ValueError, match=r'a ConvMAE; .*to_official\("convmae", .* takes'):
        from_official("convmae", from_official("convmae", OFFICIAL["convmae"]))


@pytest.mark.parametrize("method", sorted(CONVERTERS))
def test_the_state_dict_is_found_inside_a_checkpoint(method):
    to_ours, to_theirs = CONVERTERS[method]
    weights = OFFICIAL[method]
    expected = to_ours(weights)
    for checkpoint in (
        {"model": weights, "epoch": 3, "optimizer": {"state": {}}},
        {"model": {"model": weights}},
        {"state_dict": weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"checkpoint": {"state_dict": {"model": weights}}, "scheduler": {"last_epoch": 3}},
        {f"module.{name}": value for name, value in weights.items()},
        {f"_orig_mod.module.{name}": value for name, value in weights.items()},
        {"state_dict": {f"model._orig_mod.{name}": value for name, value in weights.items()}},
        {"epoch": torch.tensor(3), "net": weights, "optim": {"exp_avg": torch.ones(2)}},
        {"step": torch.ones(1), "G_Optimizer": {"m": torch.ones(2)}, "weights": dict(weights)},
        {"model": {"arch": "vit"}, "state_dict": weights, "lr_sched": {"base": torch.ones(2)}},
        {f"backbone.net.{name}": value for name, value in weights.items()},
        {name.replace(".", "._orig_mod.", 1): value for name, value in weights.items()},
    ):
        converted = to_ours(checkpoint)
        assert converted.dropped == ()
        assert converted.keys() == expected.keys()
    assert to_theirs({"model": expected}).keys() == weights.keys()


@pytest.mark.untyped
def test_a_dictionary_without_one_models_tensors_is_refused():
    weights, cyclic = OFFICIAL["mae"], {"epoch": 3}
    cyclic["model"] = cyclic
    for wrong, message in [
        (cyclic, "'model' contains itself"),
        (
            {"epoch": 3, "loss": 0.5},
            r"no tensors in a dictionary with the keys \['epoch', 'loss'\]",
        ),
        ({"model": {}}, "no tensors"),
        ({"student": weights, "teacher": weights}, "several state dicts .* student or teacher"),
        (weights | {f"module.{n}": t for n, t in weights.items()}, "two tensors have the name"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_official("mae", wrong)
    with pytest.raises(TypeError, match=r"got Linear .*: pass its \.state_dict\(\)"):
        from_official("mae", torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="names in a state dict must be strings; got 0"):
        from_official("mae", {0: torch.zeros(1)})


def test_converting_does_not_change_its_input():
    weights = dict(OFFICIAL["mae"])
    names = list(weights)
    converted = from_official("mae", weights)
    assert list(weights) == names
    assert converted["encoder.cls_token"] is weights["cls_token"]


@pytest.mark.untyped
@pytest.mark.parametrize("convert", [from_official, to_official])
def test_the_error_for_an_unknown_method_lists_the_known_ones(convert):
    with pytest.raises(ValueError, match=r"'mae'.*'mae_vit'.*'beit'"):
        convert("beit", {})


@pytest.mark.parametrize(
    "name",
    [
        "dist_token",
        "blocks.11.attn.q_norm.weight",
        "norm_pre.weight",
        "reg_token",
        "blocks.0.mlp.norm.weight",
    ],
)
def test_timm_models_that_compute_something_else_are_refused(name):
    with pytest.raises(ValueError, match=name):
        from_timm(OFFICIAL["timm"] | {name: torch.zeros(1, 1)})


def test_a_convmae_checkpoint_loads_into_the_fine_tuning_encoder():
    """The decoder and the multi-scale fusions are dropped, as in the authors' code."""
    official = OFFICIAL["convmae"]
    converted = from_official("convmae_vit", official)
    encoder = ConvViT(image_size=64, dim=(16, 24, 40), depth=(2, 2, 2), heads=4)
    encoder.load_state_dict(converted)
    dropped = ("decoder", "mask_token", "stage1_output_decode", "stage2_output_decode")
    assert set(converted.dropped) == {name for name in official if name.startswith(dropped)}


def test_a_detectors_index_buffer_is_dropped_and_listed():
    name = "windowed_rel_pos_bias.relative_position_index"
    converted = from_official("convmae_det", OFFICIAL["convmae_det"] | {name: torch.zeros(16, 16)})
    assert converted.dropped == (name,)
