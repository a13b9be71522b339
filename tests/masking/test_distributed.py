"""Masks as inputs and containers as outputs of static-graph `DistributedDataParallel`."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from mimkit import masking
from recipes.mae import MAE, MAEConfig

RANKS, BATCH, STEPS = 2, 4, 2
CONFIG = MAEConfig(
    image_size=(8, 12),
    patch_size=4,
    dim=8,
    depth=1,
    heads=2,
    decoder_dim=8,
    decoder_depth=1,
    decoder_heads=2,
)


def gradients(model: torch.nn.Module, rows: slice) -> list[dict[str, Tensor]]:
    """Return the gradients of every step, for some rows of the batch."""
    images = torch.randn(BATCH, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    steps = []
    for epoch in range(STEPS):
        key = masking.key(torch.arange(BATCH)[rows], seed=0, epoch=epoch)
        mask = masking.uniform(key, (2, 3), 0.5)
        model.zero_grad()
        model(images[rows], mask).loss.backward()
        steps.append(
            {
                name.removeprefix("module."): parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
            }
        )
    return steps


def new_model() -> MAE:
    torch.manual_seed(0)
    return MAE(CONFIG)


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(minutes=5),
    )
    share = BATCH // RANKS
    rows = slice(rank * share, (rank + 1) * share)
    # The wrapper must be destroyed before the group. As the last owner of the group it would hold
    # the GIL while it waits for the group's threads, one of which may be waiting for the GIL.
    steps = gradients(DistributedDataParallel(new_model(), static_graph=True), rows)
    torch.distributed.destroy_process_group()
    torch.save(steps, f"{folder}/{rank}.pt")


@pytest.mark.full
def test_two_processes_compute_the_gradients_of_the_whole_batch(tmp_path: Path):
    spawn(train, args=(str(tmp_path),), nprocs=RANKS)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS))
    whole = gradients(new_model(), slice(None))
    part = gradients(new_model(), slice(0, BATCH // RANKS))
    for step in range(STEPS):
        for name, expected in whole[step].items():
            assert torch.equal(first[step][name], second[step][name]), name
            torch.testing.assert_close(first[step][name], expected, rtol=1e-4, atol=1e-6)
    # Without the reduction each rank would have the gradients of its own part.
    assert not torch.allclose(first[0]["head.weight"], part[0]["head.weight"], rtol=1e-3)
