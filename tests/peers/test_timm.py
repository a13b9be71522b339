"""timm's Vision Transformers with a mimkit mask, and conversion of their weights."""

from typing import Any

import pytest
import torch
from hypothesis import given
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import from_timm, to_timm, wrap_timm
from mimkit.masking import Mask
from mimkit.nn import ViT
from mimkit.patches import gather_visible
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


@torch.no_grad()
def test_timms_weights_give_the_same_output_in_mimkit(images):
    model = timm_vit(num_classes=5, global_pool="avg")
    ours = ViT(image_size=16, patch_size=4, dim=12, depth=2, heads=3, num_classes=5, pool_norm=True)
    converted = from_timm(model.state_dict())
    assert converted.dropped == ()
    ours.load_state_dict(converted)
    tokens = ours(images)
    torch.testing.assert_close(ours.head(ours.pool(tokens)), model(images), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_wrapped_models_weights(images):
    model = timm_vit()
    mask = masking.uniform(masking.key([0, 1], seed=0), GRID, 0.6)
    wrap_timm(model)(images, mask).pow(3).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n[:5] != "head.")
    visible = gather_visible(torch.arange(16.0).expand(2, 16).unsqueeze(2), mask).unique().long()
    touched = model.pos_embed.grad[0, 1:].ne(0).any(dim=1)
    assert torch.equal(touched.nonzero().flatten(), visible)


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
