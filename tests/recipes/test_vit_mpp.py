"""ViT's masked patch prediction, and hybrid stems."""

import pytest
import torch
from hypothesis import given, settings

from mimkit import masking
from mimkit.nn import ConvStem, ViT
from mimkit.patches import gather_masked, patchify
from recipes.vit_mpp import MPP, RECIPE, MPPConfig
from tests.nn import plain
from tests.strategies import masks

SHAPE = {"image_size": (16, 24), "patch_size": 4, "dim": 12, "depth": 1, "heads": 2}


def model(**changes: object) -> MPP:
    torch.manual_seed(0)
    return MPP(MPPConfig(**(SHAPE | changes)))


def batch(channels: int = 3) -> tuple[torch.Tensor, masking.Mask]:
    mask = masking.uniform(masking.key(range(64), seed=0), (4, 6), 0.5)
    return torch.randn(64, channels, 16, 24), mask


def test_a_class_is_the_mean_color_in_eight_levels_a_channel():
    images, mask = batch()
    mpp = model()
    means = gather_masked(patchify(images, 4), mask).unflatten(2, (-1, 3)).mean(2)
    levels = ((means + 2.2) / 4.9 * 8).long().clamp(0, 7)
    colors = mpp.target(images, mask)
    assert torch.equal(colors, levels @ torch.tensor([1, 8, 64]))
    painted = mpp.target.draw(colors, images, mask).unflatten(2, (-1, 3)).mean(2)
    assert (painted - means).abs().max() <= 4.9 / 16 + 1e-5


def test_corrupted_patches_are_masked_swapped_or_kept_in_their_shares():
    images, mask = batch()
    mpp = model()
    hidden = mpp.encoder.patch_embed(images, mask.complement())
    corrupted = mpp._corrupt(images, mask)
    is_token = (corrupted == mpp.mask_token).all(-1)
    is_kept = (corrupted == hidden).all(-1)
    among = (corrupted.unsqueeze(2) == hidden.unsqueeze(1)).all(-1).any(-1)
    assert (is_token | among).all()
    deviation = 4 * (0.16 / is_token.numel()) ** 0.5
    assert is_token.float().mean() == pytest.approx(0.8, abs=deviation)
    # A twelfth of the swapped ones meet themselves.
    assert is_kept.float().mean() == pytest.approx(0.1 + 0.1 / 12, abs=deviation)


def test_in_evaluation_masked_patches_are_not_read():
    images, mask = batch()
    mpp = model().eval()
    hidden = mask.is_masked.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    with torch.no_grad():
        seen = mpp.encoder(images, mask, mask_token=mpp.mask_token)
        poisoned = mpp.encoder(
            images.masked_fill(hidden, torch.nan), mask, mask_token=mpp.mask_token
        )
    assert torch.equal(seen, poisoned)


@pytest.mark.parametrize("channels", [1, 3])
def test_colors_are_learned(channels):
    images, mask = batch(channels)
    mpp = model(in_channels=channels)
    optimizer = torch.optim.Adam(mpp.parameters(), lr=3e-3)
    before = mpp(images, mask).loss.item()
    for _ in range(20):
        loss = mpp(images, mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < before
    assert all(p.grad is not None for p in mpp.parameters())
    assert RECIPE.reconstruct(mpp.eval(), images, mask).shape == images.shape


def test_shares_of_more_than_everything_are_refused():
    with pytest.raises(ValueError, match="shares of one whole"):
        model(mask_share=0.8, other_share=0.3)


# Hybrids.


def hybrid() -> ViT:
    stem = ConvStem(in_channels=2, channels=(4, 6))
    encoder = ViT(image_size=(16, 24), patch_size=1, in_channels=2, dim=12, depth=1, heads=2,
                  stem=stem)  # fmt: skip
    plain.randomize(encoder)
    return encoder.eval()


def test_a_hybrid_cuts_the_feature_map():
    encoder = hybrid()
    assert encoder.grid == (4, 6)
    assert encoder.patch_embed.patch_size == (4, 4)
    images = torch.randn(2, 2, 16, 24)
    maps = encoder.patch_embed.stem(images)
    expected = encoder.patch_embed.proj(maps.flatten(2).mT)
    torch.testing.assert_close(encoder.patch_embed(images), expected)
    assert encoder(images).shape == (2, 25, 12)


@given(masks(grid=(4, 6), batch_size=2))
@settings(max_examples=10)
def test_no_hidden_pixel_reaches_a_visible_token_through_the_stem(mask):
    encoder = hybrid()
    images = torch.randn(2, 2, 16, 24)
    hidden = mask.is_masked.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    with torch.no_grad():
        assert torch.equal(
            encoder(images, mask), encoder(images.masked_fill(hidden, torch.nan), mask)
        )


def test_a_hybrid_predicts_colors_too():
    mpp = model(patch_size=1, stem=(4, 8))
    images, mask = batch()
    mpp(images, mask).loss.backward()
    assert all(p.grad is not None for p in mpp.encoder.patch_embed.parameters())
