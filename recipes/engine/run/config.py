"""What a run is made of: presets, options, and the configuration that they resolve to."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from mimkit.masking import Mask
from recipes.engine.data.images import Interpolation
from recipes.engine.errors import UserError
from recipes.engine.run import defaults
from recipes.engine.run.cli import (
    CommonOptions,
    Precision,
    check_options,
    check_positive,
    choose_preset,
)


@dataclass(frozen=True)
class Training:
    """How a preset is trained.

    Attributes:
        epochs: Length of the run.
        batch_size: Images per optimizer step.
        base_lr: Learning rate per 256 images of a step.
        warmup_epochs: Epochs in which the rate rises from `warmup_lr`.
        weight_decay: Of parameters with more than one axis.
        betas: Of AdamW.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start.
        cosine_from_start: Whether the cosine along which the rate falls begins with the run,
            instead of after the warm-up.
        milestones: Epochs at which the rate is divided by 10, instead of falling along a cosine.
        clip_grad: Largest norm of the gradient; None for no limit.
        crop_area: Of an image of a folder: least and largest share in a random crop.
        interpolation: How crops are resized.
        precision: "fp32", or "bf16" for bfloat16 autocast.
    """

    epochs: int
    batch_size: int
    base_lr: float
    warmup_epochs: float
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    cosine_from_start: bool = False
    milestones: tuple[float, ...] = ()
    clip_grad: float | None = None
    crop_area: tuple[float, float] = (0.2, 1.0)
    interpolation: Interpolation = "bicubic"
    precision: Precision = "fp32"


@dataclass(frozen=True)
class Preset:
    """A model's shape, how it is trained, and on which masks.

    Attributes:
        model: Shape of the model: a frozen dataclass.
        training: How it is trained.
        masking: Which patches are masked: a frozen dataclass like `masks.Masking`, with at least
            `mask_ratio` and `draw(key, grid)`.
    """

    model: Any
    training: Training
    masking: Any


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """Command line of pre-training; what is not given comes from the preset.

    Attributes:
        image_size: Side of the images in pixels.
        mask_ratio: Fraction of patches to mask, in (0, 1).
        warmup_epochs: Epochs in which the learning rate rises.
        compile: Run the model through torch.compile.
        accumulate: Parts in which a batch goes through the model, to save memory.
        shard: Spread weights over the processes of torchrun (FSDP2) instead of copying them (DDP).
        non_finite: What to do about a loss that is not finite: "stop", or "rewind" to the last
            checkpoint and leave out the batch.
        tracker: Where metrics go beside metrics.jsonl.
    """

    image_size: int | None = None
    mask_ratio: float | None = None
    warmup_epochs: float | None = None
    compile: bool = False
    accumulate: int = 1
    shard: bool = False
    non_finite: Literal["stop", "rewind"] = "stop"
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"


@dataclass(frozen=True)
class Recipe:
    """What the engine needs to know of a method.

    Where a field from `baselines` to `fit` is left out, the model's `target` does the work (see
    `recipes.engine.targets`).

    Attributes:
        name: Name of the recipe, as in the default output folder.
        presets: Name -> preset; the first one is the default.
        build: Makes the model of a configuration. It has an `encoder` with `grid` and `pool`, and
            is called with images and what the preset's `masking` draws.
        baselines: Scores trivial predictors under the loss: (model, images, mask).
        reconstruct: Fills in the masked patches of model inputs: (model, images, mask).
        note: What a viewer of reconstructions must know; or tells it of a model.
        options: Its command line. An option named as a field of the preset's model, training or
            masking replaces that field.
        pictures: More files of held-out pictures by name. Each makes columns by caption:
            (model, model inputs).
        fit: Fits what a model must see images for before its first step: (model, model inputs).
    """

    name: str
    presets: Mapping[str, Preset]
    build: Callable[[Any], nn.Module]
    baselines: Callable[[Any, Tensor, Mask], dict[str, Tensor]] = defaults.baselines
    reconstruct: Callable[[Any, Tensor, Mask], Tensor] = defaults.reconstruct
    note: str | Callable[[Any], str] = defaults.note
    options: type[Options] = Options
    pictures: Mapping[str, Callable[[Any, Tensor], Mapping[str, Tensor]]] = field(
        default_factory=dict
    )
    fit: Callable[[Any, Tensor], None] | None = defaults.fit


@dataclass(frozen=True, kw_only=True)
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

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dictionaries, as in `config.yaml`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def digest(self) -> str:
        """Return eight characters that name this configuration."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """All that decides the result of pre-training.

    Attributes:
        contents: Digests of the files that the model's configuration names (a tokenizer, a
            teacher); None without any.
    """

    masking: Any
    compile: bool
    accumulate: int
    contents: Mapping[str, str] | None


def resolve(options: Options, recipe: Recipe) -> PretrainConfig:
    """Fill in the preset's values.

    Raises:
        UserError: An unknown preset or device, or a value that does not fit.
    """
    preset_name, preset = choose_preset(options, recipe.presets)
    training = override(preset.training, options)
    lr = options.lr if options.lr is not None else scaled_lr(training)
    device = check_options(options, epochs=training.epochs, batch_size=training.batch_size, lr=lr)
    check_positive("accumulate", options.accumulate)
    model = override(preset.model, options)
    return PretrainConfig(
        recipe=recipe.name,
        preset=preset_name,
        data=options.data,
        model=model,
        training=training,
        masking=override(preset.masking, options),
        lr=lr,
        max_steps=options.max_steps,
        seed=options.seed,
        device=device,
        compile=options.compile,
        accumulate=options.accumulate,
        contents=_contents(model) or None,
    )


def _contents(model: Any) -> dict[str, str]:
    digests = {}
    for name in ("tokenizer", "teacher"):
        file = Path(getattr(model, name, None) or "")
        with contextlib.suppress(OSError):  # whoever reads the file says what is wrong with it
            if file.is_file():
                digests[name] = digest_of(file)
    return digests


def digest_of(file: Path) -> str:
    """Return eight characters that name the content of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:8]


def scaled_lr(training: Training) -> float:
    """Scale the base rate, which is for 256 images a step, linearly with the batch."""
    return training.base_lr * training.batch_size / 256


Dataclass = TypeVar("Dataclass")


def override(part: Dataclass, options: CommonOptions) -> Dataclass:
    """Replace the fields of a preset's part that options of the same name give.

    Raises:
        UserError: A value that does not fit.
    """
    names = {field.name for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(options).items() if name in names}
    try:
        return replace_given(part, **given)
    except ValueError as error:
        raise UserError(str(error)) from error


def replace_given(value: Dataclass, **changes: Any) -> Dataclass:
    """Replace the fields whose new value is not None."""
    given = {name: change for name, change in changes.items() if change is not None}
    return dataclasses.replace(value, **given)  # type: ignore[type-var]
