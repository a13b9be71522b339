"""`SwinTransformer` and relative positions: windows, shapes, masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mimkit import masking
from mimkit.masking import Mask
from mimkit.nn import InverseSwin, RelativePositionBias, SimMIMHead, SwinTransformer, ViT
from mimkit.nn._simmim_heads import points_of_patches
from mimkit.nn._swin import PatchMerging, fit_window, shifted_window_mask, window_order
from mimkit.patches import gather_masked, patchify
from tests.nn import plain
from tests.strategies import generators, grids, masks

SMALL = {"image_size": (16, 32), "patch_size": 2, "in_channels": 2, "dim": 8, "window": 4}


def swin(**changes: object) -> SwinTransformer:
    model = SwinTransformer(**(SMALL | {"depth": (2, 2), "heads": (2, 4)} | changes)).eval()
    plain.randomize(model)
    return model


# Windows.


@given(st.sampled_from([(4, 8), (8, 8), (12, 4), (6, 6)]), st.integers(0, 3))
def test_every_token_is_in_exactly_one_window(grid, shift):
    order = window_order(grid, 2, min(shift, 1))
    assert sorted(order.flatten().tolist()) == list(range(grid[0] * grid[1]))


def test_unshifted_windows_are_squares_of_adjacent_tokens():
    order = window_order((4, 4), 2, 0)
    assert order.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@given(st.sampled_from([(8, 8, 4, 2), (8, 12, 4, 1), (6, 9, 3, 1)]))
def test_the_shift_mask_separates_tokens_that_only_the_roll_made_neighbors(case):
    height, width, window, shift = case
    order = window_order((height, width), window, shift)
    is_masked = shifted_window_mask((height, width), window, shift).squeeze(1) != 0
    y, x = order // width, order % width
    far = ((y[:, :, None] - y[:, None]).abs() >= window) | (
        (x[:, :, None] - x[:, None]).abs() >= window
    )
    assert torch.equal(is_masked, far)


@pytest.mark.parametrize(
    ("grid", "window", "fitted"),
    [((8, 8), 4, (4, 2)), ((4, 4), 4, (4, 0)), ((4, 4), 7, (4, 0)), ((3, 6), 7, (3, 0))],
)
def test_a_window_that_reaches_the_shorter_side_is_unshifted(grid, window, fitted):
    assert fit_window(grid, window) == fitted


# The encoder.


def test_any_rectangle_that_fits_gives_its_grid_and_features():
    model, images = swin(), torch.randn(3, 2, 16, 32)
    assert model.grid == (8, 16)
    assert model.out_grid == (4, 8)
    assert model.stride == (4, 4)
    tokens = model(images)
    assert tokens.shape == (3, 32, 16)
    features = model.features(images)
    assert [tuple(f.shape) for f in features] == [(3, 8, 8, 16), (3, 16, 4, 8)]
    normed = model.norm(features[-1].flatten(2).mT)
    torch.testing.assert_close(normed, tokens)
    torch.testing.assert_close(model.pool(tokens), tokens.mean(1))


@given(st.data(), generators())
@settings(max_examples=10)
def test_masked_patches_are_not_read(data, generator):
    model = swin()
    images = torch.randn(2, 2, 16, 32, generator=generator)
    mask = data.draw(masks(grid=(8, 16), batch_size=2))
    token = torch.randn(1, 1, 8, generator=generator)
    hidden = mask.is_masked.repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)
    poisoned = images.masked_fill(hidden, torch.nan)
    with torch.no_grad():
        assert torch.equal(
            model(images, mask, mask_token=token), model(poisoned, mask, mask_token=token)
        )


def test_without_masked_patches_the_mask_token_is_not_used():
    model, images = swin(), torch.randn(2, 2, 16, 32)
    mask = masking.uniform(masking.key([0, 1], seed=0), (8, 16), num_masked=0)
    tokens = model(images, mask, mask_token=torch.full((1, 1, 8), torch.nan))
    torch.testing.assert_close(tokens, model(images))


def test_samples_do_not_affect_each_other():
    model, images = swin(), torch.randn(3, 2, 16, 32)
    with torch.no_grad():
        together = model(images)
        for row in range(3):
            torch.testing.assert_close(model(images[row, None])[0], together[row])


def test_a_mask_needs_a_mask_token_and_the_other_way_round():
    model, images = swin(), torch.randn(1, 2, 16, 32)
    mask = masking.uniform(masking.key([0], seed=0), (8, 16), 0.5)
    with pytest.raises(ValueError, match="pass a mask_token with the mask"):
        model(images, mask)
    with pytest.raises(ValueError, match="pass a mask with it"):
        model(images, mask_token=torch.zeros(1, 1, 8))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth": (2,)}, "one number per stage"),
        ({"image_size": (16, 30)}, "not divisible by total patch merging"),
        ({"image_size": (8, 8, 8)}, "two axes"),
        ({"heads": (3, 4)}, "is not divisible by heads=3"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        swin(**changes)


def test_another_image_size_is_refused():
    with pytest.raises(ValueError, match=r"images of size \(16, 32\); got \(1, 2, 32, 16\)"):
        swin()(torch.randn(1, 2, 32, 16))


def test_gradients_through_the_permutations_are_right():
    model = swin(depth=(2,), heads=(2,), image_size=(8, 16)).double()
    images = torch.randn(1, 2, 8, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x).square().sum(), images, fast_mode=True)


@pytest.mark.full
@pytest.mark.parametrize("make", [swin, lambda: plain_vit("shared")])
def test_encoders_trace_in_one_graph(make):
    model = make().train()
    images = torch.randn(2, 2, 16, 32)
    mask = masking.uniform(masking.key([0, 1], seed=0), model.grid, 0.5)
    token = torch.randn(1, 1, 8, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(images, mask, mask_token=token)
    traced = compiled(images, mask, mask_token=token)
    torch.testing.assert_close(traced, expected)
    one, other = (torch.autograd.grad(out.sum(), token)[0] for out in (traced, expected))
    torch.testing.assert_close(one, other)


# Relative positions of a ViT.


def plain_vit(relative: str, **changes: object) -> ViT:
    options = {"image_size": (16, 32), "patch_size": 4, "in_channels": 2, "dim": 8, "heads": 2}
    options |= {"depth": 2, "relative_positions": relative, "absolute_positions": False}
    model = ViT(**(options | changes)).eval()
    plain.randomize(model)
    return model


@given(grids(max_tokens=20), st.booleans(), generators())
def test_a_bias_depends_on_the_offset_alone(grid, class_token, generator):
    bias = RelativePositionBias(grid=grid, heads=2, class_token=class_token)
    with torch.no_grad():
        bias.table.normal_(generator=generator)
    prefix = int(class_token)
    square = bias()[0, :, prefix:, prefix:]
    positions = torch.cartesian_prod(*[torch.arange(size) for size in grid]).view(-1, len(grid))
    offsets = (positions[:, None] - positions).tolist()
    by_offset: dict[tuple[int, ...], torch.Tensor] = {}
    for query, row in enumerate(offsets):
        for key, offset in enumerate(row):
            value = by_offset.setdefault(tuple(offset), square[:, query, key])
            assert torch.equal(value, square[:, query, key])


@given(st.sampled_from(["shared", "block"]), st.booleans(), masks(grid=(4, 8), batch_size=2))
@settings(max_examples=10)
def test_visible_tokens_keep_their_positions(relative, class_token, mask):
    """Encoding only visible tokens equals full attention with masked keys set to -inf."""
    model = plain_vit(relative, class_token=class_token)
    images = torch.randn(2, 2, 16, 32)
    encoded = model(images, mask)
    assert encoded.shape[1] == model.num_prefix_tokens + mask.num_visible
    prefix = model.num_prefix_tokens
    is_visible = F.pad(~mask.is_masked.flatten(1), (prefix, 0), value=True)
    key_bias = torch.zeros(2, 1, 1, is_visible.shape[1])
    key_bias = key_bias.masked_fill(~is_visible[:, None, None], -torch.inf)
    tokens = model.patch_embed(images)
    if model.cls_token is not None:
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1)
    for index, block in enumerate(model.blocks):
        table = model.rel_pos_bias[index if relative == "block" else 0]
        tokens = block(tokens, attn_bias=table() + key_bias)
    for row in range(2):
        expected = model.norm(tokens[row][is_visible[row]])
        torch.testing.assert_close(encoded[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.untyped
def test_an_unknown_kind_of_relative_positions_is_refused():
    with pytest.raises(ValueError, match='"shared", "block" or None'):
        plain_vit("absolute")


# Heads.


def test_points_are_ordered_as_in_pixel_shuffle():
    cells = torch.randn(2, 6, 3 * 8 * 8)
    image = F.pixel_shuffle(cells.mT.reshape(2, -1, 2, 3), 8)
    patches = points_of_patches(cells, (2, 3), (8, 8), (4, 4))
    expected = F.unfold(image, 4, stride=4).mT
    torch.testing.assert_close(patches, expected)


def test_a_patch_larger_than_a_cell_is_assembled_from_cells():
    cells = torch.randn(2, 16, 3 * 2 * 2)
    large = points_of_patches(cells, (4, 4), (2, 2), (4, 4))
    back = points_of_patches(large, (2, 2), (4, 4), (2, 2))
    assert torch.equal(back, cells)


def test_an_inverse_swin_splits_after_every_stage_but_the_last():
    head = InverseSwin(
        grid=(2, 4),
        in_dim=10,
        dim=(16, 8, 4),
        depth=(1, 2, 1),
        heads=(2, 2, 1),
        window=2,
        out_dim=5,
    )
    tokens = torch.randn(2, 8, 10, requires_grad=True)
    cells = head(tokens)
    assert cells.shape == (2, 8 * 16, 5)
    # A cell depends on its own token, and not on other samples.
    grad = torch.autograd.grad(cells[0, -1].sum(), tokens)[0]
    assert grad[0, -1].abs().sum() > 0
    assert grad[1].abs().sum() == 0


def test_masked_patches_equal_those_of_a_prediction_of_the_whole_image():
    """Reference: the authors' convolution and `PixelShuffle`, for tokens of four patches."""
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 6), 0.5)
    head = SimMIMHead(grid=(2, 3), dim=10, token=(8, 8), patch=(4, 4), values=3)
    tokens = torch.randn(2, 6, 10)
    points = head.predict(tokens).mT.reshape(2, -1, 2, 3)
    patches = patchify(F.pixel_shuffle(points, 8), 4, order="c p1 p2")
    torch.testing.assert_close(head(tokens, mask), gather_masked(patches, mask))


