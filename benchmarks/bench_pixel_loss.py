"""MAE's loss on normalised pixels: over all patches, then masked; or over masked patches only.

Axes: batch; channels; height, width; tokens; masked; patch.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_patches import CHANNELS, GRID, PATCH, SIZE, authors_patchify
from benchmarks.harness import Bench, Variant, with_compiled
from mimkit import masking
from mimkit.losses import masked_pixel_loss
from mimkit.masking import Mask
from mimkit.patches import gather_masked


def authors_loss(prediction: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Patchify and normalise all patches; return the mean error of masked (1) patches."""
    target = authors_patchify(images)
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (variance + 1e-6) ** 0.5
    errors = ((prediction - target) ** 2).mean(dim=-1)
    return (errors * hidden).sum() / hidden.sum()


def ours(prediction: Tensor, images: Tensor, mask: Mask) -> Tensor:
    """Compute the loss from masked pixels only."""
    return masked_pixel_loss(prediction, images, mask, PATCH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_masked_pixel_loss(bench: Bench, dtype: torch.dtype) -> None:
    batch = bench.batch(256, 8)
    ids = torch.arange(batch, device=bench.device)
    mask = masking.uniform(masking.key(ids, seed=0), GRID, 0.75)
    images = torch.randn(batch, CHANNELS, SIZE, SIZE, device=bench.device)
    everywhere = torch.randn(
        batch, mask.num_tokens, CHANNELS * PATCH**2, dtype=dtype, device=bench.device
    )
    masked = gather_masked(everywhere, mask).requires_grad_()
    everywhere.requires_grad_()
    hidden = mask.is_masked.flatten(1).float()
    variants = [
        Variant(
            "authors: all patches",
            authors_loss,
            (everywhere, images, hidden),
            (everywhere,),
            view=lambda loss, gradients: (loss, gather_masked(gradients[0], mask)),
            is_baseline=True,
        ),
        Variant("mimkit: masked patches", ours, (masked, images, mask), (masked,)),
    ]
    values, size = masked.numel(), masked.element_size()
    bench.compare(
        f"{tuple(images.shape)} p={PATCH}, {mask.num_masked} of {mask.num_tokens} masked",
        with_compiled(variants),
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        passes=("forward", "backward", "both"),
        # Forward reads pixels and prediction; backward reads both again and writes the gradient.
        moved={"forward": values * (4 + size), "backward": values * (4 + 2 * size)},
    )
