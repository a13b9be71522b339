"""The training loop of every recipe.

A `Task` holds the model and its optimizer, and computes the loss of a batch. Pre-training,
classification, segmentation, detection and the tokenizer each have one. `run_steps` loads batches,
steps, logs and saves checkpoints, and can rewind when a loss or gradient is not finite.
"""

import contextlib
import itertools
import math
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from recipes import signals
from recipes.engine.data.sets import Batch, TrainSet, check_readable
from recipes.engine.errors import UserError, say
from recipes.engine.flops import counting_flops
from recipes.engine.optim import gradients, scheduled_lr
from recipes.engine.run.checkpoint import Checkpoints, start_from
from recipes.engine.run.cli import Options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import CHECKPOINTS, RunFolder
from recipes.engine.run.loader import make_loader, on_device
from recipes.engine.run.tracker import Tracker, make_tracker
from recipes.engine.run.world import (
    COMPUTING,
    LOADING,
    Watchdog,
    World,
    distribute,
    gradient_sync,
    whole,
)
from recipes.engine.seeds import stream_seed

IMAGENET = 1_281_167  # training images of ImageNet-1K
_MAX_SKIPPED = 10
_LINES_PER_RUN = 50  # if stderr is not a terminal, which gets a progress bar
_MEASURED = 20  # steps that the remaining time is estimated from; the first one is slow


@dataclass(frozen=True)
class Moment:
    """Position of a step in a run.

    Attributes:
        step: Number of steps before it.
        epoch: Number of epochs before it, with fractions.
    """

    step: int
    epoch: float


@dataclass(frozen=True)
class Plan:
    """Number of steps of a run, and when to log and save.

    Attributes:
        steps_per_epoch: Steps per epoch.
        num_steps: Steps of the run.
        checkpoint_every: Steps between checkpoints.
        log_every: Steps between logged rows.

    Example:
        >>> plan = Plan(steps_per_epoch=4, num_steps=10, checkpoint_every=4, log_every=3)
        >>> [done for done in range(1, 11) if plan.saves(done)]
        [4, 8, 10]
        >>> [done for done in range(1, 11) if plan.logs(done)]
        [1, 3, 6, 9, 10]
        >>> plan.moment(6)
        Moment(step=6, epoch=1.5)
    """

    steps_per_epoch: int
    num_steps: int
    checkpoint_every: int
    log_every: int

    def moment(self, step: int) -> Moment:
        """Return the position of a step."""
        return Moment(step, step / self.steps_per_epoch)

    def saves(self, done: int) -> bool:
        """Whether to save a checkpoint after this many steps."""
        return done % self.checkpoint_every == 0 or done == self.num_steps

    def logs(self, done: int) -> bool:
        """Whether to log a row after this many steps."""
        return done == 1 or done % self.log_every == 0 or done == self.num_steps


def make_plan(
    config: RunConfig, options: Options, train_set: TrainSet, *, checkpoint_at_least: int = 1
) -> Plan:
    """Plan the steps of a run.

    Args:
        config: The run's configuration.
        options: How often to log and save; by default a checkpoint is saved every epoch.
        train_set: The training images. A dry run with fewer than a batch plans for ImageNet-1K.
        checkpoint_at_least: Least number of steps between checkpoints, for short epochs. Ignored
            with `--checkpoint-every`.

    Raises:
        UserError: If a batch is larger than the data set.
    """
    batch_size = config.training.batch_size
    num_images = len(train_set)
    if options.dry_run and num_images < batch_size:
        num_images = max(IMAGENET, batch_size)
    steps_per_epoch = num_images // batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--batch-size {batch_size} is more than the {len(train_set)} images of {config.data}"
        )
    num_steps = config.training.epochs * steps_per_epoch
    return Plan(
        steps_per_epoch=steps_per_epoch,
        num_steps=min(num_steps, config.max_steps or num_steps),
        checkpoint_every=options.checkpoint_every or max(steps_per_epoch, checkpoint_at_least),
        log_every=options.log_every,
    )


class NonFiniteError(Exception):
    """The loss or gradient of a step is not finite. The weights have not changed."""

    def __init__(self, at: Moment, loss: float, norm: float) -> None:
        super().__init__(
            f"the loss of step {at.step + 1} is {loss}, the norm of its gradient {norm}"
        )
        self.step = at.step


