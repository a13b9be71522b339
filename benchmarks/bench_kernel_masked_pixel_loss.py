"""`masked_pixel_loss` at MAE's shapes: kernel, plain PyTorch, torch.compile.

Axes: batch; channels; height, width; masked; patch.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_patches import CHANNELS, GRID, MEAN, PATCH, SIZE, STD
from benchmarks.harness import Bench, kernel_variants
from mimkit import masking
from mimkit._checks import Order
from mimkit.losses import masked_pixel_loss


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_kernel_masked_pixel_loss(
    bench: Bench, dtype: torch.dtype, image_dtype: torch.dtype, order: Order
) -> None:
    batch = bench.batch(256, 8)
    ids = torch.arange(batch, device=bench.device)
    mask = masking.uniform(masking.key(ids, seed=0), GRID, 0.75)
    shape = (batch, CHANNELS, SIZE, SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8, device=bench.device).to(image_dtype)
    statistics = {"mean": MEAN, "std": STD} if image_dtype == torch.uint8 else {}
    values = CHANNELS * PATCH**2
    prediction = torch.randn(batch, mask.num_masked, values, dtype=dtype, device=bench.device)
    prediction.requires_grad_()

    def loss(prediction: Tensor) -> Tensor:
        return masked_pixel_loss(prediction, images, mask, PATCH, order=order, **statistics)

    pixel, value, number = images.element_size(), prediction.element_size(), prediction.numel()
    bench.compare(
        f"{shape} {str(image_dtype).removeprefix('torch.')}, {order}",
        kernel_variants(loss, (prediction,), (prediction,), bench.device),
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2,
        passes=("forward", "backward"),
        moved={"forward": number * (pixel + value), "backward": number * (pixel + 2 * value)},
    )
