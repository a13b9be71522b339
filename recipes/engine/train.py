"""The training loop."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mimkit import masking
from recipes.engine.data.sets import Batch, DataSet
from recipes.engine.errors import UserError
from recipes.engine.masks import Masks, first, take_rows
from recipes.engine.optim import gradients, parameter_groups, scheduled_lr
from recipes.engine.run.checkpoint import Checkpoints, start_from
from recipes.engine.run.config import Options, PretrainConfig, Recipe, RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.loader import make_loader
from recipes.engine.run.tracker import make_tracker
from recipes.engine.run.world import World, distribute, gradient_sync, whole, whole_weights
from recipes.engine.seeds import stream_seed

_LOGS_PER_RUN = 50
_MAX_SKIPPED = 10
_FITTING_IMAGES = 256


def build_model(recipe: Recipe, config: PretrainConfig) -> nn.Module:
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


def warn_of_short_schedule(config: RunConfig) -> None:
    """Tell the user when a run is too short for the schedule of its preset."""
    training = config.training
    late = [epoch for epoch in training.milestones if epoch >= training.epochs]
    if training.warmup_epochs >= training.epochs:
        told = f"end within the {training.warmup_epochs:g} epochs in which the rate rises"
    elif late:
        told = f"end before the rate falls, at epoch {late[0]:g}"
    else:
        return
    print(
        f"warning: {training.epochs} epochs {told}: preset {config.preset} is made for longer runs",
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
    recipe: Recipe,
    config: PretrainConfig,
    data: DataSet,
    folder: RunFolder,
    options: Options,
    world: World,
) -> dict[str, Tensor]:
    """Train a model from its last checkpoint on, log its metrics, and return its weights."""
    trainer = Trainer(recipe, config, data, world, shard=options.shard)
    checkpoints = Checkpoints(folder.path / "checkpoints", world, keep_every=options.keep_every)
    _, num_steps = count_steps(config, data)
    first_step = start_from(
        options.resume, checkpoints, trainer.model, trainer.optimizer, num_steps
    )
    tracker = make_tracker(options.tracker if world.is_main else "none", config, folder)
    while True:
        try:
            for batch, row in _train_from(first_step, trainer, data, folder, checkpoints, options):
                folder.note_unreadable(batch.unreadable_ids)
                if row is not None:
                    tracker.log(row)
            checkpoints.finish()
        except NonFiniteError as error:
            checkpoints.finish()
            first_step = _rewind(error, trainer, folder, checkpoints, options)
        else:
            tracker.close()
            return whole_weights(trainer.model)


def _train_from(
    first_step: int,
    trainer: "Trainer",
    data: DataSet,
    folder: RunFolder,
    checkpoints: Checkpoints,
    options: Options,
) -> Iterator[tuple[Batch, dict[str, Any] | None]]:
    """Make the steps from `first_step` to the end; yield every batch and the row logged for it.

    Raises:
        NonFiniteError: A step whose loss or gradient is not finite; it changed nothing.
    """
    config, world = trainer.config, trainer.world
    steps_per_epoch, num_steps = count_steps(config, data)
    skipped = folder.read_skipped()
    folder.start_metrics(first_step=first_step)
    if options.non_finite == "rewind" and not world.agree(checkpoints.steps()):
        checkpoints.save(first_step, trainer.model, trainer.optimizer)
    loader = make_loader(
        data.train,
        world=world,
        batch_size=config.training.batch_size,
        seed=config.seed,
        first_step=first_step,
        num_steps=num_steps,
        workers=options.workers,
        pin_memory=config.device == "cuda",
    )
    meter = _Meter(every=max(num_steps // _LOGS_PER_RUN, 1), num_steps=num_steps, world=world)
    for step, batch in enumerate(meter.watch(loader, first_step), first_step):
        done = step + 1
        row = None
        result = None if step in skipped else trainer.step(batch, step, step / steps_per_epoch)
        if result is not None and meter.is_due(done, result):
            row = {"step": done, "epoch": done / steps_per_epoch, **meter.row(done, result)}
            if world.is_main and len(result.images):
                mask = first(result.masks)
                scores = trainer.recipe.baselines(trainer.bare_model, result.images, mask)
                row["baselines"] = {name: score.item() for name, score in scores.items()}
                folder.append_metrics(row)
        if done % (options.checkpoint_every or steps_per_epoch) == 0 or done == num_steps:
            checkpoints.save(done, trainer.model, trainer.optimizer)
        yield batch, row


class NonFiniteError(Exception):
    """A step whose loss or gradient is not finite."""

    def __init__(self, step: int, loss: float, norm: float) -> None:
        super().__init__(f"the loss of step {step + 1} is {loss}, the norm of its gradient {norm}")
        self.step = step


def _rewind(
    error: NonFiniteError,
    trainer: "Trainer",
    folder: RunFolder,
    checkpoints: Checkpoints,
    options: Options,
) -> int:
    """Go back to the last checkpoint and skip the batch, if that is asked for and helps.

    Raises:
        UserError: It is not, or it did not the last few times.
    """
    steps = trainer.world.agree(checkpoints.steps())
    safe = f"the checkpoint of step {steps[-1]} is safe" if steps else "no checkpoint was written"
    if options.non_finite == "stop":
        raise UserError(
            f"{error}; {safe}: lower --lr, take --precision fp32, or skip the batch with "
            "--non-finite rewind"
        )
    skipped = sorted({*folder.read_skipped(), error.step})
    if len(skipped) > _MAX_SKIPPED:
        raise UserError(f"{error}, after {_MAX_SKIPPED} batches that were skipped; {safe}")
    # On disk, so that a run which is killed and goes on skips the same batches.
    folder.write_skipped(skipped)
    if trainer.world.is_main:
        print(f"warning: {error}; back to step {steps[-1]}, without its batch", file=sys.stderr)
    trainer.world.wait()
    checkpoints.load(steps[-1], trainer.model, trainer.optimizer)
    return steps[-1]


@dataclass(frozen=True)
class StepResult:
    """What a step gives the log.

    Attributes:
        loss: Mean over all processes.
        others: Means of the output's other numbers, by name.
        lr: Learning rate.
        grad_norm: Norm of the gradient before clipping.
        num_images: Images of all processes.
        images: Those of this process.
        masks: Their masks.
    """

    loss: Tensor
    others: dict[str, Tensor]
    lr: float
    grad_norm: Tensor
    num_images: int
    images: Tensor
    masks: Masks


class Trainer:
    """Model and optimizer, spread over the processes, and how they make a step.

    Args:
        recipe: The method.
        config: The run's configuration.
        data: The images.
        world: The processes.
        shard: Whether weights are spread over the processes, or copied to each.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: PretrainConfig,
        data: DataSet,
        world: World,
        *,
        shard: bool,
    ) -> None:
        self.recipe = recipe
        self.config = config
        self.world = world
        model = build_model(recipe, config).train()
        if recipe.fit is not None:  # the same in every process; a checkpoint overwrites it
            recipe.fit(model, fitting_images(data).to(config.device))
        encoder: Any = model.encoder
        self.grid: tuple[int, ...] = encoder.grid
        self.image_size: tuple[int, ...] = encoder.image_size
        self.bare_model = model
        self.model = distribute(model, world, shard=shard)
        self.optimizer = torch.optim.AdamW(
            # Of the model itself: DDP's wrapper has other names, and no `not_decayed`.
            parameter_groups(model, weight_decay=config.training.weight_decay),
            betas=config.training.betas,
            fused=True,
        )
        if config.compile:
            self.model.compile()

    def step(self, batch: Batch, step: int, epoch: float) -> StepResult | None:
        """Make a step; `None` if not one image of the batch could be read.

        Args:
            batch: This process's share of the batch.
            step: Number of the step.
            epoch: Epochs done, a fraction within one.

        Raises:
            NonFiniteError: The loss or its gradient is not finite; the weights are as they were.
        """
        count = torch.tensor(len(batch.images), device=self.config.device)
        num_images = int(self.world.total(count))
        if num_images == 0:
            return None
        lr = self._set_lr(epoch)
        images, masks = self._draw(batch, epoch=int(epoch))
        # Drop path draws from the global generator: another stream in every step and process.
        torch.manual_seed(stream_seed(self.config.seed, step, self.world.rank))
        numbers = self._backward(images, masks, num_images)
        loss = numbers.pop("loss")
        norm = self._clip()
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            raise NonFiniteError(step, loss.item(), norm.item())
        self.optimizer.step()
        return StepResult(loss, numbers, lr, norm, num_images, images, masks)

    def _set_lr(self, epoch: float) -> float:
        lr = scheduled_lr(epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _draw(self, batch: Batch, *, epoch: int) -> tuple[Tensor, Masks]:
        """Move a batch to the device, and draw its masks there."""
        images = batch.images.to(self.config.device, non_blocking=True)
        if len(images) == 0:  # this process takes part in the step all the same
            images = images.new_empty(0, self.config.model.in_channels, *self.image_size)
        sample_ids = batch.sample_ids.to(self.config.device, non_blocking=True)
        key = masking.key(sample_ids, seed=self.config.seed, epoch=epoch)
        return images, self.config.masking.draw(key, self.grid)

    def _backward(self, images: Tensor, masks: Masks, num_images: int) -> dict[str, Tensor]:
        """Fill in the gradients, part by part; return the output's numbers over all processes."""
        self.model.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        parts = torch.arange(len(images)).tensor_split(self.config.accumulate)
        for index, rows in enumerate(parts, 1):
            with gradient_sync(self.model, enabled=index == len(parts)):
                with autocast(self.config):
                    output = self.model(images[rows], take_rows(masks, rows))
                # Processes count the same, however many images each could read: weigh by images.
                share = len(rows) * self.world.size / num_images
                (output.loss * share).backward()
            for name, value in scalars(output).items():
                totals[name] = totals.get(name, 0.0) + value * share
        summed = self.world.total(torch.stack(list(totals.values()))) / self.world.size
        return dict(zip(totals, summed, strict=True))

    def _clip(self) -> Tensor:
        """Clip the gradient to a norm, and return the norm that it had."""
        norm = whole(nn.utils.get_total_norm(gradients(self.model.parameters())))
        if self.config.training.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.training.clip_grad, norm
            )
        return norm