@dataclass(frozen=True)
class Step:
    """Numbers of a step for the log.

    Attributes:
        numbers: The loss and other numbers of the task, averaged over the images of all processes;
            the learning rate; the gradient norm before clipping.
        num_images: Number of images in all processes.
    """

    numbers: dict[str, float]
    num_images: int


class Started:
    """Numbers of a step, copied to the host while the device goes on.

    Args:
        at: Position of the step.
        lr: Its learning rate.
        numbers: The other numbers by name, on the device.
    """

    def __init__(self, at: Moment, lr: float, numbers: Mapping[str, Tensor]) -> None:
        self.at = at
        self.lr = lr
        self._on_device = dict(numbers)
        values = torch.stack(list(numbers.values()))
        self._values = values.to("cpu", non_blocking=True)  # to pinned memory
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    @property
    def is_bad(self) -> Tensor:
        """Whether the step must change no weight, on the device."""
        loss, norm, count = (self._on_device[name] for name in ("loss", "grad_norm", "num_images"))
        return ~(loss.isfinite() & norm.isfinite() & (count > 0))

    def fetch(self) -> dict[str, float]:
        """Return the numbers: the only synchronization with the device in a step."""
        if self._copied is not None:
            self._copied.synchronize()
        return dict(zip(self._on_device, self._values.tolist(), strict=True))


