"""timm's Vision Transformers with a mimkit mask, and conversion of their weights."""

import importlib.util
from doctest import ELLIPSIS, SKIP, DocTestFinder, DocTestRunner
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import DiffParallelScalingBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import from_timm, to_timm, wrap_timm
from mimkit.masking import Mask
from mimkit.nn import ViT
from mimkit.patches import gather_visible, interpolate_positions
from tests.nn import plain
from tests.strategies import masks

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
GRID = (4, 4)


def timm_vit(**options: Any) -> nn.Module:
    model = VisionTransformer(**(SIZES | options)).eval()
    plain.randomize(model)
    return model


MODELS = {
    "plain": timm_vit,
    "layer scale and registers": lambda: timm_vit(init_values=0.1, reg_tokens=2),
    "no class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "norm before the blocks": lambda: timm_vit(pre_norm=True),
    "class token without position": lambda: timm_vit(no_embed_class=True),
    "parallel blocks": lambda: timm_vit(block_fn=DiffParallelScalingBlock),
}


def encode_each_sample(model: Any, images: Tensor, mask: Mask) -> Tensor:
    """Reference: sample by sample, embed all tokens, then delete the masked ones."""
    rows = []
    for image, hidden in zip(images, mask.is_masked.flatten(1), strict=True):
        tokens = model._pos_embed(model.patch_embed(image[None]))
        kept = torch.cat([torch.ones(model.num_prefix_tokens, dtype=torch.bool), ~hidden])
        rows.append(model.norm(model.blocks(model.norm_pre(tokens[:, kept]))))
    return torch.cat(rows)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_example_of_wrap_timm_runs():
    example = next(e for e in DocTestFinder().find(wrap_timm, "wrap_timm") if e.examples)
    for line in example.examples:
        line.options.pop(SKIP, None)  # there, timm may not be installed
    assert DocTestRunner(optionflags=ELLIPSIS).run(example).failed == 0


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_wrapped_model_without_a_mask_equals_forward_features(name, images):
    model = MODELS[name]()
    encoder = wrap_timm(model)
    assert encoder.num_prefix_tokens == model.num_prefix_tokens
    expected = model.forward_features(images)
    assert torch.equal(encoder(images), expected)
    all_visible = Mask.from_bool(torch.zeros(2, *GRID, dtype=torch.bool))
    assert torch.equal(encoder(images, all_visible), expected)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_wrapped_model_encodes_the_visible_tokens(name, images):
    model = MODELS[name]()
    encoder = wrap_timm(model)
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    encoded = encoder(images, mask)
    assert encoded.shape == (2, model.num_prefix_tokens + mask.num_visible, 12)
    expected = encode_each_sample(model, images, mask)
    torch.testing.assert_close(encoded, expected, rtol=1e-4, atol=1e-5)
    assert encoder.pool(encoded).shape == (2, 12)


@given(masks(grid=GRID, batch_size=2))
@torch.no_grad()
def test_hidden_pixels_do_not_reach_the_output_of_a_wrapped_model(mask):
    encoder = wrap_timm(timm_vit())
    images = torch.randn(2, 3, 16, 16)
    hidden = mask.refine(4).is_masked.unsqueeze(1)
    poisoned = images.masked_fill(hidden, float("nan"))
    assert torch.equal(encoder(poisoned, mask), encoder(images, mask))


@torch.no_grad()
def test_mimkits_weights_give_the_same_output_in_timm(images):
    ours = ViT(image_size=16, patch_size=4, dim=12, depth=2, heads=3, num_classes=5, pool="token")
    plain.randomize(ours)
    model = timm_vit(num_classes=5)
    converted = to_timm(ours.state_dict())
    assert converted.dropped == ()
    model.load_state_dict(converted)
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours(images), model.forward_features(images), **close)
    torch.testing.assert_close(ours(images, mask), wrap_timm(model)(images, mask), **close)
    torch.testing.assert_close(ours.head(ours.pool(ours(images))), model(images), **close)


