"""Files converted from the names of one project to those of another, with a receipt."""

import hashlib
import json
import re
import resource
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mimkit import interop, masking, nn
from mimkit.interop import convert_file
from mimkit.interop._built import _WHOLE, model_from
from mimkit.interop._command import main
from mimkit.interop._convert_file import not_equal
from mimkit.interop._formats import ENCODERS, FORMATS, HALVES, OFFICIAL, model_of, select
from mimkit.interop._rules import Converted
from recipes.cae import CAE, CAEConfig
from recipes.convmae import ConvMAE, ConvMAEConfig
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIM, SimMIMConfig
from tests import hostile
from tests.nn import plain

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 64, "depth": 2, "heads": 1}
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "dim": 16, "depth": (2, 2), "heads": (2, 4), "window": 4
}  # fmt: skip
CONV: dict[str, Any] = {"image_size": 32, "dim": (8, 16, 64), "depth": (1, 1, 2), "heads": 1}
DECODER: dict[str, Any] = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
BLOCK_TABLES = {"relative_positions": "block", "qkv_bias": "qv", "absolute_positions": False}
MODELS: dict[str, Any] = {
    "MAE": lambda: MAE(MAEConfig(**VIT, **DECODER)),
    "SimMIM with a ViT": lambda: SimMIM(SimMIMConfig(encoder="vit", **VIT)),
    "SimMIM with a Swin": lambda: SimMIM(SimMIMConfig(encoder="swin", **SWIN)),
    "CAE": lambda: CAE(CAEConfig(**VIT, **DECODER, regressor_depth=1, vocabulary_size=16)),
    "ConvMAE": lambda: ConvMAE(ConvMAEConfig(**CONV, **DECODER)),
    "ViT": lambda: nn.ViT(**VIT),
    "ViT with tables": lambda: nn.ViT(**VIT, **BLOCK_TABLES),
    "SwinTransformer": lambda: nn.SwinTransformer(**SWIN),
    "ConvViT": lambda: nn.ConvViT(**CONV),
    "ConvViTDetector": lambda: nn.ConvViTDetector(**CONV, window=2, global_layers=(1,)),
    "AttentiveProbe": lambda: nn.AttentiveProbe(dim=64, heads=1, num_classes=3),
    "DiscreteVAE": lambda: nn.DiscreteVAE(dim=16, depth=1, stem_dim=8, vocabulary_size=8),
}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    return {name: make().state_dict() for name, make in MODELS.items()}


def takes(wanted: str, model: str) -> bool:
    plain = model.removesuffix(" with tables")
    return {plain, ENCODERS.get(plain)} & {*FORMATS[wanted].models} != set()


def test_every_format_has_an_example(states):
    for name, model in FORMATS.items():
        assert {*model.models} <= {n.removesuffix(" with tables") for n in states}, name
    for name, state in states.items():
        assert model_of(state) == name.removesuffix(" with tables")


@settings(max_examples=30)
@given(st.data())
def test_every_pair_of_formats_converts_or_names_what_is_lacking(states, data):
    """What comes out of one format and goes into another comes back the same."""
    model = data.draw(st.sampled_from(sorted(states)))
    fitting = sorted(name for name in FORMATS if name != "hf" and takes(name, model))
    first, second = (data.draw(st.sampled_from(fitting)) for _ in range(2))
    lacking = None
    try:
        _, ours = select(Converted(states[model], ()), first)
        given = FORMATS[first].to_ours(FORMATS[first].to_theirs(ours))
        kind, chosen = select(given, second)
        result = FORMATS[second].to_theirs(chosen)
    except ValueError as error:
        lacking = str(error)
    if (
        lacking is not None
    ):  # relative positions, layer scale (also one that DINOv2 adds), a decoder
        assert re.search("rel_pos_bias|gamma_1|holds a", lacking)
        return
    assert kind in FORMATS[second].models
    differing = not_equal(chosen, result, FORMATS[second].to_ours(result))
    if second.startswith(("Beit", "Data2Vec")):  # without the key's bias, which softmax cancels
        differing = [name for name in differing if not name.endswith("qkv.bias")]
    assert not differing


