"""What a run is made of: presets, and the configuration that they and the options resolve to."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mimkit.masking import Mask
from recipes.engine.data.images import Interpolation
from recipes.engine.errors import UserError
from recipes.engine.fields import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    check_fields,
)
from recipes.engine.run import defaults
from recipes.engine.run.cli import Options, override

# Of the files in a run folder. 2: one loop for all recipes.
FORMAT = 2

PresetType = TypeVar("PresetType")


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

    epochs: PositiveInt
    batch_size: PositiveInt
    base_lr: PositiveFloat
    warmup_epochs: NonNegativeFloat
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    min_lr: NonNegativeFloat = 0.0
    warmup_lr: NonNegativeFloat = 0.0
    cosine_from_start: bool = False
    milestones: tuple[NonNegativeFloat, ...] = ()
    clip_grad: PositiveFloat | None = None
    crop_area: tuple[Fraction, Fraction] = (0.2, 1.0)
    interpolation: Interpolation = "bicubic"
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def scaled_lr(self) -> float:
        """Scale the base rate, which is for 256 images a step, linearly with the batch."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class Preset:
    """A model's shape, how it is trained, and on which masks.

    Attributes:
        model: Shape of the model: a frozen dataclass.
        training: How it is trained.
        masking: Which patches are masked: a frozen dataclass like `masks.Masking`, with at least
            `mask_ratio` and `draw(key, grid)`; None where nothing is masked.
    """

    model: Any
    training: Training
    masking: Any = None

    @property
    def parts(self) -> tuple[object, ...]:
        """Return the configurations whose fields can be options."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)


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
        flags: Names of fields of the preset's model, training and masking that are options, too,
            beside those that every recipe has.
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
    flags: Sequence[str] = ()
    pictures: Mapping[str, Callable[[Any, Tensor], Mapping[str, Tensor]]] = field(
        default_factory=dict
    )
    fit: Callable[[Any, Tensor], None] | None = defaults.fit


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All that decides the result of a run.

    Attributes:
        format: Version of the run folder's files: a run of another one is refused.
        contents: Digests of the files that the configuration names (a tokenizer, a teacher); None
            without any.
    """

    recipe: str
    preset: str
    data: str
    model: Any
    training: Training
    masking: Any = None
    lr: float
    max_steps: int | None
    seed: int
    device: str
    compile: bool
    accumulate: int
    contents: Mapping[str, str] | None = None
    format: int = FORMAT

    @property
    def image_size(self) -> tuple[int, ...]:
        """Return the pixels per axis."""
        size = self.model.image_size
        return tuple(size) if isinstance(size, tuple) else (size, size)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the model runs."""
        is_on = self.training.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_on)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dictionaries, as in `config.yaml`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=_plain))
        return plain

    def digest(self) -> str:
        """Return eight characters that name this configuration."""
        text = json.dumps(self.as_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _plain(number: Any) -> float:
    """Take the number out of one of NumPy's."""
    value: float = number.item()
    return value


ConfigType = TypeVar("ConfigType", bound=RunConfig)


def choose_preset(options: Options, presets: Mapping[str, PresetType]) -> tuple[str, PresetType]:
    """Return the preset that was asked for, or the first one, with its name.

    Raises:
        UserError: There is none of that name.
    """
    name = options.preset or next(iter(presets))
    if name not in presets:
        raise UserError(f"no preset {name!r}: choose {', '.join(presets)}")
    return name, presets[name]


def resolve(
    options: Options,
    recipe: str,
    presets: Mapping[str, Any],
    *,
    config_type: type[ConfigType],
    model: Any = None,
    **more: Any,
) -> ConfigType:
    """Fill in the preset's values.

    Args:
        options: Options, of which those that are given replace the preset's fields.
        recipe: Name of the recipe.
        presets: Its presets.
        config_type: What to make.
        model: Shape of the model, if a file rather than the preset says it.
        more: Fields that `config_type` has besides those of `RunConfig`.

    Raises:
        UserError: An unknown preset or device, or a value that does not fit.
    """
    name, preset = choose_preset(options, presets)
    training = override(preset.training, options)
    model = override(preset.model if model is None else model, options)
    return config_type(
        recipe=recipe,
        preset=name,
        data=options.data,
        model=model,
        training=training,
        masking=None if preset.masking is None else override(preset.masking, options),
        lr=options.lr or training.scaled_lr,
        max_steps=options.max_steps,
        seed=options.seed,
        device=choose_device(options.device),
        compile=options.compile,
        accumulate=options.accumulate,
        contents=_contents(model) or None,
        **more,
    )


def choose_device(name: str) -> str:
    """Return "cuda" or "cpu".

    Raises:
        UserError: A device that is not there.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: PyTorch finds no GPU here; choose cpu or auto")
    return "cuda" if name == "auto" and has_gpu else name.replace("auto", "cpu")


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


def warn_of_slow_precision(config: RunConfig) -> None:
    """Warn where bfloat16 is emulated: every product then takes many times longer."""
    capability = torch.backends.cpu.get_cpu_capability()
    is_slow = config.device == "cpu" and not capability.startswith("AVX512")
    if config.training.precision == "bf16" and is_slow:
        print(
            f"warning: --precision bf16 is slow on this CPU ({capability}), which has no bfloat16 "
            "products; fp32 is faster",
            file=sys.stderr,
        )


def warn_of_short_schedule(config: RunConfig) -> None:
    """Warn where a run is too short for the schedule of its preset."""
    training = config.training
    late = [epoch for epoch in training.milestones if epoch >= training.epochs]
    if training.warmup_epochs >= training.epochs:
        what = f"end within the {training.warmup_epochs:g} epochs in which the rate rises"
    elif late:
        what = f"end before the rate falls, at epoch {late[0]:g}"
    else:
        return
    print(
        f"warning: {training.epochs} epochs {what}: preset {config.preset} is made for longer runs",
        file=sys.stderr,
    )
