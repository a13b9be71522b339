"""One step under FSDP2, in each of two processes: equal to a plain step of the whole batch.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/peers/sharded_step.py
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.peers.test_export import ENCODERS, build, inputs

BATCH, RATE = 4, 0.1


def step(encoder: Any, images: Tensor, mask: Any) -> None:
    """Take a step of plain gradient descent on the mean of squared tokens."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=RATE)
    encoder(images, mask).square().mean().backward()
    optimizer.step()


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """Return the blocks: what stands in a list, and holds none."""
    lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    inside = [block for blocks in lists for block in blocks]
    return [b for b in inside if not any(isinstance(m, nn.ModuleList) for m in b.modules())]


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in ENCODERS:
        plain = build(name)
        images, mask = inputs(plain, BATCH, 0)
        sharded = copy.deepcopy(plain)
        for block in blocks_of(sharded):
            fully_shard(block)
        fully_shard(sharded)
        assert all(isinstance(weight, DTensor) for weight in sharded.parameters())
        before = {key: weight.detach().clone() for key, weight in plain.named_parameters()}
        step(plain, images, mask)
        own = torch.arange(BATCH).chunk(world)[rank]
        step(sharded, images[own], mask[own])
        for key, weight in sharded.named_parameters():
            found = weight.full_tensor()
            expected = plain.get_parameter(key)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
        moved = sum(not torch.equal(plain.get_parameter(k), w) for k, w in before.items())
        print(f"{name}: {moved} of {len(before)} tensors moved, rank {rank} the same")
    dist.barrier()  # both have printed
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
