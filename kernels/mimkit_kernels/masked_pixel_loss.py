"""Compute the loss of predicted patches against pixels, without storing the targets.

    errors[b, m] = mean over v of e(prediction[b, m, v] - target[b, m, v])
    target       = patches, or (patches - mu) / sqrt(var + 1e-6) with mu, var of each patch
    e(x)         = x^2 | |x| | x^2 / (2 beta) below beta, |x| - beta / 2 above it

Axes: b batch; m masked patches; v values of a patch, ordered as in `gather_patches`. var divides by
v - 1. The forward pass reads the prediction and the masked pixels once and saves mu and
1 / sqrt(var + 1e-6). The backward pass reads both again and writes the gradient of the prediction.
Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._dtypes import dtype_obstacle
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import on_device, power_of_2_from
from mimkit_kernels._patch_tiles import (
    ImageLayout,
    describe,
    load_patch,
    tile_positions,
    value_offsets,
)
from mimkit_kernels._patches import (
    Statistic,
    channel_tensor,
    image_obstacle,
    prepare_statistics,
    take_pixels,
)
from mimkit_kernels._register import register

if TYPE_CHECKING:
    import triton.language as tl

Kind = Literal["l2", "l1", "smooth_l1"]
NORMALIZATION_EPS = 1e-6


def masked_pixel_loss(
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    *,
    mean: Statistic = None,
    std: Statistic = None,
    channels_last: bool = True,
    normalize: bool = True,
    kind: Kind = "l2",
    beta: float = 1.0,
) -> Tensor:
    """Compute the error of each predicted patch, by kernel or reference.

    Args:
        prediction: [batch, masked, values].
        images: [batch, channels, *spatial]; floats, or uint8, which become fractions first.
        ids: [batch, masked], int64; row-major positions of patches.
        patch: Pixels per patch, one integer per spatial axis.
        mean: One value per channel to subtract from the images.
        std: One value per channel to divide them by.
        channels_last: Whether predicted values have the order "p1 p2 c", else "c p1 p2".
        normalize: Whether each target patch is normalized to zero mean and unit variance.
        kind: "l2", "l1" or "smooth_l1".
        beta: Where "smooth_l1" changes from quadratic to linear.

    Returns:
        [batch, masked], the mean error of each patch; float32 (float64 for float64 predictions).
    """
    options = Options(list(patch), mean, std, channels_last, normalize, kind, beta)
    if takes_kernel(
        "masked_pixel_loss", prediction, lambda: _obstacle(prediction, images, options)
    ):
        errors: Tensor = masked_pixel_loss_op(prediction, images, ids, *options)[0]
        return errors
    return masked_pixel_loss_reference(prediction, images, ids, *options)


class Options(NamedTuple):
    """Options of `masked_pixel_loss`, in the order of the operators' arguments."""

    patch: Sequence[int]
    mean: Statistic
    std: Statistic
    channels_last: bool
    normalize: bool
    kind: Kind
    beta: float


def masked_pixel_loss_reference(
    prediction: Tensor, images: Tensor, ids: Tensor, *options: Any
) -> Tensor:
    """Compute `masked_pixel_loss` in plain PyTorch."""
    how = Options(*options)
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = _target(images, ids, how, prediction.dtype)
    return elementwise_error(how.kind, how.beta)(prediction, target).mean(dim=2)


def _target(images: Tensor, ids: Tensor, how: Options, dtype: torch.dtype) -> Tensor:
    # Statistics are computed in memory order; the requested order of values comes after.
    pixels = take_pixels(images, ids, how.patch, how.mean, how.std)
    target = pixels.flatten(2).to(dtype)
    if how.normalize:
        patch_mean, patch_std = patch_statistics(target)
        target = (target - patch_mean) / patch_std
    if how.channels_last:
        target = target.unflatten(2, (images.shape[1], -1)).transpose(2, 3).flatten(2)
    return target


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of each patch, [..., 1], as MAE defines them."""
    # Two passes: several times faster on a CPU than `torch.var_mean`.
    mean = patches.mean(dim=-1, keepdim=True)
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + NORMALIZATION_EPS).sqrt()


def elementwise_error(kind: Kind, beta: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the elementwise error function of `kind`."""
    if kind == "smooth_l1":
        return lambda x, y: F.smooth_l1_loss(x, y, beta=beta, reduction="none")
    function = F.mse_loss if kind == "l2" else F.l1_loss
    return lambda x, y: function(x, y, reduction="none")


# Kernels


