"""`FeaturePyramid`, `UPerHead` and `FCNHead`; the peers' tier compares the heads with others'."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimkit.nn import FCNHead, FeaturePyramid, UPerHead
from tests.nn import plain


def image_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Detectron2's LayerNorm of feature maps, by its formula."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).pow(2).mean(1, keepdim=True)
    scaled = (x - mean) / torch.sqrt(variance + 1e-6)
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@torch.no_grad()
def test_vitdets_pyramid_equals_its_plain_definition():
    pyramid = FeaturePyramid(dim=8, out_dim=5)
    plain.randomize(pyramid)
    x = torch.randn(2, 8, 3, 5)
    first, second, same, half = pyramid.levels
    up = F.conv_transpose2d(x, first[0].weight, first[0].bias, stride=2)
    up = F.gelu(image_norm(up, first[1]))
    expected = [
        (F.conv_transpose2d(up, first[3].weight, first[3].bias, stride=2), first[4:]),
        (F.conv_transpose2d(x, second[0].weight, second[0].bias, stride=2), second[1:]),
        (x, same),
        (F.max_pool2d(x, 2), half[1:]),
    ]
    levels = pyramid(x)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (5, 12, 20),
        (5, 6, 10),
        (5, 3, 5),
        (5, 1, 2),
    ]
    for level, (scaled, (narrow, norm, wide, last)) in zip(levels, expected, strict=True):
        projected = image_norm(F.conv2d(scaled, narrow.weight), norm)
        projected = image_norm(F.conv2d(projected, wide.weight, padding=1), last)
        torch.testing.assert_close(level, projected, rtol=1e-5, atol=1e-5)
    assert [first[0].out_channels, first[3].out_channels] == [4, 2], "channels are halved"


def test_beits_pyramid_keeps_the_channels_and_takes_one_map_a_level():
    pyramid = FeaturePyramid(dim=6, out_dim=None).train()
    maps = [torch.randn(2, 6, 4, 2) for _ in range(4)]
    levels = pyramid(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [
        (6, 16, 8),
        (6, 8, 4),
        (6, 4, 2),
        (6, 2, 1),
    ]
    assert [type(layer).__name__ for layer in pyramid.levels[0]] == [
        "ConvTranspose2d",
        "BatchNorm2d",
        "GELU",
        "ConvTranspose2d",
    ]
    assert torch.equal(levels[2], maps[2])
    assert torch.equal(levels[3], F.max_pool2d(maps[3], 2))


@pytest.mark.parametrize("scales", [(4.0, 2.0, 1.0, 0.5), (8.0,), (1.0, 0.25)])
@pytest.mark.parametrize("out_dim", [None, 3])
def test_levels_have_the_size_of_their_scale(scales, out_dim):
    pyramid = FeaturePyramid(dim=8, out_dim=out_dim, scales=scales)
    for level, scale in zip(pyramid(torch.randn(1, 8, 4, 8)), scales, strict=True):
        assert tuple(level.shape) == (1, pyramid.out_channels, int(4 * scale), int(8 * scale))


def test_gradients_reach_every_weight_of_pyramid_and_heads():
    pyramid = FeaturePyramid(dim=8, out_dim=4)
    head = UPerHead(in_dims=(4,) * 4, num_classes=3, dim=8, pool_scales=(1, 2))
    auxiliary = FCNHead(in_dim=4, num_classes=3, dim=8, num_convs=2, concat_input=True)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    levels = pyramid(x)
    (head(levels).square().sum() + auxiliary(levels[2]).square().sum()).backward()
    assert x.grad is not None
    assert x.grad.any()
    for module in (pyramid, head, auxiliary):
        assert all(weight.grad.isfinite().all() for weight in module.parameters())
        assert all(
            weight.grad.any() for name, weight in module.named_parameters() if "bias" in name
        )


def test_logits_have_the_grid_of_the_finest_map_whatever_the_sizes():
    head = UPerHead(in_dims=(2, 3, 4), num_classes=5, dim=8).eval()
    maps = [torch.randn(1, 2, 9, 13), torch.randn(1, 3, 5, 7), torch.randn(1, 4, 2, 3)]
    assert head(maps).shape == (1, 5, 9, 13)


MAPS = [torch.randn(1, 4, 2, 2)] * 2


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FeaturePyramid(dim=8, scales=(3.0,)), r"powers of two.*got \(3\.0,\)"),
        (lambda: FeaturePyramid(dim=8, scales=()), r"powers of two.*got \(\)"),
        (lambda: FeaturePyramid(dim=8)(MAPS[0]), r"\[batch, 8, height, width\].*\(1, 4, 2, 2\)"),
        (lambda: FeaturePyramid(dim=4)(MAPS), r"4, height.*\(1, 4, 2, 2\)"),
        (
            lambda: FeaturePyramid(dim=4)(torch.randn(1, 4, 1, 8)),
            r"at least 2 rows and columns for a scale of 0\.5; got \(1, 4, 1, 8\)",
        ),
        (
            lambda: UPerHead(in_dims=(4, 4), num_classes=2)([MAPS[0], MAPS[1].repeat(3, 1, 1, 1)]),
            r"one batch size; got \[\(1, 4, 2, 2\), \(3, 4, 2, 2\)\]",
        ),
        (
            lambda: UPerHead(in_dims=(4, 4), num_classes=2)([MAPS[0], MAPS[1][..., :0]]),
            r"\[batch, 4, height, width\]; got .*\(1, 4, 2, 0\)",
        ),
        (lambda: UPerHead(in_dims=(), num_classes=2), "at least one map"),
        (lambda: UPerHead(in_dims=(4,), num_classes=2)(MAPS), r"\[batch, 4, height, width\]; got"),
        (lambda: FCNHead(in_dim=3, num_classes=2)(MAPS[0]), r"\[batch, 3, height, width\]; got"),
        (lambda: FCNHead(in_dim=3, num_classes=2, num_convs=0), "num_convs=0 keeps in_dim=3"),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.untyped
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_maps_of_another_dtype_are_refused_unless_autocast_converts_them(dtype):
    head = UPerHead(in_dims=(4, 4), num_classes=2, dim=4)
    with pytest.raises(TypeError, match=f"torch.float32, as the weights; got {dtype}"):
        head([MAPS[0], MAPS[1].to(dtype)])
    with torch.autocast("cpu", torch.bfloat16):
        assert head.eval()([one.bfloat16() for one in MAPS]).dtype == torch.bfloat16
