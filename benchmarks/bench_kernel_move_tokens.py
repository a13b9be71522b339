"""`gather_visible` and `restore` at MAE's shapes: kernels, plain PyTorch, torch.compile.

Axes: batch; class token and tokens; dim.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, kernel_variants, nbytes
from mimkit import masking
from mimkit.masking import Mask
from mimkit.patches import gather_visible, restore

GRID, ENCODER_DIM, DECODER_DIM = (14, 14), 768, 512
DTYPES = [torch.float32, torch.bfloat16]


def _mask(bench: Bench) -> Mask:
    batch, device = bench.batch(256, 8), bench.device
    return masking.uniform(masking.key(torch.arange(batch, device=device), seed=0), GRID, 0.75)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_kernel_gather_tokens(bench: Bench, dtype: torch.dtype) -> None:
    mask = _mask(bench)
    shape = (mask.batch_size, 1 + mask.num_tokens, ENCODER_DIM)
    tokens = torch.randn(shape, dtype=dtype, device=bench.device, requires_grad=True)

    def gather(tokens: Tensor) -> Tensor:
        return gather_visible(tokens, mask, num_prefix=1)

    taken = nbytes(tokens) * (1 + mask.num_visible) // (1 + mask.num_tokens)
    bench.compare(
        f"{shape}, {mask.num_visible} visible",
        kernel_variants(gather, (tokens,), (tokens,), bench.device),
        dtype=dtype,
        tolerance=0,
        passes=("forward", "backward"),
        moved={"forward": 2 * taken, "backward": taken + nbytes(tokens)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_kernel_restore_tokens(bench: Bench, dtype: torch.dtype) -> None:
    mask = _mask(bench)
    shape = (mask.batch_size, 1 + mask.num_visible, DECODER_DIM)
    visible = torch.randn(shape, dtype=dtype, device=bench.device, requires_grad=True)
    fill = torch.randn(DECODER_DIM, dtype=dtype, device=bench.device, requires_grad=True)
    positions = torch.randn(1 + mask.num_tokens, DECODER_DIM, dtype=dtype, device=bench.device)

    def restore_tokens(visible: Tensor, fill: Tensor) -> Tensor:
        return restore(visible, mask, fill, positions=positions, num_prefix=1)

    restored = mask.batch_size * nbytes(positions)
    bench.compare(
        f"{shape} to {1 + mask.num_tokens} tokens",
        kernel_variants(restore_tokens, (visible, fill), (visible, fill), bench.device),
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        passes=("forward", "backward"),
        moved={
            "forward": nbytes(visible, positions) + restored,
            "backward": restored + nbytes(visible),
        },
    )
