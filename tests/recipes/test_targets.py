"""Targets: what holds for every kind of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mimkit import losses, masking, viz
from mimkit.masking import Mask
from mimkit.nn import PatchTokenizer, ViT
from mimkit.patches import gather_masked, patchify
from recipes.engine import targets
from recipes.engine.run import defaults
from recipes.engine.targets import ClassTarget, NumberTarget, PixelTarget, Target

PATCH = (4, 4)
SHAPE = (PATCH, 2)


def make_tokenizer() -> PatchTokenizer:
    return PatchTokenizer(patch_size=PATCH, in_channels=2, vocabulary_size=6)


def make_teacher() -> ViT:
    torch.manual_seed(0)
    teacher = ViT(image_size=(16, 24), patch_size=4, in_channels=2, dim=12, depth=1, heads=2)
    return teacher.eval().requires_grad_(False)


KINDS: dict[str, Callable[[], Target]] = {
    "pixels": lambda: PixelTarget(*SHAPE, error="l1"),
    "normalised pixels": lambda: PixelTarget(*SHAPE, normalize=True),
    "components": lambda: targets.PCATarget(*SHAPE, 5),
    "all components": lambda: targets.PCATarget(*SHAPE, 32),
    "squares in a patch": lambda: targets.SquareTarget(*SHAPE, 2, error="l1"),
    "squares of patches": lambda: targets.SquareTarget(*SHAPE, 8, error="l2"),
    "windows": lambda: targets.WindowTarget(*SHAPE, error="smooth_l1"),
    "histograms": lambda: targets.HOGTarget(*SHAPE, error="l1"),
    "features": lambda: targets.FeatureTarget(make_teacher(), normalize=True, error="l2"),
    "directions": lambda: targets.FeatureTarget(make_teacher(), normalize=False),
    "similarities": lambda: targets.SimilarityTarget(make_teacher()),
    "clusters": lambda: targets.ClusterTarget(*SHAPE, 6),
    "bins": lambda: targets.BinTarget(*SHAPE, 8),
    "mean colors": lambda: targets.MeanColorTarget(*SHAPE),
    "tokens": lambda: targets.TokenTarget(make_tokenizer(), PATCH),
    "counted tokens": lambda: targets.CountedTokenTarget(make_tokenizer(), PATCH),
}
FITTED = {"components", "all components", "clusters", "tokens", "counted tokens"}
NO_WAY_BACK = {"histograms", "features", "directions"}
EXACT = {"pixels", "normalised pixels", "windows", "all components"}


def batch() -> tuple[Tensor, Mask]:
    images = torch.randn(8, 2, 16, 24, generator=torch.Generator().manual_seed(0))
    return images, masking.uniform(masking.key(range(8), seed=0), (4, 6), 0.5, unit=2)


def make(kind: str) -> Target:
    target = KINDS[kind]()
    target.fit(batch()[0])
    return target


def perfect(target: Target, images: Tensor, mask: Mask) -> Tensor:
    """Return the prediction of a model that makes no mistake."""
    truth = target(images, mask)
    if not isinstance(target, ClassTarget):
        return truth
    return 100.0 * nn.functional.one_hot(truth, target.value_shape[-1]).float()


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_has_the_shape_that_a_head_is_asked_for(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    prediction = perfect(target, images, mask)
    rows = target.group(mask).num_masked
    assert prediction.shape == (8, rows, *target.value_shape)
    assert prediction[0, 0].numel() == target.num_values


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_perfect_prediction_is_zero_and_every_other_is_worse(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    prediction = perfect(target, images, mask)
    loss = target.loss(prediction, images, mask)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    noise = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(1))
    assert target.loss(prediction + 200 * noise, images, mask) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_trivial_predictors_score_worse_than_a_perfect_prediction(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    loss = target.loss(perfect(target, images, mask), images, mask)
    scores = target.baselines(images, mask)
    assert scores
    for name, score in scores.items():
        assert score.isfinite(), name
        assert score > loss + 1e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_reaches_every_predicted_value(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    prediction = torch.randn(8, target.group(mask).num_masked, *target.value_shape)
    prediction.requires_grad_()
    target.loss(prediction, images, mask).backward()
    assert prediction.grad is not None
    assert prediction.grad.ne(0).float().mean() > 0.99


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - NO_WAY_BACK))
def test_a_prediction_becomes_patches(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    patches = target.invert(perfect(target, images, mask), images, mask)
    assert patches.shape == (8, mask.num_masked, 32)
    assert patches.isfinite().all()
    if kind in EXACT:
        pixels = gather_masked(patchify(images, PATCH), mask)
        torch.testing.assert_close(patches, pixels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clusters", "bins", "mean colors", "squares in a patch"])
def test_what_is_drawn_is_the_same_target_again(kind: str) -> None:
    """Colors, bins and means lose detail, but what they draw has the colors that it shows."""
    target, (images, mask) = make(kind), batch()
    truth = target(images, mask)
    drawn = viz.fill_masked(
        images, mask, target.invert(perfect(target, images, mask), images, mask), PATCH
    )
    torch.testing.assert_close(target(drawn, mask), truth)


@pytest.mark.parametrize("kind", sorted(NO_WAY_BACK))
def test_without_a_way_back_masked_patches_stay_gray(kind: str) -> None:
    target, (images, mask) = make(kind), batch()
    prediction = perfect(target, images, mask)
    with pytest.raises(NotImplementedError):
        target.invert(prediction, images, mask)

    class Model(nn.Module):
        def forward(self, images: Tensor, mask: Mask) -> "Model":
            self.prediction = prediction
            return self

    model = Model()
    model.target = target
    patches = gather_masked(patchify(defaults.reconstruct(model, images, mask), PATCH), mask)
    assert not patches.any()
    assert "stay gray" in defaults.note(model)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fitted_is_in_the_state_and_nothing_else_changes_it(kind: str) -> None:
    fitted, fresh, (images, mask) = make(kind), KINDS[kind](), batch()
    changed = [
        name
        for name, value in fitted.state_dict().items()
        if not torch.equal(value, fresh.state_dict()[name])
    ]
    assert bool(changed) == (kind in FITTED)
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(images, mask), fitted(images, mask))


@pytest.mark.parametrize("kind", KINDS)
def test_no_target_is_trained(kind: str) -> None:
    assert not [name for name, value in make(kind).named_parameters() if value.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
def test_a_viewer_is_given_one_sentence_of_its_own(kind: str) -> None:
    assert make(kind).note.endswith(".")


def test_pixels_are_scored_by_the_fused_loss_on_the_patches_of_the_masks_own_grid() -> None:
    images, mask = batch()
    fine = mask.refine(2)
    for target, normalize in ((make("pixels"), None), (make("normalised pixels"), "patch")):
        assert isinstance(target, PixelTarget)
        for each, patch in ((mask, 4), (fine, 2)):
            prediction = torch.randn(8, each.num_masked, 2 * patch**2)
            expected = losses.masked_pixel_loss(
                prediction, images, each, patch, normalize=normalize, kind=target.error
            )
            assert torch.equal(target.loss(prediction, images, each), expected)
            baselines = losses.baselines(
                images, each, patch, normalize=normalize, kind=target.error
            )
            assert target.baselines(images, each) == baselines


def test_squares_of_several_patches_must_be_masked_as_a_whole() -> None:
    images, _ = batch()
    mask = masking.uniform(masking.key(range(8), seed=0), (4, 6), 0.5)
    with pytest.raises(ValueError, match=r"pixels_8x .* give --unit 2 or a multiple of it"):
        make("squares of patches").group(mask)


def test_the_best_constant_prediction_of_classes_is_their_entropy() -> None:
    target, (images, mask) = make("tokens"), batch()
    shares = target(images, mask).flatten().bincount(minlength=6) / mask.masked_ids.numel()
    logits = shares.clamp(min=1e-12).log().expand(8, mask.num_masked, -1)
    expected = target.loss(logits, images, mask)
    torch.testing.assert_close(target.baselines(images, mask)["frequencies"], expected)


def test_frequencies_of_codes_are_counted_over_the_images_that_are_fitted() -> None:
    target, (images, mask) = make("counted tokens"), batch()
    assert isinstance(target, targets.CountedTokenTarget)
    counts = target.encode(images).flatten().bincount(minlength=6) + 1
    assert torch.equal(target.frequencies, counts / counts.sum())
    scores = target.baselines(images, mask)
    assert scores["uniform"] == pytest.approx(torch.tensor(6.0).log().item())
    logits = target.frequencies.log().expand(8, mask.num_masked, -1)
    torch.testing.assert_close(scores["unigram"], target.loss(logits, images, mask))


def test_a_component_more_than_a_patch_has_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pca_components must be in \[1, 32\].*got 33"):
        targets.PCATarget(*SHAPE, 33)


def test_a_kind_of_ones_own_needs_the_true_values_and_an_error_alone() -> None:
    doubled = NumberTarget(
        lambda images, mask: 2 * gather_masked(patchify(images, PATCH), mask),
        PATCH, 32, error="l2", note="Twice as bright.",
    )  # fmt: skip
    images, mask = batch()
    assert doubled.loss(doubled(images, mask), images, mask) == 0
    assert doubled.baselines(images, mask)["zero"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_stays_in_evaluation_mode_in_a_model_that_is_trained(kind: str) -> None:
    model = nn.Sequential(nn.Linear(1, 1), KINDS[kind]()).train()
    assert model[0].training
    assert not any(module.training for module in model[1].modules())
