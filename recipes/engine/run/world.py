"""Distributed training: the processes of a run, DDP and FSDP2."""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mimkit.nn import PixelHead, TransformerBlock
from recipes.engine.errors import LostProcessError, UserError

T = TypeVar("T")

# Messages of gloo and NCCL when another process has died.
_CONNECTION_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|nccl", re.IGNORECASE
)


@dataclass(frozen=True)
class World:
    """The processes of a run, started by `torchrun`.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, value: T) -> T:
        """Broadcast the main process's value to all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Collect the values of all processes, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.size > 1:
            dist.barrier()


def rank_from_environment() -> int:
    """Return the rank that `torchrun` gave this process; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size_from_environment() -> int:
    """Return the number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def join(device: str) -> Iterator[World]:
    """Join the process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        LostProcessError: If another process dies.
    """
    world = World(rank_from_environment(), world_size_from_environment())
    if world.size == 1:
        yield world
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield world
    except RuntimeError as error:
        if not _CONNECTION_LOST.search(str(error)):
            raise
        raise LostProcessError(
            f"process {world.rank} of {world.size} has lost another process of the job: start the "
            "same command again, which continues from the last complete checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def check_shares(batch_size: int, world: World, *, accumulate: int = 1) -> None:
    """Check that a batch can be divided evenly among processes and accumulation steps.

    Raises:
        UserError: If it cannot.
    """
    parts = world.size * accumulate
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} cannot be divided evenly among {world.size} processes with "
            f"--accumulate {accumulate}: choose a multiple of {parts}"
        )


def check_shard(shard: bool) -> None:
    """Check that there are several processes for `--shard`.

    Raises:
        UserError: If there is only one.
    """
    if shard and world_size_from_environment() == 1:
        raise UserError(
            "--shard needs several processes, and there is only one: start with "
            "torchrun --nproc-per-node 2 or more"
        )


def distribute(model: nn.Module, world: World, *, shard: bool) -> nn.Module:
    """Wrap a model in DDP, or shard its weights with FSDP2."""
    if shard:
        for module in model.modules():
            if isinstance(module, TransformerBlock | PixelHead):
                fully_shard(module)
        fully_shard(model)
        return model
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Synchronize gradients in this backward pass, or only in a later one."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield


def whole(value: Tensor) -> Tensor:
    """Return the full tensor of a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """Return the full state dict, under the names of the unwrapped model.

    Args:
        model: The model, copied or sharded.
        everywhere: Whether every process gets the weights, on its device. Otherwise only the main
            process does, on the CPU, and the others get an empty dictionary.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