def test_a_head_predicts_only_masked_patches_if_a_token_is_a_patch():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), num_masked=2)
    head = SimMIMHead("mlp", grid=(2, 3), dim=10, token=(4, 4), patch=(4, 4), values=3)
    shapes = []
    head.predict.register_forward_hook(lambda module, args, output: shapes.append(args[0].shape))
    assert head(torch.randn(2, 6, 10), mask).shape == (2, 2, 48)
    assert shapes == [(2, 2, 10)]


@pytest.mark.untyped
def test_heads_that_do_not_exist_or_have_nothing_to_split_are_refused():
    shape = {"grid": (2, 2), "dim": 8, "token": (4, 4), "patch": (4, 4), "values": 3}
    with pytest.raises(ValueError, match="got 'conv'"):
        SimMIMHead("conv", **shape)
    with pytest.raises(ValueError, match="4x4 predicted points"):
        SimMIMHead("inverse_swin_t", **shape)


def test_an_empty_batch_gives_no_tokens():
    encoder = swin()
    assert encoder(torch.zeros(0, 2, 16, 32)).shape == (0, math.prod(encoder.out_grid), 16)


def test_patch_merging_uses_the_authors_order():
    merging = PatchMerging(dim=1)
    merging.norm = torch.nn.Identity()
    with torch.no_grad():
        merging.reduction.weight.copy_(torch.tensor([[1.0, 10, 100, 1000], [0, 0, 0, 0]]))
    # (0, 0), (1, 0), (0, 1), (1, 1), as (row, column).
    tokens = torch.tensor([[[1.0], [3.0], [2.0], [4.0]]])
    assert merging(tokens, (2, 2))[0, 0, 0] == 4321


