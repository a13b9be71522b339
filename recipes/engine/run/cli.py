"""The command line: options derived from configuration fields, with defaults from a YAML file."""

import codecs
import contextlib
import dataclasses
import errno
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar, get_args, get_type_hints

import docstring_parser
import torch
import tyro

from mimkit._text import escaped
from recipes import signals
from recipes.engine.errors import ProcessError, UserError, say, say_page
from recipes.engine.fields import (
    FieldError,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Seed,
    Workers,
    admits,
    check_fields,
    describe,
    shown,
)
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.run.world import fails_alone, world_from_environment

Compile = bool | Literal["graphs"]
# Folders of runs as arguments of a command, which says itself what is wrong if there are none.
Runs = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every recipe. Options that are not given come from the preset.

    Attributes:
        preset: Model and schedule.
        data: "photos", "digits", or a folder of images or arrays.
        out: Output folder; by default runs/<recipe>-<preset>-<data>-<hash of the configuration>.
        max_steps: Stop after this many optimizer steps; the learning-rate schedule does not change.
        lr: Peak learning rate, not scaled with the batch size.
        seed: Seed of weights, data order, augmentation and masks.
        device: Where to train; "auto" takes a GPU if there is one.
        workers: Processes that load images; 0 loads in the training process.
        decode: Where image files are decoded: "auto" and "cpu" in the loading processes; "gpu" the
            JPEG files to train on, through torchvision's nvJPEG.
        compile: Compile the model with torch.compile; "graphs" also replays its kernels as CUDA
            graphs, which saves the time to launch them; --no-compile overrides a --config.
        accumulate: Gradient accumulation: number of parts a batch is split into, to save memory.
        recompute: Activation checkpointing: compute the encoder's blocks again in the backward pass
            instead of keeping what they computed.
        deterministic: Let a GPU use deterministic algorithms, which are slower (in attention, for
            one), so that a run that was stopped ends with the weights of one that was not; on a CPU
            it does so anyway.
        shard: Shard the weights over the processes of torchrun (FSDP2) instead of copying them
            (DDP).
        timeout: Seconds to wait for another process of torchrun before giving up and naming it.
        lock: Lock the output folder, so that only one job at a time writes it; --no-lock where the
            file system has no locks.
        non_finite: What to do when the loss or gradient is not finite: "stop", or "rewind" to the
            last checkpoint and skip the batch.
        log_every: Steps between rows of metrics.jsonl; the first and last step always have one.
        tracker: Experiment tracker that gets the metrics too.
        checkpoint_every: Steps between checkpoints; one epoch by default.
        keep_every: Keep the checkpoints at multiples of this many steps; of the others, only the
            last two are kept.
        resume: "auto" continues from the last checkpoint in the output folder, "never" refuses to
            continue a run, and the folder of a checkpoint starts from that one.
        accept_changed_data: Go on in the output folder though the --data folder has changed: from
            the weights of the last checkpoint, with epochs counted anew.
        dry_run: Print configuration and cost without training.
        config: YAML file with any of these options; the command line takes precedence.
    """

    preset: str | None = None
    data: str = "photos"
    out: str | None = None
    max_steps: PositiveInt | None = None
    lr: PositiveFloat | None = None
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: Workers = 0
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    compile: Compile = False
    accumulate: PositiveInt = 1
    recompute: bool = False
    deterministic: bool = False
    shard: bool = False
    timeout: Seconds = 1800.0
    lock: bool = True
    non_finite: Literal["stop", "rewind"] = "stop"
    log_every: PositiveInt = 20
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    checkpoint_every: PositiveInt | None = None
    keep_every: PositiveInt | None = None
    resume: str = "auto"
    accept_changed_data: bool = False
    dry_run: bool = False
    config: Path | None = None


# Fields of every preset's model and training that become options.
IMAGE_FLAGS = ("orientation", "background", "value_range")
ARRAY_FLAGS = ("channels", "crop", "array_key")
FLAGS = (
    "image_size",
    "epochs",
    "batch_size",
    "warmup_epochs",
    "precision",
    *IMAGE_FLAGS,
)

# Errors of files that no program could have avoided.
_OF_FILES = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG)

# PyTorch's message of an allocation on the CPU that fails.
_NO_MEMORY = "can't allocate memory"
# Its message when a loading worker has ended.
_WORKER_LOST = re.compile(r"DataLoader worker .*(is killed by signal|exited unexpectedly)")

# Its message of an operation that `--deterministic` does not allow.
_NOT_DETERMINISTIC = re.compile(r"(\S+) does not have a deterministic implementation")

OptionsType = TypeVar("OptionsType")


def _called(name: str) -> str:
    """Return how a recipe was called, for its help: as a file, or by the command `mimkit`."""
    return sys.argv[0] if sys.argv[0].startswith("mimkit ") else f"recipes/{name}.py"


def _as_called(text: str, program: str) -> str:
    """Return a help text with the recipes' names as commands, if `mimkit` was called."""
    if not program.startswith("mimkit "):
        return text
    name = re.compile(r"(?:python )?recipes/(\w+)\.py")
    return name.sub(lambda found: f"mimkit {found[1].replace('_', '-')}", text)