@pytest.mark.parametrize(
    ("model", "from_format", "to_format", "kind"),
    [
        ("MAE", "mae", "mae_vit", "ViT"),
        ("MAE", "mae", "ViTMAEForPreTraining", "MAE"),
        ("SimMIM with a ViT", "simmim_vit", "simmim_vit_finetune", "ViT"),
        ("SimMIM with a Swin", "simmim_swin", "SwinModel", "SwinTransformer"),
        ("CAE", "cae", "cae_vit", "ViT"),
        ("ConvMAE", "fastconvmae", "convmae_vit", "ConvViT"),
        ("ConvMAE", "convmae", "mimkit", "ConvMAE"),
        ("ViT with tables", "timm", "BeitModel", "ViT"),
        ("SwinTransformer", "timm", "simmim_swin_finetune", "SwinTransformer"),
        ("CAE", "cae", "mimkit", "CAE"),
        ("AttentiveProbe", "mimkit", "cae_probe", "AttentiveProbe"),
        ("ConvViTDetector", "convmae_det", "mimkit", "ConvViTDetector"),
        ("DiscreteVAE", "mimkit", "dalle", "DiscreteVAE"),
        ("DiscreteVAE", "dalle_decoder", "mimkit", "DiscreteVAE"),
        ("DiscreteVAE", "mimkit", "mimkit", "DiscreteVAE"),
    ],
)
def test_a_file_is_converted_with_a_receipt(
    model, from_format, to_format, kind, states, tmp_path, capsys
):
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    theirs = FORMATS[from_format].to_theirs(Converted(states[model], ()))
    torch.save({"epoch": 3, "model": dict(theirs)}, source)
    written = tmp_path / "receipt.json"
    arguments = [str(source), str(out), "--from", from_format, "--to", to_format]
    assert main([*arguments, "--receipt", str(written)]) == 0
    printed, receipt = capsys.readouterr().out, json.loads(written.read_text())
    assert receipt["model"] == kind
    assert receipt["not_equal"] == []
    assert receipt["out_sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert receipt["out_sha256"] in printed
    result = load_file(out)
    assert receipt["num_tensors"] == len(result)
    kept = FORMATS[to_format].to_ours(result)
    stands_in = [line for line in printed.splitlines() if "mimkit's class computes" in line]
    formats = {from_format, to_format}
    if formats & {*HALVES}:
        reasons = ["the authors' package DALL-E was not built (No module named 'dall_e')"]
        reasons = [] if find_spec("dall_e") else reasons
    else:
        reasons = ["the authors' code is no package"] if formats & {*OFFICIAL} else []
    assert len(stands_in) == len(reasons)
    assert all(reason in line for reason, line in zip(reasons, stands_in, strict=True))
    if receipt["difference"] is None:  # tests/peers have the packages
        assert re.search("No module named '(timm|transformers)'", receipt["compared"])
    elif to_format == "convmae_vit":  # a fine-tuning encoder has no multi-scale fusions
        assert any("fusions" in name for name in receipt["dropped"])
        assert receipt["difference"] > 0.01
    else:
        assert receipt["difference"] < 2e-6
    _, expected = select(FORMATS[from_format].to_ours(theirs), to_format)
    for name in expected.keys() - {*receipt["dropped"]}:
        assert torch.equal(kept[name], expected[name])


@pytest.mark.parametrize("kind", _WHOLE)
def test_a_whole_model_of_a_comparison_predicts_what_its_recipe_does(kind, states):
    recipe = MODELS[kind]().eval()
    recipe.load_state_dict(states[kind])
    built = model_from(kind, states[kind], {"heads": 1, "decoder_heads": 2, "image_size": (32, 32)})
    mask = masking.uniform(masking.key([0, 1], seed=0), recipe.encoder.grid, 0.5)
    images = torch.randn(2, 3, 32, 32)
    codes = {"token_ids": torch.zeros(2, 16).long(), "return_logits": True}
    output = recipe(images, mask, **(codes if kind == "CAE" else {}))
    expected, found = output.prediction, built(images, mask)
    if kind.startswith("SimMIM"):  # the head's own order is "c p1 p2"
        found = rearrange(found, "b m (c p) -> b m (p c)", c=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"dim": 32, "layer_scale": None, "decoder_depth": 2}])
