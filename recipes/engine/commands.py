"""The command line of what is done to a finished encoder: fine-tuning and probing."""

import contextlib
import dataclasses
import io
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
import yaml

from recipes.engine.config import (
    Precision,
    Training,
    _check_positive,
    _config_path,
    _one_line,
    _resolve_device,
    print_error,
)
from recipes.engine.encoders import EncoderFile, EncoderShape, load_encoder
from recipes.engine.errors import UserError

OptionsType = TypeVar("OptionsType", bound="CommonOptions")


@dataclass(frozen=True)
class CommonOptions:
    """Options of fine-tuning and probing; what is not given comes from the preset.

    Attributes:
        encoder: An `encoder.safetensors`, whose shape is in the `config.yaml` beside it, or a
            checkpoint of the authors' MAE, whose shape is the preset's.
        preset: Shape of an encoder without `config.yaml`, and how it is trained.
        data: "photos", "digits", or a folder with train/<class> and, if need be, val/<class>.
        out: Output folder; by default runs/<recipe>-<preset>-<data>-<hash of the configuration>.
        epochs: Length of the run.
        max_steps: Stop after this many optimizer steps; the schedule is that of the whole run.
        batch_size: Images per optimizer step.
        lr: Highest learning rate, not scaled with the batch.
        seed: Seed of weights, order, augmentation and mixing.
        device: Where to train; "auto" takes a GPU if there is one.
        precision: fp32, or bf16 for bfloat16 autocast.
        workers: Processes that load images; 0 loads in the training process.
        checkpoint_every: Steps between checkpoints; by default an epoch's, or 100 if that is more.
        keep_every: Steps whose multiples are kept; of other checkpoints only the last two are.
        resume: "auto" goes on with the output folder's last checkpoint, "never" insists on a new
            start.
        dry_run: Print configuration, parameters and steps, and stop.
        config: YAML file with any of these options; the command line wins.
    """

    encoder: str
    preset: str | None = None
    data: str = "photos"
    out: Path | None = None
    epochs: int | None = None
    max_steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision | None = None
    workers: int = 0
    checkpoint_every: int | None = None
    keep_every: int | None = None
    resume: Literal["auto", "never"] = "auto"
    dry_run: bool = False
    config: Path | None = None


def run_command(
    command: Callable[[OptionsType], None],
    options_type: type[OptionsType],
    *,
    name: str,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run a command.

    Args:
        command: What to do with the options.
        options_type: The options.
        name: Name of the script.
        description: Text above the options of `--help`.
        arguments: Command line; that of the process if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is told on one line of stderr.
    """
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"recipes/{name}.py runs in one process: start it without torchrun")
        command(
            parse(
                options_type,
                sys.argv[1:] if arguments is None else arguments,
                program=f"recipes/{name}.py",
                description=description,
            )
        )
    except UserError as error:
        print_error(error)
        return 2
    return 0


def parse(
    options_type: type[OptionsType], arguments: Sequence[str], *, program: str, description: str
) -> OptionsType:
    """Read the command line, on top of the YAML file that `--config` names.

    Raises:
        UserError: An unknown option or one that cannot be read, in either place.
    """
    from_file = yaml_arguments(_config_path(arguments), options_type)
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                options_type,
                args=[*from_file, *arguments],
                prog=program,
                description=description,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(_one_line(messages.getvalue())) from None


def yaml_arguments(path: Path | None, options_type: type[Any]) -> list[str]:
    """Turn a YAML file into the arguments that would say the same on the command line.

    Raises:
        UserError: A file that cannot be read, or an unknown key.
    """
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `option: value` lines; got {content!r}")
    known = {field.name for field in dataclasses.fields(options_type)} - {"config"}
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


PresetType = TypeVar("PresetType")


def choose_preset(
    options: CommonOptions, presets: Mapping[str, PresetType]
) -> tuple[str, PresetType]:
    """Return the preset that was asked for, or the first one, with its name.

    Raises:
        UserError: There is none of that name.
    """
    name = options.preset or next(iter(presets))
    if name not in presets:
        raise UserError(f"no preset {name!r}: choose {', '.join(presets)}")
    return name, presets[name]


def open_encoder(options: CommonOptions, shape: EncoderShape) -> EncoderFile | None:
    """Read the encoder that `--encoder` names; None for "none".

    Args:
        options: The options.
        shape: Its shape, where no `config.yaml` beside it tells.

    Raises:
        UserError: It cannot be read.
    """
    return None if options.encoder == "none" else load_encoder(Path(options.encoder), shape)


def check_options(options: CommonOptions, training: Training, lr: float) -> str:
    """Check what was asked for, and return the device.

    Raises:
        UserError: A number out of range, or a device that is not there.
    """
    _check_positive("epochs", training.epochs)
    _check_positive("batch-size", training.batch_size)
    for name in ("max_steps", "checkpoint_every", "keep_every"):
        if getattr(options, name) is not None:
            _check_positive(name.replace("_", "-"), getattr(options, name))
    if not (lr > 0 and math.isfinite(lr)):
        raise UserError(f"--lr {lr} is no learning rate: give a positive number")
    for name in ("seed", "workers"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} is negative: give 0 or more")
    return _resolve_device(options.device)