# Image sizes: a square grid, and grids with a square number of patches and one more.
SHAPES = [(16, 16), (12, 20), (8, 16), (16, 24)]
PREFIXES: list[dict[str, Any]] = [
    {},
    {"reg_tokens": 2},
    {"class_token": False, "global_pool": "avg"},
    {"class_token": False, "global_pool": "avg", "reg_tokens": 3},
]


@pytest.mark.parametrize("no_embed_class", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_positions_and_prefix_tokens_convert_on_any_grid(shape, prefix, no_embed_class):
    model = timm_vit(**prefix, img_size=shape, num_classes=5, no_embed_class=no_embed_class)
    num_registers = prefix.get("reg_tokens", 0)
    first = model.num_prefix_tokens - num_registers
    if not no_embed_class:  # registers with positions are refused
        model.pos_embed[:, first : model.num_prefix_tokens] = 0
    ours = ViT(
        image_size=shape,
        patch_size=4,
        dim=12,
        depth=2,
        heads=3,
        class_token=prefix.get("class_token", True),
        num_registers=num_registers,
        num_classes=5,
        pool_norm="global_pool" in prefix,
        pool="mean" if "global_pool" in prefix else "token",
    ).eval()
    ours.load_state_dict(from_timm(model), strict=True)
    named = from_timm(model.state_dict(), grid=model.patch_embed.grid_size)
    assert all(torch.equal(named[n], t) for n, t in ours.state_dict().items())
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.forward_head(ours(images)), model(images), **close)
    # Back: beside registers, the position of a class token decides about `no_embed_class`.
    without = no_embed_class if num_registers else not first
    back = to_timm(ours)
    assert back.dropped == ()
    again = timm_vit(**prefix, img_size=shape, num_classes=5, no_embed_class=without or not first)
    again.load_state_dict(back, strict=True)
    torch.testing.assert_close(again(images), model(images), **close)


def test_positions_that_do_not_fit_are_refused():
    model = timm_vit(reg_tokens=2)
    with pytest.raises(ValueError, match=r"'reg_token' in 'pos_embed' .* are not zero"):
        from_timm(model)
    with pytest.raises(ValueError, match=r"18 rows, .* grid \(4, 5\).*2 of reg_token"):
        from_timm(
            {"pos_embed": torch.zeros(1, 18, 8), "cls_token": torch.zeros(1, 1, 8),
             "reg_token": torch.zeros(1, 2, 8)}, grid=(4, 5)
        )  # fmt: skip


@torch.no_grad()
def test_timms_weights_give_the_same_output_in_mimkit(images):
    model = timm_vit(num_classes=5, global_pool="avg")
    ours = ViT(image_size=16, patch_size=4, dim=12, depth=2, heads=3, num_classes=5, pool_norm=True)
    converted = from_timm(model.state_dict())
    assert converted.dropped == ()
    ours.load_state_dict(converted)
    tokens = ours(images)
    torch.testing.assert_close(ours.head(ours.pool(tokens)), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relative", ["shared", "block"])
@pytest.mark.parametrize("qkv_bias", ["qv", True, False])
@pytest.mark.parametrize("pool_norm", [False, True])
@torch.no_grad()
def test_relative_positions_load_into_timms_beit_and_give_the_same(
    relative, qkv_bias, pool_norm, images
):
    sizes = {"image_size": 16, "patch_size": 4, "dim": 12, "depth": 3, "heads": 3}
    options = {"absolute_positions": False, "layer_scale": 0.1, "pool_norm": pool_norm}
    ours = ViT(**sizes, **options, relative_positions=relative, qkv_bias=qkv_bias).eval()
    plain.randomize(ours)
    theirs = Beit(
        **SIZES | {"depth": 3},
        num_classes=0,
        use_abs_pos_emb=False,
        use_rel_pos_bias=True,
        init_values=1.0,
        qkv_bias=bool(qkv_bias),
        global_pool="avg" if pool_norm else "token",
    ).eval()
    converted = to_timm(ours)
    theirs.load_state_dict(converted)
    copies = [f"blocks.{i}.attn.relative_position_bias_table" for i in (1, 2)]
    assert list(converted.filled) == (copies if relative == "shared" else [])
    expected, found = ours(images), theirs.forward_features(images)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)


