"""Gathering visible or masked tokens, and restoring the sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mimkit import masking
from mimkit.masking import Mask
from mimkit.patches import gather_masked, gather_visible, restore
from tests.golden_files import golden
from tests.strategies import generators, masks

prefixes = st.integers(0, 3)
dims = st.integers(1, 5)


def whole_sequence(mask: Mask, num_prefix: int, dim: int, generator: torch.Generator) -> Tensor:
    shape = (mask.batch_size, num_prefix + mask.num_tokens, dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def restore_in_a_loop(
    visible: Tensor, mask: Mask, fill: Tensor, positions: Tensor | None, num_prefix: int
) -> Tensor:
    """Restore one sample at a time, as in MAE's `forward_decoder`."""
    sequences = []
    for row, tokens in enumerate(visible):
        sequence = tokens.new_zeros(num_prefix + mask.num_tokens, tokens.shape[1])
        sequence[:num_prefix] = tokens[:num_prefix]
        sequence[num_prefix + mask.visible_ids[row]] = tokens[num_prefix:]
        sequence[num_prefix + mask.masked_ids[row]] = fill if fill.ndim == 1 else fill[row]
        sequences.append(sequence if positions is None else sequence + positions)
    return torch.stack(sequences)


@given(masks(), prefixes, dims, generators())
def test_gathering_returns_prefix_tokens_and_visible_or_masked_tokens(
    mask, num_prefix, dim, generator
):
    tokens = whole_sequence(mask, num_prefix, dim, generator)
    is_masked = mask.is_masked.flatten(1)
    prefix = torch.ones(num_prefix, dtype=torch.bool)
    visible = gather_visible(tokens, mask, num_prefix=num_prefix)
    masked = gather_masked(tokens, mask, num_prefix=num_prefix)
    for row, sequence in enumerate(tokens):
        assert torch.equal(visible[row], sequence[torch.cat([prefix, ~is_masked[row]])])
        assert torch.equal(masked[row], sequence[torch.cat([prefix, is_masked[row]])])


@given(masks(), prefixes, dims, generators())
def test_restore_undoes_gathering(mask, num_prefix, dim, generator):
    tokens = whole_sequence(mask, num_prefix, dim, generator)
    visible = gather_visible(tokens, mask, num_prefix=num_prefix)
    masked = gather_masked(tokens, mask, num_prefix=num_prefix)[:, num_prefix:]
    assert torch.equal(restore(visible, mask, masked, num_prefix=num_prefix), tokens)


