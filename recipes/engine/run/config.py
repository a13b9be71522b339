"""Presets, and the configuration of a run: a preset with the given options."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
import yaml
from torch import Tensor, nn

from mimkit.masking import Mask
from recipes.engine.data.arrays import ArrayOptions, Channels, CropName
from recipes.engine.data.decode import Background, Decoder, Orientation
from recipes.engine.data.images import Interpolation, NativeCrops
from recipes.engine.data.sets import DataSet
from recipes.engine.data.statistics import Statistics
from recipes.engine.errors import UserError, say
from recipes.engine.fields import (
    Beta,
    Epochs,
    FieldError,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Tokens,
    check_fields,
    shown,
)
from recipes.engine.reading import UnreadableError, sha256_of
from recipes.engine.run import defaults
from recipes.engine.run.cli import Compile, Options, override, refusing

# Pixels of a model input: 4096 x 16384, or a volume of 256 x 512 x 512.
_MOST_PIXELS = 2**26

# Version of the files in a run folder. 2: one training loop for all recipes. 3: digests in
# checkpoints and summaries, no pickle.
FORMAT = 3

PresetType = TypeVar("PresetType")


@dataclass(frozen=True)
class Training:
    """Training hyperparameters of a preset.

    Attributes:
        epochs: Length of the run.
        batch_size: Images per optimizer step.
        base_lr: Learning rate for a batch of 256 images.
        warmup_epochs: Epochs of linear warm-up from `warmup_lr`.
        weight_decay: Weight decay of parameters with more than one axis.
        betas: Betas of AdamW.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start of the warm-up.
        cosine_from_start: Whether the cosine schedule starts with the run instead of after the
            warm-up.
        milestones: Epochs at which the learning rate is divided by 10; replaces the cosine.
        clip_grad: Largest gradient norm; None for no clipping.
        crop_area: Least and largest share of the image in a random crop; for folders only.
        interpolation: How random crops are resized; for folders only.
        orientation: Whether to "ignore" the orientation tag of image files, as the papers do, or to
            "apply" it; for folders only.
        background: Color under transparent pixels; for folders only.
        value_range: Values that become black and white in gray images of 16 bits or more; by
            default 0 to 65535; for folders only.
        channels: "rgb" reads pictures as RGB, "keep" with the channels and bits that they have; by
            default, pictures as RGB and arrays as they are; for folders only.
        crop: Of arrays, and of pictures instead of the papers' resized crops: "random" cuts out
            boxes, nothing is resized or flipped; "whole" resamples all of it to the image size; for
            folders only.
        native_size: Keep the aspect ratios of pictures, and encode at most this many patches of
            each; instead of resized crops of the image size; for folders only.
        array_key: Name of the array in .npz files that hold several; for folders only.
        bands: Channels of an array to be shown as red, green and blue, or one as gray, counted from
            1; by default the first three.
        precision: "fp32", or "bf16" for bfloat16 autocast.
    """

    epochs: PositiveInt
    batch_size: PositiveInt
    base_lr: PositiveFloat
    warmup_epochs: Epochs
    weight_decay: NonNegativeFloat = 0.05
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    min_lr: NonNegativeFloat = 0.0
    warmup_lr: NonNegativeFloat = 0.0
    cosine_from_start: bool = False
    milestones: tuple[Epochs, ...] = ()
    clip_grad: PositiveFloat | None = None
    crop_area: tuple[PositiveFraction, PositiveFraction] = (0.2, 1.0)
    interpolation: Interpolation = "bicubic"
    orientation: Orientation = "ignore"
    background: Background = "black"
    value_range: tuple[float, float] | None = None
    channels: Channels | None = None
    crop: CropName | None = None
    native_size: Tokens | None = None
    array_key: str | None = None
    bands: tuple[PositiveInt, ...] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.crop_area[0] > self.crop_area[1]:
            raise FieldError("crop_area", self.crop_area, "two shares, the smaller one first")
        low, high = self.value_range or (0, 1)
        if not -math.inf < low < high < math.inf:
            raise FieldError("value_range", self.value_range, "two numbers, the smaller one first")
        if self.native_size is not None and self.crop is not None:
            raise ValueError(
                f"--native-size {self.native_size} and --crop {self.crop} contradict each other: "
                "give one of them"
            )
        if self.bands is not None and len(self.bands) not in (1, 3):
            raise FieldError("bands", self.bands, "one channel or three")

    @property
    def arrays(self) -> ArrayOptions:
        """How files are read that may be arrays."""
        return ArrayOptions(self.channels, self.crop, self.array_key)

    @property
    def decoder(self) -> Decoder:
        """How image files are decoded."""
        return Decoder(self.orientation, self.background, self.value_range)

    @property
    def scaled_lr(self) -> float:
        """Peak learning rate: `base_lr`, scaled linearly with the batch size."""
        return self.base_lr * self.batch_size / 256


@dataclass(frozen=True)
class DenseTraining(Training):
    """Hyperparameters of dense transfer: segmentation.

    Attributes:
        power: Power of the share of the run that is left, in the learning rate; 1 is linear.
        layer_decay: Factor from each layer's learning rate to that of the layer before it.
        drop_path: Fraction of samples whose residual branches the last block leaves out.
    """

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    power: PositiveFloat = 1.0
    layer_decay: Fraction = 0.65
    drop_path: Fraction = 0.1


@dataclass(frozen=True)
class Preset:
    """Configuration of a model, its training and its masks.

    Attributes:
        model: Configuration of the model: a frozen dataclass.
        training: Training hyperparameters.
        masking: Configuration of the masks: a frozen dataclass like `masks.Masking`, with at least
            `mask_ratio` and `draw(key, grid)`; None if nothing is masked.
    """

    model: Any
    training: Training
    masking: Any = None

    @property
    def parts(self) -> tuple[object, ...]:
        """The configurations whose fields can become options."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple(value for value in values if value is not None)