@torch.no_grad()
def test_a_table_that_timms_blocks_share_is_shared_by_ours(images):
    theirs = Beit(**SIZES, use_abs_pos_emb=False, use_shared_rel_pos_bias=True, num_classes=0)
    plain.randomize(theirs.eval())
    sizes = {"image_size": 16, "patch_size": 4, "dim": 12, "depth": 2, "heads": 3}
    options = {"absolute_positions": False, "relative_positions": "shared", "qkv_bias": "qv"}
    ours = ViT(**sizes, **options, pool_norm=True, layer_scale=None).eval()
    ours.load_state_dict(from_timm(theirs))
    torch.testing.assert_close(ours(images), theirs.forward_features(images))


def test_gradients_reach_the_wrapped_models_weights(images):
    model = timm_vit()
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    wrap_timm(model)(images, mask).pow(3).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n[:5] != "head.")
    visible = gather_visible(torch.arange(16.0).expand(2, 16).unsqueeze(2), mask).unique().long()
    touched = model.pos_embed.grad[0, 1:].ne(0).any(dim=1)
    assert torch.equal(touched.nonzero().flatten(), visible)


@torch.no_grad()
def test_a_wrapped_eva_without_rotary_positions_works(images):
    model = Eva(**SIZES, use_rot_pos_emb=False).eval()
    plain.randomize(model)
    encoder = wrap_timm(model)
    torch.testing.assert_close(encoder(images), model.forward_features(images))
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    poisoned = images.masked_fill(mask.refine(4).is_masked.unsqueeze(1), float("nan"))
    assert torch.equal(encoder(poisoned, mask), encoder(images, mask))


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2}])
@torch.no_grad()
def test_a_mask_token_in_a_wrapped_model_works_as_in_mimkits(options, images):
    model = timm_vit(**options)
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    token = torch.randn(12)
    found = wrap_timm(model)(images, mask, mask_token=token)
    assert found.shape == (2, model.num_prefix_tokens + 16, 12)
    per_patch = token.expand(2, mask.num_masked, 12)
    assert torch.equal(found, wrap_timm(model)(images, mask, mask_token=per_patch))
    if not options.get("reg_tokens"):
        ours = ViT(image_size=16, patch_size=4, dim=12, depth=2, heads=3)
        state = from_timm({n: t for n, t in model.state_dict().items() if n[:5] != "head."})
        ours.load_state_dict(state)
        expected = ours(images, mask, mask_token=token)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pass a mask with it"):
        wrap_timm(model)(images, mask_token=token)


@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}, {"reg_tokens": 2}])
@torch.no_grad()
def test_different_counts_in_a_wrapped_model_give_what_each_sample_gives_alone(options):
    encoder = wrap_timm(timm_vit(**options))
    key = masking.key(range(4), seed=0)
    mask = masking.ragged(masking.uniform, key, GRID, [0, 0.3, 0.8, 1])
    images, token = torch.randn(4, 3, 16, 16), torch.randn(12)
    hidden = torch.stack([one.refine(4).is_masked for one in mask.unbind()])
    found = encoder(images.masked_fill(hidden, float("nan")), mask, mask_token=token)
    for row, one in enumerate(mask.unbind()):
        alone = encoder(images[row : row + 1], one, mask_token=token)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="needs a Mask"):
        encoder(images, mask)
    with pytest.raises(ValueError, match=r"4 images have grid \(4, 4\)"):
        encoder(images, mask[:3], mask_token=token)


