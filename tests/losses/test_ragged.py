"""Losses of samples that mask different numbers of tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit import losses
from mimkit.losses import masked_cross_entropy, masked_mse, masked_pixel_loss
from mimkit.masking import RaggedMask
from mimkit.testing import assert_reduction_exact
from tests.strategies import generators, orders, patch_sizes, ragged_masks

LOSSES = [losses.masked_mse, losses.masked_l1, losses.masked_smooth_l1]


def check_against_each_sample(loss, prediction: Tensor, mask: RaggedMask) -> None:
    """Compare values and gradients of `loss(prediction, sample, reduction)` with each sample alone.

    `sample` is `None` for the whole batch, or the index of one sample.
    """
    leaf = prediction.clone().requires_grad_()
    alone = [row.clone()[None].requires_grad_() for row in mask.split_masked(prediction)]
    values = [loss(row, i, "mean") for i, row in enumerate(alone)]
    torch.testing.assert_close(loss(leaf, None, "sample"), torch.stack(values))
    mean = loss(leaf, None, "mean")
    torch.testing.assert_close(mean, torch.stack(values).mean())
    tokens = [loss(row, i, "none")[0] for i, row in enumerate(alone)]
    torch.testing.assert_close(loss(leaf, None, "none"), torch.cat(tokens))
    (grad,) = torch.autograd.grad(mean, leaf)
    expected = torch.autograd.grad(torch.stack(values).sum(), alone)
    expected = torch.cat([one[0] for one in expected]) / mask.batch_size
    torch.testing.assert_close(grad, expected)
    assert mean.dtype == torch.float32


@given(
    ragged_masks(), st.sampled_from(LOSSES), st.lists(st.integers(1, 3), max_size=2), generators()
)
def test_each_sample_contributes_as_it_does_alone(mask, loss, values, generator):
    shape = (len(mask.masked_ids), *values)
    prediction, target = (torch.randn(shape, generator=generator) for _ in range(2))
    one, rows = mask.unbind(), mask.split_masked(target)

    def score(prediction: Tensor, sample: int | None, reduction: str) -> Tensor:
        if sample is None:
            return loss(prediction, target, mask, reduction=reduction)
        return loss(prediction, rows[sample][None], one[sample], reduction=reduction)

    check_against_each_sample(score, prediction, mask)


@given(ragged_masks(), generators())
def test_each_sample_contributes_to_cross_entropy_as_it_does_alone(mask, generator):
    prediction = torch.randn(len(mask.masked_ids), 5, generator=generator)
    target = torch.randint(0, 5, (len(mask.masked_ids),), generator=generator)
    one, rows = mask.unbind(), mask.split_masked(target)

    def score(prediction: Tensor, sample: int | None, reduction: str) -> Tensor:
        if sample is None:
            return masked_cross_entropy(prediction, target, mask, reduction=reduction)
        whole = masked_cross_entropy(
            prediction, rows[sample][None], one[sample], reduction=reduction
        )
        return whole

    check_against_each_sample(score, prediction, mask)


@given(st.data(), orders, st.sampled_from(["l2", "l1", "smooth_l1"]), st.booleans(), generators())
def test_each_image_contributes_to_the_pixel_loss_as_it_does_alone(
    data, order, kind, norm, generator
):
    mask = data.draw(ragged_masks())
    patch = data.draw(patch_sizes(len(mask.grids[0])))
    sizes = [[n * p for n, p in zip(grid, patch, strict=True)] for grid in mask.grids]
    images = [torch.rand(2, *size, generator=generator) for size in sizes]
    values = 2 * torch.Size(patch).numel()
    prediction = torch.randn(len(mask.masked_ids), values, generator=generator)
    options = {"order": order, "kind": kind, "normalize": "patch" if norm else None}
    options |= {"mean": [0.1, 0.2], "std": [0.3, 0.4]}
    one = mask.unbind()

    def score(prediction: Tensor, sample: int | None, reduction: str) -> Tensor:
        batch, which = (images, mask) if sample is None else (images[sample][None], one[sample])
        return masked_pixel_loss(prediction, batch, which, patch, reduction=reduction, **options)

    check_against_each_sample(score, prediction, mask)


@given(ragged_masks(), generators())
def test_of_all_tokens_the_masked_ones_are_used(mask, generator):
    everything = torch.randn(sum(mask.num_tokens), 4, generator=generator)
    target = torch.randn(len(mask.masked_ids), 4, generator=generator)
    expected = masked_mse(everything[mask.masked_rows], target, mask)
    assert torch.equal(masked_mse(everything, target, mask), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_average_to_the_batch(loss):
    assert_reduction_exact(loss, ragged=True)


def test_micro_batches_average_to_the_batch_for_cross_entropy_and_pixels():
    def classes(mask: RaggedMask) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        count = len(mask.masked_ids)
        logits = torch.randn(count, 6, generator=generator)
        return logits, torch.randint(0, 6, (count,), generator=generator)

    assert_reduction_exact(masked_cross_entropy, inputs=classes, ragged=True)

    def patches(mask: RaggedMask) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        count = len(mask.masked_ids)
        return torch.randn(count, 12, generator=generator), torch.arange(count)

    def pixel_loss(prediction: Tensor, which: Tensor, mask: RaggedMask) -> Tensor:
        # The image of a sample depends on its mask only, not on its place in the batch.
        images = [torch.sin(h.float().sum() + torch.arange(144.0)).view(3, 6, 8) for h in
                  mask.is_masked]  # fmt: skip
        return masked_pixel_loss(prediction, images, mask, 2)

    assert_reduction_exact(pixel_loss, inputs=patches, ragged=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, t, mask: (
            (p - t).square().mean()
        ),  # over all tokens: long samples have a larger weight
        lambda p, t, mask: (p - t).square().mean(dim=1).sum() / max(mask.num_masked[0], 1),
        lambda p, t, mask: torch.stack(
            [rows.mean() for rows in mask.split_masked((p - t).square())]
        ).mean(),  # NaN if a sample masks nothing
    ],
)
def test_wrong_means_are_caught(loss):
    with pytest.raises(AssertionError, match="expected"):
        assert_reduction_exact(loss, ragged=True)


@pytest.mark.untyped
def test_errors_repeat_what_was_passed():
    mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([True, True, False])])
    with pytest.raises(ValueError, match=r"3 masked or 5 tokens.*\(4, 2\)"):
        masked_mse(torch.zeros(4, 2), torch.zeros(3, 2), mask)
    with pytest.raises(ValueError, match="differ in shape"):
        masked_mse(torch.zeros(3, 2), torch.zeros(3, 1), mask)
    with pytest.raises(ValueError, match="reduction"):
        masked_mse(torch.zeros(3, 2), torch.zeros(3, 2), mask, reduction="sum")
    with pytest.raises(ValueError, match="there are 1"):
        masked_pixel_loss(torch.zeros(3, 2), [torch.zeros(1, 4)], mask, 2)
    with pytest.raises(TypeError, match="needs a Mask"):
        losses.baselines(torch.zeros(2, 1, 4), mask, 2)
