"""ViT and MAE with a `RaggedMask`: different counts and image sizes in one batch."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mimkit import losses, masking
from mimkit.masking import Mask, RaggedMask
from mimkit.nn import ConvStem, ConvViT, CrossDecoder, MAEDecoder, SwinTransformer, ViT
from mimkit.nn import _layers as layers
from mimkit.nn._packing import pack
from mimkit.patches import interpolate_positions, neighbors, sincos_positions
from mimkit.targets import DownsampledPixels
from mimkit.testing import assert_no_leak, assert_samples_isolated
from recipes.engine.masks import join
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIM, SimMIMConfig
from tests.nn import plain
from tests.strategies import generators, ragged_masks

PATCH, CHANNELS, DIM, HEADS, WIDTH, DECODER_HEADS = (2, 3), 2, 8, 2, 12, 3
VALUES = CHANNELS * PATCH[0] * PATCH[1]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
# Losses are accumulated in float32.
CLOSE_LOSS = {"rtol": 1e-6, "atol": 1e-6}


def config(grid: tuple[int, int], **options: object) -> MAEConfig:
    size = (grid[0] * PATCH[0], grid[1] * PATCH[1])
    shape = {"dim": DIM, "depth": 2, "heads": HEADS, "decoder_dim": WIDTH, "decoder_depth": 2}
    shape |= {"patch_size": PATCH, "in_channels": CHANNELS, "decoder_heads": DECODER_HEADS}
    return MAEConfig(image_size=size, **(shape | options))


def make_model(grid: tuple[int, int] = (2, 3), **options: object) -> MAE:
    model = MAE(config(grid, **options)).double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain.randomize(nn.ParameterList(trained))
    return model


def on_grid(model: MAE, grid: tuple[int, int]) -> MAE:
    """Build the model for images of another size, with the same weights."""
    other = MAE(config(grid)).double()
    ours, tables = dict(model.named_parameters()), ("encoder.pos_embed", "decoder.pos_embed")
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name not in tables:
                parameter.copy_(ours[name])
    return other


def make_images(mask: RaggedMask, generator: torch.Generator) -> list[Tensor]:
    sizes = [[n * p for n, p in zip(grid, PATCH, strict=True)] for grid in mask.grids]
    return [
        torch.randn(CHANNELS, *size, generator=generator, dtype=torch.float64) for size in sizes
    ]


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    found = zip(named.items(), grads, strict=True)
    return {name: torch.zeros_like(p) if grad is None else grad for (name, p), grad in found}


def make_ragged(grids=((2, 3), (3, 3), (2, 3), (1, 4)), counts=(2, 5, 5, 3)) -> RaggedMask:
    key = masking.key(range(len(grids)), seed=0)
    return masking.ragged(masking.uniform, key, list(grids), num_masked=list(counts))


def check_against_each_sample_alone(mask: RaggedMask, generator: torch.Generator) -> None:
    """Compare latents, predictions, losses and gradients with one MAE call per image."""
    model, images = make_model(), make_images(mask, generator)
    output = model(images, mask)
    by_sample = losses.masked_pixel_loss(output.prediction, images, mask, PATCH, reduction="sample")
    latents = mask.split_visible(output.latent, num_prefix=1)
    predictions = mask.split_masked(output.prediction)
    mean = dict.fromkeys(gradients(output.loss, model), torch.tensor(0.0))
    for i, (one, image) in enumerate(zip(mask.unbind(), images, strict=True)):
        small = on_grid(model, mask.grids[i])
        alone = small(image[None], one)
        torch.testing.assert_close(latents[i], alone.latent[0], **CLOSE)
        torch.testing.assert_close(predictions[i], alone.prediction[0], **CLOSE)
        torch.testing.assert_close(by_sample[i], alone.loss, **CLOSE_LOSS)
        expected = gradients(alone.loss, small)
        for name, grad in gradients(by_sample[i], model).items():
            torch.testing.assert_close(grad, expected[name], **CLOSE_LOSS)
        mean = {name: grad + expected[name] / mask.batch_size for name, grad in mean.items()}
    for name, grad in gradients(output.loss, model).items():
        torch.testing.assert_close(grad, mean[name], **CLOSE_LOSS)


@settings(max_examples=12)
@given(ragged_masks(axes=2, max_tokens=12, min_visible=1), generators())
def test_a_batch_gives_the_same_results_as_each_sample_alone(mask, generator):
    check_against_each_sample_alone(mask, generator)


@pytest.mark.parametrize(
    "visible", [(1, 1, 1), (1, 4, 6), (6, 6, 1), (3, 3, 3), (0, 6, 2)], ids=str
)
def test_counts_of_zero_one_and_all_visible_patches_work(visible):
    mask = make_ragged([(2, 3)] * 3, [6 - count for count in visible])
    assert mask.num_visible == visible
    check_against_each_sample_alone(mask, torch.Generator().manual_seed(1))


def padded_block(
    tokens: Tensor, weights: dict[str, Tensor], name: str, heads: int, is_padding: Tensor
) -> Tensor:
    """A block with a key padding mask."""
    normal = plain.norm(tokens, weights, f"{name}.norm1")
    parts = plain.linear(normal, weights, f"{name}.attn.qkv").chunk(3, dim=-1)
    attended = []
    for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in parts), strict=True):
        logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(is_padding[:, None], -torch.inf)
        attended.append(logits.softmax(dim=-1) @ v)
    tokens = tokens + plain.linear(torch.cat(attended, dim=-1), weights, f"{name}.attn.proj")
    hidden = plain.linear(plain.norm(tokens, weights, f"{name}.norm2"), weights, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return tokens + plain.linear(hidden, weights, f"{name}.mlp.fc2")


def padded_mae(model: MAE, images: list[Tensor], mask: RaggedMask) -> tuple[Tensor, Tensor]:
    """Reference MAE from the weights: pad to the longest sample, decode in grid order."""
    weights = dict(model.named_parameters())
    encoder, decoder = (
        {name.removeprefix(part): w for name, w in weights.items() if name.startswith(part)}
        for part in ("encoder.", "decoder.")
    )
    rows, grids = [], mask.grids
    for image, one, grid in zip(images, mask.unbind(), grids, strict=True):
        tokens = plain.embed_patches(image[None], encoder)[0] + sincos_positions(DIM, grid)
        rows.append(torch.cat([encoder["cls_token"][0], tokens[one.visible_ids[0]]]))
    tokens, is_padding = pad(rows)
    for number in range(2):
        tokens = padded_block(tokens, encoder, f"blocks.{number}", HEADS, is_padding)
    latent = plain.norm(tokens, encoder, "norm")
    embedded = plain.linear(latent, decoder, "embed")
    rows = []
    for row, one, grid in zip(embedded, mask.unbind(), grids, strict=True):
        whole = decoder["mask_token"][0].expand(one.num_tokens, -1)
        whole = whole.index_copy(0, one.visible_ids[0], row[1 : 1 + one.num_visible])
        rows.append(torch.cat([row[:1], whole + sincos_positions(WIDTH, grid)]))
    tokens, is_padding = pad(rows)
    for number in range(2):
        tokens = padded_block(tokens, decoder, f"blocks.{number}", DECODER_HEADS, is_padding)
    prediction = plain.linear(plain.norm(tokens, decoder, "norm"), weights, "head")
    samples = zip(prediction, mask.unbind(), strict=True)
    masked = torch.cat([row[1 + one.masked_ids[0]] for row, one in samples])
    kept = zip(latent, mask.num_visible, strict=True)
    return masked, torch.cat([row[: 1 + count] for row, count in kept])


def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    tokens = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(tokens.shape[1]) >= lengths[:, None]


@settings(max_examples=12)
@given(ragged_masks(axes=2, max_tokens=12, min_visible=1), generators())
def test_packed_samples_give_the_same_results_as_padded_ones(mask, generator):
    model, images = make_model(), make_images(mask, generator)
    output = model(images, mask)
    prediction, latent = padded_mae(model, images, mask)
    torch.testing.assert_close(output.prediction, prediction, **CLOSE)
    torch.testing.assert_close(output.latent, latent, **CLOSE)
    loss = losses.masked_pixel_loss(prediction, images, mask, PATCH)
    torch.testing.assert_close(output.loss, loss, **CLOSE_LOSS)
    upstream = torch.randn(prediction.shape, generator=generator, dtype=torch.float64)
    expected = gradients((prediction * upstream).sum(), model)
    for name, grad in gradients((output.prediction * upstream).sum(), model).items():
        torch.testing.assert_close(grad, expected[name], **CLOSE)


def test_a_ragged_mask_of_equal_counts_gives_the_same_results_as_a_mask():
    mask = masking.uniform(masking.key(range(3), seed=0), (2, 3), 0.5)
    model, images = make_model(), torch.randn(3, CHANNELS, 4, 9, dtype=torch.float64)
    plain_output, packed = model(images, mask), model(images, RaggedMask.cat([mask]))
    torch.testing.assert_close(packed.loss, plain_output.loss, **CLOSE_LOSS)
    torch.testing.assert_close(packed.latent, plain_output.latent.flatten(0, 1), **CLOSE)
    torch.testing.assert_close(packed.prediction, plain_output.prediction.flatten(0, 1), **CLOSE)


def test_results_follow_the_order_of_samples():
    mask, model = make_ragged(), make_model()
    images = make_images(mask, torch.Generator().manual_seed(0))
    expected = mask.split_masked(model(images, mask).prediction)
    for order in itertools.permutations(range(4)):
        prediction = model([images[i] for i in order], mask[order]).prediction
        torch.testing.assert_close(prediction, torch.cat([expected[i] for i in order]), **CLOSE)


def encode_padded(encoder: ViT):
    """Adapt an encoder to the checkers: they pass booleans and expect one padded row per sample."""

    def encode(images: Tensor, is_masked: Tensor) -> Tensor:
        mask = RaggedMask.from_bool(is_masked)
        rows = mask.split_visible(encoder(images, mask), num_prefix=encoder.num_prefix_tokens)
        return pad_sequence(list(rows), batch_first=True)

    return encode


def test_samples_are_isolated_and_hidden_pixels_do_not_leak_bit_for_bit():
    is_masked = torch.stack(make_ragged([(2, 3)] * 4, [2, 5, 5, 0]).is_masked)
    model = make_model().float()
    images = torch.randn(4, CHANNELS, 4, 9)
    assert_samples_isolated(encode_padded(model.encoder), images, is_masked)
    assert_no_leak(encode_padded(model.encoder), images, is_masked)

    def decode(images: Tensor, is_masked: Tensor) -> Tensor:
        mask = RaggedMask.from_bool(is_masked)
        rows = mask.split_masked(model(images, mask).prediction)
        return pad_sequence(list(rows), batch_first=True)

    assert_samples_isolated(decode, images, is_masked)


def test_attention_across_samples_is_caught(monkeypatch):
    def attend_across(query, key, value, packing):
        return layers.merge_heads(layers.attend(query, key, value))

    is_masked = torch.stack(make_ragged([(2, 3)] * 4, [2, 5, 5, 0]).is_masked)
    encoder, images = make_model().float().encoder, torch.randn(4, CHANNELS, 4, 9)
    monkeypatch.setattr(layers, "attend_packed", attend_across)
    with pytest.raises(AssertionError, match="sample 0 reaches sample 1"):
        assert_samples_isolated(encode_padded(encoder), images, is_masked)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5), generators()
)
def test_packed_attention_equals_attention_of_each_sample(sizes, generator):
    sizes = [(length, min(queries, length)) for length, queries in sizes]
    lengths, num_queries = zip(*sizes, strict=True)
    packing = pack(lengths, torch.device("cpu"), num_queries=num_queries)
    parts = [
        torch.randn(1, 2, sum(rows), 8, generator=generator, dtype=torch.float64).requires_grad_()
        for rows in (num_queries, lengths, lengths)
    ]
    query, key, value = parts
    samples = zip(
        query.split(num_queries, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
    )
    expected = torch.cat([layers.merge_heads(layers.attend(*sample)) for sample in samples], dim=1)
    upstream = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, parts, upstream)
    functions = [layers.attend_packed]
    if min(num_queries) > 0:  # the GPU path, on the CPU here
        functions.append(layers._attend_nested)
    for function in functions:
        attended = function(*parts, packing)
        torch.testing.assert_close(attended, expected)
        grads = torch.autograd.grad(attended, parts, upstream)
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_same_results_as_a_cpu():
    model, mask = make_model(dim=32, decoder_dim=48).float(), make_ragged()
    images = [image.float() for image in make_images(mask, torch.Generator().manual_seed(0))]
    expected = model(images, mask)
    expected_grads = gradients(expected.loss, model)
    model.cuda()
    output = model([image.cuda() for image in images], mask.to("cuda"))
    for name in ("loss", "prediction", "latent"):
        found = getattr(output, name).cpu()
        torch.testing.assert_close(found, getattr(expected, name), rtol=1e-3, atol=1e-3)
    grads = {name: grad.cpu() for name, grad in gradients(output.loss, model).items()}
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)


def test_samples_of_equal_length_share_an_attention_call_without_padding(monkeypatch):
    calls, attend = [], layers.attend

    def count(query, key, value, bias=None):
        calls.append((query.shape[0], query.shape[2], key.shape[2]))
        return attend(query, key, value, bias)

    monkeypatch.setattr(layers, "attend", count)
    mask = make_ragged([(2, 3)] * 4, [2, 4, 2, 4])
    make_model()(make_images(mask, torch.Generator().manual_seed(0)), mask)
    encoder_block, middle = [(2, 3, 3), (2, 5, 5)], [(4, 7, 7)]
    assert calls == [*encoder_block * 2, *middle, (2, 4, 7), (2, 2, 7)]


def test_drop_path_drops_whole_samples():
    torch.manual_seed(0)
    packing = pack((3, 5, 2) * 20, torch.device("cpu"))
    drop = layers.DropPath(0.4).train()
    kept = drop(torch.ones(1, sum(packing.lengths), 4), packing)
    by_sample = kept[0].split(packing.lengths)
    assert all(len(rows.unique()) == 1 for rows in by_sample)
    factors = torch.stack([rows[0, 0] for rows in by_sample])
    assert set(factors.unique().tolist()) == {0.0, factors.max().item()}
    assert factors.max().item() == pytest.approx(1 / 0.6)
    block = layers.TransformerBlock(dim=4, heads=1, drop_path=0.999999).train()
    tokens = torch.randn(1, sum(packing.lengths), 4)
    assert torch.equal(block(tokens, packing=packing), tokens)


def test_other_grids_use_a_sincos_table_or_interpolate_the_learned_one():
    mask = make_ragged([(2, 3), (3, 4)], [0, 0])
    options = {"image_size": (4, 9), "patch_size": PATCH, "in_channels": CHANNELS, "depth": 0}
    options |= {"dim": DIM, "heads": HEADS, "class_token": False, "pool_norm": True}
    images = [torch.zeros(CHANNELS, 4, 9), torch.zeros(CHANNELS, 6, 12)]
    fixed = ViT(**options, first_axis="row")
    nn.init.zeros_(fixed.patch_embed.proj.bias)
    own, other = mask.split_visible(fixed(images, mask))
    torch.testing.assert_close(own, fixed.pos_embed[0])
    torch.testing.assert_close(other, sincos_positions(DIM, (3, 4), first_axis="row"))
    learned = ViT(**options, learn_positions=True)
    nn.init.zeros_(learned.patch_embed.proj.bias)
    nn.init.normal_(learned.pos_embed)
    own, other = mask.split_visible(learned(images, mask))
    torch.testing.assert_close(own, learned.pos_embed[0])
    expected = interpolate_positions(learned.pos_embed[0], (2, 3), (3, 4))
    torch.testing.assert_close(other, expected)
    (grad,) = torch.autograd.grad(other.sum(), learned.pos_embed)
    assert grad.abs().min() > 0


@pytest.mark.parametrize("pool", ["mean", "token"])
def test_pooling_works_sample_by_sample(pool):
    mask = make_ragged()
    options = {"image_size": (4, 9), "patch_size": PATCH, "in_channels": CHANNELS, "depth": 1}
    encoder = ViT(**options, dim=DIM, heads=HEADS, pool=pool).double()
    tokens = encoder(make_images(mask, torch.Generator().manual_seed(0)), mask)
    pooled = encoder.pool(tokens, mask)
    rows = mask.split_visible(tokens, num_prefix=1)
    torch.testing.assert_close(pooled, torch.cat([encoder.pool(row[None]) for row in rows]))
    assert pooled.shape == (4, DIM)
    assert torch.equal(encoder.forward_head(tokens, mask=mask), pooled)
    assert torch.equal(
        encoder.forward_features(make_images(mask, torch.Generator().manual_seed(0)), mask), tokens
    )
    for wrong in (lambda: encoder.pool(tokens), lambda: encoder.forward_head(tokens)):
        with pytest.raises(ValueError, match=r"are pooled with their mask.*and no mask"):
            wrong()
    with pytest.raises(ValueError, match="and a RaggedMask"):
        encoder.pool(tokens.new_zeros(4, 3, DIM), mask)


@pytest.mark.untyped
def test_blocks_outputs_of_packed_tokens_are_refused():
    mask = make_ragged()
    encoder = ViT(image_size=(4, 9), patch_size=PATCH, in_channels=CHANNELS, dim=DIM, heads=HEADS)
    with pytest.raises(TypeError, match="forward_intermediates needs a Mask; got a RaggedMask"):
        encoder.forward_intermediates(torch.zeros(9, DIM), mask=mask, output_fmt="NLC")


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_axes_work(axes):
    grids = {1: [(5,), (3,)], 3: [(2, 1, 3), (1, 2, 2)]}[axes]
    mask = make_ragged(grids, [2, 2])
    dim = 12
    encoder = ViT(
        image_size=tuple(2 * n for n in grids[0]), patch_size=2, dim=dim, depth=1, heads=2,
        in_channels=CHANNELS,
    )  # fmt: skip
    decoder = MAEDecoder(grid=encoder.grid, in_dim=dim, dim=dim, depth=1, heads=2)
    images = [torch.randn(CHANNELS, *[2 * n for n in grid]) for grid in grids]
    assert decoder(encoder(images, mask), mask).shape == (4, dim)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_decoder_of_any_depth_returns_the_masked_tokens(depth):
    mask = make_ragged([(2, 3)] * 2, [2, 5])
    decoder = MAEDecoder(grid=(2, 3), in_dim=DIM, dim=WIDTH, depth=depth, heads=DECODER_HEADS)
    plain.randomize(decoder)
    latent = torch.randn(sum(mask.num_visible) + 2, DIM)
    decoded = mask.split_masked(decoder(latent, mask))
    for rows, one, ours in zip(
        mask.split_visible(latent, num_prefix=1), mask.unbind(), decoded, strict=True
    ):
        torch.testing.assert_close(ours, decoder(rows[None], one)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.untyped
def test_mae_compiles_into_one_graph():
    torch.compiler.reset()
    mask = make_ragged([(2, 3), (3, 3)], [2, 5])
    model = make_model(depth=1, decoder_depth=1).float()
    images = [image.float() for image in make_images(mask, torch.Generator().manual_seed(0))]
    compiled = torch.compile(
        lambda images, mask: model(images, mask).loss, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(images, mask), model(images, mask).loss)


def test_autocast_is_followed():
    mask, model = make_ragged(), make_model().float()
    images = [image.float() for image in make_images(mask, torch.Generator().manual_seed(0))]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, mask)
    expected = model(images, mask)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected.loss, rtol=5e-2, atol=5e-2)


def train_one_share(rank: int, folder: str) -> None:
    """Run one of two DDP processes on half of the samples."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    grads = averaged_gradients(torch.arange(4).view(2, 2)[rank])
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()


