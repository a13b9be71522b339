"""The command line of every recipe: options in dataclasses, a YAML file beneath them."""

import contextlib
import dataclasses
import io
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

from recipes.engine.errors import LostProcessError, UserError
from recipes.engine.run.world import rank_from_environment

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that every recipe has; what is not given comes from the preset.

    Attributes:
        preset: Model and schedule.
        data: "photos", "digits", or a folder of images.
        out: Output folder; by default runs/<recipe>-<preset>-<data>-<hash of the configuration>.
        epochs: Length of the run.
        max_steps: Stop after this many optimizer steps; the schedule is that of the whole run.
        batch_size: Images per optimizer step.
        lr: Highest learning rate, not scaled with the batch.
        seed: Seed of weights, order, augmentation and masks.
        device: Where to train; "auto" takes a GPU if there is one.
        precision: fp32, or bf16 for bfloat16 autocast.
        workers: Processes that load images; 0 loads in the training process.
        checkpoint_every: Steps between checkpoints; an epoch's by default.
        keep_every: Steps whose multiples are kept; of other checkpoints only the last two are.
        resume: "auto" goes on with the output folder's last checkpoint, "never" insists on a new
            start, and a checkpoint's folder begins with that one.
        dry_run: Print what the run would be, and stop.
        config: YAML file with any of these options; the command line wins.
    """

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
    resume: str = "auto"
    dry_run: bool = False
    config: Path | None = None


OptionsType = TypeVar("OptionsType", bound=CommonOptions)
PresetType = TypeVar("PresetType")


def run_command(
    command: Callable[[OptionsType], None],
    options_type: type[OptionsType],
    *,
    name: str,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run a command with the options of a command line.

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
        command(
            parse_options(
                options_type,
                sys.argv[1:] if arguments is None else arguments,
                program=f"recipes/{name}.py",
                description=description,
            )
        )
    except UserError as error:
        if rank_from_environment() == 0 or isinstance(error, LostProcessError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def parse_options(
    options_type: type[OptionsType], arguments: Sequence[str], *, program: str, description: str
) -> OptionsType:
    """Read the command line, on top of the YAML file that `--config` names.

    Raises:
        UserError: An unknown option or one that cannot be read, in either place.
    """
    from_file = _yaml_arguments(_config_path(arguments), options_type)
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


def check_options(options: CommonOptions, *, epochs: int, batch_size: int, lr: float) -> str:
    """Check the numbers that a run will use, and return its device.

    Raises:
        UserError: A number out of range, or a device that is not there.
    """
    check_positive("epochs", epochs)
    check_positive("batch-size", batch_size)
    for name in ("max_steps", "checkpoint_every", "keep_every"):
        if getattr(options, name) is not None:
            check_positive(name.replace("_", "-"), getattr(options, name))
    if not (lr > 0 and math.isfinite(lr)):
        raise UserError(f"--lr {lr} is no learning rate: give a positive number")
    for name in ("seed", "workers"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} is negative: give 0 or more")
    if options.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here; choose cpu or auto")
    return options.device


def check_positive(name: str, value: int) -> None:
    """Check an option that must be 1 or more.

    Raises:
        UserError: It is less.
    """
    if value < 1:
        raise UserError(f"--{name} {value} is too small: give 1 or more")


def _config_path(arguments: Sequence[str]) -> Path | None:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return Path(argument.removeprefix("--config="))
        if argument == "--config" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
    return None


def _yaml_arguments(path: Path | None, options_type: type[Any]) -> list[str]:
    """Turn a YAML file into the arguments that would say the same on the command line."""
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `option: value` lines; got {content!r}")
    known = {field.name: field.type for field in dataclasses.fields(options_type)}
    del known["config"]
    arguments: list[str] = []
    for name, value in content.items():
        option = str(name).replace("-", "_")
        if option not in known:
            choices = ", ".join(sorted(known))
            raise UserError(f"--config {path} has an unknown key {name!r}: choose from {choices}")
        flag = option.replace("_", "-")
        if known[option] is bool and not isinstance(value, bool):
            raise UserError(f"--config {path}: {name} must be true or false; got {value!r}")
        if known[option] is bool:
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _one_line(message: str) -> str:
    """Take the sentences out of tyro's framed message."""
    message = message.replace("{None}|", "")  # options may be left out; None need not be written
    lines = (re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in message.splitlines())
    sentences = [line for line in lines if line and not re.match(r"[╭╰─+]|-+$", line)]
    return " ".join(sentences) if sentences else "the command line cannot be read"
