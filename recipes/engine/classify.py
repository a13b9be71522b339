"""The training loop of classifiers, and their score."""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.engine.data.labelled import LabelledData
from recipes.engine.data.mixing import Mixing
from recipes.engine.errors import UserError
from recipes.engine.optim import scheduled_lr
from recipes.engine.run.checkpoint import Checkpoints, start_from
from recipes.engine.run.cli import CommonOptions
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.loader import held_out_batches, make_loader
from recipes.engine.run.world import World, distribute
from recipes.engine.seeds import step_generator, stream_seed
from recipes.engine.train import autocast, count_steps

_LOGS_PER_RUN = 20
_STEPS_BETWEEN_CHECKPOINTS = 100
_TEST_BATCH = 256


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model to be trained, and how.

    Attributes:
        model: Maps images to logits; its weights are those that a checkpoint holds.
        optimizer: Its groups may have an `lr_scale`, a factor of the schedule's rate.
        mixing: Mixes images, and turns labels into targets.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mixing: Mixing


def fit(
    classifier: Classifier,
    config: RunConfig,
    data: LabelledData,
    folder: RunFolder,
    options: CommonOptions,
) -> None:
    """Train a classifier from its last checkpoint on, and log its metrics."""
    model, world = classifier.model.train(), folder.world
    steps_per_epoch, num_steps = count_steps(config, data.images)
    checkpoints = Checkpoints(folder.path / "checkpoints", world, keep_every=options.keep_every)
    first_step = start_from(options.resume, checkpoints, model, classifier.optimizer, num_steps)
    spread = dataclasses.replace(classifier, model=distribute(model, world, shard=False))
    folder.start_metrics(first_step=first_step)
    loader = make_loader(
        data.images.train,
        world=world,
        batch_size=config.training.batch_size,
        seed=config.seed,
        first_step=first_step,
        num_steps=num_steps,
        workers=options.workers,
        pin_memory=config.device == "cuda",
    )
    checkpoint_every = options.checkpoint_every or max(steps_per_epoch, _STEPS_BETWEEN_CHECKPOINTS)
    log_every = max(num_steps // _LOGS_PER_RUN, 1)
    start = time.perf_counter()
    for done, batch in enumerate(loader, first_step + 1):
        folder.note_unreadable(batch.unreadable_ids)
        num_images = int(world.total(torch.tensor(len(batch.images), device=config.device)))
        if num_images:
            lr = set_lr(classifier.optimizer, config, (done - 1) / steps_per_epoch)
            labels = data.train_labels[batch.sample_ids]
            # Processes count the same, however many images each could read: weigh by images.
            share = len(labels) * world.size / num_images
            loss = train_step(
                spread, config, batch.images, labels, step=done - 1, rank=world.rank, share=share
            )
            loss = world.total(loss) / world.size
            if done % log_every == 0 or done == num_steps:
                row = {"step": done, "epoch": done / steps_per_epoch, "loss": loss.item(), "lr": lr}
                row["seconds"] = time.perf_counter() - start
                log(folder, row, num_steps)
        if done % checkpoint_every == 0 or done == num_steps:
            checkpoints.save(done, model, classifier.optimizer)
    checkpoints.finish()
    model.eval()


def set_lr(optimizer: torch.optim.Optimizer, config: RunConfig, epoch: float) -> float:
    """Set the learning rates of a moment of the run, and return that of the last layer."""
    lr = scheduled_lr(epoch, config)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def train_step(
    classifier: Classifier,
    config: RunConfig,
    images: Tensor,
    labels: Tensor,
    *,
    step: int,
    rank: int,
    share: float,
) -> Tensor:
    """Make a step on this process's share of a batch, and return its loss, weighted by `share`.

    Images are mixed within the share, all processes in the same proportion.
    """
    generator = step_generator(seed=config.seed, step=step)
    images, labels = (t.to(config.device, non_blocking=True) for t in (images, labels))
    images, targets = classifier.mixing(images, labels, generator)
    # Drop path draws from the global generator: another stream in every step and process.
    torch.manual_seed(stream_seed(config.seed, step, rank))
    with autocast(config):
        logits = classifier.model(images)
    loss = F.cross_entropy(logits.float(), targets) * share
    classifier.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if config.training.clip_grad is not None:
        nn.utils.clip_grad_norm_(classifier.model.parameters(), config.training.clip_grad)
    classifier.optimizer.step()
    return loss.detach()


def log(folder: RunFolder, row: dict[str, Any], num_steps: int) -> None:
    """Write a row of metrics, and show it.

    Raises:
        UserError: The loss is no number any more.
    """
    if not math.isfinite(row["loss"]):
        raise UserError(
            f"the loss is {row['loss']} at step {row['step']}: choose a smaller --lr and another "
            "--out"
        )
    folder.append_metrics(row)
    if folder.world.is_main:
        print(
            f"{folder.path.name}: step {row['step']}/{num_steps}  loss {row['loss']:.3f}",
            file=sys.stderr,
            flush=True,
        )


@torch.no_grad()
def score(
    model: nn.Module, config: RunConfig, data: LabelledData, world: World, *, workers: int
) -> float:
    """Return the accuracy on the images to score on, in percent."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=config.device)  # right ones, all
    for batch in held_out_batches(data, world, batch_size=_TEST_BATCH, workers=workers):
        if len(batch.images):
            with autocast(config):
                logits = model(batch.images.to(config.device))
            labels = data.test_labels[batch.sample_ids].to(config.device)
            counts[0] += (logits.argmax(dim=1) == labels).sum()
            counts[1] += len(labels)
    correct, total = world.total(counts).tolist()
    if total == 0:
        raise UserError(f"none of the {len(data.test)} test images of {data.images.name} is read")
    return 100 * float(correct) / float(total)
