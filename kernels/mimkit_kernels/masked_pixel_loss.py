"""Score predicted patches against the pixels of the patches `ids`; no target is ever stored.

    errors[b, m] = mean over v of e(prediction[b, m, v] - target[b, m, v])
    target       = patches, or (patches - mu) / sqrt(var + 1e-6) with mu, var of each patch
    e(x)         = x^2 | |x| | x^2 / (2 beta) below beta, |x| - beta / 2 above it

Axes: b batch; m masked patches; v values of a patch, ordered as in `gather_patches`. var is divided
by v - 1. Forward reads prediction and masked pixels once, keeps mu and 1 / sqrt(var + 1e-6);
backward reads both again and writes the gradient of the prediction. Sums are in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import dtype_obstacle, takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._patch_tiles import Geometry, normalized, pixel_offsets, value_offsets
from mimkit_kernels._register import on_device, power_of_2_from, register
from mimkit_kernels.gather_patches import (
    Numbers,
    Statistic,
    gather_patches_reference,
    image_obstacle,
    on_gpu,
)

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
    """Score predictions of the patches `ids`, by kernel or reference.

    Args:
        prediction: [batch, masked, values].
        images: [batch, channels, *spatial]; floats, or uint8, which become fractions first.
        ids: [batch, masked], int64; row-major positions of patches.
        patch: Pixels per patch, one integer per spatial axis.
        mean: One value per channel to subtract from the images.
        std: One value per channel to divide them by.
        channels_last: Whether predicted values lie in the order "p1 p2 c", else "c p1 p2".
        normalize: Whether each target patch is brought to zero mean and unit variance.
        kind: "l2", "l1" or "smooth_l1".
        beta: Of "smooth_l1".

    Returns:
        [batch, masked], the mean error of each patch; float32 (float64 if the prediction is).
    """
    arguments = (prediction, images, ids, list(patch), mean, std, channels_last, normalize, kind)
    if takes_kernel(
        "masked_pixel_loss", prediction, lambda: _obstacle(prediction, images, patch, mean, std)
    ):
        errors: Tensor = masked_pixel_loss_op(*arguments, beta)[0]
        return errors
    return masked_pixel_loss_reference(*arguments, beta)


def masked_pixel_loss_reference(
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
    normalize: bool,
    kind: Kind,
    beta: float,
) -> Tensor:
    """Compute `masked_pixel_loss` in plain PyTorch."""
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    target = _target(images, ids, patch, mean, std, channels_last, normalize, prediction.dtype)
    return elementwise_error(kind, beta)(prediction, target).mean(dim=2)


def _target(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
    normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    # Statistics first, in the order that pixels lie in memory; the asked-for order after.
    target = gather_patches_reference(images, ids, patch, mean, std, False).to(dtype)
    if normalize:
        patch_mean, patch_std = patch_statistics(target)
        target = (target - patch_mean) / patch_std
    return (
        target.unflatten(2, (images.shape[1], -1)).transpose(2, 3).flatten(2)
        if channels_last
        else target
    )


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch, [..., 1], as MAE normalises by them."""
    # Two passes: on a CPU several times faster than `torch.var_mean`.
    mean = patches.mean(dim=-1, keepdim=True)
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + NORMALIZATION_EPS).sqrt()


