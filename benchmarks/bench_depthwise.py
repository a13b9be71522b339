"""Masked depth-wise convolution: the authors' dense form against packed cells.

Axes: batch; channels; height, width; visible (cells); cell.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Bench, Variant, has_fast_bfloat16, nbytes
from mimkit import masking
from mimkit.conv import packed_depthwise_conv2d
from mimkit.masking import Mask
from mimkit.patches import neighbors, pack_cells, unpack_cells

GRID, RATIO, KERNEL = (14, 14), 0.75, 5
STAGES = {"stage 1": (256, 4), "stage 2": (384, 2)}  # channels, positions per axis of a cell


def authors_convolution(x: Tensor, visible: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply by the mask, then convolve the whole map."""
    return F.conv2d(x * visible, weight, bias, padding=KERNEL // 2, groups=x.shape[1])


def at_visible(mask: Mask) -> Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Compare visible positions only; the gradient of masked ones is zero."""

    def view(output: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grad, *others = gradients
        return pack_cells(output, mask), pack_cells(grad, mask), *others

    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def bench_depthwise(bench: Bench, stage: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not has_fast_bfloat16(bench.device):
        bench.note(["bfloat16 is emulated on this CPU"])
    channels, side = STAGES[stage]
    batch = bench.batch(256, 8)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    mask = masking.uniform(key, GRID, RATIO)
    options = {"dtype": dtype, "device": bench.device}
    x = torch.randn(batch, channels, GRID[0] * side, GRID[1] * side, **options)
    weight = torch.randn(channels, 1, KERNEL, KERNEL, **options, requires_grad=True)
    bias = torch.randn(channels, **options, requires_grad=True)
    visible = (~mask.refine(side).is_masked).unsqueeze(1).to(dtype)

    cells = pack_cells(x, mask).requires_grad_()
    upstream = torch.randn_like(cells)
    dense_upstream = unpack_cells(upstream, mask)
    variants = []
    for name, layout in (("", torch.contiguous_format), (", channels_last", torch.channels_last)):
        leaf = x.to(memory_format=layout).requires_grad_()
        variants.append(
            Variant(
                f"authors: x * visible, conv2d{name}",
                authors_convolution,
                (leaf, visible, weight, bias),
                (leaf, weight, bias),
                view=at_visible(mask),
                is_baseline=True,
                upstream=dense_upstream.to(memory_format=layout),
            )
        )
    packed = partial(packed_depthwise_conv2d, neighbors=neighbors(mask), cell=side)
    leaves = (cells, weight, bias)
    variants.append(Variant("mimkit, packed", packed, leaves, leaves, upstream=upstream))
    taken = nbytes(cells)
    bench.compare(
        f"{stage}: {tuple(x.shape)}, {mask.num_visible} of {mask.num_tokens} cells visible",
        variants,
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        passes=("forward", "both"),
        moved={"forward": 2 * taken, "both": 5 * taken},
    )
