"""Patchify, unpatchify, and gathering visible patches."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit import masking
from mimkit.masking import Mask
from mimkit.patches import gather_patches, gather_visible, grid_of, patchify, unpatchify
from tests.golden_files import golden
from tests.strategies import generators, grids, images, masked_images, orders, patch_sizes


def cut_out(pictures: np.ndarray, patch: tuple[int, ...], order: str) -> np.ndarray:
    """Cut patches by slicing, one at a time."""
    counts = [range(size // p) for size, p in zip(pictures.shape[2:], patch, strict=True)]
    patches = []
    for place in itertools.product(*counts):
        window = tuple(slice(n * p, (n + 1) * p) for n, p in zip(place, patch, strict=True))
        cut = pictures[(slice(None), slice(None), *window)]
        cut = np.moveaxis(cut, 1, -1) if order == "p1 p2 c" else cut
        patches.append(cut.reshape(len(pictures), -1))
    return np.stack(patches, axis=1)


@given(masked_images(), orders)
def test_patchify_returns_patches_in_row_major_order(drawn, order):
    pictures, _, patch = drawn
    assert np.array_equal(
        patchify(pictures, patch, order=order).numpy(), cut_out(pictures.numpy(), patch, order)
    )


@given(masked_images(), orders)
def test_unpatchify_undoes_patchify(drawn, order):
    pictures, mask, patch = drawn
    patches = patchify(pictures, patch, order=order)
    assert torch.equal(unpatchify(patches, mask.grid, patch, order=order), pictures)


@given(grid=grids(max_tokens=30), order=orders, channels=st.integers(1, 3), data=st.data())
def test_patchify_undoes_unpatchify(grid, order, channels, data):
    patch = data.draw(patch_sizes(len(grid)))
    shape = (2, int(np.prod(grid)), channels * int(np.prod(patch)))
    patches = torch.randn(shape, generator=data.draw(generators()))
    pictures = unpatchify(patches, grid, patch, order=order)
    assert grid_of(pictures, patch) == grid
    assert torch.equal(patchify(pictures, patch, order=order), patches)


@pytest.mark.parametrize("case", range(3))
def test_the_default_order_is_that_of_mae(case):
    arrays = golden("patchify")
    _, patch, _ = arrays.config["cases"][case]
    pictures, theirs = arrays.tensor(f"case{case}/imgs"), arrays.tensor(f"case{case}/patches")
    assert torch.equal(patchify(pictures, patch), theirs)
    assert torch.equal(unpatchify(theirs, grid_of(pictures, patch), patch), pictures)


def test_the_other_order_is_that_of_convolution_weights():
    pictures, weight = torch.randn(2, 3, 8, 12), torch.randn(5, 3, 4, 2)
    convolved = torch.nn.functional.conv2d(pictures, weight, stride=(4, 2)).flatten(2).mT
    projected = patchify(pictures, (4, 2), order="c p1 p2") @ weight.flatten(1).T
    torch.testing.assert_close(projected, convolved)


@given(masked_images(), orders)
def test_gather_patches_returns_the_visible_rows_of_patchify(drawn, order):
    pictures, mask, patch = drawn
    whole = patchify(pictures, patch, order=order)
    gathered = gather_patches(pictures, mask, patch, order=order)
    assert torch.equal(gathered, gather_visible(whole, mask))
    assert gathered.dtype == pictures.dtype
    masked = gather_patches(pictures, mask.complement(), patch, order=order)
    assert torch.equal(masked, gather_visible(whole, mask.complement()))


@given(masked_images(dtype=torch.uint8), orders)
def test_uint8_images_are_divided_by_255(drawn, order):
    pictures, mask, patch = drawn
    gathered = gather_patches(pictures, mask, patch, order=order)
    assert gathered.dtype == torch.float32
    assert torch.equal(gathered, gather_patches(pictures.float() / 255, mask, patch, order=order))


@given(masked_images(dtype=torch.uint8), orders, st.booleans(), generators())
def test_mean_and_std_are_applied_per_channel(drawn, order, as_tensor, generator):
    pictures, mask, patch = drawn
    channels = pictures.shape[1]
    mean = torch.rand(channels, generator=generator)
    std = torch.rand(channels, generator=generator) + 0.5
    shape = (-1, *[1] * len(patch))
    normal = (pictures.float() / 255 - mean.view(shape)) / std.view(shape)
    passed = (mean, std) if as_tensor else (mean.tolist(), std.tolist())
    gathered = gather_patches(pictures, mask, patch, mean=passed[0], std=passed[1], order=order)
    torch.testing.assert_close(gathered, gather_patches(normal, mask, patch, order=order))
    only_mean = gather_patches(pictures, mask, patch, mean=mean)
    torch.testing.assert_close(
        only_mean, gather_patches(normal * std.view(shape), mask, patch), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_float_images_is_kept_until_statistics_are_applied(dtype):
    pictures = torch.rand(2, 3, 8, 8).to(dtype)
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5)
    assert gather_patches(pictures, mask, 4).dtype == dtype
    normal = gather_patches(pictures, mask, 4, mean=[0.5] * 3, std=[0.2] * 3)
    assert normal.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = (gather_patches(pictures.double(), mask, 4) - 0.5) / 0.2
    torch.testing.assert_close(normal.double(), expected, rtol=1e-5, atol=1e-6)


@given(masked_images(), orders)
def test_images_need_not_be_contiguous(drawn, order):
    pictures, mask, patch = drawn
    expected = gather_patches(pictures, mask, patch, order=order)
    strided = torch.stack([pictures, pictures + 1], dim=-1)[..., 0]
    flipped = pictures.flip(-1).flip(-1)
    last = torch.movedim(torch.movedim(pictures, 1, -1).contiguous(), -1, 1)
    for same in (strided, flipped, last, pictures.mT.contiguous().mT):
        assert torch.equal(gather_patches(same, mask, patch, order=order), expected)
    if pictures.ndim == 4:
        channels_last = pictures.to(memory_format=torch.channels_last)
        assert torch.equal(gather_patches(channels_last, mask, patch, order=order), expected)


@given(masked_images(), orders)
def test_masked_pixels_are_not_read(drawn, order):
    pictures, mask, patch = drawn
    hidden = mask.refine(patch).is_masked.unsqueeze(1)
    poisoned = pictures.masked_fill(hidden, float("nan"))
    statistics = {"mean": [0.5] * pictures.shape[1], "std": [0.2] * pictures.shape[1]}
    for options in ({}, statistics):
        seen = gather_patches(poisoned, mask, patch, order=order, **options)
        assert torch.equal(seen, gather_patches(pictures, mask, patch, order=order, **options))


@given(masked_images(max_tokens=8, dtype=torch.float64), orders)
def test_gradients_go_to_the_visible_pixels(drawn, order):
    pictures, mask, patch = drawn
    pictures.requires_grad_()
    weights = torch.randn(gather_patches(pictures, mask, patch).shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(
        (gather_patches(pictures, mask, patch, order=order) * weights).sum(), pictures
    )
    spread = torch.zeros(len(pictures), mask.num_tokens, weights.shape[2], dtype=torch.float64)
    spread.scatter_(1, mask.visible_ids.unsqueeze(2).expand_as(weights), weights)
    assert torch.equal(grad, unpatchify(spread, mask.grid, patch, order=order))


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
def test_gradients_pass_gradcheck(order):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    pictures = torch.randn(2, 2, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: gather_patches(x, mask, (2, 3), mean=[0.1, 0.2], std=[0.5, 2.0], order=order),
        pictures,
    )
    assert torch.autograd.gradcheck(lambda x: patchify(x, (2, 3), order=order), pictures)


@pytest.mark.full
@pytest.mark.untyped
def test_gather_patches_compiles_into_one_graph():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    compiled = torch.compile(gather_patches, fullgraph=True, backend="aot_eager")
    pictures = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    for order in ("p1 p2 c", "c p1 p2"):
        options = {"mean": [0.5] * 3, "std": [0.2] * 3, "order": order}
        torch.testing.assert_close(
            compiled(pictures, mask, 4, **options), gather_patches(pictures, mask, 4, **options)
        )


@given(images((3,), (5,), dtype=torch.uint8))
def test_an_integer_patch_size_applies_to_every_axis(pictures):
    assert torch.equal(patchify(pictures, 5), patchify(pictures, (5,)))
    cube = pictures.view(*pictures.shape[:2], 15, 1, 1).expand(-1, -1, -1, 5, 10)
    assert torch.equal(patchify(cube, 5), patchify(cube, [5, 5, 5]))


PICTURES = torch.zeros(2, 3, 8, 12)
MASK = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: patchify(PICTURES, 5), r"\(8, 12\).*\(5, 5\).*\(5, 10\) or \(10, 15\)"),
        (lambda: patchify(PICTURES, (4, 4, 4)), r"\(4, 4, 4\)"),
        (lambda: patchify(PICTURES, 0), "got 0"),
        (lambda: patchify(PICTURES[0, 0], 4), r"\(8, 12\)"),
        (lambda: patchify(PICTURES, 4, order="c p q"), "'c p q'"),
        (lambda: grid_of(torch.zeros(1, 1, 2, 2, 2, 2), 1), r"\(1, 1, 2, 2, 2, 2\)"),
        (lambda: unpatchify(torch.zeros(2, 5, 48), (2, 3), 4), r"6.*\(2, 3\).*\(2, 5, 48\)"),
        (lambda: unpatchify(torch.zeros(2, 6, 47), (2, 3), 4), r"47 values.*\(4, 4\)"),
        (lambda: unpatchify(torch.zeros(2, 6, 48), (2, 3), 4, order="c"), "'c'"),
        (lambda: gather_patches(PICTURES, MASK, 2), r"\(2, 3\).*\(4, 6\)"),
        (lambda: gather_patches(PICTURES[:1], MASK, 4), "2 samples.* has 1"),
        (lambda: gather_patches(PICTURES, MASK, 4, mean=[0.5]), r"mean.*3 channels.*\(1,\)"),
        (lambda: gather_patches(PICTURES, MASK, 4, std=0.5), r"std.*3 channels.*\(\)"),
        (lambda: gather_patches(PICTURES, MASK, 4, order="c"), "'c'"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.untyped
def test_images_that_are_neither_floats_nor_uint8_raise():
    with pytest.raises(TypeError, match=r"torch\.int64"):
        gather_patches(PICTURES.long(), MASK, 4)


def test_all_visible_and_all_masked_are_legal():
    nothing = Mask.from_bool(torch.zeros(2, 2, 3, dtype=torch.bool))
    pictures = torch.randn(2, 3, 8, 12)
    assert torch.equal(gather_patches(pictures, nothing, 4), patchify(pictures, 4))
    assert gather_patches(pictures, ~nothing, 4).shape == (2, 0, 48)