class Inputs(NamedTuple):
    """What both kernels read; they take it whole.

    Attributes:
        prediction: [batch, masked, values].
        images: [batch, channels, *spatial].
        ids: [batch, masked], the predicted patches.
        mean: One value per channel, or `None`.
        std: One value per channel, or `None`.
        masked: Predicted patches per sample.
        layout: Layout of the images.
    """

    prediction: Tensor
    images: Tensor
    ids: Tensor
    mean: Tensor | None
    std: Tensor | None
    masked: int
    layout: ImageLayout


@jit
def _load_pair(
    inputs: Inputs,
    slot: tl.tensor,
    SHAPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Load one predicted patch and its pixels; also return its offsets and which are inside."""
    row, column, inside = tile_positions(0, 1, SHAPE, ROWS, COLUMNS)
    pixels = load_patch(
        inputs.images, inputs.ids, inputs.mean, inputs.std,
        slot, inputs.masked, row, column, inside, inputs.layout, SHAPE,
    )  # fmt: skip
    place = value_offsets(slot, row, column, SHAPE, CHANNELS_LAST)
    predicted = tl.load(inputs.prediction + place, mask=inside, other=0.0).to(tl.float32)
    return predicted, pixels, place, inside


@jit
def _forward_kernel(
    errors: tl.tensor,
    patch_mean: tl.tensor,
    patch_rstd: tl.tensor,
    inputs: Inputs,
    beta: tl.tensor,
    SHAPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one patch."""
    VALUES: tl.constexpr = SHAPE.ROWS * SHAPE.COLUMNS
    slot = tl.program_id(0)
    predicted, pixels, _, inside = _load_pair(inputs, slot, SHAPE, CHANNELS_LAST, ROWS, COLUMNS)
    target = tl.where(inside, pixels, 0.0)
    if NORMALIZE:
        mu = tl.sum(tl.sum(target, axis=1), axis=0) / VALUES
        centered = tl.where(inside, target - mu, 0.0)
        variance = tl.sum(tl.sum(centered * centered, axis=1), axis=0) / (VALUES - 1)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-6))
        tl.store(patch_mean + slot, mu)
        tl.store(patch_rstd + slot, rstd)
        target = centered * rstd
    difference = predicted - target
    size = tl.abs(difference)
    if KIND == "l2":
        error = difference * difference
    elif KIND == "l1":
        error = size
    else:
        error = tl.where(size < beta, 0.5 * size * size / beta, size - 0.5 * beta)
    error = tl.where(inside, error, 0.0)
    tl.store(errors + slot, tl.sum(tl.sum(error, axis=1), axis=0) / VALUES)


