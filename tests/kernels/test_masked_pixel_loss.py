"""Masked pixel loss: errors of patches, and the gradient of the prediction."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.losses import masked_pixel_loss
from mimkit.testing import assert_op_correct
from mimkit_kernels.masked_pixel_loss import (
    _launch_backward,
    _launch_forward,
    masked_pixel_loss_op,
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
    float_dtypes,
    gradients,
    laid_out,
    launches,
    layouts,
    long_tier,
    meta,
    poisoned_outputs,
    random,
)
from tests.kernels.test_gather_patches import NAMES, cases
from tests.strategies import generators

KINDS = ("l2", "l1", "smooth_l1")


def at_imagenet(
    dtype: torch.dtype,
    image_dtype: torch.dtype,
    channels_last: bool,
    normalize: bool,
    kind: str,
) -> None:
    prediction, ids = meta(256, 147, 768, dtype=dtype), meta(256, 147, dtype=torch.int64)
    images = meta(256, 3, 224, 224, dtype=image_dtype)
    statistics = (0.5, 0.4, 0.3) if image_dtype == torch.uint8 else None
    options = ((16, 16), statistics, statistics, channels_last, normalize, kind, 1.0)
    saved = _launch_forward(prediction, images, ids, *options)
    _launch_backward(*saved, prediction, images, ids, *options)


def list_launches() -> dict[str, Any]:
    """List MAE's loss for several dtypes and both orders, and variations of one option each."""
    varied = [
        (dtype, image_dtype, channels_last, True, "l2")
        for dtype in (torch.bfloat16, torch.float32)
        for image_dtype in (torch.float32, torch.uint8)
        for channels_last in (True, False)
    ]
    varied += [(torch.float32, torch.float32, True, n, k) for n in (True, False) for k in KINDS[1:]]
    varied += [(torch.float32, torch.float32, True, False, "l2")]
    varied += [(d, d, True, True, "l2") for d in FLOATS[1:]]
    launches = {}
    for case in varied:
        dtype, image_dtype, channels_last, normalize, kind = case
        words = (
            NAMES[dtype],
            f"{NAMES[image_dtype]} images",
            "p1 p2 c" if channels_last else "c p1 p2",
            "normalized" if normalize else "raw",
            kind,
        )
        launches[", ".join(words)] = lambda case=case: at_imagenet(*case)
    return launches


LAUNCHES = list_launches()


@st.composite
def losses(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], dict[str, Any]]:
    """Draw a prediction, images, ids, a patch size and options."""
    images, ids, patch = draw(cases())
    values = images.shape[1] * math.prod(patch)
    assume(values > 1)
    dtype = draw(st.sampled_from(list(NAMES)))
    images = (images * 50 + 100).clamp(0, 255) if dtype == torch.uint8 else images
    options = {
        "channels_last": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "kind": draw(st.sampled_from(KINDS)),
        "beta": draw(st.sampled_from([0.5, 2.0])),
    }
    if draw(st.booleans()):
        channels = images.shape[1]
        options |= {"mean": [0.1 * c for c in range(channels)], "std": [0.5] * channels}
    prediction = random(draw(generators()), *ids.shape, values)
    return prediction, images.to(dtype), ids, patch, options


@launches
@few
@given(losses(), float_dtypes, layouts, layouts)
def test_errors_and_gradients_match_the_reference(case, dtype, layout, layout_of_images):
    prediction, images, ids, patch, options = case
    images, ids = laid_out(images, layout_of_images), laid_out(ids)
    prediction = laid_out(prediction.to(dtype), layout)

    def loss(prediction: Tensor) -> Tensor:
        return kernels.masked_pixel_loss(prediction, images, ids, patch, **options)

    with mimkit.use("triton"), poisoned_outputs():
        result = loss(prediction)
        (grad,) = gradients(loss, prediction.requires_grad_())
    with mimkit.use("reference"):
        wide = prediction.detach().double().requires_grad_()
        expected = loss(wide)
        (expected_grad,) = gradients(loss, wide)
    assert result.dtype == torch.float32
    assert grad.dtype == dtype
    # Normalization amplifies rounding errors in patches of few, nearly equal values.
    rounding = max((dtype, torch.float16), key=lambda d: torch.finfo(d).eps)
    assert_near(result, expected, rounding)
    if dtype == torch.float32 or options["kind"] == "l2":  # else rounding may change the sign
        assert_near(grad, expected_grad, rounding)


