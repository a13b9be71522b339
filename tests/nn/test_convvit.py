"""`ConvViT`, packed with a mask and dense without, and the detection backbone."""

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import masking
from mimkit.interop import from_official, to_official
from mimkit.masking import Mask
from mimkit.nn import ConvViT, ConvViTDetector
from mimkit.patches import (
    gather_visible,
    interpolate_positions,
    interpolate_relative_positions,
)
from mimkit.testing import assert_no_leak, assert_samples_isolated
from tests.golden_files import golden
from tests.nn import plain
from tests.strategies import masks

SHAPES = {
    "the authors' strides": {"image_size": 32, "patch_sizes": (4, 2, 2)},
    "rectangle": {"image_size": (24, 16), "patch_sizes": ((2, 1), 2, (3, 2))},
    "stride one": {"image_size": (6, 4), "patch_sizes": (1, 2, 1)},
}
CHANNELS, HEADS = 2, 2


def make_encoder(shape: str = "rectangle", **options: object) -> ConvViT:
    """A small encoder with random weights, norms and biases included."""
    sizes = {"in_channels": CHANNELS, "dim": (4, 6, 8), "depth": (2, 1, 2), "heads": HEADS}
    ratios = {"mlp_ratio": (2.0, 1.5, 3.0), "multi_scale": True}
    encoder = ConvViT(**(SHAPES[shape] | sizes | ratios | options))
    plain.randomize(encoder)
    return encoder


def make_images(encoder: ConvViT, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, CHANNELS, *encoder.image_size, generator=generator)


def make_mask(encoder: ConvViT, batch: int = 2) -> Mask:
    return masking.uniform(masking.key(range(batch), seed=0), encoder.grid, 0.6)


def map_norm(x: Tensor, module: nn.LayerNorm) -> Tensor:
    last = x.movedim(1, -1)
    normal = F.layer_norm(last, module.weight.shape, module.weight, module.bias)
    return normal.movedim(-1, 1)


def pointwise(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.conv2d(x, layer.weight[..., None, None], layer.bias)


def embed(x: Tensor, module: nn.Module) -> Tensor:
    weight = module.proj.weight
    return F.gelu(map_norm(F.conv2d(x, weight, module.proj.bias, weight.shape[2:]), module.norm))


def convolve_dense(x: Tensor, stage: nn.Module, mask: Mask | None) -> Tensor:
    x = embed(x, stage.embed)
    visible = 1.0
    if mask is not None:
        fine = mask.refine([n // g for n, g in zip(x.shape[2:], mask.grid, strict=True)])
        visible = (~fine.is_masked).unsqueeze(1).to(x.dtype)
    for block in stage.blocks:
        y = pointwise(map_norm(x, block.norm1), block.conv1) * visible
        weight = block.depthwise.weight
        y = F.conv2d(
            y, weight, block.depthwise.bias, padding=weight.shape[-1] // 2, groups=len(weight)
        )
        x = x + pointwise(y, block.conv2)
        y = F.gelu(pointwise(map_norm(x, block.norm2), block.mlp.fc1))
        x = x + pointwise(y, block.mlp.fc2)
    return x


def encode_dense(encoder: ConvViT, images: Tensor, mask: Mask | None) -> Tensor:
    """The authors' way: full feature maps, masked before every depth-wise convolution."""
    x, fused = images, []
    for index, stage in enumerate(encoder.stages):
        x = convolve_dense(x, stage, mask)
        if encoder.fusions:
            weight = encoder.fusions[index].weight
            fused.append(F.conv2d(x, weight, encoder.fusions[index].bias, weight.shape[2:]))
    tokens = encoder.embed_proj(embed(x, encoder.embed).flatten(2).mT) + encoder.pos_embed
    parts = [tokens, *(part.flatten(2).mT for part in fused)]
    tokens, *fused = parts if mask is None else [gather_visible(part, mask) for part in parts]
    weights = dict(encoder.named_parameters())
    for number in range(len(encoder.blocks)):
        tokens = plain.block(tokens, weights, f"blocks.{number}", HEADS)
    return plain.norm(sum(fused, tokens), weights, "norm")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"multi_scale": False}, {"kernel_size": 3}], ids=str)
