"""`MAEDecoder` against the authors' way, which restores grid order; `CrossDecoder`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mimkit import masking
from mimkit.masking import Mask
from mimkit.nn import CrossDecoder, MAEDecoder, PixelHead
from mimkit.patches import gather_masked, restore
from tests.nn import plain
from tests.strategies import generators, grids, masks

# DIM is a width that sine-cosine tables of one, two and three axes allow.
HEADS, DEPTH, IN_DIM, DIM = 2, 2, 7, 12


def make_decoder(grid: tuple[int, ...], num_prefix: int = 1, **options: object) -> MAEDecoder:
    sizes = {"in_dim": IN_DIM, "dim": DIM, "depth": DEPTH, "heads": HEADS}
    decoder = MAEDecoder(grid=grid, num_prefix=num_prefix, **(sizes | options)).double()
    plain.randomize(decoder)
    return decoder


def decode_in_grid_order(
    weights: dict[str, Tensor], latent: Tensor, mask: Mask, num_prefix: int
) -> Tensor:
    """Restore grid order, add positions, decode all tokens, then take the masked ones."""
    tokens = plain.linear(latent, weights, "embed")
    positions = weights["pos_embed"][0]
    tokens = restore(
        tokens, mask, weights["mask_token"][0, 0], positions=positions, num_prefix=num_prefix
    )
    for number in range(DEPTH):
        tokens = plain.block(tokens, weights, f"blocks.{number}", HEADS)
    decoded = plain.norm(tokens, weights, "norm")
    return gather_masked(decoded[:, num_prefix:], mask)


@given(grids(max_tokens=20).flatmap(lambda grid: masks(grid=grid)), st.integers(0, 2), generators())
def test_values_and_gradients_equal_those_of_decoding_in_grid_order(mask, num_prefix, generator):
    decoder = make_decoder(mask.grid, num_prefix)
    shape = (mask.batch_size, num_prefix + mask.num_visible, IN_DIM)
    latent = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = dict(decoder.named_parameters())
    ours = decoder(latent, mask)
    theirs = decode_in_grid_order(weights, latent, mask, num_prefix)
    assert ours.shape == (mask.batch_size, mask.num_masked, DIM)
    torch.testing.assert_close(ours, theirs)
    inputs = [latent, *(p for p in weights.values() if p.requires_grad)]
    for grad, expected in zip(
        torch.autograd.grad(ours.pow(3).sum(), inputs),
        torch.autograd.grad(theirs.pow(3).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)


def test_every_norm_has_maes_epsilon():
    norms = [m for m in make_decoder((2, 2)).modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * DEPTH + 1
    assert {norm.eps for norm in norms} == {1e-6}


def test_every_trained_parameter_has_a_gradient():
    decoder = make_decoder((4, 4))
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
    decoder(torch.randn(2, 5, IN_DIM, dtype=torch.float64), mask).pow(3).sum().backward()
    for name, parameter in decoder.named_parameters():
        if name == "pos_embed":
            assert not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.full
@pytest.mark.untyped
def test_the_decoder_compiles_into_one_graph():
    torch._dynamo.reset()
    decoder = make_decoder((4, 4), depth=1)
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    latent = torch.randn(2, 5, IN_DIM, dtype=torch.float64)
    torch.testing.assert_close(compiled(latent, mask), decoder(latent, mask))


def test_autocast_to_bfloat16_stays_close_to_float32():
    decoder = make_decoder((4, 4)).float()
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.75)
    latent = torch.randn(2, 5, IN_DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = decoder(latent, mask)
    assert (decoded.float() - decoder(latent, mask)).abs().max() < 0.2


@pytest.mark.parametrize(
    ("patch", "channels", "values"), [((8, 8), 3, 192), ((4,), 2, 8), ((2, 4, 3), 1, 24)]
)
def test_the_head_predicts_every_value_of_a_patch(patch, channels, values):
    head = PixelHead(dim=6, patch_size=patch, in_channels=channels)
    assert head(torch.randn(2, 5, 6)).shape == (2, 5, values)
    assert not head.bias.any()


DECODER = make_decoder((2, 3))
MASK = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: DECODER(torch.zeros(2, 3, IN_DIM, dtype=torch.float64), MASK),
            r"1 prefix and 3 visible.*\(2, 3, 7\)",
        ),
        (lambda: DECODER(torch.zeros(1, 4, IN_DIM), MASK), "2 samples.* has 1"),
        (lambda: DECODER(torch.zeros(2, 4, IN_DIM), MASK.refine(2)), r"\(4, 6\).*\(2, 3\)"),
        (lambda: make_decoder((2, 3), heads=5), "dim=12.*heads=5"),
        (lambda: make_decoder((2, 3), dim=10), "multiple of 4.*got 10"),
    ],
)
def test_what_does_not_fit_is_repeated_in_the_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_decoder_returns_the_positions_in_query_ids() -> None:
    torch.manual_seed(0)
    mask = masking.uniform(masking.key([0, 1], seed=0), (3, 5), 0.6)
    decoder = MAEDecoder(grid=(3, 5), in_dim=8, dim=16, depth=2, heads=2).double()
    latent = torch.randn(2, 1 + mask.num_visible, 8, dtype=torch.float64)
    all_positions = decoder(latent, mask, torch.arange(15).expand(2, -1))
    assert all_positions.shape == (2, 15, 16)
    torch.testing.assert_close(gather_masked(all_positions, mask), decoder(latent, mask))


def test_a_cross_decoder_decodes_positions_independently() -> None:
    torch.manual_seed(0)
    mask = masking.uniform(masking.key([0, 1], seed=0), (3, 5), 0.6)
    decoder = CrossDecoder(grid=(3, 5), in_dim=8, dim=16, depth=2, heads=2).double()
    latent = torch.randn(2, 1 + mask.num_visible, 8, dtype=torch.float64)
    decoded = decoder(latent, mask)
    some = decoder(latent, mask, mask.masked_ids[:, 1::3])
    torch.testing.assert_close(some, decoded[:, 1::3])


def test_a_cross_decoder_refuses_latents_of_another_mask() -> None:
    mask = masking.uniform(masking.key([0], seed=0), (3, 5), 0.6)
    decoder = CrossDecoder(grid=(3, 5), in_dim=8, dim=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="1 prefix and 6 visible tokens"):
        decoder(torch.randn(1, 8, 8), mask)
