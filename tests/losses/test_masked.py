"""Losses on masked positions."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mimkit import masking
from mimkit.losses import (
    masked_cosine,
    masked_l1,
    masked_mse,
    masked_pixel_loss,
    masked_smooth_l1,
)
from mimkit.masking import Mask
from mimkit.targets import NormalizedPixels, Pixels
from tests.golden_files import golden
from tests.strategies import generators, masked_images, masks, orders

betas = st.sampled_from([0.0, 0.3, 1.0, 2.5])


def smooth(difference: Tensor, beta: float) -> Tensor:
    size = difference.abs()
    if beta == 0:
        return size
    return torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


LOSSES = {
    "mse": (masked_mse, lambda difference: difference**2),
    "l1": (masked_l1, torch.abs),
    "smooth_l1": (masked_smooth_l1, lambda difference: smooth(difference, 1.0)),
}
names = st.sampled_from(sorted(LOSSES))
some_masks = masks().filter(lambda mask: mask.num_masked > 0)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def both(generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    return random(generator, *shape), random(generator, *shape)


def masked_rows(values: Tensor, mask: Mask) -> Tensor:
    return torch.stack([row[ids] for row, ids in zip(values, mask.masked_ids, strict=True)])


@given(some_masks, names, st.lists(st.integers(1, 4), max_size=2), generators())
def test_losses_match_their_formulas(mask, name, value_shape, generator):
    loss, formula = LOSSES[name]
    shape = (mask.batch_size, mask.num_masked, *value_shape)
    prediction, target = both(generator, *shape)
    errors = formula((prediction - target).double())
    by_token = errors.flatten(2).mean(dim=2) if value_shape else errors
    expected = {"none": by_token, "sample": by_token.mean(dim=1), "mean": by_token.mean()}
    for reduction, value in expected.items():
        ours = loss(prediction, target, mask, reduction=reduction)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-6)
    assert torch.equal(
        loss(prediction, target, mask), loss(prediction, target, mask, reduction="mean")
    )


@given(some_masks, names, st.booleans(), st.booleans(), generators())
def test_of_whole_sequences_the_masked_tokens_are_used(mask, name, whole_p, whole_t, generator):
    loss, _ = LOSSES[name]
    prediction, target = both(generator, mask.batch_size, mask.num_tokens, 2, 3)
    expected = loss(masked_rows(prediction, mask), masked_rows(target, mask), mask)
    ours = loss(
        prediction if whole_p else masked_rows(prediction, mask),
        target if whole_t else masked_rows(target, mask),
        mask,
    )
    assert torch.equal(ours, expected)


@given(some_masks, names, generators())
def test_tokens_may_be_single_numbers(mask, name, generator):
    loss, _ = LOSSES[name]
    prediction, target = both(generator, mask.batch_size, mask.num_tokens)
    expected = loss(prediction.unsqueeze(2), target.unsqueeze(2), mask)
    assert torch.equal(loss(prediction, target, mask), expected)


@given(some_masks, names, generators())
def test_visible_tokens_have_no_gradient(mask, name, generator):
    loss, _ = LOSSES[name]
    prediction, target = both(generator, mask.batch_size, mask.num_tokens, 2)
    prediction.requires_grad_()
    loss(prediction, target, mask).backward()
    touched = prediction.grad.ne(0).any(dim=2)
    assert torch.equal(touched, mask.is_masked.flatten(1))


@given(some_masks, betas, generators())
def test_smooth_l1_changes_at_beta(mask, beta, generator):
    prediction, target = both(generator, mask.batch_size, mask.num_masked, 3)
    ours = masked_smooth_l1(prediction, target, mask, beta=beta)
    expected = smooth((prediction - target).double(), beta).mean()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@given(some_masks, st.integers(1, 5), st.booleans(), st.floats(0.1, 10), generators())
def test_the_cosine_loss_matches_pytorch_on_the_masked_tokens(mask, dim, whole, length, generator):
    prediction, target = both(generator, mask.batch_size, mask.num_tokens, dim)
    rows = [masked_rows(values, mask).flatten(0, 1) for values in (prediction, target)]
    expected = F.cosine_embedding_loss(*rows, torch.ones(len(rows[0])))
    if not whole:
        prediction, target = masked_rows(prediction, mask), masked_rows(target, mask)
    ours = masked_cosine(length * prediction, target, mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_cosine_loss_of_an_empty_mask_or_of_zeros_is_finite():
    nothing = Mask.from_visible_ids(torch.arange(4).view(1, 4), (2, 2))
    empty = torch.zeros(1, 0, 3, requires_grad=True)
    assert float(masked_cosine(empty, empty, nothing).detach()) == 0
    zeros = torch.zeros(1, 4, 3, requires_grad=True)
    loss = masked_cosine(zeros, torch.ones(1, 4, 3), nothing.complement())
    loss.backward()
    assert float(loss.detach()) == 1
    assert zeros.grad.isfinite().all()


def test_gradients_match_those_of_pytorch():
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
    prediction = torch.randn(2, 12, 6, requires_grad=True)
    target = torch.randn(2, 12, 6)
    for loss, plain in [
        (masked_mse, F.mse_loss),
        (masked_l1, F.l1_loss),
        (masked_smooth_l1, F.smooth_l1_loss),
    ]:
        (grad,) = torch.autograd.grad(loss(prediction, target, mask), prediction)
        (expected,) = torch.autograd.grad(plain(prediction, target), prediction)
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_accumulate_in_float32_for_any_dtype(name, dtype):
    loss, formula = LOSSES[name]
    mask = Mask.from_bool(torch.ones(2, 64, dtype=torch.bool))
    prediction = torch.full((2, 64, 600), 3.0).to(dtype).requires_grad_()
    target = torch.zeros_like(prediction)
    value = loss(prediction, target, mask)
    assert value.dtype == torch.float32
    # 76800 nines: neither float16 (at most 65504) nor bfloat16 (8 bits) can sum them.
    expected = float(formula(torch.tensor(3.0)))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    assert prediction.grad.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tokens", [0, 4], ids=["masked only", "whole sequence"])
@pytest.mark.parametrize("value_shape", [(), (3,), (2, 3)], ids=str)
def test_an_empty_mask_gives_zero_with_zero_gradient(name, tokens, value_shape):
    loss, _ = LOSSES[name]
    mask = Mask.from_bool(torch.zeros(2, 4, dtype=torch.bool))
    prediction = torch.randn(2, tokens, *value_shape, requires_grad=True)
    target = torch.randn(2, tokens, *value_shape)
    value = loss(prediction, target, mask)
    assert value.dtype == torch.float32
    assert value == 0
    value.backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    assert torch.equal(loss(prediction, target, mask, reduction="sample"), torch.zeros(2))
    assert loss(prediction, target, mask, reduction="none").shape == (2, 0)


@pytest.mark.parametrize("normalize", ["patch", None])
def test_an_empty_mask_gives_zero_pixel_loss(normalize):
    mask = Mask.from_bool(torch.zeros(2, 2, 2, dtype=torch.bool))
    prediction = torch.randn(2, 0, 48, requires_grad=True)
    value = masked_pixel_loss(prediction, torch.rand(2, 3, 8, 8), mask, 4, normalize=normalize)
    assert value == 0
    value.backward()
    assert prediction.grad.shape == (2, 0, 48)


@given(some_masks, names, st.integers(1, 3), generators())
def test_equal_micro_batches_average_to_the_batch(mask, name, parts, generator):
    loss, _ = LOSSES[name]
    masks_of_batch = Mask.cat([mask] * parts)
    prediction, target = both(generator, masks_of_batch.batch_size, mask.num_masked, 3)
    whole = loss(prediction, target, masks_of_batch)
    chunks = zip(prediction.chunk(parts), target.chunk(parts), strict=True)
    losses = [loss(*chunk, mask) for chunk in chunks]
    torch.testing.assert_close(sum(losses) / parts, whole, rtol=1e-6, atol=1e-7)
    by_sample = loss(prediction, target, masks_of_batch, reduction="sample")
    torch.testing.assert_close(by_sample.mean(), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.untyped
def test_there_is_no_broadcasting():
    """Broadcasting one channel to three would give a wrong loss without an error."""
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    gray, color = torch.randn(2, 2, 16), torch.randn(2, 2, 48)
    for loss, _ in LOSSES.values():
        with pytest.raises(ValueError, match=r"\(2, 2, 16\).*\(2, 2, 48\)"):
            loss(gray, color, mask)
        with pytest.raises(ValueError, match=r"\(2, 2, 1\).*\(2, 2, 48\)"):
            loss(torch.randn(2, 2, 1), color, mask)
        with pytest.raises(ValueError, match="2 samples.* has 1"):
            loss(color[:1], color[:1], mask)
    with pytest.raises(ValueError, match=r"\(2, 2, 16\).*\(2, 2, 48\)"):
        masked_pixel_loss(gray, torch.rand(2, 3, 8, 8), mask, 4)


# The pixel loss.


@given(
    masked_images(),
    orders,
    st.sampled_from(["patch", None]),
    st.sampled_from(["l2", "l1", "smooth_l1"]),
    st.sampled_from(["mean", "sample", "none"]),
    generators(),
)
def test_the_pixel_loss_matches_target_and_loss(
    drawn, order, normalize, kind, reduction, generator
):
    pictures, mask, patch = drawn
    values = pictures.shape[1] * math.prod(patch)
    assume(values > 1)
    assume(mask.num_masked > 0)
    prediction = random(generator, mask.batch_size, mask.num_masked, values).requires_grad_()
    statistics = {"mean": [0.3] * pictures.shape[1], "std": [0.5] * pictures.shape[1]}
    ours = masked_pixel_loss(
        prediction,
        pictures,
        mask,
        patch,
        normalize=normalize,
        kind=kind,
        beta=0.4,
        order=order,
        reduction=reduction,
        **statistics,
    )
    target_type = NormalizedPixels if normalize == "patch" else Pixels
    target = target_type(patch, order, **statistics)(pictures, mask)
    loss = {
        "l2": masked_mse,
        "l1": masked_l1,
        "smooth_l1": lambda *a, **k: masked_smooth_l1(*a, beta=0.4, **k),
    }[kind]
    expected = loss(prediction, target, mask, reduction=reduction)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(ours.sum(), prediction)
    (expected_grad,) = torch.autograd.grad(expected.sum(), prediction)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


def per_sample_combined(normalize: str | None) -> Tensor:
    """Weight the loss of each sample by its count: the authors' batch masks 13 and 14 patches."""
    arrays = golden("mae_loss")
    pictures, prediction = arrays.tensor("in/imgs"), arrays.tensor("in/pred")
    is_masked = arrays.tensor("in/mask").bool()
    assert is_masked[0].sum() != is_masked[1].sum()
    total = torch.zeros(())
    for row in range(2):
        mask = Mask.from_bool(is_masked[[row]].view(1, 4, 4))
        loss = masked_pixel_loss(
            prediction[[row]][:, is_masked[row]], pictures[[row]], mask, 8, normalize=normalize
        )
        total = total + mask.num_masked * loss
    return total / is_masked.sum()


