"""Fused attention and plain matrix products: the rule in `mimkit.nn._layers.attend`.

Axes: batch; heads; tokens; head_dim.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Bench, Variant
from mimkit.nn._layers import attend


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with PyTorch's fused operator."""
    return F.scaled_dot_product_attention(query, key, value)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with two matrix products around a softmax."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "tokens", "heads", "head_dim"),
    [("MAE encoder", 50, 12, 64), ("MAE decoder", 197, 16, 32), ("ViT-B", 197, 12, 64)],
)
def bench_attend(
    bench: Bench, model: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    batch = 256 if bench.device.type == "cuda" else 8
    # Heads are cut out of one fused projection, as in a block: strided views, not contiguous.
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, dtype=dtype, device=bench.device)
    leaves = tuple(part.transpose(1, 2).requires_grad_() for part in qkv.unbind(2))
    variants = [
        Variant("plain: matmul, softmax, matmul", plain, leaves, leaves, is_baseline=True),
        Variant("fused: scaled_dot_product_attention", fused, leaves, leaves, is_baseline=True),
        Variant("mimkit: attend", attend, leaves, leaves),
    ]
    bench.compare(
        f"{model}: B={batch}, {tokens} tokens, {heads} x {head_dim}",
        variants,
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        passes=("forward", "backward", "both"),
    )