def run_command(
    command: Callable[[Any], None],
    options_type: type[Any],
    *,
    name: str,
    description: str,
    arguments: Sequence[str] | None,
) -> int:
    """Run a command with the options of a command line.

    Args:
        command: Function that takes the options.
        options_type: A dataclass of options.
        name: Name of the script.
        description: Text above the options in `--help`.
        arguments: Command-line arguments; by default those of the process.

    Returns:
        The exit code: 0; 2 after a `UserError` or where there is not enough memory, which is
        printed as one line on stderr; that of a signal (`signals.EXIT_CODES`), after which there
        is one line, too; or 141 if what reads the output has ended.
    """
    signals.forget()
    try:
        world_from_environment()  # before anything that takes long
        command(
            parse_options(
                options_type,
                sys.argv[1:] if arguments is None else arguments,
                program=_called(name),
                description=description,
            )
        )
    except ProcessError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        _print_error(str(error))
        return 2
    except BrokenPipeError:  # such as `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
        say("error: the program that reads the output has ended", file=sys.stderr)
        return 141
    except signals.Stopped as stop:
        if world_from_environment().is_main:
            say(stop, file=sys.stderr)
        return stop.code
    except Exception as error:
        message = _about_the_machine(error) or _about_determinism(error)
        if message is None:
            _add_process(error)
            raise
        _print_error(message)
        return 2
    return 0


def _about_the_machine(error: Exception) -> str | None:
    """Return one line about what the machine lacks or refuses; None for other errors.

    That is memory, a loading worker that was killed, or a file: even to ask whether there is one
    fails in a folder of somebody else's, or when a file server is away.
    """
    is_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if isinstance(error, OSError):
        if error.errno in _OF_FILES and error.filename is not None:
            return f"{os.fsdecode(error.filename)} cannot be used: {error.strerror}"
        is_of_memory = error.errno == errno.ENOMEM
    elif isinstance(error, RuntimeError):
        is_of_memory |= _NO_MEMORY in str(error)
        if _WORKER_LOST.search(str(error)):
            return (
                "a process that loads images was killed, as systems do when there is not enough "
                "memory, or shared memory (/dev/shm): give fewer --workers, and start the same "
                "command again, which continues from the last checkpoint"
            )
    if is_of_memory:
        return (
            "there is not enough memory: give a smaller --batch-size or --image-size, a larger "
            "--accumulate, or a smaller model"
        )
    return None


def _about_determinism(error: Exception) -> str | None:
    """Return one line about an operation that has no deterministic form; None for other errors."""
    found = _NOT_DETERMINISTIC.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return f"--deterministic: {found[1]} is not deterministic on this device; omit the option"


def _print_error(message: str) -> None:
    """Print the line of a run that fails: once for a job, but each process that fails alone."""
    world = world_from_environment()
    if fails_alone():
        say(f"error in process {world.rank} of {world.size}: {message}", file=sys.stderr)
    elif world.is_main:
        say(f"error: {message}", file=sys.stderr)


def _add_process(error: Exception) -> None:
    """Let the last line of a traceback name the process."""
    world = world_from_environment()
    if world.size > 1:
        said = escaped(f"{type(error).__name__}: {error}")
        error.add_note(f"error in process {world.rank} of {world.size}: {said[:500]}")