def averaged_gradients(share: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, mask = make_model(), make_ragged()
    images = make_images(mask, torch.Generator().manual_seed(0))
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel([images[i] for i in share.tolist()], mask[share]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.full
def test_two_processes_give_the_gradients_of_one(tmp_path):
    start = torch.multiprocessing.spawn
    processes = start(train_one_share, (str(tmp_path),), nprocs=2, join=False, daemon=True)
    assert any(processes.join(timeout=60) for _ in range(4)), "a process hangs"
    torch.manual_seed(0)
    model, mask = make_model(), make_ragged()
    images = make_images(mask, torch.Generator().manual_seed(0))
    expected = gradients(model(images, mask).loss, model)
    found = torch.load(tmp_path / "grads.pt")
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, **CLOSE_LOSS)


# Encoders that take a mask token, on a grid of 2 x 4 patches of 4 x 4 pixels.
WITH_TOKEN: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViT(**SMALL),
    "relative positions": lambda: ViT(
        **SMALL, relative_positions="shared", absolute_positions=False
    ),
    "windows": lambda: ViT(**SMALL, class_token=False, window=2),
    "swin": lambda: SwinTransformer(
        image_size=(8, 16), patch_size=4, in_channels=2, dim=8, depth=(2,), heads=(2,), window=2
    ),
}
SMALL: dict[str, Any] = {
    "image_size": (8, 16), "patch_size": 4, "in_channels": 2, "dim": 8, "depth": 2, "heads": 2
}  # fmt: skip
# Some, none and all of the patches are masked.
COUNTS = st.lists(st.sampled_from([0, 1, 5, 8]), min_size=1, max_size=4)


