"""Data loading. The samples of a step are a pure function of (seed, step)."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from recipes import signals
from recipes.engine.data.sets import Batch, TrainSet, collate, unpack
from recipes.engine.run.world import World
from recipes.engine.seeds import sample_rng

SINGLE = World()


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample id), shuffled in each epoch; the last, smaller batch is dropped.

    Args:
        num_samples: Samples per epoch.
        batch_size: Samples per batch, over all processes.
        seed: Seed of the run.
        first_step: First step. A resumed run needs no other state.
        num_steps: End of the steps, exclusive.
        world: The processes; each gets its part of every batch.

    Example:
        >>> batches = list(EpochBatches(5, batch_size=2, seed=0, first_step=0, num_steps=3))
        >>> [sorted({epoch for epoch, _ in batch}) for batch in batches]
        [[0], [0], [1]]
        >>> batches[1:] == list(EpochBatches(5, batch_size=2, seed=0, first_step=1, num_steps=3))
        True
        >>> batches == list(EpochBatches(5, batch_size=2, seed=1, first_step=0, num_steps=3))
        False
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        first_step: int,
        num_steps: int,
        world: World = SINGLE,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.first_step = first_step
        self.num_steps = num_steps
        self.world = world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_samples // self.batch_size
        epoch, order = -1, torch.empty(0)
        for step in range(self.first_step, self.num_steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = self._order(epoch)
            share = self.batch_size // self.world.size
            start = step % steps_per_epoch * self.batch_size + self.world.rank * share
            ids = order[start : start + share].tolist()
            yield [(epoch, sample_id) for sample_id in ids]

    def __len__(self) -> int:
        return self.num_steps - self.first_step

    def _order(self, epoch: int) -> Tensor:
        return torch.from_numpy(sample_rng(self.seed, epoch).permutation(self.num_samples))


def make_loader(
    train: TrainSet,
    *,
    world: World,
    batch_size: int,
    seed: int,
    first_step: int,
    num_steps: int,
    workers: int,
    pin_memory: bool,
) -> Iterable[Batch]:
    """Make one loader for the steps [first_step, num_steps); workers persist across epochs."""
    batches = EpochBatches(
        len(train),
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        num_steps=num_steps,
        world=world,
    )
    return DataLoader(
        train,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=signals.shield_worker,
        pin_memory=pin_memory,
    )


def on_device(batch: Batch, data: TrainSet, device: str, *, keep_bytes: bool = False) -> Batch:
    """Move the images of a batch to a device, and normalize them there if they are bytes.

    Args:
        batch: The batch.
        data: The data set that it is from.
        device: The device.
        keep_bytes: Whether bytes stay as they are.
    """
    batch = data.to_device(batch, device)
    if batch.shapes is None:
        return batch if keep_bytes else batch._replace(images=data.to_inputs(batch.images))
    images = unpack(batch)
    if not keep_bytes:
        images = [data.to_inputs(image[None])[0] for image in images]
    return batch._replace(images=images)


def held_out_batches(
    test: TrainSet, world: World, *, batch_size: int, workers: int
) -> Iterator[Batch]:
    """Load this process's share of the test images."""
    indices = [(0, sample_id) for sample_id in range(world.rank, len(test), world.size)]
    return iter(
        DataLoader(
            test,
            sampler=indices,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=signals.shield_worker,
        )
    )
