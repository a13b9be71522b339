"""`regressor_inputs` at CAE-B's shapes: kernel, plain PyTorch, torch.compile.

Axes: batch; visible; queries; width.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import mimkit_kernels as kernels
from benchmarks.harness import Bench, kernel_variants, nbytes

VISIBLE = QUERIES = 98
WIDTH, EPS = 768, 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_kernel_regressor_inputs(bench: Bench, dtype: torch.dtype) -> None:
    batch = bench.batch(256, 8)
    lengths = (VISIBLE, QUERIES)
    visible, queries, *positions = (
        torch.randn(batch, length, WIDTH, device=bench.device) for length in (*lengths, *lengths)
    )
    parameters = [torch.randn(WIDTH, device=bench.device) for _ in range(6)]
    leaves = tuple(leaf.requires_grad_() for leaf in (visible, queries, *parameters))

    def make(visible: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
            return kernels.regressor_inputs(visible, queries, *positions, parameters, EPS)

    upstream = tuple(torch.randn_like(part) for part in make(visible, queries))
    read, made = nbytes(visible, queries, *positions), nbytes(*upstream)
    variants = kernel_variants(make, (visible, queries), leaves, bench.device)
    bench.compare(
        f"{batch} x ({VISIBLE} visible + {QUERIES} queries) x {WIDTH}",
        [
            replace(variant, upstream=upstream, view=lambda made, grads: (*made, *grads))
            for variant in variants
        ],
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        passes=("forward", "backward"),
        moved={"forward": read + made, "backward": made + read + nbytes(visible, queries)},
    )