def test_the_normalised_pixel_loss_matches_the_authors():
    expected = golden("mae_loss").tensor("out/loss_normpix")
    torch.testing.assert_close(per_sample_combined("patch"), expected, rtol=2e-5, atol=0)


def test_the_raw_pixel_loss_matches_the_authors():
    expected = golden("mae_loss").tensor("out/loss_rawpix")
    torch.testing.assert_close(per_sample_combined(None), expected, rtol=2e-5, atol=0)


def test_visible_pixels_do_not_affect_the_pixel_loss():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    pictures, prediction = torch.rand(2, 3, 8, 12), torch.randn(2, 3, 48)
    poisoned = pictures.masked_fill(~mask.refine(4).is_masked.unsqueeze(1), float("nan"))
    for normalize in ("patch", None):
        assert torch.equal(
            masked_pixel_loss(prediction, poisoned, mask, 4, normalize=normalize),
            masked_pixel_loss(prediction, pictures, mask, 4, normalize=normalize),
        )


def test_constant_patches_give_a_finite_loss_and_gradient():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    for value in (0, 1, 255):
        pictures = torch.full((2, 3, 8, 8), value, dtype=torch.uint8)
        prediction = torch.zeros(2, 2, 48, requires_grad=True)
        loss = masked_pixel_loss(prediction, pictures, mask, 4)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert prediction.grad.isfinite().all()