def test_a_cae_of_a_comparison_has_the_parts_that_its_weights_have(options):
    """With a projection and without layer scale; without a decoder, and with features."""
    more = {"target": "features", "feature_dim": 5} if options else {"no_decoder": True}
    config = CAEConfig(
        **VIT | DECODER | {"decoder_dim": 64, "vocabulary_size": 16} | options | more
    )
    state = CAE(config).state_dict()
    built = model_from("CAE", state, {"heads": 1, "decoder_heads": 2})
    assert built.state_dict().keys() == state.keys()


def test_classes_of_a_comparison_compute_what_the_weights_are_for(states):
    images, tokens = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 64)
    options = CONV | {"window": 2, "global_layers": (1,)}
    detector = nn.ConvViTDetector(**options).eval()
    plain.randomize(detector)
    built = model_from("ConvViTDetector", detector.state_dict(), {"global_layers": (1,)})
    assert all(map(torch.equal, built(images), detector(images)))
    probe = nn.AttentiveProbe(dim=64, heads=2, num_classes=3).eval()
    plain.randomize(probe)
    built = model_from("AttentiveProbe", probe.state_dict(), {"heads": 2})
    assert torch.equal(built(tokens), probe(tokens))
    vae = nn.DiscreteVAE(dim=16, depth=1, stem_dim=8, vocabulary_size=8, groups=3)
    logits = vae.encoder(images)
    pixels = vae.decoder(logits.softmax(dim=1))
    whole = model_from("DiscreteVAE", vae.state_dict(), {})(images)
    assert torch.equal(whole, torch.cat([logits.flatten(1), pixels.flatten(1)], dim=1))
    for half, taken, expected in (("encoder.", images, logits), ("decoder.", logits, pixels)):
        state = {name: t for name, t in vae.state_dict().items() if name.startswith(half)}
        assert torch.equal(model_from("DiscreteVAE", state, {})(taken), expected.flatten(1))


def test_weights_come_back_through_pth_files_and_folders(tmp_path, states):
    encoder = nn.ViT(**VIT)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    (tmp_path / "config.yaml").write_text("model: {heads: 1, image_size: 32}\n")
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    receipt = convert_file(tmp_path, folder, from_format="mimkit", to_format="hf")
    assert (receipt.model, receipt.not_equal) == ("ViTModel", ())
    receipt = convert_file(folder, back, from_format="hf", to_format="mae_vit")
    assert receipt.dropped == ()
    official = interop.load_checkpoint(back)["model"]
    assert official.keys() == interop.to_official("mae_vit", encoder.state_dict()).keys()
    assert torch.equal(official["cls_token"], encoder.cls_token)


def test_a_vit_that_a_detector_trained_in_windows_stays_where_it_is(tmp_path, states):
    save_file(states["ViT"], tmp_path / "encoder.safetensors")
    config = "model: {heads: 1, image_size: 32}\ndetector: {window: 2}\n"
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(ValueError, match="attention windows of 2 tokens"):
        convert_file(tmp_path, tmp_path / "out.pth", from_format="mimkit", to_format="timm")