def draw_counts(counts: list[int]) -> RaggedMask:
    key = masking.key(range(len(counts)), seed=0)
    return masking.ragged(masking.uniform, key, (2, 4), num_masked=counts)


@pytest.mark.parametrize("name", WITH_TOKEN)
@settings(max_examples=6)
@given(counts=COUNTS, generator=generators())
def test_mask_tokens_under_different_counts_give_what_each_sample_gives_alone(
    name, counts, generator
):
    torch.manual_seed(0)
    model, mask = WITH_TOKEN[name]().double(), draw_counts(counts)
    plain.randomize(model)
    images = torch.randn(len(counts), 2, 8, 16, generator=generator).double()
    token = torch.randn(8, generator=generator).double()
    hidden = torch.stack([one.refine(4).is_masked for one in mask.unbind()])
    poisoned = images.masked_fill(hidden, torch.nan)
    found = model(poisoned, mask, mask_token=token)
    for row, one in enumerate(mask.unbind()):
        expected = model(images[row : row + 1], one, mask_token=token)
        torch.testing.assert_close(found[row : row + 1], expected)
    per_patch = token.expand(sum(mask.num_masked), -1)
    torch.testing.assert_close(model(images, mask, mask_token=per_patch), found)


@pytest.mark.parametrize("encoder", ["vit", "swin"])
@settings(max_examples=6)
@given(counts=COUNTS, generator=generators())
def test_simmim_under_different_counts_gives_what_each_sample_gives_alone(
    encoder, counts, generator
):
    torch.manual_seed(0)
    shape = {"depth": (2,), "heads": (2,), "window": 2} if encoder == "swin" else {}
    model = SimMIM(SimMIMConfig(encoder=encoder, **(SMALL | shape))).double()
    mask = draw_counts(counts)
    images = torch.randn(len(counts), 2, 8, 16, generator=generator).double()
    output = model(images, mask)
    alone = [model(images[i : i + 1], one) for i, one in enumerate(mask.unbind())]
    torch.testing.assert_close(output.loss, torch.stack([one.loss for one in alone]).mean())
    rows = torch.cat([one.prediction[0] for one in alone])
    torch.testing.assert_close(output.prediction, rows)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(output.loss, weights, allow_unused=True)
    mean = torch.stack([one.loss for one in alone]).mean()
    expected = torch.autograd.grad(mean, weights, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if one is None else one.sum(), zero if other is None else other.sum(),
            check_dtype=False,
        )  # fmt: skip