@jit
def _backward_kernel(
    grad_prediction: tl.tensor,
    grad_errors: tl.tensor,
    patch_mean: tl.tensor,
    patch_rstd: tl.tensor,
    inputs: Inputs,
    beta: tl.tensor,
    SHAPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one patch."""
    slot = tl.program_id(0)
    predicted, target, place, inside = _load_pair(inputs, slot, SHAPE, CHANNELS_LAST, ROWS, COLUMNS)
    if NORMALIZE:
        target = (target - tl.load(patch_mean + slot)) * tl.load(patch_rstd + slot)
    difference = predicted - target
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    if KIND == "l2":
        slope = 2.0 * difference
    elif KIND == "l1":
        slope = sign
    else:
        slope = tl.where(tl.abs(difference) < beta, difference / beta, sign)
    # A difference of NaN must not become a gradient of 0.
    slope = tl.where(difference == difference, slope, difference)
    grad = slope * (tl.load(grad_errors + slot).to(tl.float32) / (SHAPE.ROWS * SHAPE.COLUMNS))
    tl.store(grad_prediction + place, grad.to(grad_prediction.dtype.element_ty), mask=inside)


# Launchers

MAX_VALUES = 8192  # of a tile; larger patches use the reference


def _num_warps(values: int) -> int:
    """Return one warp per 1024 values: the values of a thread share its offset computations."""
    return min(max(values // 1024, 1), 8)


def _prepare(
    prediction: Tensor, images: Tensor, ids: Tensor, how: Options, *, interleaved: bool
) -> tuple[Inputs, dict[str, Any]]:
    """Return what both kernels read, and the constants of a launch."""
    layout, shape = describe(images, how.patch, interleaved=interleaved)
    rows, columns = shape.tile(MAX_VALUES, MAX_VALUES)
    mean, std = (
        channel_tensor(statistic, images.device)  # type: ignore[arg-type]
        for statistic in (how.mean, how.std)
    )
    inputs = Inputs(
        prediction.contiguous(), images, ids.contiguous(), mean, std, ids.shape[1], layout
    )
    constants = {
        "SHAPE": shape,
        "CHANNELS_LAST": how.channels_last,
        "NORMALIZE": how.normalize,
        "KIND": how.kind,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": _num_warps(rows * columns),
        "enable_fp_fusion": True,
    }
    return inputs, constants


def _launch_forward(
    prediction: Tensor, images: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    how = Options(*options)
    shape = ids.shape if how.normalize else (0,)
    errors, patch_mean, patch_rstd = (
        torch.empty(size, dtype=torch.float32, device=images.device)
        for size in (ids.shape, shape, shape)
    )
    inputs, constants = _prepare(prediction, images, ids, how, interleaved=False)
    if prediction.numel():
        with on_device(images):
            _forward_kernel[(ids.numel(),)](
                errors, patch_mean, patch_rstd, inputs, how.beta, **constants
            )
    return errors, patch_mean, patch_rstd


def _launch_backward(
    grad_errors: Tensor,
    patch_mean: Tensor,
    patch_rstd: Tensor,
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    *options: Any,
) -> Tensor:
    how = Options(*options)
    grad_prediction = torch.empty(
        prediction.shape, dtype=prediction.dtype, device=prediction.device
    )
    inputs, constants = _prepare(prediction, images, ids, how, interleaved=how.channels_last)
    if prediction.numel():
        with on_device(images):
            _backward_kernel[(ids.numel(),)](
                grad_prediction,
                grad_errors.contiguous(),
                patch_mean,
                patch_rstd,
                inputs,
                how.beta,
                **constants,
            )
    return grad_prediction


# Registration


def _obstacle(prediction: Tensor, images: Tensor, how: Options) -> str | None:
    obstacle = dtype_obstacle(prediction=prediction.dtype)
    obstacle = obstacle or image_obstacle(images, how.mean, how.std)
    if obstacle is None and images.requires_grad:
        return "images that require a gradient"
    shapes = [describe(images, how.patch, interleaved=either)[1] for either in (False, True)]
    sizes = [power_of_2_from(shape.ROWS) * power_of_2_from(shape.COLUMNS) for shape in shapes]
    if obstacle is None and max(sizes) > MAX_VALUES:
        return f"patches of {prediction.shape[2]} values"
    return obstacle


def _reference_forward(
    prediction: Tensor, images: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kernel returns: errors, and the statistics for the backward pass."""
    how = Options(*options)
    errors = masked_pixel_loss_reference(prediction, images, ids, *options)
    if not how.normalize:
        return errors, errors.new_empty(0), errors.new_empty(0)
    patches = take_pixels(images, ids, how.patch, how.mean, how.std).flatten(2).float()
    patch_mean, patch_std = patch_statistics(patches)
    return errors, patch_mean.squeeze(2), 1 / patch_std.squeeze(2)


def _reference_backward(
    grad_errors: Tensor,
    patch_mean: Tensor,
    patch_rstd: Tensor,
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    *options: Any,
) -> Tensor:
    how = Options(*options)
    difference = prediction.float() - _target(images, ids, how, torch.float32)
    if how.kind == "l2":
        slope = 2 * difference
    elif how.kind == "l1" or how.beta == 0:
        slope = difference.sign()
    else:
        slope = (difference / how.beta).clamp(-1, 1)
    grad: Tensor = slope * (grad_errors.unsqueeze(2) / prediction.shape[2])
    return grad.to(prediction.dtype)


def _fake_forward(
    prediction: Tensor, images: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    prepare_statistics(images.device, Options(*options).mean, Options(*options).std)
    errors = prediction.new_empty(ids.shape, dtype=torch.float32)
    statistic = ids.shape if Options(*options).normalize else (0,)
    return errors, errors.new_empty(statistic), errors.new_empty(statistic)


def _fake_backward(
    grad_errors: Tensor,
    patch_mean: Tensor,
    patch_rstd: Tensor,
    prediction: Tensor,
    *rest: Any,
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prediction, images, ids, *ctx.options = inputs
    _, patch_mean, patch_rstd = output
    ctx.mark_non_differentiable(patch_mean, patch_rstd)
    ctx.save_for_backward(patch_mean, patch_rstd, prediction, images, ids)


def _backward(ctx: Any, grad_errors: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad = masked_pixel_loss_backward_op(grad_errors, *ctx.saved_tensors, *ctx.options)
    return grad, *[None] * 9


_OPTIONS = (
    "Tensor prediction, Tensor images, Tensor ids, SymInt[] patch, float[]? mean, float[]? std, "
    "bool channels_last, bool normalize, str kind, float beta"
)
masked_pixel_loss_op = register(
    f"masked_pixel_loss({_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    launch=_launch_forward,
    reference=_reference_forward,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
masked_pixel_loss_backward_op = register(
    "masked_pixel_loss_backward(Tensor grad_errors, Tensor patch_mean, Tensor patch_rstd, "
    f"{_OPTIONS}) -> Tensor",
    launch=_launch_backward,
    reference=_reference_backward,
    fake=_fake_backward,
)
