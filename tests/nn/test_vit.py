"""`ViT`: encoding of visible patches, golden vectors, initialisation, gradients, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimkit import masking
from mimkit.interop import from_official
from mimkit.masking import Mask
from mimkit.nn import ConvStem, PatchEmbed, ViT
from mimkit.patches import gather_visible, sincos_positions
from tests.golden_files import golden
from tests.nn import plain
from tests.strategies import generators, masked_images, masks

SHAPES = {
    "square": {"image_size": 16, "patch_size": 4},
    "rectangle": {"image_size": (8, 20), "patch_size": (4, 5)},
    "one axis": {"image_size": (24,), "patch_size": 4},
    "three axes": {"image_size": (4, 8, 6), "patch_size": (2, 4, 3)},
}
HEADS, DEPTH, CHANNELS = 3, 2, 2


def make_encoder(shape: str = "rectangle", **options: object) -> ViT:
    """A small encoder with random weights, norms and biases included."""
    sizes = SHAPES[shape] | {"in_channels": CHANNELS, "dim": 12, "depth": DEPTH, "heads": HEADS}
    encoder = ViT(**(sizes | options))
    plain.randomize(encoder)
    return encoder


def make_images(encoder: ViT, batch: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, CHANNELS, *encoder.image_size, generator=generator)


def make_mask(encoder: ViT, batch: int = 3, seed: int = 0) -> Mask:
    return masking.uniform(masking.key(range(batch), seed=seed), encoder.grid, 0.6)


def encode_then_drop(
    encoder: ViT, images: Tensor, mask: Mask | None, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """The authors' way: embed all patches, then keep the visible ones."""
    weights = encoder.state_dict() if weights is None else weights
    positions, prefix = weights["pos_embed"], encoder.num_prefix_tokens
    tokens = plain.embed_patches(images, weights) + positions[:, prefix:]
    if mask is not None:
        tokens = torch.stack(
            [row[~hidden.flatten()] for row, hidden in zip(tokens, mask.is_masked, strict=True)]
        )
    if prefix:
        token = (weights["cls_token"] + positions[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([token, tokens], dim=1)
    for number in range(DEPTH):
        tokens = plain.block(tokens, weights, f"blocks.{number}", HEADS)
    return plain.norm(tokens, weights, "norm")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("class_token", [True, False])
@torch.no_grad()
def test_visible_patches_are_encoded_as_the_authors_encode_them(shape, class_token):
    encoder = make_encoder(shape, class_token=class_token)
    images, mask = make_images(encoder), make_mask(encoder)
    assert encoder.num_prefix_tokens == class_token
    for mask_or_none in (mask, None):
        encoded = encoder(images, mask_or_none)
        expected = encode_then_drop(encoder, images, mask_or_none)
        torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)


@given(masks(grid=(2, 4), batch_size=2))
@torch.no_grad()
def test_any_count_of_visible_patches_is_encoded(mask):
    encoder = make_encoder()
    images = make_images(encoder, batch=2)
    encoded = encoder(images, mask)
    assert encoded.shape == (2, 1 + mask.num_visible, 12)
    expected = encode_then_drop(encoder, images, mask)
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_mask_that_hides_nothing_changes_nothing():
    encoder = make_encoder()
    images = make_images(encoder)
    all_visible = Mask.from_bool(torch.zeros(3, *encoder.grid, dtype=torch.bool))
    torch.testing.assert_close(encoder(images, all_visible), encoder(images))


GOLDEN = golden("mae_finetune_vit_A")
MODES = {"global_pool": {"pool": "mean", "pool_norm": True}, "cls": {"pool": "token"}}


def golden_encoder(mode: str) -> ViT:
    config = GOLDEN.config
    return ViT(
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        dim=config["embed_dim"],
        depth=config["depth"],
        heads=config["num_heads"],
        num_classes=config["num_classes"],
        **MODES[mode],
    )


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_features_and_logits_equal_those_of_the_fine_tuned_encoder(mode):
    encoder = golden_encoder(mode)
    converted = from_official("mae_vit", GOLDEN.tensors(f"{mode}/param/"))
    assert converted.dropped == ()
    encoder.load_state_dict(converted)
    features = encoder.pool(encoder(GOLDEN.tensor("in/imgs")))
    expected = GOLDEN.tensor(f"{mode}/features")
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=2e-5)
    logits = GOLDEN.tensor(f"{mode}/logits")
    torch.testing.assert_close(encoder.head(features), logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_have_timms_names_and_shapes(mode):
    theirs = GOLDEN.tensors(f"{mode}/param/")
    ours = golden_encoder(mode).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize("pool_norm", [True, False])
def test_every_norm_has_maes_epsilon(pool_norm):
    encoder = make_encoder(pool_norm=pool_norm)
    norms = [module for module in encoder.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 2 * DEPTH + 1
    assert {module.eps for module in norms} == {1e-6}


@torch.no_grad()
def test_pooling_leaves_out_the_class_token():
    images = torch.randn(3, CHANNELS, 8, 20)
    for options in ({}, {"class_token": False}, {"pool_norm": True}):
        encoder = make_encoder(**options)
        tokens = encoder(images, make_mask(encoder))
        mean = tokens[:, encoder.num_prefix_tokens :].mean(dim=1)
        if "pool_norm" in options:
            mean = plain.norm(mean, encoder.state_dict(), "fc_norm")
        torch.testing.assert_close(encoder.pool(tokens), mean, rtol=1e-4, atol=1e-5)
    encoder = make_encoder(pool="token")
    tokens = encoder(images)
    assert torch.equal(encoder.pool(tokens), tokens[:, 0])


@pytest.mark.parametrize("shape", SHAPES)
def test_position_embeddings_are_a_zero_row_and_the_sincos_table(shape):
    encoder = ViT(**SHAPES[shape], dim=12, depth=1, heads=2)
    table = torch.cat([torch.zeros(1, 12), sincos_positions(12, encoder.grid)])
    assert torch.equal(encoder.pos_embed[0], table)
    assert not encoder.pos_embed.requires_grad
    assert ViT(
        **SHAPES[shape], dim=12, depth=1, heads=2, learn_positions=True
    ).pos_embed.requires_grad


@given(masks(grid=(2, 4), batch_size=3), generators(), st.booleans())
@torch.no_grad()
def test_hidden_pixels_do_not_change_the_output(mask, generator, poison):
    encoder = make_encoder()
    images = make_images(encoder)
    hidden = mask.refine((4, 5)).is_masked.unsqueeze(1)
    noise = torch.randn(images.shape, generator=generator)
    other = (
        images.masked_fill(hidden, float("nan")) if poison else torch.where(hidden, noise, images)
    )
    assert torch.equal(encoder(other, mask), encoder(images, mask))


@given(masks(grid=(2, 4), batch_size=3), st.integers(0, 2), generators())
@torch.no_grad()
def test_other_samples_do_not_change_the_output(mask, row, generator):
    encoder = make_encoder()
    images = make_images(encoder)
    others = torch.arange(3) != row
    changed = images.clone()
    changed[others] = torch.randn(images[others].shape, generator=generator)
    assert torch.equal(encoder(changed, mask)[row], encoder(images, mask)[row])


@torch.no_grad()
def test_permuting_the_batch_permutes_the_latents():
    encoder = make_encoder()
    images, mask, order = make_images(encoder), make_mask(encoder), [2, 0, 1]
    torch.testing.assert_close(
        encoder(images[order], mask[order]), encoder(images, mask)[order], rtol=1e-5, atol=1e-6
    )


def test_hidden_pixels_have_no_gradient():
    encoder = make_encoder()
    images, mask = make_images(encoder).requires_grad_(), make_mask(encoder)
    encoder(images, mask).square().sum().backward()
    hidden = mask.refine((4, 5)).is_masked.unsqueeze(1).expand_as(images)
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].ne(0).all()


@pytest.mark.parametrize("class_token", [True, False])
def test_every_trained_parameter_has_a_gradient(class_token):
    encoder = make_encoder(class_token=class_token, learn_positions=True)
    encoder(make_images(encoder), make_mask(encoder)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def gradients(encoder: ViT, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))


def test_gradients_equal_those_of_the_authors_way():
    encoder = make_encoder()
    images, mask = make_images(encoder).double(), make_mask(encoder)
    encoder.double()
    ours = gradients(encoder, encoder(images, mask).pow(3).sum())
    weights = dict(encoder.named_parameters())
    theirs = gradients(encoder, encode_then_drop(encoder, images, mask, weights).pow(3).sum())
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=name)


