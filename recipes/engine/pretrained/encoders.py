"""Pre-trained encoders: load them from files, and check that they fit."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimkit.interop import from_hf
from recipes.engine.data.arrays import ArrayOptions
from recipes.engine.data.folder import spread
from recipes.engine.data.sets import DataSet, read_first
from recipes.engine.data.statistics import FindStatistics, Statistics, measure
from recipes.engine.errors import UserError, say
from recipes.engine.pretrained.files import check_finite, read_weights
from recipes.engine.pretrained.shapes import KINDS, Encoder, EncoderShape, ViTShape
from recipes.engine.reading import UnreadableError, read_json, read_yaml
from recipes.engine.run.cli import Options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import find_statistics, read_statistics
from recipes.engine.run.world import World

# Modules after the last block: pre-training and fine-tuning have different ones.
_AFTER_BLOCKS = ("norm.", "fusions.")
_CLASSIFIER = ("fc_norm.", "head.")
# Tables of relative positions that a ConvViT gets in a detector.
_OF_DETECTOR = {"window_bias.table", "global_bias.table"}
ENCODER = "encoder.safetensors"
_COMPARED = 16  # samples of which statistics are compared
_FAR = 5.0  # deviations of the encoder's arrays
_ADVICE = (
    "give the --preset of this encoder, or put a config.yaml beside it: that of its run, or for a "
    "ViT one line with its own numbers, model: {image_size: 224, patch_size: 16, in_channels: 3, "
    "dim: 192, depth: 12, heads: 3, mlp_ratio: 4.0}"
)


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """Options of every recipe that takes a pre-trained encoder.

    Attributes:
        encoder: The folder of a finished run, or its `encoder.safetensors`, whose shape is in the
            `config.yaml` in the same folder; or a folder of Hugging Face, with `config.json` and
            `model.safetensors`; or a checkpoint of the authors' MAE, CAE, SimMIM or ConvMAE, whose
            shape is the preset's; or "none".
        resume: "auto" continues from the last checkpoint in the output folder, "never" refuses to
            continue a run.
    """

    encoder: str
    resume: Literal["auto", "never"] = "auto"


def open_encoder(options: EncoderOptions, shape: "EncoderShape") -> "EncoderFile | None":
    """Load the encoder that `--encoder` names; None for "none".

    Args:
        options: The options.
        shape: Its shape, if there is no `config.yaml` in the same folder.

    Raises:
        UserError: If it cannot be read.
    """
    return None if options.encoder == "none" else load_encoder(Path(options.encoder), shape)


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """A pre-trained encoder.

    Attributes:
        path: Path of the file.
        digest: Hash of the file's content, eight characters.
        shape: Shape of the encoder.
        weights: Its weights, under mimkit's names.
        statistics: What its inputs were normalised by, if it was trained on arrays.
        window: Tokens per axis of the attention windows that a detector trained it with; 0 without.
    """

    path: Path
    digest: str
    shape: EncoderShape
    weights: Mapping[str, Tensor]
    statistics: Statistics | None = None
    window: int = 0


def statistics_of(file: EncoderFile | None, options: Options, config: RunConfig) -> FindStatistics:
    """Return what finds the statistics of arrays: those of the encoder, or of the run's folder."""

    def find(channels: int, image_size: tuple[int, ...]) -> Statistics | None:
        if file is not None and file.statistics is not None:
            return file.statistics if len(file.statistics.mean) == channels else None
        return find_statistics(options.out, config, channels, image_size)

    return find


def warn_of_other_values(file: EncoderFile | None, data: DataSet) -> None:
    """Warn if arrays are far from those that the encoder was trained on: in another unit, say."""
    known = None if file is None else file.statistics
    if known is None or data.statistics != known:
        return
    ids = spread(len(data.train), _COMPARED)
    found = measure(image for image, _ in read_first(data.train, ids, _COMPARED, set()))
    for channel, (mean, std, own_mean, own_std) in enumerate(
        zip(known.mean, known.std, found.mean, found.std, strict=True)
    ):
        if abs(own_mean - mean) > _FAR * std or not 1 / _FAR < own_std / std < _FAR:
            say(
                f"note: channel {channel} of {data.name} has mean {own_mean:.3g} and deviation "
                f"{own_std:.3g}; the encoder was trained with {mean:.3g} and {std:.3g}, by which "
                "its inputs are normalised: are they in the same unit?",
                file=sys.stderr,
            )
            return


def array_options(file: EncoderFile | None, config: RunConfig) -> ArrayOptions:
    """Return how files are read: for an encoder of arrays, with the channels that they have."""
    options = config.training.arrays
    if file is not None and file.statistics is not None and options.channels is None:
        return dataclasses.replace(options, channels="keep")
    return options


def loading_options(
    config: RunConfig, file: EncoderFile | None, options: Options, world: World
) -> dict[str, Any]:
    """Return how labelled images are loaded for an encoder: arguments of `load_data`."""
    return {
        "image_size": config.model.image_size,
        "seed": config.seed,
        "decode": config.training.decoder,
        "options": array_options(file, config),
        "find_statistics": statistics_of(file, options, config),
        "share": world.share,
    }