def options_of(
    parts: Iterable[object],
    flags: Sequence[str],
    base: type[OptionsType],
    *,
    presets: Iterable[str] = (),
) -> type[OptionsType]:
    """Derive options from configuration fields: their types, and help texts from docstrings.

    Args:
        parts: Configurations, such as a preset's model, training and masking.
        flags: Names of the fields that become options. A name that is not a field of any part is
            ignored: a preset's model need not have an `image_size`.
        base: Class of options to extend.
        presets: Names of the presets, for the help; the first one is the default.

    Returns:
        A dataclass of options. An option that is not given is None. A boolean field whose default
        is False becomes a switch, which is False if it is not given.

    Example:
        >>> from recipes.engine.fields import Depth
        >>> @dataclass(frozen=True)
        ... class Model:
        ...     '''A model.
        ...
        ...     Attributes:
        ...         depth: Blocks of the encoder.
        ...     '''
        ...     depth: Depth = 12
        >>> kind = options_of([Model()], ["depth"], Options)
        >>> options = parse_options(kind, ["--depth", "3"], program="", description="")
        >>> options.depth, override(Model(), options)
        (3, Model(depth=3))
    """
    derived: dict[str, tuple[str, Any, Any]] = {}
    for part in parts:
        kinds, helps = get_type_hints(type(part), include_extras=True), _help_of(type(part))
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            if field.name in flags and field.name not in derived:
                is_switch = kinds[field.name] is bool and field.default is False
                kind: Any = bool if is_switch else kinds[field.name] | None
                shown_help = tyro.conf.arg(
                    help=helps.get(field.name, ""), help_behavior_hint="(default: the preset's)"
                )
                described: Any = Annotated[kind, shown_help]
                derived[field.name] = (field.name, described, False if is_switch else None)
    ordered = [derived[name] for name in flags if name in derived]
    if names := list(presets):
        ordered.insert(0, _preset_option(names, help=_help_of(base)["preset"]))
    return dataclasses.make_dataclass(
        base.__name__,
        ordered,
        bases=(base,),
        frozen=True,
        kw_only=True,
        namespace={"__doc__": base.__doc__},
    )


def _preset_option(names: Sequence[str], *, help: str) -> tuple[str, Any, None]:
    """Return the option `--preset`, which is any text: the recipe says which names there are."""
    shown_help = tyro.conf.arg(
        help=help,
        metavar=f"{{{','.join(names)}}}",
        help_behavior_hint=f"(default: {names[0]})",
    )
    return "preset", Annotated[str | None, shown_help], None


