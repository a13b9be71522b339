"""What a run is made of: presets, the command line, and the configuration that they resolve to."""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
import yaml
from torch import Tensor, nn

from mimkit.masking import Key, Mask
from recipes.engine.errors import UserError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Training:
    """How a preset is trained.

    Attributes:
        epochs: Length of the run.
        batch_size: Images per optimizer step.
        base_lr: Learning rate per 256 images of a step.
        warmup_epochs: Epochs in which the rate rises from 0.
        mask_ratio: Fraction of patches to mask, in (0, 1).
        weight_decay: Of parameters with more than one axis.
        betas: Of AdamW.
        min_lr: Learning rate at the end.
        clip_grad: Largest norm of the gradient; None for no limit.
        precision: "fp32", or "bf16" for bfloat16 autocast.
    """

    epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: float
    mask_ratio: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    min_lr: float = 0.0
    clip_grad: float | None = None
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Preset:
    """A model's shape and how it is trained."""

    model: Any
    training: Training


@dataclass(frozen=True)
class Recipe:
    """What the engine needs to know of a method.

    Attributes:
        name: Name of the recipe, as in the default output folder.
        presets: Name -> preset; the first one is the default.
        build: Makes the model of a configuration. It has an `encoder` with `grid` and `pool`, and
            is called with images and a mask.
        draw_mask: Draws the masks of a batch: (key, grid, ratio).
        baselines: Scores trivial predictors under the loss: (model's configuration, images, mask).
        reconstruct: Fills in the masked patches of model inputs: (model, images, mask).
        note: What a viewer of reconstructions must know.
    """

    name: str
    presets: Mapping[str, Preset]
    build: Callable[[Any], nn.Module]
    draw_mask: Callable[[Key, tuple[int, ...], float], Mask]
    baselines: Callable[[Any, Tensor, Mask], dict[str, Tensor]]
    reconstruct: Callable[[Any, Tensor, Mask], Tensor]
    note: str


@dataclass(frozen=True)
class Options:
    """Command line of every recipe; what is not given comes from the preset.

    Attributes:
        preset: Model and schedule.
        data: "photos", "digits", or a folder of images.
        out: Output folder; by default runs/<recipe>-<preset>-<data>-<hash of the configuration>.
        epochs: Length of the run.
        max_steps: Stop after this many optimizer steps; the schedule is that of the whole run.
        batch_size: Images per optimizer step.
        lr: Highest learning rate, not scaled with the batch.
        mask_ratio: Fraction of patches to mask, in (0, 1).
        seed: Seed of weights, order, augmentation and masks.
        device: Where to train; "auto" takes a GPU if there is one.
        precision: fp32, or bf16 for bfloat16 autocast.
        workers: Processes that load images; 0 loads in the training process.
        compile: Run the model through torch.compile.
        accumulate: Parts in which a batch goes through the model, to save memory.
        shard: Spread weights over the processes of torchrun (FSDP2) instead of copying them (DDP).
        non_finite: What to do about a loss that is not finite: "stop", or "rewind" to the last
            checkpoint and leave out the batch.
        checkpoint_every: Steps between checkpoints; an epoch's by default.
        keep_every: Steps whose multiples are kept; of other checkpoints only the last two are.
        resume: "auto" goes on with the output folder's last checkpoint, "never" insists on a new
            start, and a checkpoint's folder begins with that one.
        tracker: Where metrics go beside metrics.jsonl.
        dry_run: Print configuration, parameters, FLOPs and memory, and stop.
        config: YAML file with any of these options; the command line wins.
    """

    preset: str | None = None
    data: str = "photos"
    out: Path | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    mask_ratio: float | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision | None = None
    workers: int = 0
    compile: bool = False
    accumulate: int = 1
    shard: bool = False
    non_finite: Literal["stop", "rewind"] = "stop"
    checkpoint_every: int | None = None
    keep_every: int | None = None
    resume: str = "auto"
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    dry_run: bool = False
    config: Path | None = None