def test_activation_checkpointing_gives_the_same_gradients():
    encoder = make_encoder(drop_path=0.5).train()
    images, mask = make_images(encoder), make_mask(encoder)

    def loss(recompute: bool) -> Tensor:
        torch.manual_seed(0)
        if recompute:
            return checkpoint(encoder, images, mask, use_reentrant=False).square().sum()
        return encoder(images, mask).square().sum()

    expected, recomputed = gradients(encoder, loss(False)), gradients(encoder, loss(True))
    for name, grad in expected.items():
        assert torch.equal(grad, recomputed[name]), name


@pytest.mark.full
@pytest.mark.untyped
def test_the_encoder_compiles_into_one_graph():
    torch._dynamo.reset()
    encoder = make_encoder(depth=1)
    images, mask = make_images(encoder), make_mask(encoder)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, mask), encoder(images, mask))
    ours = gradients(encoder, compiled(images, mask).square().sum())
    for name, expected in gradients(encoder, encoder(images, mask).square().sum()).items():
        torch.testing.assert_close(ours[name], expected)


def test_autocast_to_bfloat16_stays_close_to_float32():
    encoder = make_encoder("square", dim=48, heads=4)
    images, mask = make_images(encoder), make_mask(encoder)
    expected = encoder(images, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = encoder(images, mask)
    assert (encoded.float() - expected).abs().max() < 0.1
    assert not torch.equal(encoded.float(), expected)
    for grad in gradients(encoder, encoded.float().square().mean()).values():
        assert grad.dtype == torch.float32
        assert grad.isfinite().all()


@torch.no_grad()
def test_a_bfloat16_encoder_encodes_in_bfloat16():
    encoder = make_encoder("square", dim=48, heads=4)
    images, mask = make_images(encoder), make_mask(encoder)
    expected = encoder(images, mask)
    encoded = encoder.bfloat16()(images.bfloat16(), mask)
    assert encoded.dtype == torch.bfloat16
    assert (encoded.float() - expected).abs().max() < 0.2


@torch.no_grad()
def test_patch_embed_equals_timms_convolution():
    embed = PatchEmbed(patch_size=(4, 2), in_channels=3, dim=5)
    images = torch.randn(2, 3, 8, 6)
    weights = {f"patch_embed.{name}": value for name, value in embed.state_dict().items()}
    expected = plain.embed_patches(images, weights)
    torch.testing.assert_close(embed(images), expected)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    torch.testing.assert_close(embed(images, mask), gather_visible(expected, mask))


@torch.no_grad()
@given(drawn=masked_images(dtype=torch.uint8))
def test_patch_embed_normalises_bytes_bit_for_bit_and_leaves_floats(drawn):
    images, mask, patch = drawn
    channels = images.shape[1]
    embed = PatchEmbed(patch_size=patch, in_channels=channels, dim=5)
    mean, std = torch.rand(channels).tolist(), (torch.rand(channels) + 0.1).tolist()
    column = (-1, *[1] * len(patch))
    fractions = images / 255
    inputs = (fractions - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    before = [embed(each, mask) for each in (fractions, inputs)]
    assert torch.equal(embed(images, mask), before[0])
    embed.normalize_bytes(mean, std)
    assert torch.equal(embed(images, mask), before[1])
    assert torch.equal(embed(images), embed(inputs))
    assert torch.equal(embed(inputs, mask), before[1])
    assert embed.state_dict().keys() == {"proj.weight", "proj.bias"}


@torch.no_grad()
def test_bytes_of_any_sizes_are_normalised_but_not_together_with_floats():
    embed = PatchEmbed(patch_size=4, in_channels=3, dim=5)
    embed.normalize_bytes([0.5] * 3, [0.25] * 3)
    sides = [(8, 12), (16, 4)]
    images = [torch.randint(256, (3, *side), dtype=torch.uint8) for side in sides]
    inputs = [(image / 255 - 0.5) / 0.25 for image in images]
    key = masking.key([0, 1], seed=0)
    mask = masking.ragged(masking.uniform, key, [(2, 3), (4, 1)], 0.5)
    assert torch.equal(embed(images, mask), embed(inputs, mask))
    with pytest.raises(TypeError, match=r"must all be uint8, or none of them; got torch.float32"):
        embed([inputs[0], images[1]], mask)


@torch.no_grad()
def test_a_stem_gets_normalised_bytes_with_nothing_at_masked_positions():
    stem = ConvStem(in_channels=2, channels=(4,))
    encoder = ViT(image_size=16, patch_size=2, in_channels=2, dim=12, depth=1, heads=2, stem=stem)
    encoder.patch_embed.normalize_bytes([0.5, 0.25], [0.25, 0.5])
    images = torch.randint(256, (2, 2, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([[0.5, 0.25], [0.25, 0.5]]).view(2, 2, 1, 1)
    mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.5)
    assert torch.equal(encoder(images, mask), encoder((images / 255 - mean) / std, mask))


@pytest.mark.parametrize("masked", [False, True])
def test_statistics_of_another_number_of_channels_are_named(masked):
    embed = PatchEmbed(patch_size=4, in_channels=3, dim=5)
    embed.normalize_bytes([0.5], [0.25])
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), 0.5) if masked else None
    with pytest.raises(ValueError, match="mean must hold one value for each of 3 channels"):
        embed(images, mask)


def test_initialisation_equals_maes():
    """Xavier-uniform matrices (the patch projection as one matrix) and zero biases."""
    torch.manual_seed(0)
    encoder = ViT(image_size=32, patch_size=8, dim=96, depth=1, heads=4, num_classes=10)
    block = encoder.blocks[0]
    for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2, encoder.head):
        assert not layer.bias.any()
    matrices = [layer.weight for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1)]
    for matrix in [*matrices, encoder.patch_embed.proj.weight.flatten(1)]:
        bound = (6 / sum(matrix.shape)) ** 0.5
        assert 0.95 * bound < matrix.abs().max() <= bound
        assert matrix.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert 0.01 < encoder.cls_token.std() < 0.03