def test_checkpointing_of_a_model_is_honored_when_it_is_wrapped(images):
    model = timm_vit()
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    wrap_timm(model)(images, mask).sum().backward()
    assert len(calls) == 2


def test_models_whose_masked_patches_would_leak_or_fail_are_refused_when_wrapped():
    with torch.device("meta"):
        hybrid = timm.create_model("vit_tiny_r_s16_p8_224")
        sam = timm.create_model("samvit_base_patch16_224")
        swin = timm.create_model("swin_tiny_patch4_window7_224")
        cait = timm.create_model("cait_xxs24_224")
    with pytest.raises(TypeError, match="patches that do not overlap.*HybridEmbed"):
        wrap_timm(hybrid)
    with pytest.raises(TypeError, match="without|does not know the positions"):
        wrap_timm(sam)
    for model in (swin, cait):
        with pytest.raises(TypeError, match="without .*_pos_embed"):
            wrap_timm(model)


SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
# Rotary and relative positions.
PLACED = {
    "eva02": lambda: Eva(**SMALL, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True),
    "dinov3": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=2,
        rope_type="dinov3", rope_rotate_half=True, init_values=0.1,
    ),
    "mixed": lambda: Eva(**SMALL, use_rot_pos_emb=True, rope_type="mixed"),
    "dynamic": lambda: Eva(**SMALL, use_rot_pos_emb=True, dynamic_img_size=True),
    "no class token": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, class_token=False, global_pool="avg"
    ),
    "after the norm": lambda: Eva(**SMALL, use_rot_pos_emb=True, use_post_norm=True),
    "beit": lambda: Beit(
        **SMALL, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1
    ),
    "beit, shared": lambda: Beit(**SMALL, use_shared_rel_pos_bias=True),
    "beit, absolute": lambda: Beit(**SMALL),
    "relpos": lambda: VisionTransformerRelPos(**SMALL, rel_pos_type="bias"),
    "relpos, class token": lambda: VisionTransformerRelPos(
        **SMALL, rel_pos_type="bias", class_token=True
    ),
    "relpos mlp": lambda: VisionTransformerRelPos(**SMALL, rel_pos_type="mlp"),
    "relpos, shared": lambda: VisionTransformerRelPos(
        **SMALL, rel_pos_type="bias", shared_rel_pos=True
    ),
}  # fmt: skip


