"""Losses of trivial predictors, to compare a model's loss with."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import reduce, repeat
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional as F

import mimkit_kernels as kernels
from mimkit._arguments import NotNegative, Scales, checked
from mimkit._checks import Order
from mimkit._grids import Grid, per_axis
from mimkit.losses._masked import Kind, masked_pixel_loss
from mimkit.masking import Mask
from mimkit.patches import gather_patches, grid_of, unpatchify
from mimkit.targets import NormalizedPixels, Pixels


@torch.no_grad()
@checked
def baselines(
    images: Shaped[Tensor, "batch channels *spatial"],
    mask: Mask,
    patch_size: int | Sequence[int],
    *,
    normalize: Literal["patch"] | None = "patch",
    kind: Kind = "l2",
    beta: NotNegative = 1.0,
    order: Order = "p1 p2 c",
    mean: Sequence[float] | Tensor | None = None,
    std: Scales | Tensor | None = None,
) -> dict[str, Float32[Tensor, ""]]:
    """Compute the `masked_pixel_loss` of trivial predictors.

    The predictors use visible patches only, with one
    exception: "interpolated" is multiplied by the factor that fits the masked target best.

    Args:
        images: As in `masked_pixel_loss`.
        mask: As in `masked_pixel_loss`.
        patch_size: As in `masked_pixel_loss`.
        normalize: As in `masked_pixel_loss`.
        kind: As in `masked_pixel_loss`.
        beta: As in `masked_pixel_loss`.
        order: As in `masked_pixel_loss`.
        mean: As in `masked_pixel_loss`.
        std: As in `masked_pixel_loss`.

    Returns:
        "zero": the loss of predicting 0 everywhere.
        "mean_color": the loss of predicting each image's mean visible color.
        "nearest": the loss of predicting a copy of the nearest visible patch.
        "interpolated": the loss of a Gaussian interpolation of the visible pixels.

    Raises:
        ValueError: If the mask has no visible or no masked patches; also what `masked_pixel_loss`
            raises.

    Source:
        mimkit's own.

    Example:
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), 0.75)
        >>> list(baselines(torch.rand(1, 3, 16, 16), mask, 4))
        ['zero', 'mean_color', 'nearest', 'interpolated']
    """
    if not (mask.num_visible and mask.num_masked):
        raise ValueError(f"baselines need visible and masked patches; got {mask}")
    make_target = NormalizedPixels if normalize == "patch" else Pixels
    target = make_target(patch_size, order, mean, std)
    masked, visible = target(images, mask), target(images, mask.complement())
    smooth = make_target(patch_size, order)(
        _interpolate(images, mask, patch_size, mean=mean, std=std), mask
    )
    scale = (smooth * masked).sum() / smooth.square().sum().clamp(min=1e-12)
    predictions = {
        "zero": torch.zeros_like(masked),
        "mean_color": _mean_color(visible, images.shape[1], order).expand_as(masked),
        "nearest": kernels.gather_tokens(visible, _nearest_visible(mask), 0),
        "interpolated": smooth * scale,
    }
    return {
        name: masked_pixel_loss(
            prediction,
            images,
            mask,
            patch_size,
            normalize=normalize,
            kind=kind,
            beta=beta,
            order=order,
            mean=mean,
            std=std,
        )
        for name, prediction in predictions.items()
    }


def _mean_color(
    visible: Float[Tensor, "batch visible patch"], channels: int, order: Order
) -> Float[Tensor, "batch 1 patch"]:
    """Average visible patches over tokens and pixels, channel by channel."""
    values = "(p c)" if order == "p1 p2 c" else "(c p)"
    color = reduce(visible, f"b v {values} -> b c", "mean", c=channels)
    return repeat(color, f"b c -> b 1 {values}", p=visible.shape[2] // channels)


def _nearest_visible(mask: Mask) -> Tensor:
    """Return, for each masked token, the index of the nearest visible one in `visible_ids`."""
    axes = [torch.arange(size, device=mask.device, dtype=torch.float32) for size in mask.grid]
    position = torch.cartesian_prod(*axes).view(mask.num_tokens, -1)
    return torch.cdist(position[mask.masked_ids], position[mask.visible_ids]).argmin(dim=2)


def _interpolate(
    images: Tensor,
    mask: Mask,
    patch_size: int | Sequence[int],
    *,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
) -> Float[Tensor, "batch channels *spatial"]:
    """Fill masked pixels with a Gaussian-weighted mean of the visible ones."""
    grid = grid_of(images, patch_size)
    patch = per_axis("patch_size", patch_size, len(grid))
    visible = gather_patches(images, mask, patch, mean=mean, std=std, order="c p1 p2").float()
    patches = visible.new_zeros(images.shape[0], mask.num_tokens, visible.shape[2])
    ids = mask.visible_ids.unsqueeze(2)
    values = unpatchify(
        patches.scatter(1, ids.expand_as(visible), visible), grid, patch, order="c p1 p2"
    )
    weights = unpatchify(
        patches.scatter(1, ids.expand_as(visible), 1.0), grid, patch, order="c p1 p2"
    )
    # Far from visible pixels, where both sums vanish, the result is the mean color.
    color = values.flatten(2).mean(dim=2) / weights.flatten(2).mean(dim=2)
    color = color.view(*color.shape, *[1] * len(grid))
    floor = 1e-6
    filled: Tensor = (_blur(values, patch) + floor * color) / (_blur(weights, patch) + floor)
    return filled


def _blur(images: Tensor, sigmas: Grid) -> Tensor:
    """Blur every axis with a Gaussian of half a patch as its standard deviation."""
    for axis, sigma in enumerate(sigmas, 2):
        offsets = torch.arange(-2 * sigma, 2 * sigma + 1, device=images.device)
        kernel = torch.exp(-0.5 * (offsets / (0.5 * sigma)).square())
        lines = images.movedim(axis, -1)
        blurred = F.conv1d(
            lines.reshape(-1, 1, lines.shape[-1]),
            (kernel / kernel.sum()).to(images.dtype).view(1, 1, -1),
            padding="same",
        )
        images = blurred.view(lines.shape).movedim(-1, axis)
    return images