ENCODER = make_encoder()
IMAGES = make_images(ENCODER)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ENCODER(IMAGES[..., :10]), r"size \(8, 20\); got \(3, 2, 8, 10\)"),
        (lambda: ENCODER(IMAGES[:, :1]), r"2 channels.*\(3, 1, 8, 20\)"),
        (lambda: ENCODER(IMAGES, make_mask(ENCODER, batch=2)), "2 samples.* has 3"),
        (
            lambda: ENCODER(IMAGES, masking.uniform(masking.key(range(3), seed=0), (4, 2), 0.5)),
            r"\(4, 2\).*\(2, 4\)",
        ),
        (lambda: ViT(image_size=10, patch_size=4), r"\(10, 10\).*\(4, 4\)"),
        (lambda: ViT(image_size=(8, 8), patch_size=(4, 4, 4)), r"\(4, 4, 4\)"),
        (lambda: ViT(image_size=8, patch_size=4, dim=12, heads=5), "dim=12.*heads=5"),
        (lambda: ViT(image_size=8, patch_size=4, dim=10, heads=2), "multiple of 4.*got 10"),
        (lambda: ViT(image_size=8, patch_size=4, pool="max"), "'max'"),
        (lambda: ViT(image_size=8, patch_size=4, pool="token", class_token=False), "class_token"),
        (lambda: ViT(image_size=8, patch_size=4, dim=8, heads=2, drop_path=1.0), "got 1.0"),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_empty_batch_gives_empty_tokens_and_zero_gradients():
    encoder = ViT(image_size=16, patch_size=4, dim=16, depth=2, heads=2)
    mask = masking.uniform(masking.key([], seed=0), encoder.grid, 0.75)
    tokens = encoder(torch.empty(0, 3, 16, 16), mask)
    assert tokens.shape == (0, 5, 16)
    tokens.sum().backward()
    assert all((p.grad == 0).all() for p in encoder.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"num_registers": 2}])
def test_a_class_token_is_needed_to_pool_by_it(options):
    encoder = make_encoder(class_token=False, **options)
    with pytest.raises(ValueError, match="global_pool must be \"avg\", .*; got 'token'"):
        encoder.reset_classifier(3, "token")
    encoder = make_encoder(**options)
    encoder.reset_classifier(3, "token")
    assert torch.equal(encoder.pool(tokens := encoder(make_images(encoder))), tokens[:, 0])


def test_a_new_head_is_initialised_as_the_first_one():
    encoder = make_encoder().double()
    torch.manual_seed(0)
    encoder.reset_classifier(5)
    assert encoder.head.weight.dtype == torch.float64
    assert not encoder.head.bias.any()
    assert encoder.head.weight.abs().max() <= (6 / (12 + 5)) ** 0.5
    assert encoder.head.weight.abs().max() > 12**-0.5  # the bound of PyTorch's default