def test_a_mask_rebuilt_from_booleans_gives_the_same_tokens():
    model, images = swin(), torch.randn(1, 2, 16, 32)
    mask = masking.uniform(masking.key([0], seed=0), (8, 16), 0.5, unit=2)
    token = torch.randn(1, 1, 8)
    again = Mask.from_bool(mask.is_masked)
    assert torch.equal(
        model(images, mask, mask_token=token), model(images, again, mask_token=token)
    )


# Other sizes.


def plain_window_attention(x, weights, name, heads, mask):
    """Attention inside windows [batch * windows, inside, dim] with the bias of two loops."""
    side = math.isqrt(x.shape[1])
    table = weights[f"{name}.rel_pos_bias.table"]
    places = [(i // side, i % side) for i in range(side**2)]
    rows = torch.tensor(
        [
            [(a - c + side - 1) * (2 * side - 1) + b - d + side - 1 for c, d in places]
            for a, b in places
        ]
    )
    query, key, value = plain.linear(x, weights, f"{name}.qkv").chunk(3, dim=-1)
    heads_out = []
    parts = [part.chunk(heads, dim=-1) for part in (query, key, value)]
    for head, (q, k, v) in enumerate(zip(*parts, strict=True)):
        logits = q @ k.mT / q.shape[-1] ** 0.5 + table[rows][..., head]
        if mask is not None:
            logits = logits + mask.repeat(len(x) // len(mask), 1, 1)
        heads_out.append(logits.softmax(-1) @ v)
    return plain.linear(torch.cat(heads_out, -1), weights, f"{name}.proj")


def partition(x, side):
    """[batch, height, width, dim] to windows, row-major."""
    b, h, w, d = x.shape
    x = x.view(b, h // side, side, w // side, side, d).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side, d)


def plain_swin_features(model, images, heads):
    """The authors' segmentation: pad after the norm, roll, attend, undo both, crop."""
    weights = dict(model.named_parameters())
    patch = weights["patch_embed.proj.weight"]
    x = F.conv2d(images, patch, weights["patch_embed.proj.bias"], stride=patch.shape[2:])
    x = plain.norm(x.movedim(1, -1), weights, "patch_embed.norm", eps=1e-5)
    maps = []
    for index, stage in enumerate(model.layers):
        side = stage.window
        for number in range(len(stage.blocks)):
            name = f"layers.{index}.blocks.{number}"
            shift = side // 2 if number % 2 else 0
            _, height, width, _ = x.shape
            y = plain.norm(x, weights, f"{name}.norm1", eps=1e-5)
            y = F.pad(y, (0, 0, 0, -width % side, 0, -height % side))
            padded = y.shape[1:3]
            mask = None
            if shift:
                y = y.roll((-shift, -shift), (1, 2))
                regions = torch.zeros(1, *padded, 1)
                for count, (top, left) in enumerate(
                    (top, left)
                    for top in (slice(0, -side), slice(-side, -shift), slice(-shift, None))
                    for left in (slice(0, -side), slice(-side, -shift), slice(-shift, None))
                ):
                    regions[:, top, left] = count
                labels = partition(regions, side).squeeze(-1)
                mask = (labels[:, None] != labels[:, :, None]) * -100.0
            y = plain_window_attention(
                partition(y, side), weights, f"{name}.attn", heads[index], mask
            )
            y = y.view(len(x), padded[0] // side, padded[1] // side, side, side, -1)
            y = y.permute(0, 1, 3, 2, 4, 5).reshape(len(x), *padded, -1)
            x = x + y.roll((shift, shift), (1, 2))[:, :height, :width]
            hidden = plain.linear(
                plain.norm(x, weights, f"{name}.norm2", eps=1e-5), weights, f"{name}.mlp.fc1"
            )
            x = x + plain.linear(F.gelu(hidden), weights, f"{name}.mlp.fc2")
        maps.append(x.movedim(-1, 1))
        if stage.downsample is not None:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            quads = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
            name = f"layers.{index}.downsample"
            normal = plain.norm(torch.cat(quads, -1), weights, f"{name}.norm", eps=1e-5)
            x = normal @ weights[f"{name}.reduction.weight"].T
    return maps


@pytest.mark.parametrize("size", [(16, 32), (18, 30), (40, 22), (6, 4), (2, 2)])
@torch.no_grad()
def test_features_of_any_size_are_those_of_the_authors_segmentation(size):
    model = swin(image_size=64)
    images = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0))
    maps = model.features(images)
    for ours, expected in zip(maps, plain_swin_features(model, images, (2, 4)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_swin_whose_windows_do_not_divide_its_grids_is_padded():
    model = swin(image_size=(20, 36), window=3)
    images = torch.randn(2, 2, 20, 36, generator=torch.Generator().manual_seed(0))
    maps = model.features(images)
    for ours, expected in zip(maps, plain_swin_features(model, images, (2, 4)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    normed = model.norm(maps[-1].flatten(2).mT)
    torch.testing.assert_close(model(images), normed)


def test_padding_has_no_gradient_and_real_pixels_all_have_one():
    model = swin(image_size=64)
    images = torch.randn(1, 2, 18, 22, requires_grad=True)
    sum(one.square().sum() for one in model.features(images)).backward()
    assert images.grad.abs().sum(1).all()
    assert all(weight.grad.isfinite().all() for weight in model.layers.parameters())


@torch.no_grad()
def test_a_built_size_costs_no_padding_and_other_sizes_leave_it_as_it_was():
    model, images = swin(), torch.randn(2, 2, 16, 32)
    before = model(images)
    model.features(torch.randn(1, 2, 18, 30))
    assert torch.equal(model(images), before)
    assert model.layers[0].is_padding is None


def test_checkpointing_computes_each_block_again_and_nothing_else():
    encoder = SwinTransformer(
        image_size=32, patch_size=4, dim=8, depth=(2, 1), heads=(1, 2), window=4
    )
    calls: list[str] = []
    watched = {name: m for name, m in encoder.named_modules() if type(m).__name__ == "SwinBlock"}
    watched["downsample"] = encoder.layers[0].downsample
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    found = []
    for enable in (False, True):
        calls.clear()
        encoder.zero_grad()
        encoder.set_grad_checkpointing(enable)
        encoder(torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)).square().sum().backward()
        times = 2 if enable else 1
        assert {name: calls.count(name) for name in watched} == {
            name: 1 if name == "downsample" else times for name in watched
        }
        found.append(
            [weight.grad.clone() for weight in encoder.parameters() if weight.requires_grad]
        )
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