def check_channels(encoder: str | Path, shape: EncoderShape, data: str, channels: int) -> None:
    """Check that an encoder has the channels of the images.

    Raises:
        UserError: It has others.
    """
    if shape.in_channels != channels:
        raise UserError(
            f"--encoder {encoder} is for images of {shape.in_channels} channels, "
            f"those of {data} have {channels}"
        )


def load_encoder(path: Path, shape: EncoderShape) -> EncoderFile:
    """Load an encoder.

    Args:
        path: The folder of a finished run, its `encoder.safetensors`, a folder of Hugging Face, or
            a checkpoint of the authors' MAE, CAE, SimMIM or ConvMAE.
        shape: Its shape, if there is no `config.yaml` in the same folder.

    Raises:
        UserError: If the file cannot be read, holds no encoder, or holds an encoder of another kind
            than `shape`.
    """
    if (path / ENCODER).is_file():  # a run
        path = path / ENCODER
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise UserError(
            f"--encoder {path} is not a file: give a finished run, its {ENCODER}, a checkpoint, or "
            "a folder of Hugging Face"
        )
    file = read_weights("--encoder", path)
    tensors = file.tensors
    kind = next((kind for kind in KINDS if kind.holds(set(tensors))), None)
    if kind is None:
        known = " or ".join(kind.kind for kind in KINDS)
        raise UserError(f"--encoder {path} holds no encoder: expected a {known}")
    try:
        weights = kind.under_our_names(tensors)
    except ValueError as error:
        raise UserError(f"--encoder {path} holds no encoder: {error}") from error
    check_finite("--encoder", path, weights)
    found = _shape_from_config(path, kind)
    if found is None:
        if not isinstance(shape, kind):
            raise UserError(
                f"--encoder {path} holds a {kind.kind}: give a --preset with the shape of one, or "
                "put the config.yaml of its run beside it"
            )
        first = weights[kind.first_weight]
        if first.ndim < 2:
            raise UserError(
                f"--encoder {path}: {kind.first_weight} has shape {tuple(first.shape)}, without "
                "channels"
            )
        found = dataclasses.replace(shape, in_channels=first.shape[1])
    else:
        _check_shape(path.with_name("config.yaml"), path, found.read(weights), weights)
    shape = found.read(weights)
    config = path.with_name("config.yaml")
    if not config.is_file():
        return EncoderFile(path, file.digest, shape, weights)
    statistics = read_statistics(config, shape.in_channels)
    return EncoderFile(
        path, file.digest, shape, weights, statistics, window=_window_from_config(config)
    )


def check_no_windows(file: EncoderFile) -> None:
    """Check that a plain Vision Transformer computes what was trained: a detector's has windows.

    Raises:
        UserError: If it was trained with attention windows, which its shape does not have.
    """
    if file.window and isinstance(file.shape, ViTShape):
        raise UserError(
            f"{file.path} was trained in a detector with attention windows of {file.window} tokens,"
            " and without a class token: as a plain Vision Transformer it computes something else"
        )


