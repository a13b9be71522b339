"""The transformer block and its parts."""

import pytest
import torch

from mimkit.nn import TransformerBlock
from mimkit.nn._layers import DropPath, attend, drop_path_rates
from tests.nn import plain


@torch.no_grad()
def test_a_block_equals_the_plain_reference():
    block = TransformerBlock(dim=12, heads=3, mlp_ratio=1.5)
    plain.randomize(block)
    tokens = torch.randn(2, 5, 12)
    weights = {f"block.{name}": value for name, value in block.state_dict().items()}
    expected = plain.block(tokens, weights, "block", heads=3)
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-5)
    assert block.mlp.fc1.out_features == 18


def test_the_norms_have_maes_epsilon_by_default():
    for eps, block in [
        (1e-6, TransformerBlock(dim=8, heads=2)),
        (1e-5, TransformerBlock(dim=8, heads=2, norm_eps=1e-5)),
    ]:
        assert block.norm1.eps == block.norm2.eps == eps


def test_blocks_are_equivariant_to_token_order():
    """`MAEDecoder` relies on this: its mask tokens follow the visible tokens."""
    block = TransformerBlock(dim=12, heads=3).double()
    plain.randomize(block)
    tokens, order = torch.randn(2, 7, 12, dtype=torch.float64), torch.randperm(7)
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
def test_fused_and_plain_attention_equal_the_formula(dtype, queries):
    query, key, value = (torch.randn(2, 3, n, 16).to(dtype) for n in (queries, 5, 5))
    attended = attend(query, key, value)
    assert attended.dtype == dtype
    logits = query.double() @ key.double().mT / 4
    expected = logits.softmax(dim=-1) @ value.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(attended.double(), expected, rtol=tolerance, atol=tolerance)


def test_drop_path_drops_whole_samples_at_its_rate():
    torch.manual_seed(0)
    rate, samples = 0.3, 4000
    dropped = DropPath(rate).train()(torch.ones(samples, 2, 3))
    by_sample = dropped.flatten(1)
    assert (by_sample == by_sample[:, :1]).all()
    values = torch.unique(by_sample)
    torch.testing.assert_close(values, torch.tensor([0, 1 / (1 - rate)]))
    share = (by_sample[:, 0] == 0).float().mean()
    assert abs(share - rate) < 5 * (rate * (1 - rate) / samples) ** 0.5


def test_drop_path_scales_gradients_like_values():
    torch.manual_seed(0)
    branch = torch.ones(8, 2, requires_grad=True)
    out = DropPath(0.5).train()(branch)
    out.sum().backward()
    assert torch.equal(branch.grad, out.detach())


@pytest.mark.parametrize("module", [DropPath(0.9).eval(), DropPath(0.0).train()])
def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero(module):
    branch = torch.randn(4, 2)
    before = torch.get_rng_state()
    assert module(branch) is branch
    assert torch.equal(before, torch.get_rng_state())


def test_a_block_drops_both_branches_of_a_sample_independently():
    torch.manual_seed(0)
    block = TransformerBlock(dim=8, heads=2, drop_path=0.5).train()
    tokens = torch.randn(1, 3, 8).expand(400, -1, -1)
    with torch.no_grad():
        kinds = torch.unique(block(tokens).flatten(1).round(decimals=4), dim=0)
    assert len(kinds) == 4  # no branch, attention only, MLP only, both
    block.eval()
    with torch.no_grad():
        assert (block(tokens) - block(tokens)[:1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("rate", "depth", "rates"), [(0.2, 3, [0, 0.1, 0.2]), (0.1, 1, [0]), (0.0, 2, [0, 0])]
)
def test_drop_path_rises_linearly_with_depth(rate, depth, rates):
    assert drop_path_rates(rate, depth) == pytest.approx(rates)


@pytest.mark.untyped
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(rate):
    with pytest.raises(ValueError, match=f"got {rate}"):
        TransformerBlock(dim=8, heads=2, drop_path=rate)