QUICK = [(torch.float32, "l2"), (torch.bfloat16, "smooth_l1")]


@launches
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        pytest.param(dtype, kind, marks=() if (dtype, kind) in QUICK else long_tier)
        for dtype in FLOATS
        for kind in KINDS
    ],
)
def test_loss_works_in_training(dtype, kind):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 2), 0.5).to(DEVICE)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, device=DEVICE)
    prediction = torch.randn(2, 2, 48, device=DEVICE).to(dtype).requires_grad_()

    def loss(prediction: Tensor) -> Tensor:
        return masked_pixel_loss(prediction, images, mask, 4, kind=kind, std=[0.2, 0.3, 0.4])

    with mimkit.use("triton"):
        assert_op_correct(loss, by_reference(loss), [prediction])


@launches
def test_zero_difference_has_zero_gradient():
    """The gradient of the absolute error at 0 is 0, as in PyTorch."""
    ids = torch.tensor([[0, 1]], device=DEVICE)
    images = torch.zeros(1, 1, 2, 4, device=DEVICE)
    prediction = torch.zeros(1, 2, 4, device=DEVICE, requires_grad=True)
    for kind in KINDS:
        with mimkit.use("triton"), poisoned_outputs():
            errors = kernels.masked_pixel_loss(prediction, images, ids, (2, 2), kind=kind)
            (grad,) = torch.autograd.grad(errors.sum(), prediction)
        assert torch.equal(errors, torch.zeros(1, 2, device=DEVICE))
        assert torch.equal(grad, torch.zeros_like(grad))


@launches
def test_nan_predictions_give_nan_errors_and_gradients():
    ids = torch.tensor([[0]], device=DEVICE)
    images = torch.rand(1, 1, 2, 2, device=DEVICE)
    prediction = torch.full((1, 1, 4), float("nan"), device=DEVICE, requires_grad=True)
    for kind in KINDS:
        with mimkit.use("triton"):
            errors = kernels.masked_pixel_loss(prediction, images, ids, (2, 2), kind=kind)
            (grad,) = torch.autograd.grad(errors.sum(), prediction)
        assert errors.isnan().all()
        assert grad.isnan().all()


@launches
def test_unsupported_inputs_are_an_error_only_if_the_kernel_is_required():
    ids = torch.tensor([[0]], device=DEVICE)
    images = torch.rand(1, 1, 2, 2, dtype=torch.float64, device=DEVICE)
    prediction = torch.rand(1, 1, 4, device=DEVICE)
    with mimkit.use("triton"), pytest.raises(ValueError, match=r"does not take images of.*float64"):
        kernels.masked_pixel_loss(prediction, images, ids, (2, 2))
    kernels.masked_pixel_loss(prediction, images, ids, (2, 2))


@launches
def test_second_derivative_raises():
    ids = torch.tensor([[0]], device=DEVICE)
    images = torch.rand(1, 1, 2, 2, device=DEVICE)
    prediction = torch.rand(1, 1, 4, device=DEVICE, requires_grad=True)
    with mimkit.use("triton"):
        errors = kernels.masked_pixel_loss(prediction, images, ids, (2, 2))
        (grad,) = torch.autograd.grad(errors.sum(), prediction, create_graph=True)
        with pytest.raises(NotImplementedError, match="no derivative on the kernel path"):
            grad.sum().backward()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_pass_opcheck(dtype, normalize):
    images, ids = torch.randn(2, 3, 4, 6), torch.tensor([[0, 3], [1, 2]])
    prediction = torch.randn(2, 2, 18).to(dtype).requires_grad_()
    options = ([2, 3], None, [0.5, 0.4, 0.3], True, normalize, "l2", 1.0)
    torch.library.opcheck(masked_pixel_loss_op, (prediction, images, ids, *options))


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("masked_pixel_loss", case, target)