def test_simmim_under_different_counts_needs_pixels():
    model = SimMIM(SimMIMConfig(encoder="vit", **SMALL, target="hog"))
    with pytest.raises(ValueError, match="RaggedMask needs target=\"pixels\"; got 'hog'"):
        model(torch.zeros(1, 2, 8, 16), draw_counts([1]))


class TestErrors:
    mask = make_ragged()
    images = make_images(mask, torch.Generator().manual_seed(0))
    even = Mask.from_bool(torch.ones(4, 2, 3).bool())

    @pytest.mark.untyped
    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda s: s.encoder()(s.images, s.even), TypeError, "needs a RaggedMask"),
            (lambda s: s.encoder()(s.images), TypeError, "needs a RaggedMask"),
            (lambda s: s.encoder()(s.images[:3], s.mask), ValueError, "4 samples.*3 images"),
            (lambda s: s.encoder()(s.images[::-1], s.mask), ValueError, "grid"),
            (
                lambda s: s.encoder()([image[:1] for image in s.images], s.mask),
                ValueError,
                r"2 channels.*\(1, 1, ",
            ),
            (
                lambda s: s.encoder()(s.images, s.mask, mask_token=torch.zeros(DIM)),
                TypeError,
                "images of one size",
            ),
            (
                lambda s: s.encoder()(
                    torch.zeros(4, 2, 4, 9).double(), s.mask, mask_token=torch.zeros(DIM).double()
                ),
                ValueError,
                "grid",
            ),
            (
                lambda s: s.encoder(relative_positions="shared")(s.images, s.mask),
                ValueError,
                "need a Mask",
            ),
            (
                lambda s: ViT(
                    image_size=8, patch_size=1, in_channels=2, dim=8, depth=1, heads=1,
                    stem=ConvStem(in_channels=2, channels=(4,)),
                )(torch.zeros(4, 2, 8, 8), s.mask),
                TypeError,
                "takes a Mask",
            ),
            (
                lambda s: SwinTransformer(
                    image_size=16, patch_size=4, in_channels=2, dim=8, depth=(1,), heads=(1,),
                    window=4,
                )(torch.zeros(4, 2, 16, 16), s.mask),
                ValueError,
                "pass a mask_token",
            ),
            (
                lambda s: ConvViT(image_size=16, in_channels=2, dim=(8, 8, 8), depth=(1, 1, 1),
                                  heads=1)(torch.zeros(4, 2, 16, 16), s.mask),
                TypeError,
                "needs a Mask",
            ),
            (lambda s: neighbors(s.mask), TypeError, "needs a Mask"),
            (
                lambda s: DownsampledPixels(2, 4)(torch.zeros(4, 2, 8, 8), s.mask),
                TypeError,
                "needs a Mask",
            ),
            (lambda s: join(s.mask, torch.zeros(4, 2)), TypeError, "needs a Mask"),
            (lambda s: s.decode(torch.zeros(5, DIM)), ValueError, "latent must"),
            (
                lambda s: s.decode(torch.zeros(12, DIM), torch.zeros(4, 1).long()),
                ValueError,
                "query_ids",
            ),
            (
                lambda s: CrossDecoder(grid=(2, 3), in_dim=DIM, dim=WIDTH, depth=1, heads=1)(
                    torch.zeros(12, DIM), s.mask
                ),
                TypeError,
                "needs a Mask",
            ),
            (lambda s: make_model()(s.images, s.even), TypeError, "needs a RaggedMask"),
            (
                lambda s: make_model(decoder="cross")(s.images, s.mask),
                ValueError,
                'RaggedMask needs target="pixels"',
            ),
        ],
    )  # fmt: skip
    def test_what_does_not_fit_is_repeated_in_the_error(self, call, error, message):
        with pytest.raises(error, match=message):
            call(self)

    def encoder(self, **options: object) -> ViT:
        sizes = {"image_size": (4, 9), "patch_size": PATCH, "in_channels": CHANNELS}
        return ViT(**sizes, dim=DIM, depth=1, heads=HEADS, **options).double()

    def decode(self, latent: Tensor, query_ids: Tensor | None = None) -> Tensor:
        decoder = MAEDecoder(grid=(2, 3), in_dim=DIM, dim=WIDTH, depth=1, heads=DECODER_HEADS)
        return decoder(latent, self.mask, query_ids)
