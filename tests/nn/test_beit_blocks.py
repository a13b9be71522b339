"""BEiT's additions to a transformer block: layer scale, no key bias, an attention bias."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mimkit.nn import TransformerBlock
from mimkit.nn._layers import Attention
from tests.strategies import generators


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3, generator=generator)


@given(generators(), st.integers(1, 3), st.integers(1, 5))
def test_attention_without_a_key_bias_equals_attention_with_a_zero_key_bias(
    generator, batch, tokens
):
    bare = Attention(dim=12, heads=3, qkv_bias="qv")
    full = Attention(dim=12, heads=3)
    randomize(bare, generator)
    weights = bare.state_dict()
    q_bias, v_bias = weights.pop("q_bias"), weights.pop("v_bias")
    weights["qkv.bias"] = torch.cat([q_bias, torch.zeros(12), v_bias])
    full.load_state_dict(weights)
    x = torch.randn(batch, tokens, 12, generator=generator)
    torch.testing.assert_close(bare(x), full(x))


@given(generators(), st.integers(1, 3), st.integers(1, 6), st.data())
def test_the_bias_is_added_to_the_logits_of_every_head(generator, batch, tokens, data):
    block = TransformerBlock(dim=12, heads=3, qkv_bias="qv").double()
    randomize(block, generator)
    x = torch.randn(batch, tokens, 12, generator=generator).double()
    bias = torch.randn(1, 3, tokens, tokens, generator=generator).double().requires_grad_()
    num_queries = data.draw(st.integers(1, tokens))

    attn = block.attn
    q_v = torch.cat([attn.q_bias, torch.zeros(12).double(), attn.v_bias])
    q, k, v = (x @ attn.qkv.weight.T + q_v).view(batch, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / 2 + bias).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))[:, tokens - num_queries :]
    attended = attn(x, num_queries, bias)
    torch.testing.assert_close(attended, expected)
    assert torch.autograd.grad(attended.sum(), bias)[0].shape == bias.shape


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_layer_scale_multiplies_both_branches(value):
    plain = TransformerBlock(dim=12, heads=3)
    scaled = TransformerBlock(dim=12, heads=3, layer_scale=value)
    scaled.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 5, 12)
    middle = x + value * plain.attn(plain.norm1(x))
    torch.testing.assert_close(scaled(x), middle + value * plain.mlp(plain.norm2(middle)))
    assert {"gamma_1", "gamma_2"} == scaled.state_dict().keys() - plain.state_dict().keys()
