"""Counting the floating-point operations of a step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mimkit import conv, losses  # noqa: F401  they define the operators below

_Shape = Sequence[int]


def counting_flops() -> FlopCounterMode:
    """Return a context that counts the FLOPs of the operators that run in it.

    PyTorch's counter counts matrix products, convolutions and attention, a multiplication and an
    addition as two. It knows neither attention on a CPU nor the products in mimkit's operators, and
    forgets the groups in the backward pass of a convolution. What runs computes the same as without
    the counter.

    Example:
        >>> x, weight, target = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
        >>> with counting_flops() as counter:
        ...     loss = losses.linear_cross_entropy(x, weight, None, target)
        >>> counter.get_total_flops()  # 2 rows, 3 products and sums for each of 4 words
        48
    """
    aten, mimkit = torch.ops.aten, torch.ops.mimkit
    formulas = {
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        mimkit.linear_cross_entropy: _linear_cross_entropy,
        mimkit.packed_depthwise_conv: _packed_depthwise_conv,
        mimkit.packed_depthwise_conv_weight_gradient: _weight_gradient,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _convolution_backward(
    grad: _Shape, images: _Shape, weight: _Shape, *rest: Any, **out: Any
) -> int:
    """Count each gradient that is wanted, of images and weight, like the output."""
    wanted: Sequence[bool] = rest[-1]
    transposed: bool = rest[4]
    products = math.prod(images if transposed else grad) * math.prod(weight[1:])
    return 2 * products * sum(wanted[:2])


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **out: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: _Shape, query: _Shape, key: _Shape, value: _Shape, *_: Any, **out: Any
) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _linear_cross_entropy(
    x: _Shape,
    weight: _Shape,
    bias: Any,
    target: Any,
    dtype: Any,
    needs_gradient: bool,
    *_: Any,
    **out: Any,
) -> int:
    """Count the logits, and both gradients, which the forward pass computes."""
    return (6 if needs_gradient else 2) * x[0] * math.prod(weight)


def _packed_depthwise_conv(cells: _Shape, weight: _Shape, *_: Any, **out: Any) -> int:
    return 2 * math.prod(cells) * math.prod(weight[1:])


def _weight_gradient(
    cells: _Shape, grad: Any, neighbors: Any, cell: Any, kernel: _Shape, **out: Any
) -> int:
    return 2 * math.prod(cells) * math.prod(kernel)
