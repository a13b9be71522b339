"""Pixel targets."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import Tensor

from mimkit import masking
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify
from mimkit.targets import (
    ChannelBins,
    DownsampledPixels,
    NormalizedPixels,
    PCATarget,
    Pixels,
    WindowNormalizedPixels,
)
from tests.golden_files import golden
from tests.strategies import masked_images, orders

TARGETS = {"pixels": Pixels, "normalized": NormalizedPixels}


def samples_of(mask: Tensor) -> list[Mask]:
    """Return one mask per sample, for a batch with different counts."""
    return [Mask.from_bool(row[None].bool()) for row in mask]


@given(masked_images(), orders)
def test_pixels_are_the_masked_patches(drawn, order):
    pictures, mask, patch = drawn
    target = Pixels(patch, order)(pictures, mask)
    assert torch.equal(target, gather_masked(patchify(pictures, patch, order=order), mask))


@given(masked_images(), orders)
def test_normalised_patches_have_mean_zero_and_variance_one(drawn, order):
    pictures, mask, patch = drawn
    assume(np.prod(patch) * pictures.shape[1] >= 2)
    target = NormalizedPixels(patch, order)(pictures, mask)
    masked = Pixels(patch, order)(pictures, mask).double()
    mean = masked.mean(dim=-1, keepdim=True)
    variance = (masked - mean).square().sum(dim=-1, keepdim=True) / (masked.shape[-1] - 1)
    expected = (masked - mean) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(target.double(), expected, rtol=1e-4, atol=1e-4)


def test_normalised_patches_match_the_authors():
    arrays = golden("mae_loss")
    pictures, theirs = arrays.tensor("in/imgs"), arrays.tensor("out/target_normpix")
    masks = samples_of(arrays.tensor("in/mask").view(2, 4, 4))
    for row, mask in enumerate(masks):
        target = NormalizedPixels(8)(pictures[[row]], mask)
        expected = gather_masked(theirs[[row]], mask)
        torch.testing.assert_close(target, expected, rtol=1e-4, atol=2e-5)


def test_epsilon_is_inside_the_square_root():
    arrays = golden("mae_loss")
    everything = Mask.from_bool(torch.ones(2, 4, 4, dtype=torch.bool))
    target = NormalizedPixels(8)(arrays.tensor("in/imgs"), everything)
    theirs = arrays.tensor("out/target_normpix")
    torch.testing.assert_close(target, theirs, rtol=1e-4, atol=2e-5)
    # Nearly constant patches have a deviation far below 1, which depends on epsilon.
    deviation = theirs.std(dim=-1)
    assert ((deviation > 0) & (deviation < 0.9)).any()


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_a_constant_patch_is_normalised_to_zero(value):
    mask = Mask.from_bool(torch.ones(1, 2, 2, dtype=torch.bool))
    target = NormalizedPixels(4)(torch.full((1, 3, 8, 8), value), mask)
    torch.testing.assert_close(target, torch.zeros_like(target), rtol=0, atol=1e-3)


@given(masked_images(dtype=torch.uint8), orders, st.sampled_from(sorted(TARGETS)), st.booleans())
def test_invert_returns_the_pixels_of_the_images(drawn, order, name, with_statistics):
    pictures, mask, patch = drawn
    channels = pictures.shape[1]
    assume(np.prod(patch) * channels >= 2)
    statistics = {"mean": [0.4] * channels, "std": [0.1 + 0.2 * c for c in range(channels)]}
    target = TARGETS[name](patch, order, **(statistics if with_statistics else {}))
    values = target(pictures, mask)
    expected = Pixels(patch, order)(pictures, mask)
    assert values.dtype == torch.float32
    torch.testing.assert_close(target.invert(values, pictures, mask), expected, atol=1e-4, rtol=0)


@given(masked_images(), orders, st.sampled_from(sorted(TARGETS)))
def test_visible_pixels_do_not_affect_the_target(drawn, order, name):
    pictures, mask, patch = drawn
    assume(np.prod(patch) * pictures.shape[1] >= 2)
    visible = ~mask.refine(patch).is_masked.unsqueeze(1)
    poisoned = pictures.masked_fill(visible, float("nan"))
    target = TARGETS[name](patch, order)
    assert torch.equal(target(poisoned, mask), target(pictures, mask))


def test_uses_ground_truth_is_whether_invert_reads_masked_pixels():
    assert not Pixels(4).uses_ground_truth
    assert not PCATarget(4).uses_ground_truth
    assert NormalizedPixels(4).uses_ground_truth
    images = torch.rand(1, 3, 8, 8)
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), 0.75)
    values = torch.randn(1, 3, 48)
    for target in (Pixels(4), NormalizedPixels(4), PCATarget(4, 48).fit(images)):
        same = torch.equal(
            target.invert(values, images, mask), target.invert(values, images + 1, mask)
        )
        assert same != target.uses_ground_truth


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_targets_are_float32_for_images_of_any_dtype(dtype):
    images = torch.randint(0, 2, (2, 3, 8, 8)).to(dtype)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    for target in (Pixels(4), NormalizedPixels(4), PCATarget(4, 5).fit(images)):
        assert target(images, mask).dtype == torch.float32


@pytest.mark.untyped
def test_patches_of_one_value_cannot_be_normalised():
    mask = Mask.from_bool(torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="single value"):
        NormalizedPixels(1)(torch.rand(1, 1, 2, 2), mask)
    assert NormalizedPixels(1)(torch.rand(1, 2, 2, 2), mask).isfinite().all()


@pytest.fixture(scope="module")
def colorful() -> Tensor:
    """Make images whose patches have a different variance in every direction."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    patches = patches * torch.linspace(3, 0.3, 12) @ rotation + 0.5
    return patches.view(3, 100, 2, 2, 3).permute(0, 4, 2, 1, 3).reshape(3, 3, 2, 200).float()