def test_uint8_images_are_divided_by_255():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    prediction = torch.rand(2, 2, 48)
    for options in ({}, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}):
        for normalize in ("patch", None):
            torch.testing.assert_close(
                masked_pixel_loss(prediction, pictures, mask, 4, normalize=normalize, **options),
                masked_pixel_loss(
                    prediction, pictures / 255, mask, 4, normalize=normalize, **options
                ),
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_pixel_loss_of_half_precision_predictions_is_float32(dtype):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    pictures, prediction = torch.rand(2, 3, 8, 8), torch.randn(2, 2, 48).to(dtype)
    loss = masked_pixel_loss(prediction, pictures, mask, 4)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, masked_pixel_loss(prediction.float(), pictures, mask, 4))


def test_losses_stay_float32_under_autocast():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    pictures, prediction = torch.rand(2, 3, 8, 8), torch.randn(2, 2, 48)
    expected = masked_pixel_loss(prediction, pictures, mask, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_pixel_loss(prediction, pictures, mask, 4)
    assert torch.equal(loss, expected)


@pytest.mark.full
@pytest.mark.untyped
def test_the_pixel_loss_compiles_into_one_graph():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    prediction = torch.randn(2, 2, 48, requires_grad=True)
    compiled = torch.compile(masked_pixel_loss, fullgraph=True, backend="aot_eager")
    loss = masked_pixel_loss(prediction, pictures, mask, 4)
    torch.testing.assert_close(compiled(prediction, pictures, mask, 4), loss)
    (grad,) = torch.autograd.grad(compiled(prediction, pictures, mask, 4), prediction)
    torch.testing.assert_close(grad, *torch.autograd.grad(loss, prediction))


MASK = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
PICTURES, PREDICTION = torch.rand(2, 3, 8, 8), torch.randn(2, 2, 48)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked_pixel_loss(PREDICTION, PICTURES, MASK, 4, normalize="mean"), "'mean'"),
        (lambda: masked_pixel_loss(PREDICTION, PICTURES, MASK, 4, kind="l3"), "'l3'"),
        (lambda: masked_pixel_loss(PREDICTION, PICTURES, MASK, 2), r"\(2, 2\).*\(4, 4\)"),
        (
            lambda: masked_pixel_loss(PREDICTION, PICTURES, MASK, 4, kind="smooth_l1", beta=-1.0),
            "got -1.0",
        ),
        (lambda: masked_pixel_loss(PREDICTION[:, :1], PICTURES, MASK, 4), r"\(2, 1, 48\)"),
        (lambda: masked_mse(PREDICTION[:, :1], PREDICTION, MASK), r"2 masked or 4.*\(2, 1, 48\)"),
        (lambda: masked_mse(PREDICTION, PREDICTION, MASK, reduction="sum"), "'sum'"),
        (lambda: masked_smooth_l1(PREDICTION, PREDICTION, MASK, beta=float("nan")), "got nan"),
        (
            lambda: masked_pixel_loss(torch.zeros(2, 2, 1), torch.rand(2, 1, 2, 2), MASK, 1),
            "single value",
        ),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
