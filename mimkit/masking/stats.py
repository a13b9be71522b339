"""Statistics of masks and samplers: marginal probabilities and SimMIM's average distance.

The average distance (AvgDist) is SimMIM's measure of how hard a mask is. The table gives it in
pixels, with the top-1 accuracy on ImageNet-1K after fine-tuning from the papers (SimMIM: Swin-B,
192 px, 100 epochs; MAE: ViT-L, 224 px, 800 epochs):

| mask                         | ratio | AvgDist | top-1 |
|------------------------------|-------|---------|-------|
| SimMIM, center square        | .11   | 11.2    | 82.6  |
| SimMIM, center square        | .25   | 16.5    | 82.5  |
| SimMIM, center square        | .44   | 21.8    | 82.5  |
| SimMIM, random 4-pixel units | .6    | 2.1     | 82.0  |
| SimMIM, random 8-pixel units | .6    | 3.7     | 82.2  |
| SimMIM, random 16-pixel units| .6    | 7.3     | 82.6  |
| SimMIM, random 32-pixel units| .1    | 7.7     | 82.7  |
| SimMIM, random 32-pixel units| .5    | 12.5    | 83.0  |
| SimMIM, random 32-pixel units| .6    | 15.4    | 82.8  |
| SimMIM, random 32-pixel units| .9    | 46.6    | 82.4  |
| SimMIM, random 64-pixel units| .1    | 17.1    | 82.6  |
| MAE, grid                    | .75   | 5.95    | 84.0  |
| MAE, random                  | .75   | 10.2    | 84.9  |

Accuracy is best between 10 and 20 pixels in both papers. The distances were computed with the
samplers of this package, those of random masks as an average over up to 1500 masks. SimMIM's
accuracies are quoted from notes on the paper, not from the paper itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from mimkit._arguments import Size, checked
from mimkit._grids import as_sizes, count_tokens, per_axis
from mimkit.masking._key import key
from mimkit.masking._mask import Mask

_SAMPLES_AT_ONCE = 256


@checked
def average_distance(mask: Mask, patch_size: int | Sequence[int]) -> Float64[Tensor, ""]:
    """Return the mean Euclidean distance from a masked pixel to its nearest visible pixel.

    Args:
        mask: Masks; at least one token of each is visible.
        patch_size: Pixels per token; one integer, or one per axis.

    Returns:
        In pixels, between pixel centers: 1 for adjacent pixels. 0 if nothing is masked.

    Raises:
        ValueError: If the mask has no visible tokens.

    Source:
        SimMIM, arXiv:2111.09886, section 4.1.2 "AvgDist"; not in the released code.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[False, True]]]))
        >>> average_distance(mask, (1, 4))
        tensor(2.5000, dtype=torch.float64)
    """
    if mask.num_visible == 0:
        raise ValueError(f"average_distance needs visible tokens; got {mask}")
    patch = per_axis("patch_size", patch_size, len(mask.grid))
    # One sample at a time, which stays in the cache of a CPU.
    total = sum(_masked_distances(one, patch).double().sum() for one in mask.is_masked)
    num_pixels = mask.num_masked * count_tokens(patch) * mask.batch_size
    return torch.as_tensor(total, dtype=torch.float64) / max(num_pixels, 1)


@checked
def marginals(
    sampler: Callable[..., Mask],
    grid: Sequence[int],
    *arguments: Any,
    num_samples: Size = 4096,
    seed: int = 0,
    **options: Any,
) -> Float[Tensor, "*grid"]:
    """Estimate how often each position is masked.

    Args:
        sampler: `sampler(key, grid, *arguments, **options)`.
        grid: Tokens per axis.
        arguments: Further positional arguments of the sampler, such as its ratio.
        num_samples: Number of masks; the standard error is at most `0.5 / sqrt(num_samples)`.
        seed: Seed of the keys.
        options: Keyword arguments of the sampler.

    Returns:
        Fractions of masks.

    Source:
        mimkit's own.

    Example:
        >>> from mimkit import masking
        >>> marginals(masking.gridwise, (1, 4), num_samples=8)
        tensor([[0., 1., 0., 1.]])
    """
    grid = as_sizes("grid", grid)
    masked = torch.zeros(grid)
    for first in range(0, num_samples, _SAMPLES_AT_ONCE):
        ids = range(first, min(first + _SAMPLES_AT_ONCE, num_samples))
        masked += sampler(key(ids, seed=seed), grid, *arguments, **options).is_masked.sum(dim=0)
    return masked / num_samples


def _masked_distances(
    is_masked: Bool[Tensor, "*grid"], patch: Sequence[int]
) -> Float[Tensor, "*spatial"]:
    """Return the distance of each pixel to the nearest visible one; 0 for visible pixels."""
    # Squared distances are exact in integers. All pixels of a patch are visible or none, so the
    # distance transform is separable: one axis after the other.
    sizes = [tokens * pixels for tokens, pixels in zip(is_masked.shape, patch, strict=True)]
    squares = is_masked.long() * sum(size**2 for size in sizes)
    for axis, pixels in enumerate(patch):
        squares = _nearest_along(squares, axis, pixels)
    return squares.sqrt()


def _nearest_along(
    squares: Int64[Tensor, "*sizes"], axis: int, pixels: int
) -> Int64[Tensor, "*larger_sizes"]:
    """Expand one axis from tokens to pixels; take the smallest squared distance over its tokens."""
    tokens = squares.movedim(axis, 0)
    position = torch.arange(len(tokens) * pixels, device=squares.device)
    position = position.view(-1, *[1] * (tokens.ndim - 1))
    nearest = torch.full_like(tokens, torch.iinfo(torch.int64).max).repeat_interleave(pixels, 0)
    for token, square in enumerate(tokens):
        outside = torch.maximum(token * pixels - position, position - (token + 1) * pixels + 1)
        nearest = torch.minimum(nearest, square + outside.clamp(min=0).square())
    return nearest.movedim(0, axis)
