"""The training loop."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimkit import masking
from mimkit.masking import Mask
from recipes.engine.checkpoint import Checkpoints
from recipes.engine.config import Options, Recipe, RunConfig
from recipes.engine.data import Batch, DataSet
from recipes.engine.errors import UserError
from recipes.engine.loader import make_loader
from recipes.engine.optim import gradients, parameter_groups, warmup_cosine
from recipes.engine.run_folder import RunFolder

_LOGS_PER_RUN = 50


def build_model(recipe: Recipe, config: RunConfig) -> nn.Module:
    """Make the model with the weights that the run's seed gives."""
    torch.manual_seed(config.seed)
    try:
        return recipe.build(config.model).to(config.device)
    except ValueError as error:
        raise UserError(f"preset {config.preset} on {config.data}: {error}") from error


def warn_of_slow_precision(config: RunConfig) -> None:
    """Tell the user when bfloat16 is emulated: every product then takes many times longer."""
    capability = torch.backends.cpu.get_cpu_capability()
    slow = config.device == "cpu" and not capability.startswith("AVX512")
    if config.training.precision == "bf16" and slow:
        print(
            f"warning: --precision bf16 is slow on this CPU ({capability}), which has no bfloat16 "
            "products; fp32 is faster",
            file=sys.stderr,
        )