@given(masks(), prefixes, dims, st.booleans(), st.booleans(), generators())
def test_restore_and_its_gradients_match_a_loop_over_samples(
    mask, num_prefix, dim, one_fill, with_positions, generator
):
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    visible = random(mask.batch_size, num_prefix + mask.num_visible, dim)
    fill = random(dim) if one_fill else random(mask.batch_size, mask.num_masked, dim)
    positions = random(num_prefix + mask.num_tokens, dim) if with_positions else None
    inputs = [visible, fill] + ([positions] if positions is not None else [])
    ours = restore(visible, mask, fill, positions=positions, num_prefix=num_prefix)
    theirs = restore_in_a_loop(visible, mask, fill, positions, num_prefix)
    assert torch.equal(ours, theirs)
    weights = random(*ours.shape).detach()
    for grad, expected in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((theirs * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected)


@given(masks(), prefixes, generators())
def test_the_gradient_of_gathering_is_restore_with_zeros(mask, num_prefix, generator):
    tokens = whole_sequence(mask, num_prefix, 2, generator).requires_grad_()
    gathered = gather_visible(tokens, mask, num_prefix=num_prefix)
    weights = torch.randn(gathered.shape, generator=generator, dtype=torch.float64)
    (grad,) = torch.autograd.grad((gathered * weights).sum(), tokens)
    no_fill = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(grad, restore(weights, mask, no_fill, num_prefix=num_prefix))


def test_gradients_pass_gradcheck():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    tokens = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    visible = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    for gather in (gather_visible, gather_masked):
        assert torch.autograd.gradcheck(lambda t, g=gather: g(t, mask, num_prefix=1), tokens)
    assert torch.autograd.gradcheck(
        lambda v, f, p: restore(v, mask, f, positions=p, num_prefix=1), (visible, fill, positions)
    )


@pytest.mark.parametrize("case", range(6))
def test_visible_tokens_match_mae_up_to_their_order(case):
    arrays = golden("mae_random_masking")
    tokens, kept = arrays.tensor(f"case{case}/x"), arrays.tensor(f"case{case}/ids_keep")
    mask = Mask.from_visible_ids(kept, (tokens.shape[1],))
    theirs = arrays.tensor(f"case{case}/x_masked")
    by_position = kept.argsort(dim=1).unsqueeze(2).expand_as(theirs)
    assert torch.equal(gather_visible(tokens, mask), theirs.gather(1, by_position))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("visible_dtype", FLOATS)
@pytest.mark.parametrize("fill_dtype", FLOATS)
def test_restore_returns_the_promoted_dtype(visible_dtype, fill_dtype):
    mask = masking.uniform(masking.key([0], seed=0), (4,), 0.5)
    visible = torch.randn(1, 2, 3).to(visible_dtype)
    fill = torch.randn(3).to(fill_dtype)
    promoted = torch.promote_types(visible_dtype, fill_dtype)
    restored = restore(visible, mask, fill)
    assert restored.dtype == promoted
    assert torch.equal(gather_visible(restored, mask), visible.to(promoted))
    assert torch.equal(gather_masked(restored, mask)[:, 0], fill.to(promoted)[None])
    positions = torch.zeros(4, 3)
    with_positions = restore(visible, mask, fill, positions=positions)
    assert with_positions.dtype == torch.promote_types(promoted, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_gathering_keeps_any_dtype(dtype):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    tokens = torch.arange(2 * 6 * 2).view(2, 6, 2).to(dtype)
    taken = gather_visible(tokens, mask)
    assert taken.dtype == dtype
    assert torch.equal(taken, tokens[torch.arange(2)[:, None], mask.visible_ids])


def test_tokens_need_not_be_contiguous():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    tokens = torch.randn(2, 4, 6).mT
    assert torch.equal(gather_visible(tokens, mask), gather_visible(tokens.contiguous(), mask))
    visible = torch.randn(2, 4, 3).mT
    fill = torch.randn(4, 2)[:, 0]
    assert torch.equal(
        restore(visible, mask, fill), restore(visible.contiguous(), mask, fill.contiguous())
    )


def test_an_expanded_mask_gathers_from_every_sample():
    mask = masking.uniform(masking.key([5], seed=0), (2, 3), 0.5)
    tokens = torch.randn(4, 6, 2)
    expected = tokens[:, mask.visible_ids[0]]
    assert torch.equal(gather_visible(tokens, mask.expand(4)), expected)


@pytest.mark.full
@pytest.mark.untyped
@pytest.mark.parametrize("function", [gather_visible, gather_masked])
def test_gathering_compiles_into_one_graph(function):
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    tokens = torch.randn(2, 8, 3)
    assert torch.equal(compiled(tokens, mask, num_prefix=2), function(tokens, mask, num_prefix=2))


@pytest.mark.full
@pytest.mark.untyped
def test_restore_compiles_into_one_graph():
    mask = masking.uniform(masking.key([0, 1], seed=0), (2, 3), 0.5)
    compiled = torch.compile(restore, fullgraph=True, backend="aot_eager")
    visible, positions = torch.randn(2, 4, 3), torch.randn(7, 3)
    for fill in (torch.randn(3), torch.randn(2, 3, 3)):
        options = {"positions": positions, "num_prefix": 1}
        assert torch.equal(
            compiled(visible, mask, fill, **options), restore(visible, mask, fill, **options)
        )


MASK = masking.uniform(masking.key([0, 1], seed=0), (2, 3), num_masked=4)
TOKENS, VISIBLE, FILL = torch.zeros(2, 6, 5), torch.zeros(2, 2, 5), torch.zeros(5)


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gather_visible(TOKENS, MASK, num_prefix=1), r"\[batch, 7, dim\].*\(2, 6, 5\)"),
        (lambda: gather_visible(TOKENS[:1], MASK), "2 samples.* has 1"),
        (lambda: gather_masked(TOKENS[:, :5], MASK), r"\[batch, 6, dim\].*\(2, 5, 5\)"),
        (lambda: gather_masked(TOKENS[..., 0], MASK), r"\(2, 6\)"),
        (lambda: restore(TOKENS, MASK, FILL), r"0 prefix and 2 visible.*got \(2, 6, 5\)"),
        (
            lambda: restore(VISIBLE, MASK, FILL, num_prefix=1),
            r"1 prefix and 2 visible.*got \(2, 2, 5\)",
        ),
        (lambda: restore(VISIBLE[..., 0], MASK, FILL), r"fill must.*visible \(2, 2\); got \(5,\)"),
        (lambda: gather_visible(TOKENS, MASK, num_prefix=-1), "num_prefix must be at least 0.*-1"),
        (lambda: restore(VISIBLE[:1], MASK, FILL), "2 samples.* has 1"),
        (lambda: restore(VISIBLE, MASK, FILL[:4]), r"fill must have dim = 5.*got \(4,\)"),
        (lambda: restore(VISIBLE, MASK, torch.zeros(2, 1, 5)), r"got \(2, 1, 5\)"),
        (lambda: restore(VISIBLE, MASK, FILL, positions=TOKENS[0, :5]), r"\[6, 5\].*\(5, 5\)"),
    ],
)
def test_errors_repeat_what_was_passed(call, message):
    with pytest.raises(ValueError, match=message):
        call()
