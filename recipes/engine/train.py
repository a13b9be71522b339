"""The training loop."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimkit import masking
from recipes.engine.config import Recipe, RunConfig
from recipes.engine.data import DataSet
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
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, *, workers: int
) -> nn.Module:
    """Train a model and log its metrics.

    Returns:
        The trained model, in evaluation mode.
    """
    training = config.training
    steps_per_epoch, num_steps = count_steps(config, data)
    model = build_model(recipe, config).train()
    encoder: Any = model.encoder
    optimizer = torch.optim.AdamW(
        parameter_groups(model, weight_decay=training.weight_decay),
        betas=training.betas,
        fused=True,
    )
    folder.start_metrics(first_step=0)
    loader = make_loader(
        data.train,
        batch_size=training.batch_size,
        seed=config.seed,
        first_step=0,
        num_steps=num_steps,
        workers=workers,
        pin_memory=config.device == "cuda",
    )
    meter = _Meter(every=max(num_steps // _LOGS_PER_RUN, 1), num_steps=num_steps)
    for step, batch in enumerate(meter.watch(loader)):
        if batch is None:  # not one image of the batch could be read
            continue
        images, sample_ids = (tensor.to(config.device, non_blocking=True) for tensor in batch)
        key = masking.key(sample_ids, seed=config.seed, epoch=step // steps_per_epoch)
        mask = recipe.draw_mask(key, encoder.grid, training.mask_ratio)
        lr = warmup_cosine(
            step / steps_per_epoch,
            lr=config.lr,
            epochs=training.epochs,
            warmup_epochs=training.warmup_epochs,
            min_lr=training.min_lr,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast(config):
            output = model(images, mask)
        optimizer.zero_grad(set_to_none=True)
        output.loss.backward()
        norm = _clip(model, training.clip_grad)
        optimizer.step()
        meter.count(len(images))
        if meter.is_due(step):
            row = meter.row(step + 1, output.loss, lr, norm)
            row["epoch"] = (step + 1) / steps_per_epoch
            row["baselines"] = {
                name: value.item() for name, value in recipe.baselines(model, images, mask).items()
            }
            folder.append_metrics(row)
    return model.eval()


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

    def watch(self, loader: Any) -> Iterator[Any]:
        """Pass batches on, and measure how long each one is waited for."""
        # A terminal gets a bar; a file or a pipe gets a line a logged row.
        self.bar = tqdm(total=self.num_steps, disable=not sys.stderr.isatty(), unit="step")
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