def autocast(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which the model runs."""
    return torch.autocast(
        config.device, dtype=torch.bfloat16, enabled=config.training.precision == "bf16"
    )


def count_steps(config: RunConfig, data: DataSet) -> tuple[int, int]:
    """Return the steps of an epoch, and of the run.

    Raises:
        UserError: A batch larger than the data set.
    """
    batch_size = config.training.batch_size
    steps_per_epoch = len(data.train) // batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--batch-size {batch_size} is more than the {len(data.train)} images of {data.name}"
        )
    num_steps = config.training.epochs * steps_per_epoch
    return steps_per_epoch, min(num_steps, config.max_steps or num_steps)


def train(
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, options: Options
) -> tuple[nn.Module, list[int]]:
    """Train a model from its last checkpoint on, and log its metrics.

    Returns:
        The trained model, in evaluation mode, and the ids of images that could not be read.
    """
    training = config.training
    steps_per_epoch, num_steps = count_steps(config, data)
    model = build_model(recipe, config).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=training.weight_decay),
        betas=training.betas,
        fused=True,
    )
    checkpoints = Checkpoints(folder.path / "checkpoints", keep_every=options.keep_every)
    first_step = start_from(options.resume, checkpoints, model, optimizer)
    folder.start_metrics(first_step=first_step)
    if config.compile:
        model.compile()
    loader = make_loader(
        data.train,
        batch_size=training.batch_size,
        seed=config.seed,
        first_step=first_step,
        num_steps=num_steps,
        workers=options.workers,
        pin_memory=config.device == "cuda",
    )
    unreadable: set[int] = set()
    meter = _Meter(every=max(num_steps // _LOGS_PER_RUN, 1), num_steps=num_steps)
    for step, batch in enumerate(meter.watch(loader, first_step), first_step):
        unreadable.update(batch.unreadable_ids)
        if len(batch.images):
            lr = _set_lr(optimizer, config, step / steps_per_epoch)
            images, mask = _draw(recipe, config, model, batch, epoch=step // steps_per_epoch)
            # Drop path draws from the global generator: another stream in every step.
            torch.manual_seed((config.seed << 32) + step)
            loss = _backward(model, config, images, mask)
            norm = _clip(model, training.clip_grad)
            optimizer.step()
            meter.count(len(images))
            if meter.is_due(step):
                row = meter.row(step + 1, loss, lr, norm)
                row["epoch"] = (step + 1) / steps_per_epoch
                scores = recipe.baselines(model, images, mask)
                row["baselines"] = {name: score.item() for name, score in scores.items()}
                folder.append_metrics(row)
        done = step + 1
        if done % (options.checkpoint_every or steps_per_epoch) == 0 or done == num_steps:
            checkpoints.save(done, model, optimizer)
    return model.eval(), sorted(unreadable)


def start_from(
    resume: str, checkpoints: Checkpoints, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the checkpoint that `--resume` asks for, and return its step; 0 without one.

    Raises:
        UserError: There is none, or one that must not be overwritten.
    """
    steps = checkpoints.steps()
    if resume == "never" and steps:
        raise UserError(
            f"--resume never, but {checkpoints.folder} holds the checkpoint of step {steps[-1]}: "
            "choose another --out"
        )
    if steps:
        checkpoints.load(steps[-1], model, optimizer)
        return steps[-1]
    if resume in ("auto", "never"):
        return 0
    origin = Path(resume)
    others = Checkpoints(origin.parent)
    found = next((step for step in others.steps() if others.path(step) == origin), None)
    if found is None:
        raise UserError(f"--resume {resume} is no complete checkpoint: give auto, never or one")
    others.load(found, model, optimizer)
    return found


def _set_lr(optimizer: torch.optim.Optimizer, config: RunConfig, epoch: float) -> float:
    """Set the learning rate of a moment of the run, and return it."""
    lr = warmup_cosine(
        epoch,
        lr=config.lr,
        epochs=config.training.epochs,
        warmup_epochs=config.training.warmup_epochs,
        min_lr=config.training.min_lr,
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _draw(
    recipe: Recipe, config: RunConfig, model: nn.Module, batch: Batch, *, epoch: int
) -> tuple[Tensor, Mask]:
    """Move a batch to the device, and draw its masks there."""
    encoder: Any = model.encoder
    images = batch.images.to(config.device, non_blocking=True)
    sample_ids = batch.sample_ids.to(config.device, non_blocking=True)
    key = masking.key(sample_ids, seed=config.seed, epoch=epoch)
    return images, recipe.draw_mask(key, encoder.grid, config.training.mask_ratio)


def _backward(model: nn.Module, config: RunConfig, images: Tensor, mask: Mask) -> Tensor:
    """Fill in the gradients of a batch, part by part, and return its loss."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=images.device)
    for rows in torch.arange(len(images)).tensor_split(config.accumulate):
        if len(rows) == 0:  # unreadable images left fewer than there are parts
            continue
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        with autocast(config):
            loss = model(images[part], mask[part]).loss
        share = loss * (len(rows) / len(images))
        share.backward()
        total += share.detach()
    return total


def _clip(model: nn.Module, limit: float | None) -> Tensor:
    """Clip the gradient to a norm, and return the norm that it had."""
    norm = nn.utils.get_total_norm(gradients(model.parameters()))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


@dataclass
class _Meter:
    """Progress bar and throughput: images per second, and the share of time spent on waiting.

    Attributes:
        every: Steps between two logged rows.
        num_steps: Steps of the run.
    """

    every: int
    num_steps: int
    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    bar: Any = None

    def watch(self, loader: Any, first_step: int) -> Iterator[Any]:
        """Pass batches on, and measure how long each one is waited for."""
        # A terminal gets a bar; a file or a pipe gets a line a logged row.
        self.bar = tqdm(
            total=self.num_steps,
            initial=first_step,
            disable=not sys.stderr.isatty(),
            unit="step",
        )
        self.since = time.perf_counter()
        batches = iter(loader)
        with self.bar:
            while True:
                start = time.perf_counter()
                batch = next(batches, StopIteration)
                self.waited += time.perf_counter() - start
                if batch is StopIteration:
                    return
                yield batch
                self.bar.update()

    def count(self, images: int) -> None:
        """Add to the images seen since the last row."""
        self.images += images

    def is_due(self, step: int) -> bool:
        """Whether this step is logged: the first, every so many, and the last."""
        return step == 0 or (step + 1) % self.every == 0 or step + 1 == self.num_steps

    def row(self, step: int, loss: Tensor, lr: float, norm: Tensor) -> dict[str, Any]:
        """Close an interval and describe it."""
        row = {
            "step": step,
            "loss": loss.item(),  # waits for the device, so that the times are true
            "lr": lr,
            "grad_norm": norm.item(),
        }
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        row["images_per_s"] = self.images / elapsed
        row["data_share"] = self.waited / elapsed
        text = (
            f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s  "
            f"data {row['data_share']:.0%}"
        )
        if self.bar.disable:
            print(f"step {step}/{self.num_steps}  {text}", file=sys.stderr, flush=True)
        else:
            self.bar.set_postfix_str(text)
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()
        return row