def _help_of(kind: type) -> dict[str, str]:
    """Return the descriptions of attributes in the docstrings of a class and its bases."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        for entry in docstring_parser.parse(base.__doc__ or "").params:
            helps[entry.arg_name] = " ".join((entry.description or "").split())
    return helps


Dataclass = TypeVar("Dataclass")


def override(part: Dataclass, options: Options) -> Dataclass:
    """Replace fields of a configuration with the given options of the same names.

    Raises:
        UserError: If a value does not fit.
    """
    given = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value = getattr(options, field.name, None)
        is_absent_switch = value is False and field.default is False
        if value is not None and not is_absent_switch:
            given[field.name] = value
    with refusing():
        return dataclasses.replace(part, **given)  # type: ignore[type-var]


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turn the `ValueError` of a configuration into a `UserError`."""
    try:
        yield
    except FieldError as error:
        raise UserError(f"{error.flag} is {error.fault}: give {error.fits}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def parse_options(
    options_type: type[OptionsType], arguments: Sequence[str], *, program: str, description: str
) -> OptionsType:
    """Parse the command line, with defaults from the YAML file that `--config` names.

    Raises:
        UserError: If an option in either place is unknown, cannot be parsed, is out of range, or
            sets something that another one leaves out.
    """
    from_file = _yaml_arguments(_config_path(arguments), options_type)
    messages, page = io.StringIO(), _Page(sys.stdout)
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(page):
            options = tyro.cli(
                options_type,
                args=_spelled_out([*from_file, *arguments], options_type),
                prog=program,
                description=_as_called(description, program),
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            say_page(_without_none(page.getvalue()))
            raise
        message = _one_line(messages.getvalue())
        message = _about_a_value(message, options_type) or message
        raise UserError(message if len(message) <= 700 else f"{message[:697]}...") from None
    with refusing():
        check_fields(options)
    _check_given(options)
    if getattr(options, "deterministic", False):
        # cuBLAS reads it when it starts, which fitting a target may do before the first step.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return options


class _Page(io.StringIO):
    """A help text with the colors and borders that the stream takes on which it will be printed."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def isatty(self) -> bool:
        """Whether it will be printed on a terminal."""
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding in which it will be printed, as tyro spells it: "utf-8", not "UTF-8"."""
        return codecs.lookup(self._stream.encoding or "ascii").name


def _without_none(text: str) -> str:
    r"""Return a help text without None among the values: the option is omitted instead.

    Columns and borders stay where they are.

    Example:
        >>> print(_without_none("│ --steps {None}|INT  How many. │"))
        │ --steps INT         How many. │
        >>> print(_without_none("│ --crop {None,random,whole}    │"))
        │ --crop {random,whole}         │
    """
    text = re.sub(r"(\{None\}\|)((?:[^\s|{]+\|)*(?:\{[^}\n]*\}|[^\s{|]+))", r"\2       ", text)
    return re.sub(r"\{None,(\S*)", r"{\1     ", text)


def _spelled_out(arguments: Sequence[str], options_type: type[Any]) -> list[str]:
    """Give a switch that also takes a word its value: `--compile` is `--compile True`."""
    values: dict[str, list[str]] = {}
    for name, kind in get_type_hints(options_type).items():
        if kind == Compile:
            values |= {f"--{name}": [f"--{name}", "True"], f"--no-{name}": [f"--{name}", "False"]}
    spelled: list[str] = []
    for argument, after in itertools.pairwise([*arguments, "-"]):
        spelled += values.get(argument, [argument]) if after.startswith("-") else [argument]
    return spelled


def _about_a_value(message: str, options_type: type[Any]) -> str | None:
    """Say which values an option takes, if the parser's message is about a value."""
    found = re.match(r"Error parsing (--[\w-]+)|.*?(?:argument|for) '(--[\w-]+)'", message)
    kinds = get_type_hints(options_type, include_extras=True)
    flag = found and (found[1] or found[2])
    kind = kinds.get(flag.removeprefix("--").replace("-", "_")) if flag else None
    if kind is None:
        return None
    got = re.search(r"choice ('.*?') for|instantiated from \[(.*?)\]\.", message)
    value = (got[1] or got[2]) if got else "has no value"
    value = value if len(value) <= 60 else f"{value[:57]}..."
    return f"{flag} {value}: give {describe(kind)}"


def _check_given(options: Any) -> None:
    """Check what the types of the options cannot say.

    Raises:
        UserError: If an option that takes several values has none, or sets a part of the model that
            another one leaves out, as `--no-decoder` does with `--decoder-depth`.
    """
    for name, value in vars(options).items():
        # Of a field that is required, the command itself says what is missing.
        if value == () and getattr(type(options), name, ()) is None:
            raise UserError(f"--{name.replace('_', '-')} has no value: give one or several")
    given = {name: value for name, value in vars(options).items() if value not in (None, False)}
    for switch in (name for name in given if name.startswith("no_")):
        for name in given:
            if name.startswith(f"{switch.removeprefix('no_')}_"):
                flags = (f"--{each.replace('_', '-')}" for each in (switch, name))
                raise UserError(f"{' and '.join(flags)} contradict each other: give one of them")


def _config_path(arguments: Sequence[str]) -> Path | None:
    path = None  # of several, the last one counts, as for any option
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        if argument == "--config" and position + 1 < len(arguments):
            path = Path(arguments[position + 1])
    return path


def _yaml_arguments(path: Path | None, options_type: type[Any]) -> list[str]:
    """Turn a YAML file into command-line arguments."""
    known = get_type_hints(options_type, include_extras=True)
    if path is None or known.pop("config", None) is None:
        return []
    if not admits(str, str(path)):
        raise UserError(f"--config {shown(str(path))} is not the name of a file")
    try:
        content = read_yaml(path) or {}
    except UnreadableError as error:
        raise UserError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold `option: value` lines; got {shown(content)}")
    arguments: list[str] = []
    for name, value in content.items():
        option = str(name).replace("-", "_")
        if option not in known:
            choices = ", ".join(sorted(known))
            raise UserError(
                f"--config {path} has an unknown key {shown(name)}: choose from {choices}"
            )
        flag = option.replace("_", "-")
        kind = known[option]
        values = value if isinstance(value, list) else [value]
        # YAML 1.1 reads yes and no as booleans, where a text or number may be meant.
        to_check = [value] if _is_switch(kind) else [v for v in values if isinstance(v, bool)]
        if not all(admits(kind, each) for each in to_check) or not all(
            isinstance(each, str | int | float | date | None) for each in values
        ):
            raise UserError(f"--config {path}: {name} must be {describe(kind)}; got {shown(value)}")
        if _is_switch(kind) and isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", *map(str, values)]
    return arguments


def _is_switch(kind: Any) -> bool:
    """Whether an option can be given without a value; one that is derived carries its help."""
    return kind is bool or get_args(kind)[:1] == (bool,)


def _one_line(message: str) -> str:
    """Extract the sentences from tyro's boxed message."""
    message = message.replace("{None}|", "")  # nobody types None: the option is omitted instead
    lines = (re.sub(r"^[│|]\s?|\s*[│|]$", "", line).strip() for line in message.splitlines())
    sentences = [line for line in lines if line and not re.match(r"[╭╰─+]|-+$", line)]
    if not sentences:
        return "the command line cannot be read"
    # Its sections end without a full stop.
    return re.sub(
        r"\.? (?=Perhaps you meant:|Arguments similar|For full helptext,)",
        ". ",
        " ".join(sentences),
    )
