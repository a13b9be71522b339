"""Gathering patches of images, and the gradient of the images."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.patches import gather_patches
from mimkit.testing import assert_op_correct
from mimkit_kernels.gather_patches import (
    _launch_gather,
    _launch_scatter,
    gather_patches_op,
    scatter_patches_op,
)
from tests.kernels.figures import check_case, compiled_cases
from tests.kernels.harness import (
    DEVICE,
    DTYPES,
    FLOATS,
    assert_near,
    by_reference,
    compiles,
    few,
    gradients,
    laid_out,
    launches,
    layouts,
    meta,
    poisoned_outputs,
    random,
)
from tests.strategies import generators


def at_imagenet(dtype: torch.dtype, channels_last: bool, statistics: bool) -> None:
    channels = (0.5, 0.4, 0.3) if statistics else None
    ids = meta(256, 49, dtype=torch.int64)
    images = meta(256, 3, 224, 224, dtype=dtype)
    _launch_gather(images, ids, (16, 16), channels, channels, channels_last)


def gradient_at_imagenet(dtype: torch.dtype, channels_last: bool) -> None:
    grad, ids = meta(256, 49, 768, dtype=dtype), meta(256, 49, dtype=torch.int64)
    _launch_scatter(grad, ids, (256, 3, 224, 224), (16, 16), None, channels_last, dtype)


NAMES = {torch.uint8: "uint8", **{dtype: str(dtype).removeprefix("torch.") for dtype in FLOATS}}
LAUNCHES = {
    f"{name}, {order}": lambda dtype=dtype, order=order: at_imagenet(
        dtype, order == "p1 p2 c", dtype == torch.uint8
    )
    for dtype, name in NAMES.items()
    for order in ("c p1 p2", "p1 p2 c")
} | {
    f"gradient, {NAMES[dtype]}, {order}": lambda dtype=dtype, order=order: gradient_at_imagenet(
        dtype, order == "p1 p2 c"
    )
    for dtype in FLOATS
    for order in ("c p1 p2", "p1 p2 c")
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Draw images, ids and a patch size: one to three axes, sizes that are not powers of 2."""
    axes = draw(st.integers(1, 3))
    grid = draw(st.tuples(*[st.integers(1, 3)] * axes))
    patch = draw(st.tuples(*[st.sampled_from([1, 2, 3, 5, 8])] * axes))
    batch, channels = draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4, 7]))
    generator = draw(generators())
    images = random(generator, batch, channels, *(g * p for g, p in zip(grid, patch, strict=True)))
    tokens = math.prod(grid)
    taken = draw(st.integers(1, min(tokens, 4)))
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    return images, order[:, :taken], patch


@launches
@few
@given(cases(), st.sampled_from(list(NAMES)), layouts, st.booleans(), st.booleans())
def test_patches_match_the_reference(case, dtype, layout, channels_last, with_statistics):
    images, ids, patch = case
    images = (images * 50 + 100).clamp(0, 255) if dtype == torch.uint8 else images
    images, ids = laid_out(images.to(dtype), layout), laid_out(ids)
    channels = images.shape[1]
    statistics = {}
    if with_statistics:
        statistics = {"mean": torch.rand(channels).tolist(), "std": [1.5] * channels}
    options = {**statistics, "channels_last": channels_last}
    with mimkit.use("triton"), poisoned_outputs():
        result = kernels.gather_patches(images, ids, patch, **options)
    with mimkit.use("reference"):
        expected = kernels.gather_patches(images, ids, patch, **options)
    assert result.dtype == expected.dtype
    assert_near(result, expected, result.dtype)
    if not with_statistics and dtype != torch.uint8:
        assert torch.equal(result, expected)


@launches
@few
@given(cases(), st.sampled_from(FLOATS), st.booleans(), st.booleans())
def test_gradient_of_images_matches_the_reference(case, dtype, channels_last, scaled):
    images, ids, patch = case
    images, ids = laid_out(images.to(dtype)), laid_out(ids)
    std = [1.5 + c for c in range(images.shape[1])] if scaled else None

    def take(images: Tensor) -> Tensor:
        return kernels.gather_patches(images, ids, patch, std=std, channels_last=channels_last)

    with mimkit.use("triton"), poisoned_outputs():
        (result,) = gradients(take, images.clone().requires_grad_())
    with mimkit.use("reference"):
        (expected,) = gradients(take, images.double().requires_grad_())
    assert result.dtype == dtype
    assert_near(result, expected, dtype)


@launches
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_works_in_training(dtype):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5).to(DEVICE)
    images = torch.randn(2, 3, 8, 12, device=DEVICE).to(dtype).requires_grad_()

    def take(images: Tensor) -> Tensor:
        return gather_patches(images, mask, 4, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])

    with mimkit.use("triton"):
        assert_op_correct(take, by_reference(take), [images])


@launches
def test_patch_larger_than_a_tile():
    images = torch.randn(1, 9, 20, 300, device=DEVICE)
    ids = torch.tensor([[1]], device=DEVICE)
    for channels_last in (False, True):
        with mimkit.use("triton"), poisoned_outputs():
            result = kernels.gather_patches(images, ids, (20, 150), channels_last=channels_last)
        with mimkit.use("reference"):
            expected = kernels.gather_patches(images, ids, (20, 150), channels_last=channels_last)
        assert torch.equal(result, expected)


@launches
def test_second_derivative_is_correct():
    images = torch.randn(1, 2, 4, 4, device=DEVICE, requires_grad=True)
    ids = torch.tensor([[0, 3]], device=DEVICE)
    with mimkit.use("triton"):
        patches = kernels.gather_patches(images, ids, (2, 2))
        (grad,) = torch.autograd.grad(patches.square().sum(), images, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), images)
    expected = torch.zeros_like(images)
    expected[..., :2, :2] = expected[..., 2:, 2:] = 2
    assert torch.equal(second, expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
def test_operators_pass_opcheck(dtype, channels_last):
    images = torch.randn(2, 3, 4, 6).mul(50).to(dtype)
    if dtype != torch.uint8:
        images.requires_grad_()
    ids, std = torch.tensor([[0, 3], [1, 2]]), [1.0, 1.5, 2.0]
    inputs = (images, ids, [2, 3], None, std, channels_last)
    torch.library.opcheck(gather_patches_op, inputs)
    grad = torch.randn(2, 2, 18, requires_grad=True)
    torch.library.opcheck(
        scatter_patches_op, (grad, ids, [2, 3, 4, 6], [2, 3], std, channels_last, torch.float32)
    )


def test_empty_batch_gives_no_patches():
    ids = torch.empty(0, 2, dtype=torch.int64)
    patches = gather_patches_op(torch.empty(0, 3, 4, 4), ids, [2, 2], None, None, True)
    assert patches.shape == (0, 2, 12)


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("gather_patches", case, target)