def fitting_images(data: DataSet) -> Tensor:
    """Take some model inputs for `Recipe.fit`."""
    count = min(len(data.train), _FITTING_IMAGES)
    items = (data.train[0, sample_id] for sample_id in range(count))
    return torch.stack([image for image, _ in items if image is not None])


def scalars(output: Any) -> dict[str, Tensor]:
    """Return the numbers of a model's output, the loss among them, by name."""
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {
        name: value.detach().float()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim == 0
    }


@dataclass
class _Meter:
    """Progress bar and throughput: images per second, and the share of time spent on waiting.

    Attributes:
        every: Steps between two logged rows.
        num_steps: Steps of the run.
        world: The processes, of which the main one shows its progress.
    """

    every: int
    num_steps: int
    world: World
    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    bar: Any = None

    def watch(self, loader: Any, first_step: int) -> Iterator[Batch]:
        """Pass batches on, and measure how long each one is waited for."""
        # A terminal gets a bar; a file or a pipe gets a line a logged row.
        self.bar = tqdm(
            total=self.num_steps,
            initial=first_step,
            disable=not (self.world.is_main and sys.stderr.isatty()),
            unit="step",
        )
        self.since = time.perf_counter()
        batches = iter(loader)
        with self.bar:
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                yield batch
                self.bar.update()

    def is_due(self, done: int, result: StepResult) -> bool:
        """Count a step, and say whether it is logged: the first, every so many, and the last."""
        self.images += result.num_images
        return done == 1 or done % self.every == 0 or done == self.num_steps

    def row(self, done: int, result: StepResult) -> dict[str, Any]:
        """Close an interval and describe it."""
        row = {
            "loss": result.loss.item(),  # waits for the device, so that the times are true
            "lr": result.lr,
            "grad_norm": result.grad_norm.item(),
        }
        row |= {name: value.item() for name, value in result.others.items()}
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        row["images_per_s"] = self.images / elapsed
        row["data_share"] = self.waited / elapsed
        text = (
            f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s  "
            f"data {row['data_share']:.0%}"
        )
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif self.world.is_main:
            print(f"step {done}/{self.num_steps}  {text}", file=sys.stderr, flush=True)
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()
        return row
