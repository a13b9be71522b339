"""Losses on masked positions. All means over masked positions are computed here.

Axes: batch; masked (tokens); tokens (of the whole grid); ... (the values of one token); channels;
*spatial; patch (the values of one patch). With a `RaggedMask`: rows (the masked tokens, or all
tokens, of all samples, concatenated); samples.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional as F

import mimkit_kernels as kernels
from mimkit._arguments import NotNegative, Scales, checked
from mimkit._checks import (
    Order,
    channel_statistic,
    check_batch,
    check_can_normalize,
    check_classes,
    check_device,
    check_mask,
    check_pixels,
    check_stacked,
    each_sample,
    is_channels_last,
)
from mimkit._grids import count_tokens, per_axis
from mimkit.masking import Mask, RaggedMask
from mimkit.patches import gather_masked, grid_of
from mimkit_kernels import elementwise_error

Reduction = Literal["mean", "sample", "none"]
# `ignore_index` of `F.cross_entropy`: a value that no target contains.
_NO_CLASS = torch.iinfo(torch.int64).min

Kind = Literal["l2", "l1", "smooth_l1"]
Loss = Float32[Tensor, ""] | Float32[Tensor, " samples"] | Float32[Tensor, "batch masked"]


@checked
def masked_mse(
    prediction: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    target: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    mask: Mask | RaggedMask,
    *,
    reduction: Reduction = "mean",
) -> Loss:
    """Mean squared error over the masked positions.

    Args:
        prediction: Values of each masked token, in the order of `mask.masked_ids`; or of each token
            of the grid, from which the masked ones are gathered. Packed rows with a `RaggedMask`.
        target: The same, for the target.
        mask: Which positions count.
        reduction: "mean" averages over everything, "sample" over each sample, "none" over the
            values of each token. With a `RaggedMask`, "mean" averages the means of the samples:
            all samples have the same weight, also if the batch is split into micro-batches or
            among processes.

    Returns:
        float32 for inputs of any dtype; 0 (with zero gradient) if nothing is masked.

    Raises:
        ValueError: If the shapes differ or do not fit the mask; there is no broadcasting.

    Source:
        MAE, facebookresearch/mae `forward_loss`.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
        >>> masked_mse(torch.zeros(1, 2, 4), torch.ones(1, 2, 4), mask)
        tensor(1.)
    """
    return _masked_loss(elementwise_error("l2"), prediction, target, mask, reduction)


@checked
def masked_l1(
    prediction: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    target: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    mask: Mask | RaggedMask,
    *,
    reduction: Reduction = "mean",
) -> Loss:
    """Mean absolute error over the masked positions.

    Args:
        prediction: As in `masked_mse`.
        target: As in `masked_mse`.
        mask: Which positions count.
        reduction: As in `masked_mse`.

    Returns:
        As in `masked_mse`.

    Raises:
        ValueError: If the shapes differ or do not fit the mask; there is no broadcasting.

    Source:
        SimMIM, arXiv:2111.09886; microsoft/SimMIM `models/simmim.py` divides the sum by
        `mask.sum() + 1e-5` and by `in_chans`; here by the number of values.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
        >>> masked_l1(torch.zeros(1, 2, 4), torch.full((1, 2, 4), -3.0), mask)
        tensor(3.)
    """
    return _masked_loss(elementwise_error("l1"), prediction, target, mask, reduction)


@checked
def masked_smooth_l1(
    prediction: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    target: Float[Tensor, "batch _ ..."] | Float[Tensor, "_ ..."],
    mask: Mask | RaggedMask,
    *,
    beta: NotNegative = 1.0,
    reduction: Reduction = "mean",
) -> Loss:
    """Smooth L1 error over the masked positions: squared below `beta`, absolute above it.

    Args:
        prediction: As in `masked_mse`.
        target: As in `masked_mse`.
        mask: Which positions count.
        beta: Error at which the loss changes from `0.5 * x**2 / beta` to `x - 0.5 * beta`; 0 is L1.
        reduction: As in `masked_mse`.

    Returns:
        As in `masked_mse`.

    Raises:
        ValueError: If `beta` is negative, or the shapes do not fit.

    Source:
        SimMIM, arXiv:2111.09886, in its comparison of prediction targets; the released code has L1
        only. Errors are those of `torch.nn.functional.smooth_l1_loss`.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
        >>> masked_smooth_l1(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 3.0), mask)
        tensor(2.5000)
    """
    _check_error("smooth_l1", beta)
    return _masked_loss(elementwise_error("smooth_l1", beta), prediction, target, mask, reduction)


@checked
def masked_cosine(
    prediction: Float[Tensor, "batch _ dim"],
    target: Float[Tensor, "batch _ dim"],
    mask: Mask,
    *,
    reduction: Reduction = "mean",
) -> Loss:
    """One minus the cosine between prediction and target at the masked positions.

    The lengths of the vectors do not matter.

    Args:
        prediction: One vector per token, as in `masked_mse`.
        target: The same, for the target.
        mask: Which positions count.
        reduction: As in `masked_mse`.

    Returns:
        As in `masked_mse`.

    Raises:
        ValueError: If the shapes differ or do not fit the mask; there is no broadcasting.

    Source:
        CAE v2, arXiv:2211.09799: features of a teacher, `F.cosine_embedding_loss` of unit vectors.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
        >>> masked_cosine(torch.ones(1, 2, 4), torch.full((1, 2, 4), -3.0), mask)
        tensor(2.)
    """
    if prediction.ndim != 3:
        raise ValueError(f"prediction must be [batch, tokens, dim]; got {tuple(prediction.shape)}")

    def error(prediction: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(prediction, target, dim=2)

    return _masked_loss(error, prediction, target, mask, reduction)


@checked
def masked_cross_entropy(
    prediction: Float[Tensor, "... classes"],
    target: Shaped[Tensor, "..."],
    mask: Mask | RaggedMask,
    *,
    reduction: Reduction = "mean",
) -> Loss:
    """Cross-entropy over the masked positions; classes are the last axis of `prediction`.

    Every masked position counts: there is no `ignore_index`.

    Args:
        prediction: Logits of each masked token, or of each token of the grid (see `masked_mse`).
        target: Class of each of these tokens.
        mask: Which positions count.
        reduction: As in `masked_mse`.

    Returns:
        As in `masked_mse`.

    Raises:
        TypeError: If the classes are not integers.
        ValueError: If the shapes do not fit, or (on a CPU) a class is out of range.

    Source:
        BEiT, arXiv:2106.08254; microsoft/unilm `beit/engine_for_pretraining.py` and Atten4Vis/CAE:
        plain cross-entropy, averaged over all masked tokens of the batch. BEiT's masks differ in
        count, so a sample with more masked tokens weighs more; with a `RaggedMask` it does not.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
        >>> masked_cross_entropy(torch.zeros(1, 2, 8), torch.tensor([[3, 7]]), mask)
        tensor(2.0794)
    """
    prediction = _take_masked("prediction", prediction, mask)
    target = _take_masked("target", target, mask)
    if prediction.shape[:-1] != target.shape:
        raise ValueError(
            "prediction must have the shape of target and a last axis of classes; got "
            f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    check_classes("target classes", target, prediction.shape[-1])
    logits, classes = prediction.float().flatten(0, -2), target.long().flatten()
    errors = F.cross_entropy(logits, classes, reduction="none", ignore_index=_NO_CLASS)
    errors = errors.view(target.shape)
    return _reduce(_one_axis_of_values(errors), mask, reduction)


@checked
def masked_pixel_loss(
    prediction: Float[Tensor, "batch _ patch"] | Float[Tensor, "rows patch"],
    images: Shaped[Tensor, "batch channels *spatial"] | Sequence[Shaped[Tensor, "channels ..."]],
    mask: Mask | RaggedMask,
    patch_size: int | Sequence[int],
    *,
    normalize: Literal["patch"] | None = "patch",
    kind: Kind = "l2",
    beta: NotNegative = 1.0,
    order: Order = "p1 p2 c",
    mean: Sequence[float] | Tensor | None = None,
    std: Scales | Tensor | None = None,
    reduction: Reduction = "mean",
) -> Loss:
    """Compute the loss between predicted patches and the masked patches of the images.

    Args:
        prediction: One patch per masked token, in the order of `mask.masked_ids`; packed rows with
            a `RaggedMask`.
        images: Floats, or uint8 in [0, 255], which is converted to float32 in [0, 1] first. Visible
            pixels are not read. With a `RaggedMask`, also a list of images of any sizes.
        mask: Which patches were predicted.
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        normalize: "patch" normalises every target patch to zero mean and unit variance first.
        kind: "l2" (mean squared), "l1" (mean absolute) or "smooth_l1".
        beta: Parameter of "smooth_l1" (see `masked_smooth_l1`).
        order: Order of the values inside a predicted patch (see `patches.patchify`).
        mean: One value per channel to subtract from the images.
        std: One value per channel to divide the images by afterwards.
        reduction: As in `masked_mse`.

    Returns:
        float32 for inputs of any dtype; 0 (with zero gradient) if nothing is masked.

    Raises:
        TypeError: If the images are neither floats nor uint8.
        ValueError: If the prediction does not fit the masked patches, or an option is unknown.

    Source:
        MAE, arXiv:2111.06377, section 3; facebookresearch/mae `forward_loss`.

    Example:
        >>> import torch
        >>> mask = Mask.from_visible_ids(torch.tensor([[0]]), (2, 2))
        >>> images, prediction = torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 12)
        >>> masked_pixel_loss(prediction, images, mask, 2, normalize=None)
        tensor(1.)
    """
    if normalize not in ("patch", None):
        raise ValueError(f'normalize must be "patch" or None; got {normalize!r}')
    _check_error(kind, beta)
    if isinstance(mask, RaggedMask):
        options: dict[str, Any] = {"normalize": normalize, "kind": kind, "beta": beta}
        options |= {"order": order, "mean": mean, "std": std, "reduction": "none"}
        rows = mask.split_masked(_take_masked_rows("prediction", prediction, mask))
        samples = zip(rows, each_sample(images, mask), strict=True)
        parts = [
            masked_pixel_loss(p.unsqueeze(0), *pair, patch_size, **options) for p, pair in samples
        ]
        return _reduce(torch.cat(parts, dim=1).unsqueeze(2), mask, reduction)
    images = check_stacked(images)
    check_pixels(images)
    grid = grid_of(images, patch_size)
    check_mask(mask, grid, images)
    check_batch(mask, prediction, "prediction")
    patch = per_axis("patch_size", patch_size, len(grid))
    shape = (mask.batch_size, mask.num_masked, images.shape[1] * count_tokens(patch))
    if prediction.shape == (mask.batch_size, mask.num_tokens, shape[2]):
        prediction = gather_masked(prediction, mask)
    if prediction.shape != shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {shape}, the masked patches of "
            f"images {tuple(images.shape)}, differ in shape"
        )
    if normalize == "patch":
        check_can_normalize(prediction)
    errors = kernels.masked_pixel_loss(
        prediction,
        images,
        mask.masked_ids,
        patch,
        mean=channel_statistic("mean", mean, images),
        std=channel_statistic("std", std, images),
        channels_last=is_channels_last(order),
        normalize=normalize == "patch",
        kind=kind,
        beta=beta,
    )
    return _reduce(errors.float().unsqueeze(2), mask, reduction)


def _check_error(kind: str, beta: float) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}; got {kind!r}")
    if not beta >= 0:  # also catches nan
        raise ValueError(f"beta must not be negative; got {beta}")


def _masked_loss(
    error: Callable[[Tensor, Tensor], Tensor],
    prediction: Tensor,
    target: Tensor,
    mask: Mask | RaggedMask,
    reduction: Reduction,
) -> Tensor:
    prediction = _take_masked("prediction", prediction, mask)
    target = _take_masked("target", target, mask)
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    errors = error(prediction.float(), target.float())
    return _reduce(_one_axis_of_values(errors), mask, reduction)


def _take_masked(name: str, values: Tensor, mask: Mask | RaggedMask) -> Tensor:
    if 0 in values.shape[1 if isinstance(mask, RaggedMask) else 2 :]:
        raise ValueError(f"{name} must have at least one value each; got {tuple(values.shape)}")
    if isinstance(mask, RaggedMask):  # one sample that holds the tokens of all
        return _take_masked_rows(name, values, mask).unsqueeze(0)
    check_batch(mask, values, name)
    if values.ndim >= 2 and values.shape[1] == mask.num_masked:
        return values
    if values.ndim >= 2 and values.shape[1] == mask.num_tokens:
        taken = gather_masked(_one_axis_of_values(values), mask)
        return taken.view(*taken.shape[:2], *values.shape[2:])
    raise ValueError(
        f"{name} must be [batch, {mask.num_masked} masked or {mask.num_tokens} tokens, ...] "
        f"for this mask; got {tuple(values.shape)}"
    )


def _take_masked_rows(name: str, values: Tensor, mask: RaggedMask) -> Tensor:
    num_masked, num_tokens = len(mask.masked_ids), sum(mask.num_tokens)
    check_device(mask, values, name)
    if len(values) == num_masked:
        return values
    if len(values) == num_tokens:
        return values.index_select(0, mask.masked_rows)
    raise ValueError(
        f"{name} must be [{num_masked} masked or {num_tokens} tokens, ...] for mask {mask}; "
        f"got {tuple(values.shape)}"
    )


def _one_axis_of_values(values: Tensor) -> Tensor:
    return values.flatten(2) if values.ndim > 2 else values.unsqueeze(2)


def _reduce(
    errors: Float32[Tensor, "batch masked values"], mask: Mask | RaggedMask, reduction: Reduction
) -> Tensor:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}; got {reduction!r}")
    if isinstance(mask, RaggedMask):
        return _reduce_rows(errors.mean(dim=2)[0], mask, reduction)
    match reduction:
        case "none":
            return errors.mean(dim=2)
        case "sample":
            return errors.sum(dim=(1, 2)) / max(errors[0].numel() if len(errors) else 0, 1)
        case "mean":
            return errors.sum() / max(errors.numel(), 1)


def _reduce_rows(
    errors: Float32[Tensor, " rows"], mask: RaggedMask, reduction: Reduction
) -> Tensor:
    if reduction == "none":
        return errors
    counts = mask.cu_masked.diff()
    # A sample without masked tokens has no rows, so its infinite weight is never used.
    weights = (1.0 / counts).repeat_interleave(counts, output_size=len(errors))
    scores = errors * weights
    if reduction == "mean":
        return scores.sum() / mask.batch_size
    return torch.stack([rows.sum() for rows in mask.split_masked(scores)])