def test_weights_that_have_changed_since_their_run_are_not_converted(tmp_path, states):
    weights = tmp_path / "encoder.safetensors"
    save_file(states["ViT"], weights)
    content = bytearray(weights.read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "summary.json").write_text(json.dumps({"digests": {weights.name: digest}}))
    formats = {"from_format": "mimkit", "to_format": "timm"}
    convert_file(tmp_path, tmp_path / "whole.pth", **formats)
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        convert_file(tmp_path, tmp_path / "damaged.pth", **formats)
    assert not (tmp_path / "damaged.pth").exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_full_disk_is_one_sentence_and_nothing_is_left_or_taken(suffix, tmp_path, states):
    save_file(states["ViT"], tmp_path / "in.safetensors")
    out, mine = tmp_path / f"out.{suffix}", tmp_path / f"out.{suffix}.partial"
    mine.write_text("mine")
    source, formats = tmp_path / "in.safetensors", {"from_format": "mimkit", "to_format": "timm"}
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written, is the disk full") as caught:
            convert_file(source, out, **formats)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.iterdir()) == before
    convert_file(source, out, **formats)
    assert mine.read_text() == "mine"


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["none.pth", "new.pth", "--from", "mae", "--to", "timm"], "no file"),
    "format": (["in.pth", "new.pth", "--from", "mea", "--to", "timm"], "'mea'"),
    "exists": (["in.pth", "in.pth", "--from", "mae_vit", "--to", "timm"], "exists"),
    "suffix": (["in.pth", "new.bin", "--from", "mae_vit", "--to", "timm"], "new.bin"),
    "folder": (["in.pth", "no/new.pth", "--from", "mae_vit", "--to", "timm"], "no folder"),
    "kind": (["in.pth", "new.pth", "--from", "mae_vit", "--to", "convmae_vit"], "of a ViT"),
    "whole": (["in.pth", "new.pth", "--from", "mae_vit", "--to", "mae"], "holds a MAE"),
    "other": (["in.pth", "new.pth", "--from", "convmae", "--to", "timm"], "does not know"),
    "heads": (["in.pth", "new", "--from", "mae_vit", "--to", "hf"], "--heads"),
    "wrong heads": (
        ["in.pth", "new", "--from", "mae_vit", "--to", "hf", "--heads", "7"], "heads"
    ),
    "none": ([], "required"),
    "hostile": (["bad.pth", "new.pth", "--from", "mae", "--to", "timm"], "run code"),
    "text": (["text.pth", "new.pth", "--from", "mae", "--to", "timm"], "neither"),
    "half": (["vae.pth", "new.pth", "--from", "dalle", "--to", "dalle_decoder"], "half a D"),
    "size": (
        ["in.pth", "new", "--from", "mae_vit", "--to", "hf", "--heads", "1", "--image-size", "9"],
        "fits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(name, tmp_path, monkeypatch, capsys, states):
    monkeypatch.chdir(tmp_path)
    torch.save(states["ViT"], "in.pth")
    torch.save(dict(interop.to_official("dalle", states["DiscreteVAE"])), "vae.pth")
    hostile.PYTORCH[0](Path("bad.pth"))
    Path("text.pth").write_text("text")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments, message = MISTAKES[name]
    try:
        code = main(arguments)
    except SystemExit as error:  # of argparse
        code = error.code
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("model", "to_format", "name"),
    [
        ("ViT", "mae_vit", "cls_token"),
        ("CAE", "cae", "regressor.blocks.0.cross_attn.k.weight"),
        ("ConvViTDetector", "convmae_det", "global_bias.table"),
        ("AttentiveProbe", "cae_probe", "norm_v.weight"),
        ("DiscreteVAE", "dalle", "encoder.blocks.group_2.block_1.res_path.conv_4.weight"),
        ("DiscreteVAE", "dalle_decoder", "decoder.blocks.input.bias"),
    ],
)
def test_a_receipt_names_what_does_not_come_back(
    model, to_format, name, monkeypatch, tmp_path, states
):
    right = FORMATS[to_format]

    def damaged(tensors: Any) -> Converted:
        noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(0))
        return right.to_theirs({**tensors, name: tensors[name] + noise})

    monkeypatch.setitem(FORMATS, to_format, replace(right, to_theirs=damaged))
    torch.save(states[model], tmp_path / "in.pth")
    receipt = convert_file(
        tmp_path / "in.pth", tmp_path / "out.pth", from_format="mimkit", to_format=to_format
    )
    assert receipt.not_equal == (name,)
    assert receipt.difference is not None
    assert receipt.difference > 1e-3
    assert f"differ: 1: {name}" in "\n".join(receipt.lines())