def placed(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = PLACED[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model


def attend_to_visible(is_seen: Tensor) -> Any:
    """Attention that reads visible tokens only: [batch, tokens], True = seen."""
    attend = nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        seen = torch.zeros(is_seen.shape).masked_fill(~is_seen, -torch.inf)[:, None, None]
        bias = seen if attn_mask is None else attn_mask + seen
        return attend(query, key, value, attn_mask=bias, **options)

    return masked


@pytest.mark.parametrize("name", PLACED)
@torch.no_grad()
def test_visible_tokens_keep_their_rotary_or_relative_positions(name, images, monkeypatch):
    """A plain definition: all tokens are computed, and attention reads the visible ones."""
    model = placed(name)
    encoder = wrap_timm(model)
    torch.testing.assert_close(encoder(images), model.forward_features(images), rtol=0, atol=0)
    nothing = Mask.from_bool(torch.zeros(2, *GRID, dtype=torch.bool))
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(encoder(images, nothing), model.forward_features(images), **close)
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    hidden = mask.refine(4).is_masked.unsqueeze(1)
    found = encoder(images.masked_fill(hidden, float("nan")), mask)
    prefix = torch.ones(2, model.num_prefix_tokens, dtype=torch.bool)
    is_seen = torch.cat([prefix, ~mask.is_masked.flatten(1)], dim=1)
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attend_to_visible(is_seen))
        expected = model.forward_features(images)[is_seen].view_as(found)
    torch.testing.assert_close(found, expected, **close)
    token = torch.randn(24)
    whole = encoder(images, mask, mask_token=token)
    assert whole.shape == model.forward_features(images).shape
    assert torch.equal(model.forward_features(images), encoder(images))  # the model is as it was


def load_script() -> Any:
    path = Path(__file__).parents[2] / "docs" / "make_timm_table.py"
    spec = importlib.util.spec_from_file_location("make_timm_table", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_of_the_table_judges_and_finds_a_wrapper_that_is_wrong(monkeypatch):
    script = load_script()
    listed = (script.PAGE).read_text().partition(script.START)[2].partition(script.END)[0]
    for name, verdict in (("eva02_tiny_patch14_224", "exact"), ("cait_xxs24_224", "refused: ")):
        assert script.judge(name).startswith(verdict)
        (row,) = (line for line in listed.splitlines() if f"`{name}`" in line)
        assert f"| {verdict}" in row

    class FirstRows(nn.Module):
        """Encodes the first patches instead of the visible ones."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor, mask: Mask | None = None) -> Tensor:
            tokens: Tensor = self.model.forward_features(images)
            return tokens if mask is None else tokens[:, : 1 + mask.num_visible]

    monkeypatch.setattr(script, "wrap_timm", FirstRows)
    assert script.judge("vit_tiny_patch16_224") == "WRONG"


@pytest.mark.parametrize("name", ["eva02", "beit", "relpos"])
def test_gradients_and_checkpointing_of_rotary_and_relative_models(name, images):
    model = placed(name)
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    wrap_timm(model)(images, mask).pow(2).mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any("rel" in n or "q_proj" in n or "qkv" in n for n in expected)
    model.zero_grad()
    model.set_grad_checkpointing()
    wrap_timm(model)(images, mask).pow(2).mean().backward()
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n])


@pytest.mark.untyped
def test_models_that_cannot_be_wrapped_are_refused():
    with pytest.raises(TypeError, match=r"got Linear without .*'patch_embed', '_pos_embed'"):
        wrap_timm(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="patch_drop_rate=0"):
        wrap_timm(timm_vit(patch_drop_rate=0.5))


@pytest.mark.untyped
def test_a_mask_of_another_grid_is_refused(images):
    encoder = wrap_timm(timm_vit())
    # The same number of tokens on another grid.
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 8), 0.5)
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(4, 4\)"):
        encoder(images, mask)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_of_a_wrapped_model_are_timms_intermediates(name, images):
    model = MODELS[name]()
    encoder = wrap_timm(model)
    for norm in (False, True):
        ours = encoder.features(images, [0, -1], norm=norm)
        theirs = model.forward_intermediates(images, [0, 1], norm=norm, intermediates_only=True)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    (last,) = encoder.features(images, norm=True)
    assert torch.equal(last.flatten(2).mT, encoder(images)[:, encoder.num_prefix_tokens :])


@pytest.mark.parametrize("size", [(8, 32), (24, 20)])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_of_another_size_are_those_of_timms_resized_model(name, size):
    model = MODELS[name]()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    ours = wrap_timm(model).features(images, [0, 1])
    grid = tuple(side // 4 for side in size)
    skip = 0 if model.no_embed_class else model.num_prefix_tokens
    table = interpolate_positions(model.pos_embed[0], GRID, grid, num_prefix=skip)
    model.set_input_size(img_size=size)
    model.pos_embed.data = table[None]
    theirs = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_a_model_with_dynamic_sizes_resamples_its_positions_itself(images):
    model = timm_vit(dynamic_img_size=True)
    tall = torch.cat([images, images], dim=2)
    theirs = model.forward_intermediates(tall, [1], intermediates_only=True)
    assert torch.equal(wrap_timm(model).features(tall)[0], theirs[0])


def test_features_honour_the_switch_for_checkpointing_and_reach_every_weight(images):
    model = timm_vit()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    wrap_timm(model).features(images)[0].sum().backward()
    assert len(calls) == 2, "computed again in backward"
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
