"""`fit_encoder`: weights of a pre-trained encoder in an encoder of another size or a detector."""

import pytest
import torch
from torch import nn

from mimkit.interop import fit_encoder, from_official
from mimkit.nn import ConvViT, ConvViTDetector, SwinTransformer, ViT
from mimkit.patches import interpolate_positions, interpolate_relative_positions
from recipes.convmae import ConvMAE, ConvMAEConfig
from recipes.engine.pretrained.shapes import ConvViTShape, ViTShape
from tests.golden_files import golden
from tests.nn import plain

VIT = {"patch_size": 4, "dim": 8, "depth": 2, "heads": 2}
HYBRID = {"dim": (4, 6, 8), "depth": (1, 1, 3), "heads": 2}


def randomized(encoder: nn.Module) -> nn.Module:
    plain.randomize(encoder)
    return encoder.eval()


def filled(encoder: nn.Module, *args: object, **options: object) -> nn.Module:
    encoder.load_state_dict(fit_encoder(*args, encoder, **options))
    return encoder.eval()


@torch.no_grad()
def test_a_detector_filled_from_a_run_gives_the_encoders_maps_where_all_blocks_are_global():
    encoder = randomized(ConvViT(image_size=64, multi_scale=True, **HYBRID))
    layers = {"window": 2, "global_layers": (0, 1, 2)}
    detector = randomized(ConvViTDetector(image_size=96, **layers, **HYBRID))
    weights = fit_encoder(encoder.state_dict(), detector)
    detector.load_state_dict(weights)
    images = torch.randn(1, 3, 96, 96)
    for ours, expected in zip(detector(images), encoder.features(images), strict=False):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    assert set(weights.dropped) == {n for n in encoder.state_dict() if n[:4] in ("norm", "fusi")}
    assert set(weights.filled) == {"window_bias.table", "global_bias.table"}
    assert not detector.window_bias.table.any()
    assert not detector.global_bias.table.any()


def test_the_weights_of_a_method_and_of_the_authors_give_the_same_detector():
    model = ConvMAE(ConvMAEConfig(image_size=32, decoder_dim=8, decoder_heads=2, **HYBRID))
    detector = ConvViTDetector(image_size=32, window=1, global_layers=(0,), **HYBRID)
    ours = fit_encoder(model.state_dict(), detector)
    alone = fit_encoder(model.encoder.state_dict(), detector)
    assert ours.keys() == alone.keys() == detector.state_dict().keys()
    assert all(torch.equal(ours[name], alone[name]) for name in ours)
    assert "decoder.mask_token" in ours.dropped


def test_an_official_pre_training_checkpoint_fills_a_detector():
    official = from_official("convmae_vit", golden("convmae_A").tensors("param/"))
    sizes = {"dim": (16, 24, 40), "depth": (2, 2, 2), "heads": 4}
    detector = ConvViTDetector(image_size=128, window=4, global_layers=(1,), **sizes)
    weights = fit_encoder(official, detector)
    detector.load_state_dict(weights)
    assert set(weights.dropped) == {"norm.weight", "norm.bias"}
    assert torch.equal(detector.blocks[1].mlp.fc1.weight, official["blocks.1.mlp.fc1.weight"])