@dataclass(frozen=True)
class Recipe:
    """A pre-training method, as the engine runs it.

    Where a field from `baselines` to `fit` is left out, the model's `target` does the work (see
    `recipes.engine.targets`).

    Attributes:
        name: Name of the recipe, as in the default output folder.
        presets: Presets by name; the first one is the default.
        build: Builds the model from its configuration. The model has an `encoder` with `grid` and
            `pool`, and is called with images and the masks that the preset's `masking` draws.
        baselines: Losses of trivial predictors by name: (model, images, mask).
        reconstruct: Fills in the masked patches of model inputs: (model, images, mask).
        note: Note under the reconstructions; or a function of the model that returns it.
        flags: Names of fields of the preset's model, training and masking that become options of
            this recipe.
        pictures: More picture files by name. Each function returns columns of pictures by caption:
            (model, model inputs).
        fit: Fits the parts of a model that need images before the first step: (model, model
            inputs).
        takes_any_size: Whether the model takes lists of images with a `RaggedMask`, too.
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
    takes_any_size: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that determines the result of a run.

    Attributes:
        format: Format number of the run folder. Folders of another format are refused.
        contents: Digests of the files that the configuration names (a tokenizer, a teacher), and
            number and digest of the samples of a folder; None if there are none.
        statistics: What arrays are normalised by; None for pictures.
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
    compile: Compile
    accumulate: int
    contents: Mapping[str, str] | None = None
    statistics: Statistics | None = None
    format: int = FORMAT

    @property
    def image_size(self) -> tuple[int, ...]:
        """Pixels per axis."""
        size = self.model.image_size
        return tuple(size) if isinstance(size, tuple) else (size, size)

    @property
    def native(self) -> NativeCrops | None:
        """How images are cropped to sizes of their own, if they are.

        Raises:
            UserError: If their patches have not two axes.
        """
        most = self.training.native_size
        if most is None:
            return None
        size = self.model.patch_size
        patch = size if isinstance(size, tuple) else (size, size)
        if len(patch) != 2:
            raise UserError(f"--native-size {most} is for pictures, whose patches have two axes")
        return NativeCrops(most, (patch[0], patch[1]), self.training.interpolation)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of the configured precision."""
        is_on = self.training.precision == "bf16"
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=is_on)

    def for_images(self, channels: int, image_size: tuple[int, ...] | None) -> Self:
        """Fit the model to the channels of images, and to their axes.

        Raises:
            UserError: If the model is for images of two axes.
        """
        changes: dict[str, Any] = {"in_channels": channels}
        if image_size is not None and self.image_size != image_size:
            changes["image_size"] = image_size
        with refusing():
            return dataclasses.replace(self, model=dataclasses.replace(self.model, **changes))

    def for_data(self, data: DataSet) -> Self:
        """Fit the model to a data set, and add its content and statistics.

        Raises:
            UserError: If the model is for images of two axes, or there is no band of `--bands`.
        """
        bands = self.training.bands or ()
        if any(band > data.in_channels for band in bands):
            raise UserError(
                f"--bands {' '.join(map(str, bands))}: {self.data} has {data.in_channels} channels"
            )
        config = self.for_images(data.in_channels, data.image_size).with_data(data.content)
        return dataclasses.replace(config, statistics=data.statistics)

    def with_data(self, content: str | None) -> Self:
        """Add the content of the data set to `contents`."""
        if content is None:
            return self
        return dataclasses.replace(self, contents={**(self.contents or {}), "data": content})

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dictionaries, as in `config.yaml`."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=_plain))
        return plain

    def as_lines(self) -> list[str]:
        """Return the lines of `config.yaml`."""
        return yaml.safe_dump(self.as_dict(), sort_keys=False).splitlines()

    def digest(self) -> str:
        """Return a hash of this configuration, of eight characters.

        It names the default output folder. The samples do not count: if they change, the folder is
        found, and the change is an error. Nor do their statistics, which are found in it.
        """
        plain = self.as_dict()
        del plain["statistics"]
        others = {name: one for name, one in (self.contents or {}).items() if name != "data"}
        text = json.dumps(plain | {"contents": others or None}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def _plain(number: Any) -> float:
    """Take the number out of one of NumPy's."""
    value: float = number.item()
    return value


ConfigType = TypeVar("ConfigType", bound=RunConfig)


def choose_preset(options: Options, presets: Mapping[str, PresetType]) -> tuple[str, PresetType]:
    """Return name and preset of `--preset`; by default the first one.

    Raises:
        UserError: If there is no preset of that name.
    """
    name = next(iter(presets)) if options.preset is None else options.preset
    if name not in presets:
        raise UserError(f"no preset {shown(name)}: choose {', '.join(presets)}")
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
    """Build the configuration of a run from a preset and the given options.

    Args:
        options: The options; those that are given replace the preset's fields.
        recipe: Name of the recipe.
        presets: Its presets.
        config_type: Class of the configuration.
        model: Configuration of the model, if it comes from a file instead of the preset.
        more: Fields that `config_type` adds to `RunConfig`.

    Raises:
        UserError: If the preset or device does not exist, or a value does not fit.
    """
    check_decode(options.decode, options.device)
    name, preset = choose_preset(options, presets)
    training = override(preset.training, options)
    model = override(preset.model if model is None else model, options)
    config = config_type(
        recipe=recipe,
        preset=name,
        data=options.data,
        model=model,
        training=training,
        masking=None if preset.masking is None else override(preset.masking, options),
        lr=training.scaled_lr if options.lr is None else options.lr,
        max_steps=options.max_steps,
        seed=options.seed,
        device=choose_device(options.device),
        compile=options.compile,
        accumulate=options.accumulate,
        contents=_contents(model) or None,
        **more,
    )
    if config.compile == "graphs":
        _check_graphs(config.device, options)
    if math.prod(config.image_size) > _MOST_PIXELS:
        raise UserError(
            f"--image-size {shown(model.image_size)} is too large: give at most "
            f"{_MOST_PIXELS:,} pixels in all"
        )
    return config


def check_decode(name: str, device: str) -> None:
    """Check that image files can be decoded where they shall be, as far as it is seen at once.

    Raises:
        UserError: If that is the GPU, and something is missing; the message names all of it.
    """
    if name != "gpu":
        return
    if device == "cpu":
        raise UserError("--decode gpu and --device cpu contradict each other: omit one of them")
    missing = [] if torch.cuda.is_available() else ["an NVIDIA GPU, which PyTorch does not find"]
    if importlib.util.find_spec("torchvision") is None:
        missing.append("torchvision, which is not installed")
    if missing:
        raise UserError(
            f"--decode gpu needs {', and '.join(missing)}; give --decode cpu, or omit it"
        )


def refuse_gpu_decoding(name: str, what: str) -> None:
    """Refuse to decode on the GPU what is decoded on the CPU only.

    Raises:
        UserError: If `--decode` is "gpu".
    """
    if name == "gpu":
        raise UserError(
            f"--decode gpu: {what} decoded on the CPU only; give --decode cpu, or omit it"
        )


def choose_device(name: str) -> str:
    """Return "cuda" or "cpu".

    Raises:
        UserError: If the device is not available.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: PyTorch finds no GPU here; choose cpu or auto")
    return "cuda" if name == "auto" and has_gpu else name.replace("auto", "cpu")


def _check_graphs(device: str, options: Options) -> None:
    if device != "cuda":
        raise UserError(
            f"--compile graphs: CUDA graphs need a GPU, this is a {device}; omit graphs"
        )
    if options.shard:
        raise UserError(
            "--compile graphs needs weights that stay where they are in memory, and --shard moves "
            "them: give one of the two"
        )


def _contents(model: Any) -> dict[str, str]:
    digests = {}
    for name in ("tokenizer", "teacher"):
        file = Path(getattr(model, name, None) or "")
        # The function that reads the file reports the error.
        with contextlib.suppress(UnreadableError):
            digests[name] = sha256_of(file)[:8]
    return digests


def warn_of_slow_precision(config: RunConfig) -> None:
    """Warn if the CPU emulates bfloat16, which makes matrix products many times slower."""
    capability = torch.backends.cpu.get_cpu_capability()
    is_slow = config.device == "cpu" and not capability.startswith("AVX512")
    if config.training.precision == "bf16" and is_slow:
        say(
            f"warning: --precision bf16 is slow on this CPU ({capability}), which has no bfloat16 "
            "products; fp32 is faster",
            file=sys.stderr,
        )


def warn_of_short_schedule(config: RunConfig) -> None:
    """Warn if a run is too short for its preset's learning-rate schedule."""
    training = config.training
    late = [epoch for epoch in training.milestones if epoch >= training.epochs]
    if training.warmup_epochs >= training.epochs:
        what = f"end within the {training.warmup_epochs:g} epochs in which the rate rises"
    elif late:
        what = f"end before the rate falls, at epoch {late[0]:g}"
    else:
        return
    say(
        f"warning: {training.epochs} epochs {what}: preset {config.preset} is made for longer runs",
        file=sys.stderr,
    )