@torch.no_grad()
def test_visible_cells_are_encoded_as_the_authors_encode_them(shape, options):
    encoder = make_encoder(shape, **options)
    images = make_images(encoder)
    for mask in (make_mask(encoder), None):
        expected = encode_dense(encoder, images, mask)
        torch.testing.assert_close(encoder(images, mask), expected, rtol=1e-4, atol=1e-5)


@given(masks(grid=(2, 4), batch_size=2))
@torch.no_grad()
def test_any_count_of_visible_cells_is_encoded(mask):
    encoder = make_encoder()
    images = make_images(encoder)
    expected = encode_dense(encoder, images, mask)
    torch.testing.assert_close(encoder(images, mask), expected, rtol=1e-4, atol=1e-5)


def gradients(encoder: ConvViT, output: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.pow(3).sum(), trained.values())
    return dict(zip(trained, grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_authors_way(shape):
    encoder = make_encoder(shape, learn_positions=True).double()
    images, mask = make_images(encoder).double(), make_mask(encoder)
    ours = gradients(encoder, encoder(images, mask))
    theirs = gradients(encoder, encode_dense(encoder, images, mask))
    for name, expected in theirs.items():
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(ours[name], expected, msg=name)


@torch.no_grad()
def test_a_mask_that_hides_nothing_changes_nothing():
    encoder = make_encoder()
    images = make_images(encoder)
    all_visible = Mask.from_bool(torch.zeros(2, *encoder.grid, dtype=torch.bool))
    torch.testing.assert_close(encoder(images, all_visible), encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_hidden_pixels_and_other_samples_change_no_bit(shape):
    encoder = make_encoder(shape)
    images, mask = make_images(encoder), make_mask(encoder)
    assert_no_leak(encoder, images, mask)
    assert_samples_isolated(encoder, images, mask)
    hidden = mask.refine(encoder.patch_size).is_masked.unsqueeze(1)
    poisoned = images.masked_fill(hidden, float("nan"))
    assert torch.equal(encoder(poisoned, mask), encoder(images, mask))


def test_hidden_pixels_have_no_gradient():
    encoder = make_encoder()
    images, mask = make_images(encoder).requires_grad_(), make_mask(encoder)
    encoder(images, mask).square().sum().backward()
    hidden = mask.refine(encoder.patch_size).is_masked.unsqueeze(1).expand_as(images)
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].ne(0).all()


def make_fine_mask(encoder: ConvViT) -> Mask:
    return masking.uniform(masking.key([0, 1], seed=0), encoder.fine_grid, 0.75)


@torch.no_grad()
def test_a_mask_on_the_fine_grid_encodes_all_tokens_without_a_leak():
    encoder = make_encoder()
    images, mask = make_images(encoder), make_fine_mask(encoder)
    assert encoder(images, mask).shape == (2, 8, 8)
    assert_no_leak(encoder, images, mask)
    all_visible = Mask.from_bool(torch.zeros(2, *encoder.fine_grid, dtype=torch.bool))
    torch.testing.assert_close(encoder(images, all_visible), encoder(images))


@torch.no_grad()
def test_a_coarse_mask_refined_to_the_fine_grid_gives_the_same_visible_tokens():
    encoder = make_encoder(depth=(2, 1, 0), multi_scale=False)
    images, mask = make_images(encoder), make_mask(encoder)
    factor = [fine // coarse for fine, coarse in zip(encoder.fine_grid, mask.grid, strict=True)]
    tokens = encoder(images, mask.refine(factor))
    torch.testing.assert_close(gather_visible(tokens, mask), encoder(images, mask))


@torch.no_grad()
def test_unmasked_convolutions_leak_as_the_paper_warns():
    encoder = make_encoder(masked_conv=False)
    images, mask = make_images(encoder), make_mask(encoder)
    # Without attention, the visible tokens are those of the whole image.
    convolutional = make_encoder(masked_conv=False, depth=(2, 1, 0))
    expected = gather_visible(convolutional(images), mask)
    torch.testing.assert_close(convolutional(images, mask), expected)
    with pytest.raises(AssertionError, match="hidden pixels reach the output"):
        assert_no_leak(encoder, images, mask)


@pytest.mark.untyped
@pytest.mark.full
def test_the_encoder_compiles_into_one_graph():
    encoder = make_encoder(depth=(1, 0, 1), kernel_size=3)
    images, mask = make_images(encoder), make_mask(encoder)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, mask), encoder(images, mask))
    torch.testing.assert_close(compiled(images), encoder(images))


def test_drop_path_rates_rise_over_all_stages():
    encoder = make_encoder(drop_path=0.4)
    blocks = [*encoder.stages[0].blocks, *encoder.stages[1].blocks, *encoder.blocks]
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    images, mask = make_images(encoder), make_mask(encoder)
    assert not torch.equal(encoder.train()(images, mask), encoder(images, mask))
    encoder.eval()
    assert torch.equal(encoder(images, mask), encoder(images, mask))


def test_initialisation_equals_the_authors():
    """Convolutions as PyTorch's default; linear layers and the last projection Xavier-uniform."""
    torch.manual_seed(0)
    encoder = ConvViT(image_size=32, dim=(32, 48, 64), depth=(1, 1, 1), heads=4, multi_scale=True)
    block = encoder.stages[0].blocks[0]
    layers = [block.conv1, block.conv2, block.mlp.fc1, block.mlp.fc2, block.depthwise]
    for layer in [*layers, encoder.stages[1].embed.proj, *encoder.fusions]:
        bound = layer.weight[0].numel() ** -0.5
        for values in (layer.weight, layer.bias):
            assert 0.85 * bound < values.abs().max() <= bound
    for layer in (encoder.embed_proj, encoder.blocks[0].attn.qkv):
        assert not layer.bias.any()
    for matrix in (encoder.embed.proj.weight.flatten(1), encoder.embed_proj.weight):
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.95 * bound < matrix.abs().max() <= bound


FINE_TUNED = golden("convmae_finetune_A")
MODES = {"global_pool": {"pool": "mean", "pool_norm": True}, "first_token": {"pool": "token"}}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_features_and_logits_equal_those_of_the_fine_tuned_encoder(mode):
    theirs = FINE_TUNED.config
    encoder = ConvViT(
        image_size=theirs["img_size"][0],
        patch_sizes=theirs["patch_size"],
        dim=theirs["embed_dim"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        num_classes=theirs["num_classes"],
        learn_positions=True,
        **MODES[mode],
    )
    weights = FINE_TUNED.tensors("global_pool/param/")
    if mode == "first_token":
        weights = {name.replace("fc_norm.", "norm."): w for name, w in weights.items()}
    converted = from_official("convmae_vit", weights)
    assert converted.dropped == ()
    encoder.load_state_dict(converted)
    back = to_official("convmae_vit", encoder.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    features = encoder.pool(encoder(FINE_TUNED.tensor("in/imgs")))
    expected = FINE_TUNED.tensor(f"{mode}/features")
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=2e-5)
    logits = FINE_TUNED.tensor(f"{mode}/logits")
    torch.testing.assert_close(encoder.head(features), logits, rtol=1e-4, atol=2e-5)


DETECTOR = golden("convmae_det_A")


@pytest.fixture(scope="module")
def backbone() -> ConvViTDetector:
    theirs = DETECTOR.config
    made = ConvViTDetector(
        image_size=theirs["img_size"][0],
        window=theirs["window_size"],
        dim=theirs["embed_dim"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
    )
    made.load_state_dict(from_official("convmae_det", DETECTOR.tensors("param/")))
    return made


@torch.no_grad()
def test_the_detectors_feature_maps_equal_the_authors(backbone):
    levels = backbone(DETECTOR.tensor("in/imgs"))
    theirs = [DETECTOR.tensor(f"out/s{level}") for level in range(4)]
    for ours, expected in zip([levels[0][:, :, ::2, ::2], *levels[1:]], theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_relative_position_biases_equal_the_authors(backbone):
    index = DETECTOR.tensor("buffer/windowed_rel_pos_bias.relative_position_index")
    assert torch.equal(backbone.window_bias.index, index)
    expected = DETECTOR.tensor("out/windowed_rel_pos_bias")
    assert torch.equal(backbone.window_bias()[0], expected)


def test_the_detectors_state_dict_round_trips(backbone):
    weights = DETECTOR.tensors("param/")
    written = to_official("convmae_det", backbone.state_dict())
    assert written.dropped == ()
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weight) for name, weight in weights.items())


@torch.no_grad()
def test_windows_are_isolated_and_global_layers_reach_all_windows():
    sizes = {"image_size": (32, 64), "window": (2, 1), "dim": (4, 6, 8), "depth": (0, 0, 2)}
    images = torch.randn(1, 3, 32, 64)
    changed = images.clone()
    changed[..., 48:] += 1  # the last column of windows
    for layers, affected in (((), [3]), ((1,), [0, 1, 2, 3])):
        backbone = ConvViTDetector(**sizes, heads=2, global_layers=layers)
        plain.randomize(backbone)
        before, after = backbone(images)[2], backbone(changed)[2]
        columns = (before != after).any(dim=(0, 1, 2)).nonzero().flatten().tolist()
        assert columns == affected


def plain_detector(detector: ConvViTDetector, images: Tensor) -> list[Tensor]:
    """The authors' detector with detectron2's padded windows, and tables resampled to the grid."""
    weights, x, levels = dict(detector.named_parameters()), images, []
    for stage in detector.stages:
        x = convolve_dense(x, stage, None)
        levels.append(x)
    x = detector.embed_proj(embed(x, detector.embed).movedim(1, -1))
    grid, side = tuple(x.shape[1:3]), detector.window[0]
    positions = interpolate_positions(detector.pos_embed[0], detector.grid, grid)
    x = x + positions.view(*grid, -1)
    table = detector.global_bias.table
    biases = {
        True: plain_bias(interpolate_relative_positions(table, detector.grid, grid), grid),
        False: plain_bias(detector.window_bias.table, detector.window),
    }
    for index in range(len(detector.blocks)):
        name, is_global = f"blocks.{index}", index in detector.global_layers
        y = plain.norm(x, weights, f"{name}.norm1")
        if is_global:
            y = biased_attention(y, weights, name, biases[True])
        else:
            y = F.pad(y, (0, 0, 0, -grid[1] % side, 0, -grid[0] % side))
            for top in range(0, y.shape[1], side):
                for left in range(0, y.shape[2], side):
                    here = slice(None), slice(top, top + side), slice(left, left + side)
                    y[here] = biased_attention(y[here], weights, name, biases[False])
        x = x + y[:, : grid[0], : grid[1]]
        hidden = plain.linear(plain.norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
        x = x + plain.linear(F.gelu(hidden), weights, f"{name}.mlp.fc2")
    coarsest = x.movedim(-1, 1)
    return [*levels, coarsest, F.max_pool2d(coarsest, 2)]


def plain_bias(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[heads, tokens, tokens]: the table's entry for every offset, found by coordinates."""
    (height, width), by_offset = grid, table.view(2 * grid[0] - 1, 2 * grid[1] - 1, -1)
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    rows, columns = y[:, None] - y + height - 1, x[:, None] - x + width - 1
    return by_offset[rows, columns].movedim(-1, 0)


def biased_attention(x: Tensor, weights: dict[str, Tensor], name: str, bias: Tensor) -> Tensor:
    """Attention of [batch, height, width, dim], head by head."""
    tokens = x.flatten(1, 2)
    parts = plain.linear(tokens, weights, f"{name}.attn.qkv").chunk(3, dim=-1)
    attended = []
    for head, (q, k, v) in enumerate(zip(*(p.chunk(HEADS, dim=-1) for p in parts), strict=True)):
        attended.append((q @ k.mT / q.shape[-1] ** 0.5 + bias[head]).softmax(dim=-1) @ v)
    return plain.linear(torch.cat(attended, dim=-1), weights, f"{name}.attn.proj").view(x.shape)


@pytest.mark.parametrize(
    ("built", "window", "size"),
    [
        (64, 2, (64, 64)),
        (64, 3, (64, 64)),
        (64, 3, (80, 112)),
        (64, 3, (32, 256)),
        pytest.param(1024, 16, (800, 1088), marks=pytest.mark.full),
        pytest.param(1024, 16, (832, 1344), marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_the_detector_at_any_size_equals_its_plain_definition(built, window, size):
    sizes = {"dim": (4, 6, 8), "depth": (1, 1, 3), "heads": HEADS, "mlp_ratio": (2.0, 2.0, 2.0)}
    detector = ConvViTDetector(image_size=built, window=window, global_layers=(1,), **sizes)
    plain.randomize(detector)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    levels = detector(images)
    for ours, expected in zip(levels, plain_detector(detector, images), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_drop_path_of_the_detector_draws_for_each_window_as_in_the_authors_code():
    sizes = {"dim": (4, 6, 8), "depth": (0, 0, 1), "heads": 2}
    detector = ConvViTDetector(image_size=64, window=2, global_layers=(), **sizes)
    plain.randomize(detector)
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    detector.blocks[0].drop_path.rate = 0.5
    detector.train()
    torch.manual_seed(0)
    ours = detector(images)[2]
    torch.manual_seed(0)
    expected = detector_by_windows(detector, images)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    detector.eval()
    assert not torch.allclose(ours, detector(images)[2])


def detector_by_windows(detector: ConvViTDetector, images: Tensor) -> Tensor:
    """The authors' order: to windows, the whole block on each window, back."""
    x = images
    for stage in detector.stages:
        x = convolve_dense(x, stage, None)
    x = detector.embed_proj(embed(x, detector.embed).movedim(1, -1))
    x = x + detector.pos_embed.view(1, 4, 4, -1)
    x = x.view(8, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
    for block in detector.blocks:
        x = block(x, attn_bias=detector.window_bias())
    x = x.view(8, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(8, 4, 4, 8)
    return x.movedim(-1, 1)


ENCODER = make_encoder()
IMAGES = make_images(ENCODER)

NARROW = {"dim": (4, 6, 8), "heads": 2}


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ENCODER(IMAGES[..., :10]), r"size \(24, 16\); got \(2, 2, 24, 10\)"),
        (lambda: ENCODER(IMAGES[:, :1]), r"2 channels.*\(2, 1, 24, 16\)"),
        (lambda: ENCODER(IMAGES, make_mask(ENCODER, batch=3)), "3 samples.* has 2"),
        (
            lambda: ENCODER(IMAGES, masking.uniform(masking.key(range(2), seed=0), (4, 2), 0.5)),
            r"\(4, 2\).*\(2, 4\)",
        ),
        (lambda: ConvViT(image_size=100), r"\(100, 100\).*strides.*\(16, 16\).*\(96, 96\)"),
        (lambda: ConvViT(image_size=(64,)), r"height and width.*\(64,\)"),
        (lambda: ConvViT(dim=(64, 128)), r"dim must have.*3 stages; got \(64, 128\)"),
        (lambda: ConvViT(depth=(2, 2, 4, 2)), r"depth must have.*3 stages; got \(2, 2, 4, 2\)"),
        (lambda: ConvViT(mlp_ratio=4), "mlp_ratio must have.*3 stages; got 4"),
        (lambda: ConvViT(patch_sizes=(4, 4)), r"patch_sizes must have.*3 stages; got \(4, 4\)"),
        (lambda: ConvViT(kernel_size=4), "odd.*got 4"),
        (lambda: ConvViT(heads=7), "dim=768.*heads=7"),
        (lambda: ConvViT(pool="max"), "'max'"),
        (
            lambda: ConvViTDetector(**NARROW, image_size=64, global_layers=())(
                torch.rand(1, 3, 16, 64)
            ),
            r"at least \(32, 32\) pixels.*\(1, 3, 16, 64\)",
        ),
        (
            lambda: ConvViTDetector(**NARROW, image_size=64, global_layers=())(
                torch.rand(1, 3, 40, 64)
            ),
            r"image size \(40, 64\) is not divisible by patch size \(16, 16\)",
        ),
        (
            lambda: ConvViTDetector(**NARROW, image_size=64, depth=(1, 1, 2)),
            r"\[0, 2\).*\(0, 3, 6, 10\)",
        ),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@torch.no_grad()
def test_an_empty_batch_gives_empty_tokens():
    encoder = make_encoder()
    mask = masking.uniform(masking.key([], seed=0), encoder.grid, 0.75)
    assert encoder(make_images(encoder, batch=0), mask).shape == (0, 2, 8)
