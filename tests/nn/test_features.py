"""`features`: maps of chosen layers, for images of any size; windows of attention in `ViT`."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import masking
from mimkit.nn import ConvViT, SwinTransformer, ViT
from mimkit.patches import interpolate_positions, interpolate_relative_positions
from tests.nn import plain

SMALL = {"image_size": 32, "patch_size": 4, "in_channels": 2, "dim": 8, "depth": 3, "heads": 2}
HYBRID = {"image_size": 32, "in_channels": 2, "dim": (4, 6, 8), "depth": (1, 2, 3), "heads": 2}
VITS = {
    "plain": {},
    "no class token": {"class_token": False},
    "registers": {"num_registers": 2},
    "relative positions of each block": {"relative_positions": "block"},
    "shared relative positions": {"relative_positions": "shared", "absolute_positions": False},
}


def vit(**options: object) -> ViT:
    torch.manual_seed(0)
    encoder = ViT(**(SMALL | options)).eval()
    plain.randomize(encoder)
    return encoder


def hybrid(**options: object) -> ConvViT:
    torch.manual_seed(0)
    encoder = ConvViT(**(HYBRID | options)).eval()
    plain.randomize(encoder)
    return encoder


def images_of(*size: int) -> Tensor:
    return torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(1))


def as_tokens(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).mT


@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_the_last_map_at_the_built_size_is_the_encoders_tokens(name):
    encoder, images = vit(**VITS[name]), images_of(32, 32)
    (last,) = encoder.features(images, norm=True)
    assert last.shape == (2, 8, 8, 8)
    assert torch.equal(as_tokens(last), encoder(images)[:, encoder.num_prefix_tokens :])
    (raw,) = encoder.features(images)
    assert torch.equal(encoder.norm(as_tokens(raw)), as_tokens(last))


@torch.no_grad()
def test_the_maps_of_a_conv_vit_at_the_built_size_are_its_stages_and_tokens():
    encoder, images = hybrid(relative_positions="block", layer_scale=0.5), images_of(32, 32)
    maps = encoder.features(images, norm=True)
    assert [tuple(one.shape) for one in maps] == [(2, 4, 8, 8), (2, 6, 4, 4), (2, 8, 2, 2)]
    assert torch.equal(as_tokens(maps[-1]), encoder(images))
    assert encoder.feature_channels == (4, 6, 8, 8, 8)


@torch.no_grad()
def test_layers_come_in_the_order_they_are_asked_for():
    images = images_of(32, 32)
    for encoder in (vit(), hybrid()):
        count = len(encoder.feature_channels)
        every = encoder.features(images, range(count))
        for layers in ([count - 1, 0], [-1, -count, 1], [1, 1]):
            chosen = encoder.features(images, layers)
            assert all(torch.equal(one, every[i]) for one, i in zip(chosen, layers, strict=True))
        assert [one.shape[1] for one in every] == list(encoder.feature_channels)
    outputs: list[Tensor] = []
    encoder = vit()
    encoder.blocks[1].register_forward_hook(lambda _module, _args, output: outputs.append(output))
    assert torch.equal(as_tokens(encoder.features(images, [1])[0]), outputs[0][:, 1:])


def rebuilt(encoder: nn.Module, kind: type, options: dict[str, object], grid: tuple) -> nn.Module:
    """An encoder built for another grid, with tables resampled by the public functions."""
    weights = dict(encoder.state_dict())
    prefix = int("cls_token" in weights)
    if "pos_embed" in weights:
        table = weights["pos_embed"][0]
        new = interpolate_positions(table, encoder.grid, grid, num_prefix=prefix)
        weights["pos_embed"] = new[None]
    for name, table in weights.items():
        if name.startswith("rel_pos_bias"):
            weights[name] = interpolate_relative_positions(
                table, encoder.grid, grid, num_extra=3 * prefix
            )
    patch = options.get("patch_size", 16)
    made = kind(**(options | {"image_size": tuple(patch * side for side in grid)})).eval()
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize("grid", [(4, 16), (16, 4), (5, 9), (8, 3), (1, 1)])
@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_another_size_equals_an_encoder_built_for_it_also_with_as_many_tokens(name, grid):
    encoder, images = vit(**VITS[name]), images_of(*(4 * side for side in grid))
    other = rebuilt(encoder, ViT, SMALL | VITS[name], grid)
    (last,) = encoder.features(images, norm=True)
    assert last.shape == (2, 8, *grid)
    expected = other(images)[:, encoder.num_prefix_tokens :]
    torch.testing.assert_close(as_tokens(last), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 4), (3, 5)])
@torch.no_grad()
def test_a_conv_vit_at_another_size_equals_one_built_for_it(grid):
    options = HYBRID | {"relative_positions": "block"}
    encoder, images = hybrid(**options), images_of(*(16 * side for side in grid))
    maps = encoder.features(images, norm=True)
    assert [one.shape[2:] for one in maps] == [tuple(n * side for side in grid) for n in (4, 2, 1)]
    expected = rebuilt(encoder, ConvViT, options, grid)(images)
    torch.testing.assert_close(as_tokens(maps[-1]), expected, rtol=1e-5, atol=1e-5)


def test_relative_positions_of_a_conv_vit_are_those_of_the_visible_tokens():
    encoder, images = hybrid(image_size=64, relative_positions="block"), images_of(64, 64)
    mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.5)
    tokens = encoder(images, mask)
    tokens.sum().backward()
    assert tokens.shape == (2, 8, 8)
    assert all(bias.table.grad.any() for bias in encoder.rel_pos_bias)
    for bias in encoder.rel_pos_bias:
        bias.table.data.zero_()
    without = hybrid(image_size=64)
    without.load_state_dict(encoder.state_dict(), strict=False)
    torch.testing.assert_close(encoder(images, mask), without(images, mask))
    assert not torch.allclose(encoder(images, mask), tokens)


@torch.no_grad()
def test_volumes_and_sound_have_feature_maps_too():
    sound = ViT(image_size=(64,), patch_size=(8,), in_channels=1, dim=8, depth=1, heads=2)
    assert sound.features(torch.rand(1, 1, 40))[0].shape == (1, 8, 5)
    sizes = {"image_size": (4, 8, 8), "patch_size": (2, 4, 4)}
    volume = ViT(**sizes, in_channels=1, dim=12, depth=1, heads=2)
    assert volume.features(torch.rand(1, 1, 6, 8, 12))[0].shape == (1, 12, 3, 2, 3)


def plain_window_block(x: Tensor, weights: dict[str, Tensor], name: str, window: int) -> Tensor:
    """A block of ViTDet on [batch, height, width, dim]: padded windows, one after the other."""
    _, height, width, _ = x.shape
    normal = plain.norm(x, weights, f"{name}.norm1")
    padded = F.pad(normal, (0, 0, 0, -width % window, 0, -height % window))
    for top in range(0, padded.shape[1], window):
        for left in range(0, padded.shape[2], window):
            inside = padded[:, top : top + window, left : left + window]
            mixed = plain.attention(inside.flatten(1, 2), weights, f"{name}.attn", heads=2)
            padded[:, top : top + window, left : left + window] = mixed.view_as(inside)
    x = x + padded[:, :height, :width]
    hidden = plain.linear(plain.norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    return x + plain.linear(F.gelu(hidden), weights, f"{name}.mlp.fc2")


@pytest.mark.parametrize(("size", "window"), [((32, 32), 4), ((32, 32), 3), ((20, 44), 4)])
@torch.no_grad()
def test_vitdets_windows_equal_their_plain_definition(size, window):
    encoder = vit(class_token=False, window=window, global_blocks=(1,), depth=4)
    weights, images = dict(encoder.named_parameters()), images_of(*size)
    grid = tuple(side // 4 for side in size)
    positions = interpolate_positions(encoder.pos_embed[0], (8, 8), grid)
    x = plain.embed_patches(images, weights) + positions
    for index in range(4):
        name = f"blocks.{index}"
        if index == 1:
            x = plain.block(x, weights, name, heads=2)
        else:
            x = plain_window_block(x.unflatten(1, grid), weights, name, window).flatten(1, 2)
    (last,) = encoder.features(images)
    torch.testing.assert_close(as_tokens(last), x, rtol=1e-4, atol=1e-5)
    if size == (32, 32):
        normed = plain.norm(x, weights, "norm")
        torch.testing.assert_close(encoder(images), normed, rtol=1e-4, atol=1e-5)


def test_a_window_with_relative_positions_has_a_table_of_its_size():
    options = {"class_token": False, "window": 4, "global_blocks": (0,)}
    encoder = vit(**options, relative_positions="block")
    assert [len(bias.table) for bias in encoder.rel_pos_bias] == [15**2, 7**2, 7**2]
    (last,) = encoder.features(images_of(20, 44))
    last.sum().backward()
    assert all(bias.table.grad.any() for bias in encoder.rel_pos_bias)


def test_drop_path_draws_for_each_image_and_not_for_each_window():
    encoder = vit(class_token=False, window=2, drop_path=0.5).train()
    seen = []
    encoder.blocks[2].drop_path.register_forward_hook(lambda _m, _args, out: seen.append(out))
    encoder.features(images_of(32, 32).repeat(8, 1, 1, 1))
    assert [len(out) for out in seen] == [16, 16]
    gone = torch.stack([(out == 0).flatten(1).all(1) for out in seen])
    assert gone.any()
    assert not gone.all()


def test_gradients_reach_images_and_every_weight_that_a_map_depends_on():
    for encoder in (vit(learn_positions=True), hybrid(learn_positions=True)):
        images = images_of(48, 16).requires_grad_()
        sum(one.square().sum() for one in encoder.features(images)).backward()
        assert images.grad.any()
        unused = {name for name, weight in encoder.named_parameters() if weight.grad is None}
        assert unused == {"norm.weight", "norm.bias"}


def test_checkpointing_changes_neither_maps_nor_gradients():
    results = []
    for enable in (False, True):
        encoder = vit(class_token=False, window=3)
        encoder.set_grad_checkpointing(enable)
        (last,) = encoder.features(images_of(32, 20))
        last.square().sum().backward()
        results.append([last, *(w.grad for w in encoder.blocks.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


SWIN = SwinTransformer(image_size=32, dim=8, depth=(1, 1), heads=(1, 2), window=4)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vit().features(images_of(30, 32)), r"image size \(30, 32\).*\(28, 32\)"),
        (lambda: vit().features(images_of(32)), r"2 axes after batch and channels.*\(2, 2, 32\)"),
        (lambda: vit().features(images_of(32, 32)[:, :1]), r"2 channels.*\(2, 1, 32, 32\)"),
        (lambda: vit().features(images_of(32, 32), []), r"among the 3 layers.*got \[\]"),
        (lambda: vit().features(images_of(32, 32), [3]), r"from -3 to 2; got \[3\]"),
        (lambda: hybrid().features(images_of(32, 24)), r"image size \(32, 24\).*\(16, 16\)"),
        (lambda: hybrid().features(images_of(32, 32)[:, :1]), r"2 channels.*\(2, 1, 32, 32\)"),
        (lambda: hybrid().features(images_of(32, 32), (5,)), r"from -5 to 4; got \(5,\)"),
        (lambda: SWIN.features(torch.rand(1, 3, 32, 32), (2,)), r"from -2 to 1; got \(2,\)"),
        (lambda: vit(window=2), r"window=2 needs class_token=False"),
        (lambda: vit(global_blocks=(0,)), r"global_blocks=\(0,\) needs a window"),
        (
            lambda: vit(class_token=False, window=2, global_blocks=(3,)),
            r"below depth=3; got \(3,\)",
        ),
        (
            lambda: vit(class_token=False, window=2)(
                images_of(32, 32), masking.uniform(masking.key([0, 1], seed=0), (8, 8), 0.5)
            ),
            r"window=\(2, 2\) needs all tokens",
        ),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