class Task(ABC):
    """A kind of training: the model, its optimizer and the loss of a batch.

    Subclasses define `make_optimizer`, `prepare` and `forward`.

    Args:
        model: The model, on its device. Checkpoints hold its weights.
        config: The run's configuration.
        world: The processes.
        shard: Whether to shard the weights (FSDP2) instead of copying them (DDP).
    """

    inputs: Any = None  # inputs of the last step, for `extras`
    takes_bytes = False  # whether `prepare` gets bytes as they are; else normalized
    stops = False  # whether a process of several had received a signal in the last step

    def __init__(
        self, model: nn.Module, config: RunConfig, world: World, *, shard: bool = False
    ) -> None:
        self.config = config
        self.world = world
        self.model = model.train()
        self.spread = distribute(model, world, shard=shard)
        self.optimizer = self.make_optimizer()  # FSDP2 has replaced the parameters by now
        # Whether a GPU works on while the host reads the numbers of the step before. This needs an
        # optimizer that leaves the weights alone by itself if a step is not finite.
        is_fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self.defers = config.device == "cuda" and is_fused and not shard
        if config.compile:
            self.spread.compile(mode="reduce-overhead" if config.compile == "graphs" else None)

    @abstractmethod
    def make_optimizer(self) -> Optimizer:
        """Make the optimizer of `self.model`.

        A parameter group may have an `lr_scale`, a factor of the scheduled learning rate.
        """

    @abstractmethod
    def prepare(self, batch: Batch, at: Moment) -> Any:
        """Move a batch, which may be empty, to the device, and return the inputs of `forward`."""

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Any) -> Mapping[str, Tensor]:
        """Return the loss as "loss", and other numbers for the log by name.

        Each is a mean over the samples in `inputs`.
        """

    def extras(self) -> dict[str, Any]:
        """Return more entries for a logged row, such as the losses of trivial predictors.

        It is called only in the main process, after a step with images.
        """
        return {}

    def take(self, inputs: Any, rows: slice) -> Any:
        """Select some samples of the inputs. By default, slice every tensor in them."""
        return tree_map_only(Tensor, lambda tensor: tensor[rows], inputs)

    def step(self, batch: Batch, at: Moment) -> Step | None:
        """Run one training step; return None if no image of the batch could be read.

        Args:
            batch: This process's share of the batch.
            at: Position of the step.

        Raises:
            NonFiniteError: If the loss or gradient is not finite; the weights have not changed.
        """
        started = self._compute(batch, at)
        step = None if started is None else self.finish(started)
        if step is not None:
            self.optimizer.step()
        return step

    def start(self, batch: Batch, at: Moment) -> "Started | None":
        """Run one training step, whose numbers are still on their way to the host.

        The fused optimizer changes nothing if the loss or gradient is not finite.

        Args:
            batch: This process's share of the batch.
            at: Position of the step.

        Returns:
            What `finish` takes; None if no image of the batch could be read.
        """
        started = self._compute(batch, at)
        if started is not None:
            self.optimizer.found_inf = started.is_bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        return started

    def finish(self, started: "Started") -> Step | None:
        """Return the numbers of a step; wait for the device if they are not there yet.

        Returns:
            None if no process had an image.

        Raises:
            NonFiniteError: If the loss or gradient is not finite. The step has changed no weight,
                but later ones may have.
        """
        numbers = started.fetch()
        self.stops = bool(numbers.pop("stop", False))
        count = int(numbers.pop("num_images"))
        if count == 0:
            return None
        loss = numbers.pop("loss")
        if not (math.isfinite(loss) and math.isfinite(numbers["grad_norm"])):
            raise NonFiniteError(started.at, loss, numbers["grad_norm"])
        return Step({"loss": loss, "lr": started.lr, **numbers}, count)

    def _compute(self, batch: Batch, at: Moment) -> "Started | None":
        """Compute the numbers of a step and its clipped gradient."""
        if self.world.size == 1 and len(batch.images) == 0:
            return None
        lr = self._set_lr(at)
        self.inputs = self.prepare(batch, at)
        # Drop path and Gumbel noise use the global generator: seed it for every step and rank.
        torch.manual_seed(stream_seed(self.config.seed, at.step, self.world.rank))
        totals, num_images = self._backward(len(batch.images))
        return Started(at, lr, {"num_images": num_images, "grad_norm": self._clip(), **totals})

    def is_stopped(self) -> bool:
        """Whether a signal ends the training after this step, the same in every process."""
        return self.stops if self.world.size > 1 else signals.received() is not None

    def _set_lr(self, at: Moment) -> float:
        lr = scheduled_lr(at.epoch, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _backward(self, num_images: int) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the gradients, part by part (gradient accumulation).

        Returns:
            The task's numbers and the number of images, over all processes.
        """
        self.spread.zero_grad(set_to_none=True)
        if self.config.compile == "graphs":
            # The graphs may now reuse memory: of the last step's results, gradients are the last
            # to be needed. All parts of a batch belong to one step, so that they can be added up.
            torch.compiler.cudagraph_mark_step_begin()
        # Filled on the device: a copy from the host would wait for it.
        count = self.world.total(torch.full((), float(num_images), device=self.config.device))
        # DDP averages over processes, which may have different numbers of readable images.
        all_images = num_images if self.world.size == 1 else count.clamp(min=1)
        totals: dict[str, Tensor] = {}
        num_parts = self.config.accumulate
        for part in range(num_parts):
            start, stop = (num_images * bound // num_parts for bound in (part, part + 1))
            with gradient_sync(self.spread, enabled=part == num_parts - 1):
                inputs = (
                    self.inputs if num_parts == 1 else self.take(self.inputs, slice(start, stop))
                )
                with self.config.autocast():
                    numbers = self.forward(self.spread, inputs)
                share = (stop - start) * self.world.size / all_images
                (numbers["loss"] * share).backward()
            for name, value in numbers.items():
                number = value.detach().float()
                if start == stop:  # a mean over no samples may be NaN
                    number = torch.zeros_like(number)
                totals[name] = totals.get(name, 0.0) + number * share
        if self.world.size > 1:  # all stop after the same step; the sum is fetched with the others
            is_stopped = float(signals.received() is not None)
            totals["stop"] = torch.full((), is_stopped, device=self.config.device)
        summed = self.world.total(torch.stack(list(totals.values()))) / self.world.size
        return dict(zip(totals, summed, strict=True)), count

    def _clip(self) -> Tensor:
        """Clip the gradient norm, and return the norm before clipping."""
        norm = whole(nn.utils.get_total_norm(gradients(self.model.parameters())))
        clip_grad = self.config.training.clip_grad
        if clip_grad is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), clip_grad, norm)
        return norm


def recompute_blocks(model: nn.Module) -> None:
    """Switch on activation checkpointing in every encoder of a model (timm's protocol).

    Raises:
        UserError: If there is none that can.
    """
    encoders: list[Any] = [m for m in model.modules() if hasattr(m, "set_grad_checkpointing")]
    if not encoders:
        raise UserError("--recompute: this model has no encoder that can, omit it")
    for encoder in encoders:
        encoder.set_grad_checkpointing(True)


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Let PyTorch use deterministic algorithms only; others raise `RuntimeError`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_steps(
    task: Task, plan: Plan, train_set: TrainSet, folder: RunFolder, options: Options
) -> None:
    """Train from the last checkpoint to the end of the plan, and log metrics.

    Args:
        task: The task.
        plan: The steps.
        train_set: The training images.
        folder: Folder of checkpoints and metrics.
        options: Options for logging, saving, resuming, loading and non-finite steps.

    Raises:
        UserError: If a checkpoint cannot be read or written, a step is not finite, no step had an
            image that could be read, or the model cannot recompute.
        Stopped: After a signal; the steps done are saved.
    """
    if options.recompute:
        recompute_blocks(task.model)
    allowed = deterministic_algorithms() if options.deterministic else contextlib.nullcontext()
    with allowed, signals.noting():
        _train(task, plan, train_set, folder, options)
    signals.set_moment(signals.AFTER_TRAINING)


def _train(
    task: Task, plan: Plan, train_set: TrainSet, folder: RunFolder, options: Options
) -> None:
    world = folder.world
    checkpoints = Checkpoints(folder.path / CHECKPOINTS, world, keep_every=options.keep_every)
    folder.repair(num_samples=len(train_set), num_steps=plan.num_steps)
    before = folder.earlier()
    first_step = start_from(
        options.resume,
        checkpoints,
        task.model,
        task.optimizer,
        plan.num_steps,
        earlier=None if before is None else Checkpoints(before / CHECKPOINTS, world),
    )
    name = options.tracker if world.is_main else "none"
    if world.is_main and first_step < plan.num_steps:
        say(_header(task, plan, len(train_set), first_step), file=sys.stderr)
    next_step: int | None = first_step
    with contextlib.closing(make_tracker(name, task.config, folder)) as tracker:
        while next_step is not None:
            log = _Log(task, plan, folder, tracker, timeout=options.timeout)
            next_step = _run_from(next_step, log, train_set, checkpoints, options)
    _check_trained(folder, train_set, is_new=first_step < plan.num_steps)


def _header(task: Task, plan: Plan, num_images: int, first_step: int) -> str:
    """Return one line about a run that starts or continues."""
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    return (
        f"step {first_step}/{plan.num_steps}  {task.config.recipe} {task.config.preset} on "
        f"{task.config.data}: "
        f"{parameters:,} parameters, {num_images:,} images, "
        f"{task.config.training.batch_size:,} of them in a step"
    )


def _peak_memory(device: str) -> float:
    """Return the most memory used so far, in GiB: allocated on a GPU, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _run_from(
    first_step: int, log: "_Log", train_set: TrainSet, checkpoints: Checkpoints, options: Options
) -> int | None:
    """Train from `first_step`; return the step to rewind to, or None at the end of the run."""
    task, plan, folder = log.task, log.plan, log.folder
    skipped = folder.read_skipped()
    folder.start_metrics(first_step=first_step)
    if options.non_finite == "rewind" and not task.world.agree(checkpoints.steps()):
        checkpoints.save(first_step, task.model, task.optimizer)
    loader = make_loader(
        train_set,
        world=task.world,
        batch_size=task.config.training.batch_size,
        seed=task.config.seed,
        first_step=first_step,
        num_steps=plan.num_steps,
        workers=options.workers,
        pin_memory=task.config.device == "cuda",
    )
    try:
        done = _run_batches(first_step, loader, log, train_set, checkpoints, skipped)
    except NonFiniteError as error:
        checkpoints.finish()
        return _rewind(error, task, folder, checkpoints, options)
    if first_step < done < plan.num_steps and not plan.saves(done):
        checkpoints.save(done, task.model, task.optimizer)
    checkpoints.finish()
    _stop(done, plan, task.world)
    return None


def _run_batches(
    first_step: int,
    loader: Iterable[Batch],
    log: "_Log",
    train_set: TrainSet,
    checkpoints: Checkpoints,
    skipped: Collection[int],
) -> int:
    """Train on the batches of a loader; return the number of steps done.

    Raises:
        NonFiniteError: If a step is not finite.
    """
    task, plan, folder = log.task, log.plan, log.folder
    unreadable = set(task.world.agree(folder.read_unreadable()))

    def record(
        done: int, has_images: bool, unreadable_ids: list[int], started: Started | Step | None
    ) -> None:
        result = task.finish(started) if isinstance(started, Started) else started
        if result is None or result.num_images < task.config.training.batch_size:
            _note_unreadable(unreadable_ids, unreadable, train_set, folder)
        log.add(done, has_images, result)

    done = first_step
    run = task.start if task.defers else task.step
    unrecorded: deque[tuple[int, bool, list[int], Started | Step | None]] = deque()
    for step, batch in enumerate(log.watch(loader, first_step), first_step):
        batch = on_device(batch, train_set, task.config.device, keep_bytes=task.takes_bytes)
        with log.counting(step + 1, len(batch.images), is_skipped=step in skipped):
            started = None if step in skipped else run(batch, plan.moment(step))
        if step == first_step and task.config.compile == "graphs" and task.world.is_main:
            _warn_of_left_out_graphs()
        done = step + 1
        unrecorded.append((done, len(batch.images) > 0, batch.unreadable_ids, started))
        is_due = not task.defers or plan.saves(done) or plan.logs(done)
        while len(unrecorded) > (0 if is_due else 1):
            record(*unrecorded.popleft())
        if plan.saves(done):
            checkpoints.save(done, task.model, task.optimizer)
        if task.is_stopped():
            break
    for values in unrecorded:
        record(*values)
    return done


def _warn_of_left_out_graphs() -> None:
    """Say so if a part of the model, compiled by now, gets no CUDA graph; PyTorch does not."""
    number = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    if number:
        say(
            f"warning: --compile graphs: PyTorch makes no CUDA graph of {number} compiled parts "
            "and launches their kernels one by one; TORCH_LOGS=perf_hints tells why",
            file=sys.stderr,
        )


def _stop(done: int, plan: Plan, world: World) -> None:
    """Raise `Stopped` if any process has received a signal."""
    number = max(world.gather(signals.received() or 0))
    if number and done == plan.num_steps:
        raise signals.Stopped(number, signals.AFTER_TRAINING)
    if number:
        saved = "which is saved" if done else "of which nothing is lost"
        moment = f"after step {done} of {plan.num_steps}, {saved}: start the same command again"
        raise signals.Stopped(number, moment)


def _note_unreadable(
    new: list[int], unreadable: set[int], train_set: TrainSet, folder: RunFolder
) -> None:
    """Record images that could not be read in any process, and stop if there are too many.

    All processes call this in the same steps: those in which some images are missing.
    """
    folder.note_unreadable(new)
    unreadable.update(*folder.world.gather(new))
    check_readable(train_set, unreadable)


def _check_trained(folder: RunFolder, train_set: TrainSet, *, is_new: bool) -> None:
    """Check that at least one step has been trained, and its row is still there.

    Args:
        folder: The folder of the run.
        train_set: The images.
        is_new: Whether this start of the run has trained any steps.

    Raises:
        UserError: If none has, in every process.
    """
    if folder.world.agree(len(folder.read_metrics())):
        return
    reason = "the loss or gradient of every step was not finite"
    unreadable = folder.world.agree(folder.read_unreadable())
    if unreadable:
        reason = (
            f"none of the {len(unreadable)} images that were drawn can be read, among them "
            f"{train_set.describe(unreadable[0])}: replace them"
        )
    elif not is_new and not folder.read_skipped():
        raise UserError(
            f"{folder.path}: all steps have been trained, but their rows in metrics.jsonl are "
            f"lost: move the newest folder in {CHECKPOINTS} elsewhere, so that the last steps are "
            "done again and the run can be scored"
        )
    raise UserError(f"{folder.path}: no step was trained, since {reason}, and choose another --out")


def _rewind(
    error: NonFiniteError,
    task: Task,
    folder: RunFolder,
    checkpoints: Checkpoints,
    options: Options,
) -> int:
    """Load the last checkpoint and mark the batch as skipped; return the checkpoint's step.

    Raises:
        UserError: If `--non-finite` is "stop", or too many batches have been skipped.
    """
    if options.non_finite == "stop":
        raise UserError(
            f"{error}; {checkpoints.safe()}: lower --lr, take --precision fp32, or skip the batch "
            "with --non-finite rewind"
        )
    skipped = sorted({*folder.read_skipped(), error.step})
    if len(skipped) > _MAX_SKIPPED:
        raise UserError(
            f"{error}, after {_MAX_SKIPPED} batches that were skipped; {checkpoints.safe()}"
        )
    # Written to disk, so that a resumed run skips the same batches.
    folder.write_skipped(skipped)
    last = checkpoints.newest()
    if last is None:
        raise UserError(f"{error}, and no checkpoint to rewind to is whole: start again")
    if task.world.is_main:
        say(
            f"warning: {error}; rewinding to step {last}, this batch will be skipped",
            file=sys.stderr,
        )
    task.world.wait()
    checkpoints.load(last, task.model, task.optimizer)
    return last


@dataclass
class _Log:
    """Logs rows of metrics, shows progress, and measures throughput since the last row."""

    task: Task
    plan: Plan
    folder: RunFolder
    tracker: Tracker
    timeout: float
    images: int = 0
    waited: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    last_line: int = 0
    first_step: int = 0
    measured_since: float = 0.0
    bar: Any = None
    numbers: Mapping[str, float] = field(default_factory=dict)  # of the last step with a result
    has_inputs: bool = False  # whether this process had images in it
    has_flops: bool = False  # whether they have been said

    def watch(self, loader: Iterable[Batch], first_step: int) -> Iterator[Batch]:
        """Yield batches, and measure the time spent waiting for them."""
        # A terminal gets a progress bar; a file or a pipe gets lines.
        self.bar = tqdm(
            total=self.plan.num_steps,
            initial=first_step,
            disable=not (self.folder.world.is_main and sys.stderr.isatty()),
            unit="step",
        )
        self.last_line = self.first_step = first_step
        self.since = time.perf_counter()
        batches = iter(loader)
        with self.bar, Watchdog(self.task.world, self.timeout) as watchdog:
            for step in itertools.count(first_step):
                watchdog.note(step, LOADING)
                start = time.perf_counter()
                try:
                    # One of several processes cannot leave the others: it waits for its batch.
                    with signals.breakable(self.task.world.size == 1):
                        batch = next(batches, None)
                except signals.BrokenOff:
                    return
                self.waited += time.perf_counter() - start
                if batch is None:
                    return
                watchdog.note(step, COMPUTING)
                yield batch
                self.bar.update()
                self._expect(step + 1)

    def add(self, done: int, has_images: bool, result: Step | None) -> None:
        """Count a step, and log a row if one is due.

        The last step always has a row: if it was skipped, with the numbers of the step before.
        """
        if result is not None:
            self.images += result.num_images
            self.numbers, self.has_inputs = result.numbers, has_images
        elif done < self.plan.num_steps:
            return
        if not self.plan.logs(done):
            return
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        row = {"step": done, "epoch": done / self.plan.steps_per_epoch, **self.numbers}
        row |= {"images_per_s": self.images / elapsed, "data_share": self.waited / elapsed}
        row["seconds"] = elapsed  # since the row before
        if result is None:
            # The run may have been resumed at this step.
            row = (self.folder.read_metrics() or [{}])[-1] | row | {"skipped": True}
        if "loss" not in row:
            return
        if self.folder.world.is_main:
            row |= self.task.extras() if self.has_inputs else {}
            self.folder.append_metrics(row)
            self.tracker.log(row)
        self._show(done, row)
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def counting(self, done: int, num_images: int, *, is_skipped: bool) -> Iterator[None]:
        """Count the FLOPs of the first step with images, and say them.

        Compiled code cannot be counted: it would not run as such.
        """
        is_due = not (self.has_flops or is_skipped or self.task.config.compile)
        if not (is_due and num_images and self.folder.world.is_main):
            yield
            return
        with counting_flops() as counter:
            yield
        self.has_flops = True
        with tqdm.external_write_mode(file=sys.stderr):  # not into the progress bar
            say(
                f"step {done}/{self.plan.num_steps}  "
                f"{counter.get_total_flops() / num_images / 1e9:,.3g} GFLOP an image, forward and "
                "backward",
                file=sys.stderr,
            )

    def _expect(self, done: int) -> None:
        """Say once how long the rest should take; a progress bar shows it all the time."""
        steps, left = done - self.first_step - 1, self.plan.num_steps - done
        if steps == 0:
            self.measured_since = time.perf_counter()
        if steps != _MEASURED or not left or not self.folder.world.is_main or not self.bar.disable:
            return
        seconds = left * (time.perf_counter() - self.measured_since) / steps
        say(
            f"step {done}/{self.plan.num_steps}  about {tqdm.format_interval(seconds)} (min:s) "
            f"of training to go, an estimate from {steps} steps",
            file=sys.stderr,
        )

    def _show(self, done: int, row: Mapping[str, Any]) -> None:
        text = (
            f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} images/s  "
            f"data {row['data_share']:.0%}"
        )
        if not self.bar.disable:
            memory = _peak_memory(self.task.config.device)
            self.bar.set_postfix_str(f"{text}  {memory:.1f} GiB")
            return
        is_due = done - self.last_line >= self.plan.num_steps / _LINES_PER_RUN
        if self.folder.world.is_main and (is_due or done in (1, self.plan.num_steps)):
            say(f"step {done}/{self.plan.num_steps}  {text}", file=sys.stderr)
            self.last_line = done