@dataclass(frozen=True)
class RunConfig:
    """All that decides the result of a run."""

    recipe: str
    preset: str
    data: str
    model: Any
    training: Training
    lr: float
    max_steps: int | None
    seed: int
    device: str
    compile: bool
    accumulate: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dictionaries, as in `config.yaml`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self) -> str:
        """Return eight characters that name this configuration."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def parse_options(arguments: Sequence[str], *, program: str, description: str) -> Options:
    """Read the command line, on top of the YAML file that `--config` names.

    Raises:
        UserError: An unknown option or one that cannot be read, in either place.
    """
    from_file = _yaml_arguments(_config_path(arguments))
    return _parse([*from_file, *arguments], program=program, description=description)


def resolve(options: Options, recipe: Recipe) -> RunConfig:
    """Fill in the preset's values.

    Raises:
        UserError: An unknown preset or device, or a number out of range.
    """
    preset_name = options.preset or next(iter(recipe.presets))
    if preset_name not in recipe.presets:
        raise UserError(f"no preset {preset_name!r}: choose {', '.join(recipe.presets)}")
    preset = recipe.presets[preset_name]
    training = replace_given(
        preset.training,
        epochs=options.epochs,
        batch_size=options.batch_size,
        mask_ratio=options.mask_ratio,
        precision=options.precision,
    )
    lr = options.lr if options.lr is not None else scaled_lr(training)
    _check_positive("epochs", training.epochs)
    _check_positive("batch-size", training.batch_size)
    _check_positive("accumulate", options.accumulate)
    for name in ("max_steps", "checkpoint_every", "keep_every"):
        if getattr(options, name) is not None:
            _check_positive(name.replace("_", "-"), getattr(options, name))
    if not (lr > 0 and math.isfinite(lr)):
        raise UserError(f"--lr {lr} is no learning rate: give a positive number")
    if not 0 < training.mask_ratio < 1:
        raise UserError(
            f"--mask-ratio {training.mask_ratio} is out of range: give a fraction between 0 and 1"
        )
    if options.seed < 0:
        raise UserError(f"--seed {options.seed} is negative: give 0 or more")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers} is negative: give 0 or more")
    return RunConfig(
        recipe=recipe.name,
        preset=preset_name,
        data=options.data,
        model=preset.model,
        training=training,
        lr=lr,
        max_steps=options.max_steps,
        seed=options.seed,
        device=_resolve_device(options.device),
        compile=options.compile,
        accumulate=options.accumulate,
    )


def scaled_lr(training: Training) -> float:
    """Scale the base rate, which is for 256 images a step, linearly with the batch."""
    return training.base_lr * training.batch_size / 256


Dataclass = TypeVar("Dataclass")


def replace_given(value: Dataclass, **changes: Any) -> Dataclass:
    """Replace the fields whose new value is not None."""
    given = {name: change for name, change in changes.items() if change is not None}
    return dataclasses.replace(value, **given)  # type: ignore[type-var]


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"--{name} {value} is too small: give 1 or more")


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; choose cpu or auto")
    return device


def _config_path(arguments: Sequence[str]) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return None


def _yaml_arguments(path: Path | None) -> list[str]:
    """Turn a YAML file into the arguments that would say the same on the command line."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML: {reason}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `option: value` lines; got {content!r}")
    known = {field.name for field in dataclasses.fields(Options)} - {"config"}
    arguments: list[str] = []
    for name, value in content.items():
        option = str(name).replace("-", "_")
        if option not in known:
            choices = ", ".join(sorted(known))
            raise UserError(f"--config {path} has an unknown key {name!r}: choose from {choices}")
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _parse(arguments: Sequence[str], *, program: str, description: str) -> Options:
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(Options, args=list(arguments), prog=program, description=description)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(_one_line(messages.getvalue())) from None


def _one_line(message: str) -> str:
    """Take the first sentence out of tyro's framed message."""
    lines = (re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in message.splitlines())
    sentences = [line for line in lines if line and not re.match(r"^[╭╰─+\-]", line)]
    return " ".join(sentences) if sentences else "the command line cannot be read"


def print_error(error: UserError) -> None:
    """Print a user's mistake on one line of stderr."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
