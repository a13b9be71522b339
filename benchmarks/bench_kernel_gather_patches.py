"""`gather_patches` at MAE's shapes: kernel, plain PyTorch, torch.compile.

Axes: batch; channels; height, width; visible; patch.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.bench_patches import CHANNELS, GRID, MEAN, PATCH, SIZE, STD
from benchmarks.harness import Bench, kernel_variants
from mimkit import masking
from mimkit._checks import Order
from mimkit.patches import gather_patches


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def bench_kernel_gather_patches(bench: Bench, dtype: torch.dtype, order: Order) -> None:
    batch = bench.batch(256, 8)
    ids = torch.arange(batch, device=bench.device)
    mask = masking.uniform(masking.key(ids, seed=0), GRID, 0.75)
    shape, is_bytes = (batch, CHANNELS, SIZE, SIZE), dtype == torch.uint8
    images = torch.randint(256, shape, dtype=torch.uint8, device=bench.device).to(dtype)
    statistics = {"mean": MEAN, "std": STD} if is_bytes else {}
    if not is_bytes:
        images.requires_grad_()

    def gather(images: Tensor) -> Tensor:
        return gather_patches(images, mask, PATCH, order=order, **statistics)

    read = images.numel() * mask.num_visible // mask.num_tokens
    write = 4 if is_bytes else images.element_size()
    bench.compare(
        f"{shape}, {mask.num_visible} of {mask.num_tokens} visible, {order}",
        kernel_variants(gather, (images,), () if is_bytes else (images,), bench.device),
        dtype=dtype,
        tolerance=1e-5 if is_bytes else 0,
        passes=("forward",) if is_bytes else ("forward", "backward"),
        moved={
            "forward": read * (images.element_size() + write),
            "backward": (read + images.numel()) * images.element_size(),
        },
    )