def _window_from_config(config: Path) -> int:
    """Read the window of a detector from the `config.yaml` of a run; 0 for any other run."""
    try:
        detector = read_yaml(config).get("detector") or {}
        return int(detector.get("window") or 0)
    except (UnreadableError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{config} cannot be read: {error}") from error


def _load_folder(folder: Path) -> EncoderFile:
    """Load an encoder, or that of a pre-training model, from a folder of Hugging Face."""
    path, config_file = folder / "model.safetensors", folder / "config.json"
    for file in (path, config_file):
        if not file.is_file():
            raise UserError(
                f"--encoder {folder} is a folder without {file.name}: give the folder of a "
                "finished run, one that save_pretrained wrote, or the file of an encoder"
            )
    found = read_weights("--encoder", path)
    check_finite("--encoder", path, found.tensors)
    try:
        config = read_json(config_file)
        # The encoder alone, also of a classifier or a pre-training model.
        marks = (name.partition("embeddings.patch_embeddings.") for name in found.tensors)
        prefix = next((before for before, mark, _ in marks if mark), "")
        tensors = {
            name.removeprefix(prefix): tensor
            for name, tensor in found.tensors.items()
            if name.startswith(prefix)
        }
        converted = from_hf(tensors, {**config, "architectures": []})
    except UnreadableError as error:
        raise UserError(f"--encoder: {config_file} cannot be read: {error}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"--encoder {folder} holds no encoder: {error}") from error
    kind = next((kind for kind in KINDS if kind.holds(set(converted))), None)
    if kind is None or converted.config is None:
        raise UserError(f"--encoder {folder} holds no encoder")
    weights = kind.under_our_names(converted)
    names = {field.name for field in dataclasses.fields(kind)} - kind.inferred_fields
    try:
        shape = kind(**{n: v for n, v in converted.config.items() if n in names}).read(weights)
    except ValueError as error:
        raise UserError(
            f"--encoder: {config_file} holds no shape of an encoder: {error}"
        ) from error
    _check_shape(config_file, path, shape, weights)
    return EncoderFile(path, found.digest, shape, weights)


def _check_shape(
    config: Path, path: Path, shape: EncoderShape, weights: Mapping[str, Tensor]
) -> None:
    """Check that a shape from a file is that of the weights, before an encoder of it is built."""
    try:
        with torch.device("meta"):  # no memory, whatever the shape
            wanted = shape.build().state_dict()
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"{config} has no shape of an encoder: move it elsewhere") from error
    for name, tensor in wanted.items():
        fits = name.startswith(_AFTER_BLOCKS) or (
            name in weights and weights[name].shape == tensor.shape
        )
        if not fits:
            raise UserError(
                f"{config} does not fit {path.name}: {name} must have shape "
                f"{tuple(tensor.shape)}; move it elsewhere"
            )


def _shape_from_config(path: Path, kind: type[EncoderShape]) -> EncoderShape | None:
    """Read the shape from the `config.yaml` of the run that wrote an encoder; None without one."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return None
    try:
        model = read_yaml(file)["model"]
        names = {field.name for field in dataclasses.fields(kind)} - kind.inferred_fields
        missing = {name for name in kind.optional_fields if model.get(name) is None}
        values = {name: model[name] for name in names - missing}
    except (UnreadableError, AttributeError, KeyError, TypeError) as error:
        lacks = f", it lacks {error}" if isinstance(error, KeyError) else ""
        raise UserError(
            f"{file} does not hold the shape of a {kind.kind}{lacks}: move it elsewhere"
        ) from error
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        return kind(**plain)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; move it elsewhere") from error


@contextlib.contextmanager
def drawing_weights(seed: int) -> Iterator[None]:
    """Draw the weights of an encoder from a seed.

    Raises:
        UserError: If no encoder can be built with the given shape.
    """
    torch.manual_seed(seed)
    try:
        yield
    except ValueError as error:
        raise UserError(f"no encoder of this shape: {error}") from error


def build_encoder(
    shape: EncoderShape, *, seed: int, pool: Literal["mean", "token"] = "mean"
) -> Encoder:
    """Build an untrained encoder.

    Args:
        shape: Its shape.
        seed: Seed of the weights.
        pool: Pooling of the encoder: the mean of its tokens, or the class token.

    Raises:
        UserError: If no encoder can be built with this shape.
    """
    with drawing_weights(seed):
        return shape.build(pool=pool)


def build_classifier(
    shape: EncoderShape, *, seed: int, num_classes: int, drop_path: float
) -> Encoder:
    """Build an untrained encoder with a classification head.

    Args:
        shape: Its shape.
        seed: Seed of the weights.
        num_classes: Number of classes.
        drop_path: Drop-path rate of the last block.

    Raises:
        UserError: If no encoder can be built with this shape.
    """
    with drawing_weights(seed):
        return shape.build_classifier(num_classes=num_classes, drop_path=drop_path)


def build_backbone(shape: EncoderShape, *, seed: int, drop_path: float) -> Encoder:
    """Build an untrained encoder to be trained for its feature maps.

    Args:
        shape: Its shape.
        seed: Seed of the weights.
        drop_path: Drop-path rate of the last block.

    Raises:
        UserError: If no encoder can be built with this shape.
    """
    with drawing_weights(seed):
        return shape.build_backbone(drop_path=drop_path)


def fill_encoder(encoder: Encoder, file: EncoderFile) -> None:
    """Load pre-trained weights into an encoder; a norm after pooling and a head are not changed.

    Position tables are resampled if the encoder has another image size or window.

    Raises:
        UserError: If weights are missing, unexpected or of another shape, or were trained with
            attention windows that `encoder` does not have.
    """
    if getattr(encoder, "window", None) is None:
        check_no_windows(file)
    own = encoder.state_dict()
    wanted = {name for name in own if not name.startswith(_CLASSIFIER)}
    weights = {
        name: tensor
        for name, tensor in file.weights.items()
        if name in wanted or not name.startswith((*_AFTER_BLOCKS, *_CLASSIFIER))
    }
    odd = sorted(wanted ^ weights.keys())
    if set(odd) == {"norm.weight", "norm.bias"} and "fc_norm.weight" in file.weights:
        raise UserError(
            f"--encoder {file.path} is a fine-tuned classifier, whose last norm comes after "
            "pooling: give the encoder.safetensors of its pre-training"
        )
    if _OF_DETECTOR.intersection(odd):
        raise UserError(
            f"--encoder {file.path} was trained in a detector, with tables of relative positions "
            f"({', '.join(sorted(_OF_DETECTOR.intersection(odd)))}), which only detect.py has: give"
            " the encoder.safetensors of its pre-training"
        )
    if odd:
        problem = "has no weight" if odd[0] in wanted else "has an unexpected weight"
        raise UserError(f"--encoder {file.path} {problem} {odd[0]}: {_ADVICE}")
    fitted = file.shape.resample(weights, encoder)
    for name, tensor in fitted.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"--encoder {file.path}: {name} has shape {tuple(tensor.shape)} "
                f"instead of {tuple(own[name].shape)}: {_ADVICE}"
            )
    encoder.load_state_dict({**own, **fitted})
