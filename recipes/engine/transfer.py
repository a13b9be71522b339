"""Dense transfer: an encoder is trained on for another task, beside an untrained one.

`recipes/segment.py` and `recipes/detect.py` say what is special about them in a `Transfer`;
`run_transfer` does the rest: it finds the encoder, trains from both starts with every seed, and
compares the scores.
"""

import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor, nn

from recipes.engine.errors import UserError, say
from recipes.engine.loop import Plan, Task, make_plan, run_steps
from recipes.engine.main import pretrain
from recipes.engine.pictures import draw_curves
from recipes.engine.pretrained.encoders import (
    ENCODER,
    EncoderFile,
    EncoderOptions,
    check_channels,
    open_encoder,
)
from recipes.engine.pretrained.files import read_weights
from recipes.engine.pretrained.shapes import check_window
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.report import print_unreadable
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import (
    Preset,
    Recipe,
    RunConfig,
    choose_device,
    choose_preset,
    refuse_gpu_decoding,
    resolve,
    warn_of_short_schedule,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import RunFolder, open_folder, output_folder
from recipes.engine.run.state import SUMMARY
from recipes.engine.run.world import World, check_shard, check_shares, join, whole_weights

AUTO = "auto"
SCENES = "scenes"
MODEL = "model.safetensors"
RECIPES = ("convmae", "cae")  # whose runs are taken without --encoder
SEEDS = 3  # on the bundled scenes
_COLORS = 3
_LEAST_STEPS_BETWEEN_CHECKPOINTS = 100

Scores = Mapping[str, Sequence[float]]  # one number a seed, by start: "pretrained" and "scratch"


@dataclass(frozen=True, kw_only=True)
class TransferOptions(EncoderOptions):
    """Options of dense transfer.

    Attributes:
        encoder: A finished run, its `encoder.safetensors`, a folder of Hugging Face, or a
            checkpoint of the authors' MAE, CAE, SimMIM or ConvMAE, whose shape is the preset's;
            "none" to train from scratch only; or "auto" for the newest finished run of ConvMAE or
            CAE in `runs`, or a new ConvMAE if there is none.
        scratch: Whether the same training is also run from an untrained encoder; "auto" does so
            for the bundled scenes.
    """

    data: str = SCENES
    encoder: str = AUTO
    scratch: Literal["auto", "always", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class TransferConfig(RunConfig):
    """All that decides the result.

    Attributes:
        encoder: Digest of the pre-trained weights, or "none".
        runs: Number of seeds, from `seed` on.
        scratch: Whether each is also run from an untrained encoder.
    """

    encoder: str
    runs: int = 1
    scratch: bool = False

    @property
    def start(self) -> str:
        """What the first training starts from: "pretrained" or "scratch"."""
        return "scratch" if self.encoder == "none" else "pretrained"


ConfigType = TypeVar("ConfigType", bound=TransferConfig)


class TransferData(Protocol):
    """Images with what is to be predicted."""

    @property
    def train(self) -> Any:
        """Training images, whose augmentation has another seed after `train.seeded(seed)`."""

    @property
    def test(self) -> Any:
        """Held-out images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""

    @property
    def content(self) -> str | None:
        """Number and digest of stored samples; None if images are composed."""


@dataclass(frozen=True)
class Transfer:
    """A recipe of dense transfer.

    Attributes:
        presets: Presets by name; the first one is the default.
        pretraining: Recipe that is run without an encoder.
        resolve: Configuration and encoder of the options.
        load: Loads the data of a configuration.
        build: Makes the model, which has an `encoder`, and fills it from a file, if there is one.
        make_task: The task of training a model.
        encoder_weights: Weights that are written as `encoder.safetensors`: of (the model, the
            configuration, the file that it started from).
        score: Scores a model: (model, configuration, data, processes, worker processes). The result
            goes into `summary.json`.
        compared: Names of those scores that are gathered by start: a list of one value a seed.
        table: Rows of the printed table: their numbers by name, from the summary.
        folder_of: Name of the folder of one of the other trainings: (configuration of the first
            one, its configuration).
        draw: Draws what the models of the first seed predict, which are given by start:
            (models, configuration, data, output folder).
        published: What the authors' settings reached, by preset.
    """

    presets: Mapping[str, Preset]
    pretraining: Recipe
    resolve: Callable[[Any], tuple[Any, EncoderFile | None]]
    load: Callable[[Any], Any]
    build: Callable[[Any, EncoderFile | None, int], nn.Module]
    make_task: Callable[[nn.Module, Any, World, Any], Task]
    encoder_weights: Callable[[Any, Any, EncoderFile | None], Mapping[str, Tensor]]
    score: Callable[[nn.Module, Any, Any, World, int], dict[str, Any]]
    compared: Sequence[str]
    table: Callable[[dict[str, Any]], Mapping[str, Scores]]
    folder_of: Callable[[Any, Any], str]
    draw: Callable[[Mapping[str, nn.Module], Any, Any, Path], None]
    published: Mapping[str, str] = field(default_factory=dict)


def run_transfer(transfer: Transfer, options: Any) -> None:
    """Train from both starts with every seed, and print the scores.

    Args:
        transfer: The recipe.
        options: Its options.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    refuse_gpu_decoding(options.decode, "images with labels for pixels or boxes are")
    with join(choose_device(options.device), timeout=options.timeout) as world:
        encoder = world.share(lambda: find_or_pretrain(transfer, options, world))
        options = dataclasses.replace(options, encoder=encoder)
        config, file = transfer.resolve(options)
        data = world.share(partial(transfer.load, config))  # one process reads the folder
        config = config.with_data(data.content)
        least = _LEAST_STEPS_BETWEEN_CHECKPOINTS
        plan = make_plan(config, options, data.train, checkpoint_at_least=least)
        check_shard(options.shard)
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        if world.is_main:
            warn_of_slow_precision(config)
            warn_of_short_schedule(config)
        model = transfer.build(config, file, len(data.class_names))  # what does not fit fails here
        if options.dry_run:
            if world.is_main:
                say(*describe(transfer, config, data, plan, model))
            return
        path = output_folder(options.out, config)
        summary = train_and_compare(transfer, config, plan, file, data, options, path, world)
        if world.is_main:
            print_summary(transfer, summary, path)


def find_or_pretrain(transfer: Transfer, options: Any, world: World) -> str:
    """Return the encoder that `--encoder` names; if "auto" finds none, pre-train one.

    Args:
        transfer: The recipe.
        options: Its options. A dry run only says that one would be pre-trained.
        world: The processes. With several of them nothing is pre-trained.

    Returns:
        A path, or "none".

    Raises:
        UserError: If there is none, and none can be pre-trained.
    """
    if options.encoder != AUTO:
        encoder: str = options.encoder
        return encoder
    name, _ = choose_preset(options, transfer.presets)
    if name != next(iter(transfer.presets)):
        raise UserError(f"--preset {name} needs --encoder: a checkpoint, a run, or none")
    found = newest_encoder(Path("runs"))
    recipe = transfer.pretraining
    if found is None:
        missing = "no --encoder is given and runs holds no finished run of ConvMAE or CAE"
        if options.dry_run:
            say(f"note: {missing}: without --dry-run one is pre-trained", file=sys.stderr)
            return "none"
        if world.size > 1:
            raise UserError(f"{missing}: run {recipe.name} first")
        say(f"note: {missing}: pre-training {recipe.name} first, some minutes", file=sys.stderr)
        pretrain(recipe, ["--device", options.device])
        found = newest_encoder(Path("runs"))
        assert found is not None
    say(f"note: no --encoder is given: taking {found}", file=sys.stderr)
    return str(found)


def newest_encoder(root: Path) -> Path | None:
    """Return the folder of the newest finished run of ConvMAE or CAE; None if there is none."""
    found = [
        folder
        for folder in root.glob("*")
        if (folder / ENCODER).is_file()
        and (folder / SUMMARY).is_file()  # written last
        and _recipe_of(folder) in RECIPES
    ]
    return max(
        found, key=lambda folder: ((folder / ENCODER).stat().st_mtime, str(folder)), default=None
    )


def _recipe_of(folder: Path) -> Any:
    try:
        return read_yaml(folder / "config.yaml").get("recipe")
    except (UnreadableError, AttributeError):
        return None


def resolve_transfer(
    options: Any,
    recipe: str,
    presets: Mapping[str, Preset],
    config_type: type[ConfigType],
    *,
    runs: int | None,
    **more: Any,
) -> tuple[ConfigType, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Args:
        options: The options; "auto" does not stand for an encoder any more.
        recipe: Name of the recipe.
        presets: Its presets.
        config_type: Class of its configuration.
        runs: Number of seeds; by default 3 for the bundled scenes, otherwise 1.
        more: Further fields of the configuration.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, presets)
    file = open_encoder(options, preset.model)
    shape = file.shape if file else preset.model
    check_window(shape, getattr(options, "window", None))
    is_bundled = options.data == SCENES
    config = resolve(
        options,
        recipe,
        presets,
        config_type=config_type,
        model=dataclasses.replace(shape, image_size=preset.model.image_size),
        encoder=file.digest if file else "none",
        runs=runs or (SEEDS if is_bundled else 1),
        scratch=file is not None
        and (options.scratch == "always" or (options.scratch == "auto" and is_bundled)),
        **more,
    )
    check_channels(options.encoder, config.model, config.data, _COLORS)
    return config, file


def train_and_compare(
    transfer: Transfer,
    config: TransferConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: TransferData,
    options: Any,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Train, or go on with it, then the trainings to compare with; return the summary.

    Args:
        transfer: The recipe.
        config: The configuration.
        plan: The steps of each training.
        file: The pre-trained encoder.
        data: The data.
        options: What does not decide the result.
        path: Output folder of the first training; the others have folders in it, and each
            continues by itself after a stop.
        world: The processes.
    """
    with open_folder(path, config, world, options) as folder:
        summary = folder.read_summary()
        if summary is not None:
            return summary
        model, summary = _train(transfer, config, plan, file, data, options, folder)
        models = {config.start: model}
        for other in other_trainings(config):
            weights = None if other.encoder == "none" else file
            inner = path / transfer.folder_of(config, other)
            one = train_and_compare(transfer, other, plan, weights, data, options, inner, world)
            for name in transfer.compared:
                for start, values in one[name].items():
                    summary[name].setdefault(start, []).extend(values)
            if world.is_main and other.seed == config.seed:
                models[other.start] = read_model(transfer, other, inner, len(data.class_names))
        if world.is_main:
            transfer.draw(models, config, data, path)
        folder.write_summary(summary)
    return summary


def _train(
    transfer: Transfer,
    config: TransferConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: TransferData,
    options: Any,
    folder: RunFolder,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train from the last checkpoint, write the weights, and score; return model and summary."""
    num_classes = len(data.class_names)
    task = transfer.make_task(
        transfer.build(config, file, num_classes), config, folder.world, options
    )
    run_steps(task, plan, data.train.seeded(config.seed), folder, options)
    model = transfer.build(config, None, num_classes)
    weights = whole_weights(task.model, everywhere=True)
    # Batch norm without SyncBatchNorm has other running means in each process: all take those of
    # the main one, which are written.
    own = {name: weights[name].cpu() for name, _ in model.named_buffers() if name in weights}
    model.load_state_dict(weights | folder.world.agree(own))
    folder.write_weights(MODEL, model)
    folder.write_tensors(ENCODER, transfer.encoder_weights(model, config, file))
    if folder.world.is_main:
        draw_curves(folder)
    scores = transfer.score(model, config, data, folder.world, options.workers)
    gathered = {name: {config.start: [scores[name]]} for name in transfer.compared}
    return model, {
        "steps": folder.read_metrics()[-1]["step"],
        **scores,
        **gathered,
        "unreadable_images": [data.train.describe(image) for image in folder.read_unreadable()],
    }


def other_trainings(config: ConfigType) -> Iterator[ConfigType]:
    """Yield the configurations of all trainings but the first: each seed from each start."""
    for seed in range(config.seed, config.seed + config.runs):
        for encoder in (config.encoder, "none")[: 1 + config.scratch]:
            if (encoder, seed) != (config.encoder, config.seed):
                yield dataclasses.replace(config, encoder=encoder, seed=seed, runs=1, scratch=False)


def read_model(
    transfer: Transfer, config: TransferConfig, path: Path, num_classes: int
) -> nn.Module:
    """Read the model of a finished training."""
    model = transfer.build(config, None, num_classes)
    model.load_state_dict(dict(read_weights("--out", path / MODEL).tensors))
    return model


def describe(
    transfer: Transfer, config: TransferConfig, data: TransferData, plan: Plan, model: nn.Module
) -> list[str]:
    """Describe a run: configuration, images, steps, parameters, published score."""
    parameters, encoder = list(model.parameters()), model.get_submodule("encoder")
    lines = [
        *config.as_lines(),
        "---",
        f"data          {config.data}: {len(data.train):,} images of {len(data.class_names)} "
        f"classes, {len(data.test):,} to score on",
        f"steps         {plan.num_steps:,} of {config.training.batch_size:,} images, "
        f"{config.runs * (1 + config.scratch)} training(s)",
        f"parameters    {sum(p.numel() for p in parameters):,} "
        f"({sum(p.numel() for p in parameters if p.requires_grad):,} trained), "
        f"{sum(p.numel() for p in encoder.parameters()):,} in the encoder",
    ]
    if config.preset in transfer.published:
        lines.append(f"published     {transfer.published[config.preset]}")
    return lines


def print_summary(transfer: Transfer, summary: dict[str, Any], path: Path) -> None:
    """Print what the run showed."""
    say(f"held-out images (%), {summary['steps']} steps; mean and range of the seeds")
    say(*table(transfer.table(summary)))
    print_unreadable(summary["unreadable_images"])
    print_closing(path)


def table(rows: Mapping[str, Scores]) -> list[str]:
    r"""Return the lines of a table: a row for each score, a column for each start.

    Args:
        rows: The numbers of the seeds, by score and start.

    Example:
        >>> rows = {"miou": {"pretrained": [20.0, 22.0], "scratch": [15.0, 14.0]}}
        >>> print(*table(rows), sep="\n")
                                     pretrained                 scratch
        miou                21.0 (20.0 to 22.0)     14.5 (14.0 to 15.0)
    """
    starts = list(next(iter(rows.values())))
    lines = [" " * 15 + "".join(f"{start:>24}" for start in starts)]
    for name, scores in rows.items():
        values = [scores[start] for start in starts]
        texts = (f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values)
        lines.append(f"{name:<15}" + "".join(f"{text:>24}" for text in texts))
    return lines
