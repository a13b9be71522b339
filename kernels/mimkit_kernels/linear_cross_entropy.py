"""Cross-entropy of a linear layer's outputs, in chunks: only one chunk of logits exists at a time.

    z        = x @ weight.T + bias
    loss     = mean over n of (logsumexp over w of z[n, w] - z[n, target[n]])
    accuracy = mean over n of (argmax over w of z[n, w] == target[n])
    dz[n, w] = softmax(z)[n, w] - (w == target[n])

Axes: n rows; d width; w words of the vocabulary. For each chunk, one matrix product computes
the logits. One kernel reads them, writes the loss and the accuracy (0 or 1) of each row, and
overwrites the logits with dz. Two more products compute the gradients. So the forward pass does all
the work, and the backward pass only scales. The gradient of the weight is summed in float32 over
the chunks. The division by the number of rows comes last: dz could underflow in float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import is_transformed, settings, takes_kernel
from mimkit_kernels._dtypes import dtype_obstacle, linear_dtype
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import on_device, power_of_2_from
from mimkit_kernels._register import register

if TYPE_CHECKING:
    import triton.language as tl


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy and accuracy of a linear layer, by kernel, chunks or reference.

    Every device works in chunks; the kernel only replaces the operations on the logits of a chunk.

    Args:
        x: [rows, width].
        weight: [words, width].
        bias: [words], or `None`.
        target: [rows], int64; the correct word of each row.

    Returns:
        Loss and accuracy, float32 (the loss float64 for float64 inputs); 0 if there are no rows.
    """
    dtype = linear_dtype(x, weight)
    fused = takes_kernel("linear_cross_entropy", x, lambda: dtype_obstacle(logits=dtype))
    if settings.backend == "reference" or is_transformed():
        return linear_cross_entropy_reference(x, weight, bias, target)
    leaves = (x, weight) if bias is None else (x, weight, bias)
    needs_gradient = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    loss, accuracy, *_ = linear_cross_entropy_op(
        x, weight, bias, target, dtype, needs_gradient, fused
    )
    return loss, accuracy


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `linear_cross_entropy` with all logits at once."""
    dtype = linear_dtype(x, weight)
    bias = None if bias is None else bias.to(dtype)
    logits = F.linear(x.to(dtype), weight.to(dtype), bias)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    rows = max(len(target), 1)
    hits = logits.argmax(dim=1) == target
    return F.cross_entropy(logits, target, reduction="sum") / rows, hits.float().sum() / rows


# Chunks

# Logits of a chunk: large enough for efficient matrix products, small beside the activations.
_CHUNK_VALUES = {"cpu": 1 << 23, "cuda": 1 << 24}


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    needs_gradient: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss, accuracy, and the gradients of `rows * loss` (empty if not needed)."""
    rows, (words, width) = len(target), weight.shape
    accumulate = torch.promote_types(dtype, torch.float32)
    has_bias = needs_gradient and bias is not None
    grad_x = torch.empty(x.shape if needs_gradient else (0,), dtype=x.dtype, device=x.device)
    grad_weight, grad_bias = (
        torch.zeros(shape if needed else (0,), dtype=accumulate, device=x.device)
        for shape, needed in (((words, width), needs_gradient), ((words,), has_bias))
    )
    losses, hits = (torch.empty((rows,), dtype=accumulate, device=x.device) for _ in range(2))
    softmax_gradient: Callable[..., Tensor] = _launch if fused else softmax_gradient_reference
    columns, offsets = weight.to(dtype), None if bias is None else bias.to(dtype)
    # Chunks of equal sizes: matrix products of few rows are slow.
    num_chunks = max(math.ceil(rows * words / _CHUNK_VALUES.get(x.device.type, 1 << 21)), 1)
    chunk = max(math.ceil(rows / num_chunks), 1)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        inputs = x[part].to(dtype)
        logits = F.linear(inputs, columns, offsets)
        grad_logits = softmax_gradient(logits, target[part], losses[part], hits[part])
        if needs_gradient:
            grad_x[part] = grad_logits @ columns
            _accumulate_product(grad_weight, grad_logits.T, inputs)
        if has_bias:
            grad_bias += grad_logits.sum(dim=0, dtype=accumulate)
    rows = max(rows, 1)
    gradients = (grad_x, grad_weight.to(weight.dtype), grad_bias)
    return losses.sum() / rows, hits.sum().float() / rows, *gradients


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total`, whose dtype may be wider than that of the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and torch.version.hip is None:
        total += torch.mm(left, right, out_dtype=total.dtype)  # not rounded before the sum
    else:
        total += left @ right  # no other device has such a product; each chunk is rounded once


def softmax_gradient_reference(
    logits: Tensor, target: Tensor, losses: Tensor, hits: Tensor
) -> Tensor:
    """Write loss and accuracy of each row, and return softmax minus one-hot.

    The logits may be overwritten.
    """
    # On a CPU, `argmax` takes four times as long in bfloat16.
    largest, word = logits.max(dim=1, keepdim=True)
    right = target.unsqueeze(1)
    hits.copy_((word == right).squeeze(1))
    softmax = logits.to(losses.dtype).sub_(largest)
    target_logit = softmax.gather(1, right)
    total = softmax.exp_().sum(dim=1, keepdim=True)
    losses.copy_((total.log() - target_logit).squeeze(1))
    softmax.div_(total).scatter_add_(1, right, total.new_full(total.shape, -1.0))
    return softmax.to(logits.dtype)


# Kernel


@jit
def _softmax_gradient_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    losses: tl.tensor,
    hits: tl.tensor,
    words: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: one row. Reads it twice (the second time from cache) and writes it once."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.arange(0, BLOCK)
    line = logits + row * words
    right = tl.load(target + row)
    # This load must come before the first loop. The second loop overwrites the row, and only the
    # barriers of the first loop's reductions order one warp's loads before another warp's stores.
    target_logit = tl.load(line + tl.minimum(tl.maximum(right, 0), words - 1)).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    best = words
    for start in range(0, words, BLOCK):
        inside = start + word < words
        z = tl.load(line + start + word, mask=inside, other=-float("inf")).to(tl.float32)
        peak = tl.max(z, axis=0)
        here = tl.min(tl.where(z == peak, start + word, words), axis=0)
        best = tl.where(peak > largest, here, best)
        above = tl.maximum(largest, peak)
        total = total * tl.exp(largest - above) + tl.sum(tl.exp(z - above), axis=0)
        largest = above
    log_total = largest + tl.log(total)
    # A target outside the vocabulary must give NaN.
    exists = (right >= 0) & (right < words)
    tl.store(losses + row, tl.where(exists, log_total - target_logit, float("nan")))
    tl.store(hits + row, tl.where(best == right, 1.0, 0.0))
    for start in range(0, words, BLOCK):
        inside = start + word < words
        z = tl.load(line + start + word, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(z - log_total) - tl.where(start + word == right, 1.0, 0.0)
        tl.store(line + start + word, gradient.to(logits.dtype.element_ty), mask=inside)


# Launcher

_MAX_BLOCK = 4096


def _launch(logits: Tensor, target: Tensor, losses: Tensor, hits: Tensor) -> Tensor:
    """Compute `softmax_gradient_reference` in place."""
    rows, words = logits.shape
    block = min(power_of_2_from(words), _MAX_BLOCK)
    with on_device(logits):
        _softmax_gradient_kernel[(rows,)](
            logits,
            target.contiguous(),
            losses,
            hits,
            words,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
            enable_fp_fusion=True,
        )
    return logits


# Registration


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dtype: torch.dtype,
    needs_gradient: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    accumulate = torch.promote_types(dtype, torch.float32)
    return (
        x.new_empty((), dtype=accumulate),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(x.shape if needs_gradient else (0,)),
        weight.new_empty(weight.shape if needs_gradient else (0,)),
        x.new_empty(
            weight.shape[:1] if needs_gradient and bias is not None else (0,), dtype=accumulate
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, *_ = inputs
    _, accuracy, *gradients = output
    ctx.rows, ctx.bias_dtype = max(len(target), 1), None if bias is None else bias.dtype
    ctx.mark_non_differentiable(accuracy, *gradients)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the weight
    ctx.save_for_backward(x, weight, *gradients)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7  # no gradient reached the loss
    scale = grad_loss / ctx.rows
    grad_x, grad_weight, grad_bias = linear_cross_entropy_backward_op(scale, *ctx.saved_tensors)
    grad_bias = None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None, None, None


def _scale(
    scale: Tensor,
    x: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale the gradients. With `x` and `weight` as inputs, a second derivative raises."""
    return tuple(  # type: ignore[return-value]
        (grad * scale).to(grad.dtype) for grad in (grad_x, grad_weight, grad_bias)
    )


linear_cross_entropy_op = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, ScalarType dtype, "
    "bool needs_gradient, bool fused) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch=_forward,
    reference=_forward,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
linear_cross_entropy_backward_op = register(
    "linear_cross_entropy_backward(Tensor scale, Tensor x, Tensor weight, Tensor grad_x, "
    "Tensor grad_weight, Tensor grad_bias) -> (Tensor, Tensor, Tensor)",
    launch=_scale,
    reference=_scale,
    fake=_scale,
)
