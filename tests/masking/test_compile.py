"""Masks as inputs and outputs of compiled graphs, and drawn inside them."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from mimkit import losses, masking
from mimkit.masking import Key, Mask
from mimkit.patches import gather_visible

pytestmark = pytest.mark.untyped
GRID = (6, 4)


def mask_of(*ids: int, seed: int = 0) -> Mask:
    return masking.uniform(masking.key(ids, seed=seed), GRID, 0.75)


def test_a_mask_is_an_input_of_a_compiled_graph():
    compiled = torch.compile(gather_visible, fullgraph=True, backend="aot_eager")
    tokens, mask = torch.randn(2, 24, 3), mask_of(0, 1)
    assert torch.equal(compiled(tokens, mask), gather_visible(tokens, mask))


MADE_INSIDE = {
    "uniform": lambda key: masking.uniform(key, GRID, 0.75),
    "uniform by the rule of mae": lambda key: masking.uniform(key, GRID, 0.6, rounding="mae"),
    "uniform by count": lambda key: masking.uniform(key, GRID, num_masked=5),
    "uniform in units": lambda key: masking.uniform(key, GRID, 0.5, unit=2),
    "all visible": lambda key: masking.uniform(key, GRID, num_masked=0),
    "blockwise": lambda key: masking.blockwise(key, GRID, 0.5),
    "inverse block": lambda key: masking.inverse_block(key, GRID, 0.75),
    "tube": lambda key: masking.tube(key, GRID, 0.5),
    "weighted": lambda key: masking.weighted(
        key, GRID, 0.5, weights=torch.linspace(0, 1, 24).expand(key.batch_size, -1)
    ),
    "visible block": lambda key: masking.visible_block(key, GRID, 0.75),
    "prefix": lambda key: masking.prefix(key, GRID, 0.75),
    "gridwise": lambda key: masking.gridwise(key, GRID),
    "central square": lambda key: masking.square(key, GRID, 2),
    "random square": lambda key: masking.square(key, GRID, 2, position="random"),
    "another view": lambda key: masking.uniform(key.view(3), GRID, 0.75),
    "refined": lambda key: masking.uniform(key, GRID, 0.75).refine(2).coarsen(2),
    "complement": lambda key: masking.uniform(key, GRID, 0.75).complement(),
    "rows": lambda key: masking.uniform(key, GRID, 0.75)[1:],
    "expanded": lambda key: masking.uniform(key, GRID, 0.75)[0].expand(3),
    "concatenated": lambda key: Mask.cat(
        [masking.uniform(key.view(n), GRID, num_masked=9) for n in (0, 1)]
    ),
    "from noise": lambda key: Mask.from_noise(
        torch.linspace(0, 1, 24).view(1, -1).expand(2, -1), GRID, 7
    ),
    "from visible ids": lambda key: Mask.from_visible_ids(
        torch.arange(4).expand(2, -1) + key.sample_ids[:, None] % 20, GRID
    ),
    "from booleans": lambda key: Mask.from_bool(
        masking.uniform(key, GRID, 0.75).is_masked, num_masked=18
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_a_mask_is_made_in_a_compiled_graph_and_returned(name):
    def both(key: Key) -> tuple[Mask, torch.Tensor]:
        mask = MADE_INSIDE[name](key)
        return mask, mask.restore_ids + mask.is_masked.flatten(1)

    key = masking.key([3, 1 << 40], seed=-5, epoch=7)
    mask, numbers = torch.compile(both, fullgraph=True, backend="aot_eager")(key)
    expected, expected_numbers = both(key)
    assert type(mask) is Mask
    assert mask.equal(expected)
    assert torch.equal(numbers, expected_numbers)


@pytest.mark.full
def test_inductor_draws_the_same_bits():
    """Ids with all bits set matter: signed overflow is undefined in the C++ of Inductor."""
    draw = torch.compile(lambda key: masking.uniform(key, GRID, 0.75), fullgraph=True)
    ids = torch.randint(
        -(1 << 63), (1 << 63) - 1, (60,), generator=torch.Generator().manual_seed(0)
    )
    ids = torch.cat([torch.tensor([0, 1, -1, 1 << 40]), ids])
    for seed, epoch in [(0, 0), (1 << 63, 3), ((1 << 64) - 1, (1 << 32) - 1)]:
        key = masking.key(ids, seed=seed, epoch=epoch)
        assert draw(key).equal(masking.uniform(key, GRID, 0.75))


@pytest.mark.full
def test_new_seeds_epochs_and_ids_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def step(key: Key, tokens: torch.Tensor) -> tuple[Mask, torch.Tensor]:
        mask = masking.uniform(key, GRID, 0.75)
        return mask, gather_visible(tokens, mask)

    tokens = torch.randn(2, 24, 3)
    for seed, epoch, ids in [(0, 0, [0, 1]), (9, 0, [0, 1]), (9, 5, [0, 1]), (9, 5, [8, 1 << 50])]:
        key = masking.key(ids, seed=seed, epoch=epoch)
        mask, visible = step(key, tokens)
        assert mask.equal(masking.uniform(key, GRID, 0.75))
        assert torch.equal(visible, gather_visible(tokens, mask))
    assert counter.frame_count == 1


@pytest.mark.full
def test_a_new_mask_does_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gather_visible, fullgraph=True, backend=counter)
    tokens = torch.randn(2, 24, 3)
    for seed in range(3):
        compiled(tokens, mask_of(0, 1, seed=seed))
    assert counter.frame_count == 1


@pytest.mark.full
def test_gradients_of_a_compiled_graph_with_a_mask():
    def loss(tokens: torch.Tensor, mask: Mask) -> torch.Tensor:
        return gather_visible(tokens, mask).square().sum()

    tokens, mask = torch.randn(2, 24, 3, requires_grad=True), mask_of(0, 1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(tokens, mask), tokens)
    (expected,) = torch.autograd.grad(loss(tokens, mask), tokens)
    assert torch.equal(grad, expected)
    assert torch.equal(grad.ne(0).any(dim=2).view(2, *GRID), ~mask.is_masked)


def test_export_with_a_mask_as_input_and_output():
    class Swap(torch.nn.Module):
        def forward(self, mask: Mask) -> Mask:
            return mask.complement()

    mask = mask_of(0, 1)
    program = torch.export.export(Swap(), (mask,))
    assert program.module()(mask).equal(~mask)


def test_tensors_without_values_are_not_read():
    with FakeTensorMode():
        mask = Mask.from_noise(torch.rand(2, 6), (2, 3), num_masked=4)
        again = Mask.from_visible_ids(mask.visible_ids, (2, 3))
        weights, key = torch.rand(2, 6), masking.key(torch.arange(2), seed=0)
        drawn = masking.weighted(key, (2, 3), 0.5, weights=weights)
        prediction, classes = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64)
        loss = losses.masked_cross_entropy(prediction, classes, mask)
    assert (again.num_masked, drawn.num_masked, loss.ndim) == (4, 3, 0)