def test_principal_components_match_scikit_learn(colorful):
    patches = patchify(colorful, 2).flatten(0, 1).double().numpy()
    reference = PCA(5, svd_solver="full").fit(patches)
    target = PCATarget(2, 5).fit(colorful)
    np.testing.assert_allclose(target.center.numpy(), reference.mean_, rtol=0, atol=1e-6)
    sign = np.sign((target.components.numpy() * reference.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        target.components.numpy() * sign, reference.components_, rtol=0, atol=1e-5
    )
    mask = Mask.from_bool(torch.ones(3, 1, 100, dtype=torch.bool))
    values = target(colorful, mask).flatten(0, 1).numpy()
    np.testing.assert_allclose(values * sign.T, reference.transform(patches), rtol=0, atol=1e-4)
    inverted = target.invert(target(colorful, mask), colorful, mask).flatten(0, 1)
    expected = reference.inverse_transform(reference.transform(patches))
    np.testing.assert_allclose(inverted, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
def test_all_components_together_are_invertible(colorful, order):
    mask = masking.uniform(masking.key(range(3), seed=0), (1, 100), 0.75)
    target = PCATarget(2, 12, order=order).fit(colorful)
    values = target(colorful, mask)
    torch.testing.assert_close(
        target.invert(values, colorful, mask), Pixels(2, order)(colorful, mask), rtol=0, atol=1e-4
    )


def test_uint8_images_are_divided_by_255():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    mask = masking.uniform(masking.key(range(4), seed=0), (4, 4), 0.75)
    of_bytes = PCATarget(2, 4).fit(pictures)
    of_floats = PCATarget(2, 4).fit(pictures / 255)
    torch.testing.assert_close(of_bytes.components, of_floats.components, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        of_bytes(pictures, mask), of_floats(pictures / 255, mask), rtol=0, atol=1e-4
    )


@pytest.mark.untyped
def test_errors_repeat_what_was_passed():
    images = torch.rand(2, 3, 4, 4)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    with pytest.raises(ValueError, match="13 components do not fit patches of 12 values"):
        PCATarget(2, 13).fit(images)
    with pytest.raises(ValueError, match="got 0"):
        PCATarget(2, 0)
    with pytest.raises(RuntimeError, match="fit"):
        PCATarget(2, 4)(images, mask)


COMPILED = {
    "pixels": lambda: Pixels(4, "c p1 p2", mean=[0.5] * 3, std=[0.25] * 3),
    "normalized": lambda: NormalizedPixels(4),
    "downsampled": lambda: DownsampledPixels(4, 2),
    "window": lambda: WindowNormalizedPixels(4, window=3),
    "bins": lambda: ChannelBins(4, 2),
}


@pytest.mark.full
@pytest.mark.untyped
@pytest.mark.parametrize("name", COMPILED)
def test_targets_compile_into_one_graph(name):
    target, images = COMPILED[name](), torch.rand(2, 3, 8, 12)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    compiled = torch.compile(
        lambda images, mask: target(images, mask), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(images, mask), target(images, mask))
