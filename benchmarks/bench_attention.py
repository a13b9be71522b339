"""Fused attention against plain matrix products: the basis of the rule in `nn._layers.attend`.

Axes: batch; heads; tokens; head_dim; windows.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Bench, Variant
from mimkit.nn._layers import attend


def fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with PyTorch's fused operator."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend with plain matrix products and a softmax."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


def _compare(bench: Bench, case: str, leaves: tuple[Tensor, ...]) -> None:
    dtype = leaves[0].dtype
    bench.compare(
        case,
        [
            Variant("plain: matmul, softmax, matmul", plain, leaves, leaves, is_baseline=True),
            Variant("fused: scaled_dot_product_attention", fused, leaves, leaves, is_baseline=True),
            Variant("mimkit: attend", attend, leaves, leaves),
        ],
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        passes=("forward", "backward", "both"),
    )


def _projected(
    bench: Bench, batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Make query, key and value as strided views of one fused projection, as in a block."""
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, dtype=dtype, device=bench.device)
    return tuple(part.transpose(1, 2).requires_grad_() for part in qkv.unbind(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "tokens", "heads", "head_dim"),
    [("MAE encoder", 50, 12, 64), ("MAE decoder", 197, 16, 32), ("ViT-B", 197, 12, 64)],
)
def bench_attend(
    bench: Bench, model: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    batch = bench.batch(256, 8)
    leaves = _projected(bench, batch, tokens, heads, head_dim, dtype)
    _compare(bench, f"{model}: B={batch}, {tokens} tokens, {heads} x {head_dim}", leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("model", "windows", "tokens", "heads", "head_dim"),
    [
        ("SimMIM's ViT-B", 1, 197, 12, 64),
        ("Swin-T, stage 1", 64, 36, 3, 32),
        ("Swin-T, stage 3", 4, 36, 12, 32),
    ],
)
def bench_attend_with_bias(
    bench: Bench,
    model: str,
    windows: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    batch = windows * bench.batch(256, 8)
    bias = torch.randn(1, heads, tokens, tokens, dtype=dtype, device=bench.device)
    leaves = *_projected(bench, batch, tokens, heads, head_dim, dtype), bias.requires_grad_()
    case = f"{model}: B={batch}, {tokens} tokens, {heads} x {head_dim}, a bias"
    _compare(bench, case, leaves)
