"""Gathering and restoring packed tokens, and patches of images of different sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
from mimkit.masking import Mask, RaggedMask
from mimkit.patches import gather_masked, gather_patches, gather_visible, patchify, restore
from tests.strategies import generators, orders, patch_sizes, ragged_masks

DIM = 3


def example() -> RaggedMask:
    return RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([True, True, False])])


@given(ragged_masks(), st.integers(0, 2), generators())
def test_packed_tokens_are_gathered_and_restored_as_for_each_sample_alone(
    mask, num_prefix, generator
):
    samples = [torch.randn(num_prefix + n, DIM, generator=generator) for n in mask.num_tokens]
    tokens = torch.cat(samples).requires_grad_()
    fill = torch.randn(len(mask.masked_ids), DIM, generator=generator)
    positions = torch.randn(len(tokens), DIM, generator=generator)
    visible = gather_visible(tokens, mask, num_prefix=num_prefix)
    masked = gather_masked(tokens, mask, num_prefix=num_prefix)
    restored = restore(visible, mask, fill, positions=positions, num_prefix=num_prefix)
    by_sample = zip(
        mask.unbind(),
        samples,
        mask.split_masked(fill),
        positions.split([num_prefix + n for n in mask.num_tokens]),
        strict=True,
    )
    expected: list[tuple[Tensor, ...]] = []
    for one, sample, filling, places in by_sample:
        seen = gather_visible(sample[None], one, num_prefix=num_prefix)
        hidden = gather_masked(sample[None], one, num_prefix=num_prefix)
        whole = restore(seen, one, filling[None], positions=places, num_prefix=num_prefix)
        expected.append((seen[0], hidden[0], whole[0]))
    for ours, theirs in zip((visible, masked, restored), zip(*expected, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs))
    restored.sum().backward()  # the gradient is 1 at visible rows, 0 elsewhere
    visible_rows = torch.zeros(len(tokens)).index_add(
        0, gather_visible(torch.arange(len(tokens))[:, None], mask, num_prefix=num_prefix)[:, 0],
        torch.ones(len(visible)),
    )  # fmt: skip
    assert torch.equal(tokens.grad, visible_rows[:, None].expand(-1, DIM))


@given(ragged_masks())
def test_one_vector_fills_all_masked_positions(mask):
    visible = torch.ones(len(mask.visible_ids), DIM)
    token = torch.full((DIM,), -1.0, dtype=torch.float64)
    restored = restore(visible, mask, token)
    assert restored.dtype == torch.float64
    hidden = torch.cat([sample.flatten() for sample in mask.is_masked])
    assert torch.equal(restored[:, 0] < 0, hidden)


@given(st.data(), orders, generators())
def test_patches_of_images_of_different_sizes_equal_those_of_each_image(data, order, generator):
    mask = data.draw(ragged_masks())
    patch = data.draw(patch_sizes(len(mask.grids[0])))
    sizes = [[n * p for n, p in zip(grid, patch, strict=True)] for grid in mask.grids]
    images = [torch.randint(0, 256, (2, *size), generator=generator).byte() for size in sizes]
    mean, std = [0.4, 0.5], [0.2, 0.3]
    ours = gather_patches(images, mask, patch, mean=mean, std=std, order=order)
    shape = (1, 2, *[1] * len(patch))
    for rows, image, one in zip(mask.split_visible(ours), images, mask.unbind(), strict=True):
        normal = (image[None] / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(
            shape
        )
        expected = patchify(normal, patch, order=order)[:, one.visible_ids[0]]
        torch.testing.assert_close(rows[None], expected)


def test_a_tensor_of_images_equals_a_list_of_them():
    hidden = torch.tensor([[[True, False]], [[False, False]]])
    images, mask = torch.randn(2, 3, 4, 8), RaggedMask.from_bool(hidden)
    assert torch.equal(gather_patches(images, mask, 4), gather_patches(list(images), mask, 4))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gather_visible(torch.zeros(4, 1), example()), ValueError, r"\[5, ...\].*\(4, 1\)"),
        (lambda: gather_masked(torch.zeros(5, 1), example(), num_prefix=1), ValueError, r"\[7,"),
        (lambda: restore(torch.zeros(3, 1), example(), torch.zeros(1)), ValueError, "visible must"),
        (lambda: restore(torch.zeros(2, 1), example(), torch.zeros(3, 2)), ValueError, "fill must"),
        (
            lambda: restore(
                torch.zeros(2, 1), example(), torch.zeros(1), positions=torch.zeros(4, 1)
            ),
            ValueError,
            "positions must",
        ),
        (lambda: gather_patches([torch.zeros(1, 8)], example(), 4), ValueError, "there are 1"),
        (
            lambda: gather_patches([torch.zeros(1, 8), torch.zeros(1, 8)], example(), 4),
            ValueError,
            r"grid \(3,\).*grid \(2,\)",
        ),
        (
            lambda: gather_patches([torch.zeros(1, 8)], Mask.from_bool(torch.ones(1, 2).bool()), 4),
            TypeError,
            "needs a RaggedMask",
        ),
    ],
)
def test_errors_repeat_what_was_passed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_values_are_checked_with_use_check():
    wrong = RaggedMask._pack(torch.tensor([1, 2]), torch.tensor([1, 0, 1]), [(2,), (3,)], [1, 1])
    gather_visible(torch.zeros(5, 1), wrong)
    with mimkit.use(check=True), pytest.raises(ValueError, match="sample 0"):
        gather_visible(torch.zeros(5, 1), wrong)
