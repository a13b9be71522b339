"""`masking.uniform` on MAE's grid and on finer grids: kernel, plain PyTorch, torch.compile."""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, kernel_variants
from mimkit import masking
from mimkit.masking import Key


@pytest.mark.parametrize("side", [14, 28, 64])
def bench_kernel_uniform_sample(bench: Bench, side: int) -> None:
    batch = bench.batch(256, 32)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)

    def draw(key: Key) -> Tensor:
        mask = masking.uniform(key, (side, side), 0.75)
        return torch.cat([mask.visible_ids, mask.masked_ids], dim=1)

    bench.compare(
        f"B={batch} L={side * side} ratio=0.75",
        kernel_variants(draw, (key,), (), bench.device),
        dtype=torch.int64,
        tolerance=0,
        moved={"forward": 8 * batch * side * side},
    )
