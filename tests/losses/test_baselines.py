"""Losses of trivial predictors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit import masking
from mimkit.losses import baselines, masked_pixel_loss
from mimkit.masking import Mask
from mimkit.patches import gather_visible, patchify
from mimkit.targets import NormalizedPixels, Pixels
from tests.strategies import masked_images, orders

PREDICTORS = ("zero", "mean_color", "nearest", "interpolated")
KINDS = ("l2", "l1", "smooth_l1")

drawn_images = masked_images(max_tokens=20).filter(
    lambda drawn: (
        drawn[1].num_visible > 0
        and drawn[1].num_masked > 0
        and drawn[0].shape[1] * math.prod(drawn[2]) > 1
    )
)


def visible_targets(
    pictures: Tensor, mask: Mask, patch: tuple[int, ...], order: str, normalize: str | None
) -> Tensor:
    """Return the visible patches with the normalisation of the target."""
    target_type = NormalizedPixels if normalize else Pixels
    return target_type(patch, order)(pictures, mask.complement())


def nearest_by_brute_force(mask: Mask, visible: Tensor) -> Tensor:
    """Return the nearest visible patch in the grid; of several, the first."""
    places = torch.cartesian_prod(*map(torch.arange, mask.grid)).view(mask.num_tokens, -1)
    predictions = []
    for row in range(mask.batch_size):
        seen = mask.visible_ids[row].tolist()
        chosen = []
        for hidden in mask.masked_ids[row].tolist():
            distances = [int((places[hidden] - places[token]).square().sum()) for token in seen]
            chosen.append(distances.index(min(distances)))
        predictions.append(visible[row, chosen])
    return torch.stack(predictions)


@given(drawn_images, orders, st.sampled_from(["patch", None]), st.sampled_from(KINDS))
def test_every_baseline_is_a_finite_float32_number(drawn, order, normalize, kind):
    pictures, mask, patch = drawn
    scores = baselines(pictures, mask, patch, normalize=normalize, kind=kind, order=order)
    assert tuple(scores) == PREDICTORS
    for score in scores.values():
        assert score.dtype == torch.float32
        assert score.isfinite()
        assert score >= 0


@given(drawn_images, orders, st.sampled_from(["patch", None]), st.sampled_from(KINDS))
def test_zero_and_nearest_match_the_loss_of_these_predictions(drawn, order, normalize, kind):
    pictures, mask, patch = drawn
    scores = baselines(pictures, mask, patch, normalize=normalize, kind=kind, order=order)
    visible = visible_targets(pictures, mask, patch, order, normalize)
    nearest = nearest_by_brute_force(mask, visible)
    for name, prediction in {"zero": torch.zeros_like(nearest), "nearest": nearest}.items():
        expected = masked_pixel_loss(
            prediction, pictures, mask, patch, normalize=normalize, kind=kind, order=order
        )
        torch.testing.assert_close(scores[name], expected, rtol=1e-5, atol=1e-6)


@given(drawn_images, orders)
def test_mean_color_predicts_the_mean_of_the_visible_pixels(drawn, order):
    pictures, mask, patch = drawn
    channels = pictures.shape[1]
    visible = gather_visible(patchify(pictures, patch), mask)
    color = visible.reshape(len(pictures), -1, channels).mean(dim=1)
    shape = (len(pictures), channels, *[1] * len(patch))
    flat = color.view(shape).expand_as(pictures)
    prediction = Pixels(patch, order)(flat, mask)
    expected = masked_pixel_loss(prediction, pictures, mask, patch, normalize=None, order=order)
    scores = baselines(pictures, mask, patch, normalize=None, order=order)
    torch.testing.assert_close(scores["mean_color"], expected, rtol=1e-4, atol=1e-5)


@given(drawn_images, orders, st.sampled_from(["patch", None]))
def test_interpolation_is_never_worse_than_zero(drawn, order, normalize):
    """Its factor is the best one for the masked target, which may be 0."""
    pictures, mask, patch = drawn
    scores = baselines(pictures, mask, patch, normalize=normalize, order=order)
    assert scores["interpolated"] <= scores["zero"] * (1 + 1e-4) + 1e-6


def test_the_loss_of_zero_is_the_variance_of_a_normalised_patch():
    """The mean square of P values with unbiased variance 1 is (P - 1) / P."""
    mask = masking.uniform(masking.key(range(4), seed=0), (4, 4), 0.75)
    for patch, channels in [(4, 3), (2, 1)]:
        images = torch.rand(4, channels, 4 * patch, 4 * patch)
        values = channels * patch**2
        zero = baselines(images, mask, patch)["zero"]
        assert float(zero) == pytest.approx((values - 1) / values, rel=1e-3)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_constant_image_is_predicted_perfectly(axes):
    mask = masking.uniform(masking.key([0, 1], seed=0), (3,) * axes, 0.6)
    colors = torch.tensor([[0.2, 0.9], [0.6, 0.1]])
    images = colors.view(2, 2, *[1] * axes).expand(2, 2, *[6] * axes)
    scores = baselines(images, mask, 2, normalize=None)
    for name in ("mean_color", "nearest", "interpolated"):
        assert float(scores[name]) == pytest.approx(0, abs=1e-8), name
    assert scores["zero"] > 0.1


def test_interpolation_is_best_for_a_smooth_image():
    along = torch.linspace(0, math.pi, 64)
    images = (along.sin()[:, None] * along.cos()[None]).expand(4, 3, 64, 64)
    mask = masking.uniform(masking.key(range(4), seed=0), (16, 16), 0.5)
    scores = baselines(images, mask, 4, normalize=None)
    assert scores["interpolated"] < scores["nearest"] < scores["mean_color"]
    assert scores["interpolated"] < 0.05 * scores["mean_color"]


def test_interpolation_uses_masked_pixels_for_one_factor_only():
    """If masked pixels are scaled, the loss of the interpolation scales with their square."""
    mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.5)
    images = torch.rand(1, 1, 16, 16)
    hidden = mask.refine(4).is_masked.unsqueeze(1)
    one = baselines(images, mask, 4, normalize=None)
    three = baselines(torch.where(hidden, 3 * images, images), mask, 4, normalize=None)
    torch.testing.assert_close(three["interpolated"], 9 * one["interpolated"], rtol=1e-4, atol=0)


def test_mean_std_and_uint8_images_are_treated_as_in_the_loss():
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
    pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    shape = (1, 3, 1, 1)
    normal = (pictures / 255 - torch.tensor(statistics["mean"]).view(shape)) / torch.tensor(
        statistics["std"]
    ).view(shape)
    for normalize in ("patch", None):
        ours = baselines(pictures, mask, 4, normalize=normalize, **statistics)
        expected = baselines(normal, mask, 4, normalize=normalize)
        for name in PREDICTORS:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_constant_patches_have_finite_baselines():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    for score in baselines(torch.zeros(2, 3, 8, 8), mask, 4).values():
        assert score == 0


@pytest.mark.untyped
def test_baselines_need_visible_and_masked_patches():
    nothing = Mask.from_bool(torch.zeros(2, 2, 2, dtype=torch.bool))
    for mask in (nothing, ~nothing):
        with pytest.raises(ValueError, match="visible and masked.*num_visible="):
            baselines(torch.rand(2, 3, 8, 8), mask, 4)