@torch.no_grad()
def test_convmaes_segmenter_starts_as_the_encoder_and_names_what_it_adds():
    encoder = randomized(ConvViT(image_size=64, **HYBRID))
    segmenter = ConvViT(image_size=96, relative_positions="block", layer_scale=1.0, **HYBRID)
    weights = fit_encoder(encoder.state_dict(), segmenter)
    segmenter.load_state_dict(weights)
    images = torch.randn(2, 3, 96, 96)
    for ours, expected in zip(segmenter.features(images), encoder.features(images), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    kinds = {name.split(".", 1)[0] + name[-5:] for name in weights.filled}
    assert kinds == {"rel_pos_biastable", "blocksmma_1", "blocksmma_2"}


@torch.no_grad()
def test_vitdet_from_mae_drops_the_class_token_and_its_position():
    encoder = randomized(ViT(image_size=32, **VIT))
    options = {"class_token": False, "window": 3, "global_blocks": (0, 1)}
    weights = encoder.state_dict()
    backbone = filled(ViT(image_size=48, **options, **VIT), weights)
    expected = interpolate_positions(weights["pos_embed"][0, 1:], (8, 8), (12, 12))
    assert torch.equal(backbone.pos_embed[0], expected)
    assert fit_encoder(weights, backbone).dropped == ("pos_embed[:, :1]", "cls_token")


@torch.no_grad()
def test_grids_are_compared_and_not_counts_of_tokens():
    encoder = randomized(ViT(image_size=(16, 64), **VIT))
    square = ViT(image_size=32, **VIT)
    with_grid = filled(square, encoder.state_dict(), grid=(4, 16))
    expected = interpolate_positions(encoder.pos_embed[0], (4, 16), (8, 8), num_prefix=1)
    assert torch.equal(with_grid.pos_embed[0], expected)
    assert not torch.equal(with_grid.pos_embed, encoder.pos_embed)
    same = filled(ViT(image_size=(16, 64), **VIT), encoder.state_dict(), grid=(4, 16))
    assert torch.equal(same.pos_embed, encoder.pos_embed)


@torch.no_grad()
def test_the_recipes_compare_grids_too():
    options = {**VIT, "relative_positions": "block"}
    wide = randomized(ViT(image_size=(8, 32), **options))
    shape = ViTShape(image_size=(8, 32), **options)
    fitted = shape.resample(wide.state_dict(), ViT(image_size=16, **options))
    expected = interpolate_positions(wide.pos_embed[0], (2, 8), (4, 4), num_prefix=1)
    assert torch.equal(fitted["pos_embed"][0], expected)
    hybrid = randomized(ConvViT(image_size=(32, 128), **HYBRID))
    fitted = ConvViTShape(image_size=(32, 128), **HYBRID).resample(
        hybrid.state_dict(), ConvViT(image_size=64, **HYBRID)
    )
    expected = interpolate_positions(hybrid.pos_embed[0], (2, 8), (4, 4))
    assert torch.equal(fitted["pos_embed"][0], expected)


@torch.no_grad()
def test_tables_of_relative_positions_are_resampled_and_a_shared_one_is_copied():
    shared = randomized(ViT(image_size=32, relative_positions="shared", **VIT))
    table = shared.rel_pos_bias[0].table
    other = filled(ViT(image_size=48, relative_positions="block", **VIT), shared.state_dict())
    expected = interpolate_relative_positions(table, (8, 8), (12, 12), num_extra=3)
    assert all(torch.equal(bias.table, expected) for bias in other.rel_pos_bias)
    options = {"class_token": False, "window": 4, "global_blocks": (1,)}
    windowed = ViT(image_size=48, relative_positions="block", **options, **VIT)
    filled(windowed, shared.state_dict())
    small = interpolate_relative_positions(table[:-3], (8, 8), (4, 4))
    assert torch.equal(windowed.rel_pos_bias[0].table, small)
    assert torch.equal(windowed.rel_pos_bias[1].table, expected[:-3])


@torch.no_grad()
def test_a_swin_takes_weights_of_another_window():
    sizes = {"dim": 8, "depth": (1, 1), "heads": (1, 2), "num_classes": 3}
    encoder = randomized(SwinTransformer(image_size=32, window=4, **sizes))
    wider = randomized(SwinTransformer(image_size=64, window=8, **sizes))
    head = wider.head.weight.clone()
    weights = {n: t for n, t in encoder.state_dict().items() if not n.startswith("head")}
    fitted = fit_encoder(weights, wider)
    wider.load_state_dict(fitted)
    name = "layers.1.blocks.0.attn.rel_pos_bias.table"
    assert torch.equal(fitted[name], interpolate_relative_positions(weights[name], (4, 4), (8, 8)))
    assert torch.equal(wider.head.weight, head)
    assert fitted.filled == ("head.bias", "head.weight")


SMALL = ViT(image_size=32, **VIT)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fit_encoder(ViT(image_size=(16, 64), **VIT).state_dict(), SMALL, grid=(4, 8)),
            r"64 tokens, not for a grid of \(4, 8\): pass the grid=",
        ),
        (
            lambda: fit_encoder(ViT(image_size=(16, 32), **VIT).state_dict(), SMALL),
            r"32 tokens, not for a grid of \(5, 5\)",
        ),
        (
            lambda: fit_encoder(ViT(image_size=32, **(VIT | {"depth": 3})).state_dict(), SMALL),
            r"no place for 12 of the weights, such as 'blocks\.2",
        ),
        (
            lambda: fit_encoder(ViT(image_size=32, **(VIT | {"depth": 1})).state_dict(), SMALL),
            r"lack 12 tensors, such as 'blocks\.1",
        ),
        (
            lambda: fit_encoder(ViT(image_size=32, **(VIT | {"dim": 16})).state_dict(), SMALL),
            r"has shape .*16.*but the encoder needs .*8",
        ),
        (
            lambda: fit_encoder(ViT(image_size=32, class_token=False, **VIT).state_dict(), SMALL),
            "has a class token, but the weights have none",
        ),
        (
            lambda: fit_encoder(ViT(image_size=32, layer_scale=0.1, **VIT).state_dict(), SMALL),
            r"no place for 4 of the weights, such as 'blocks\.0\.gamma_1'",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