def elementwise_error(kind: Kind, beta: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the error that `kind` names, of each value."""
    if kind == "smooth_l1":
        return lambda x, y: F.smooth_l1_loss(x, y, beta=beta, reduction="none")
    function = F.mse_loss if kind == "l2" else F.l1_loss
    return lambda x, y: function(x, y, reduction="none")


# Kernels


@jit
def _forward_kernel(
    errors: tl.tensor,
    patch_mean: tl.tensor,
    patch_rstd: tl.tensor,
    prediction: tl.tensor,
    images: tl.tensor,
    ids: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    beta: tl.tensor,
    masked: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    sb: tl.tensor,
    sc: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one patch."""
    VALUES: tl.constexpr = C * P1 * P2 * P3
    slot = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < C * P1 * P2)[:, None] & (column < P3)[None, :]
    token = tl.load(ids + slot)
    source = pixel_offsets(
        slot // masked, token, row, column, g2, g3, sb, sc, s1, s2, s3, P1, P2, P3
    )
    pixels = tl.load(images + source, mask=inside, other=0)
    place = slot * VALUES + value_offsets(row, column, C, P1, P2, P3, CHANNELS_LAST)
    predicted = tl.load(prediction + place, mask=inside, other=0.0).to(tl.float32)
    target = tl.where(inside, normalized(pixels, row, mean, std, C, P1, P2), 0.0)
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
    prediction: tl.tensor,
    images: tl.tensor,
    ids: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    beta: tl.tensor,
    masked: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    sb: tl.tensor,
    sc: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one patch."""
    VALUES: tl.constexpr = C * P1 * P2 * P3
    slot = tl.program_id(0).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < C * P1 * P2)[:, None] & (column < P3)[None, :]
    token = tl.load(ids + slot)
    source = pixel_offsets(
        slot // masked, token, row, column, g2, g3, sb, sc, s1, s2, s3, P1, P2, P3
    )
    pixels = tl.load(images + source, mask=inside, other=0)
    place = slot * VALUES + value_offsets(row, column, C, P1, P2, P3, CHANNELS_LAST)
    predicted = tl.load(prediction + place, mask=inside, other=0.0).to(tl.float32)
    target = normalized(pixels, row, mean, std, C, P1, P2)
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
    # A difference that is not a number must not become a gradient of 0.
    slope = tl.where(difference == difference, slope, difference)
    grad = slope * (tl.load(grad_errors + slot).to(tl.float32) / VALUES)
    tl.store(grad_prediction + place, grad.to(grad_prediction.dtype.element_ty), mask=inside)


# Launchers

MAX_VALUES = 8192  # of a tile; larger patches take the reference


def _num_warps(values: int) -> int:
    return min(max(values // 256, 1), 8)


def _launch_forward(
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Numbers,
    std: Numbers,
    channels_last: bool,
    normalize: bool,
    kind: Kind,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = ids.shape if normalize else (0,)
    errors, patch_mean, patch_rstd = (
        torch.empty(size, dtype=torch.float32, device=images.device)
        for size in (ids.shape, shape, shape)
    )
    geometry = Geometry.of(images, patch)
    rows, columns = geometry.tile(MAX_VALUES, MAX_VALUES)
    if prediction.numel():
        with on_device(images):
            _forward_kernel[(ids.numel(),)](
                errors,
                patch_mean,
                patch_rstd,
                prediction.contiguous(),
                images,
                ids.contiguous(),
                on_gpu(mean, images),
                on_gpu(std, images),
                beta,
                ids.shape[1],
                **geometry.arguments,
                **geometry.constants,
                CHANNELS_LAST=channels_last,
                NORMALIZE=normalize,
                KIND=kind,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=_num_warps(rows * columns),
                enable_fp_fusion=True,
            )
    return errors, patch_mean, patch_rstd


def _launch_backward(
    grad_errors: Tensor,
    patch_mean: Tensor,
    patch_rstd: Tensor,
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Numbers,
    std: Numbers,
    channels_last: bool,
    normalize: bool,
    kind: Kind,
    beta: float,
) -> Tensor:
    grad_prediction = torch.empty(
        prediction.shape, dtype=prediction.dtype, device=prediction.device
    )
    geometry = Geometry.of(images, patch)
    rows, columns = geometry.tile(MAX_VALUES, MAX_VALUES)
    if prediction.numel():
        with on_device(images):
            _backward_kernel[(ids.numel(),)](
                grad_prediction,
                grad_errors.contiguous(),
                patch_mean,
                patch_rstd,
                prediction.contiguous(),
                images,
                ids.contiguous(),
                on_gpu(mean, images),
                on_gpu(std, images),
                beta,
                ids.shape[1],
                **geometry.arguments,
                **geometry.constants,
                CHANNELS_LAST=channels_last,
                NORMALIZE=normalize,
                KIND=kind,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=_num_warps(rows * columns),
                enable_fp_fusion=True,
            )
    return grad_prediction


# Registration


def _obstacle(
    prediction: Tensor,
    images: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
) -> str | None:
    obstacle = dtype_obstacle(prediction=prediction.dtype) or image_obstacle(images, mean, std)
    if obstacle is None and images.requires_grad:
        return "images that require a gradient"
    rows, columns = prediction.shape[2] // patch[-1], patch[-1]
    if obstacle is None and power_of_2_from(rows) * power_of_2_from(columns) > MAX_VALUES:
        return f"patches of {prediction.shape[2]} values"
    return obstacle


def _reference_forward(
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
    normalize: bool,
    kind: Kind,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kernel returns: errors, and the statistics that backward needs."""
    options = (patch, mean, std, channels_last, normalize, kind, beta)
    errors = masked_pixel_loss_reference(prediction, images, ids, *options)
    if not normalize:
        return errors, errors.new_empty(0), errors.new_empty(0)
    patches = gather_patches_reference(images, ids, patch, mean, std, False).float()
    patch_mean, patch_std = patch_statistics(patches)
    return errors, patch_mean.squeeze(2), 1 / patch_std.squeeze(2)


def _reference_backward(
    grad_errors: Tensor,
    patch_mean: Tensor,
    patch_rstd: Tensor,
    prediction: Tensor,
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Numbers,
    std: Numbers,
    channels_last: bool,
    normalize: bool,
    kind: Kind,
    beta: float,
) -> Tensor:
    target = _target(images, ids, patch, mean, std, channels_last, normalize, torch.float32)
    difference = prediction.float() - target
    if kind == "l2":
        slope = 2 * difference
    elif kind == "l1" or beta == 0:
        slope = difference.sign()
    else:
        slope = (difference / beta).clamp(-1, 1)
    grad: Tensor = slope * (grad_errors.unsqueeze(2) / prediction.shape[2])
    return grad.to(prediction.dtype)


def _fake_forward(
    prediction: Tensor, images: Tensor, ids: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    normalize = options[4]
    errors = prediction.new_empty(ids.shape, dtype=torch.float32)
    statistic = ids.shape if normalize else (0,)
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
