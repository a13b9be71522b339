"""`linear_cross_entropy` over CAE's 8192 codes: kernel, plain PyTorch, torch.compile.

Axes: rows (masked tokens of a batch); width; words (codes).
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, has_fast_bfloat16, kernel_variants
from mimkit.losses import linear_cross_entropy

WIDTH, WORDS = 768, 8192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def bench_kernel_linear_cross_entropy(bench: Bench, dtype: torch.dtype) -> None:
    on_cpu = 512 if dtype == torch.float32 or has_fast_bfloat16(bench.device) else 8
    rows = bench.batch(25_088, on_cpu)
    x = torch.randn(rows, WIDTH, dtype=dtype, device=bench.device, requires_grad=True)
    weight = (torch.randn(WORDS, WIDTH, device=bench.device) * 0.02).to(dtype).requires_grad_()
    bias = torch.zeros(WORDS, dtype=dtype, device=bench.device, requires_grad=True)
    target = torch.randint(WORDS, (rows,), device=bench.device)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, bias, target)

    leaves = (x, weight, bias)
    variants = kernel_variants(loss, leaves, leaves, bench.device)
    case = f"{rows} rows x {WIDTH} x {WORDS} words"
    bench.compare(
        case,
        variants,
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 3e-2,
        passes=("forward", "both"),
    )
    if bench.device.type == "cuda":
        peaks = {variant.name: _peak_bytes(variant.forward, leaves) for variant in variants}
        bench.note(
            [
                f"{case}, {dtype}: peak memory {name}: {peak / 2**20:.0f} MiB, "
                f"{peak / peaks['eager']:.2f} of eager"
                for name, peak in peaks.items()
            ],
            kind="memory",
            case=case,
            dtype=str(dtype),
            peak_bytes=peaks,
        )


def _peak_bytes(forward: object, leaves: tuple[Tensor, ...]) -> int:
    """Return the peak memory of forward and backward beyond what was allocated before."""
    assert callable(forward)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(forward(), leaves)
    return torch.cuda.max_memory_allocated() - before
