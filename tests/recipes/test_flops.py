"""The counter of floating-point operations, against counts by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mimkit import losses
from recipes.engine.flops import counting_flops


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_both_gradients_of_a_convolution_take_twice_its_forward_pass(groups: int) -> None:
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=groups)
    with counting_flops() as forward:
        out = layer(torch.zeros(2, 6, 8, 8, requires_grad=True))
    assert forward.get_total_flops() == 2 * out.numel() * layer.weight[0].numel()
    with counting_flops() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_both_gradients_of_a_transposed_convolution_take_twice_its_forward_pass() -> None:
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2)
    with counting_flops() as forward:
        out = layer(torch.zeros(2, 4, 8, 8, requires_grad=True))
    assert forward.get_total_flops() == 2 * (2 * 4 * 8 * 8) * (6 * 2 * 2)
    with counting_flops() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_attention_counts_wherever_it_is_computed() -> None:
    query, key, value = (torch.zeros(2, 3, length, 4, requires_grad=True) for length in (5, 7, 7))
    product = 2 * (2 * 3) * 5 * 7 * 4
    with counting_flops() as forward:
        out = F.scaled_dot_product_attention(query, key, value)
    assert forward.get_total_flops() == 2 * product
    with counting_flops() as backward:
        out.sum().backward()
    assert backward.get_total_flops() in (4 * product, 5 * product)  # the scores again, or not


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_linear_cross_entropy_counts_its_three_products(has_bias: bool) -> None:
    x, weight = torch.zeros(10, 4, requires_grad=True), torch.zeros(8, 4, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True) if has_bias else None
    with counting_flops() as counter:
        losses.linear_cross_entropy(x, weight, bias, torch.zeros(10, dtype=torch.int64)).backward()
    assert counter.get_total_flops() == 3 * 2 * 10 * 4 * 8


def test_the_packed_convolution_counts_its_output_and_both_gradients() -> None:
    cells, weight = (
        torch.zeros(*shape, requires_grad=True) for shape in ((2, 3, 4, 6), (6, 1, 5, 5))
    )
    neighbors = torch.full((2, 3, 25), -1, dtype=torch.int32)
    one = 2 * cells.numel() * 25
    with counting_flops() as forward:
        out = torch.ops.mimkit.packed_depthwise_conv(cells, weight, None, neighbors, [2, 2])
    assert forward.get_total_flops() == one
    with counting_flops() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * one
