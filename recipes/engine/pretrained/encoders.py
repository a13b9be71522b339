"""Pre-trained encoders: reading them from files, and checking that they fit."""

import dataclasses
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from mimkit._checks import unwrap
from mimkit.interop import load_checkpoint
from recipes.engine.errors import UserError, reason_of
from recipes.engine.pretrained.shapes import KINDS, Encoder, EncoderShape
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.run.cli import Options
from recipes.engine.run.config import digest_of

_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
# What stands between the last block and classes: pre-training's is not fine-tuning's.
_BEHIND_BLOCKS = ("norm.", "fusions.")
_CLASSIFIER = ("fc_norm.", "head.")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(Options):
    """Options of what is done to a finished encoder.

    Attributes:
        encoder: An `encoder.safetensors`, whose shape is in the `config.yaml` beside it, or a
            checkpoint of the authors' MAE, CAE, SimMIM or ConvMAE, whose shape is the preset's;
            "none" for none.
        resume: "auto" goes on with the output folder's last checkpoint, "never" insists on a new
            start.
    """

    encoder: str
    resume: Literal["auto", "never"] = "auto"


def open_encoder(options: EncoderOptions, shape: "EncoderShape") -> "EncoderFile | None":
    """Read the encoder that `--encoder` names; None for "none".

    Args:
        options: The options.
        shape: Its shape, where no `config.yaml` beside it tells.

    Raises:
        UserError: It cannot be read.
    """
    return None if options.encoder == "none" else load_encoder(Path(options.encoder), shape)


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """A pre-trained encoder.

    Attributes:
        path: Where it is.
        digest: Eight characters that name the content of the file.
        shape: Its shape.
        weights: Its weights, under mimkit's names.
    """

    path: Path
    digest: str
    shape: EncoderShape
    weights: Mapping[str, Tensor]


def load_encoder(path: Path, shape: EncoderShape) -> EncoderFile:
    """Read an encoder.

    Args:
        path: An `encoder.safetensors`, or a checkpoint of the authors' MAE, CAE, SimMIM or ConvMAE.
        shape: Its shape, where no `config.yaml` beside it tells.

    Raises:
        UserError: The file cannot be read, there is no encoder in it, or one of another kind than
            `shape`.
    """
    if not path.is_file():
        raise UserError(f"--encoder {path} is no file: give an encoder.safetensors or a checkpoint")
    try:
        checkpoint = load_checkpoint(path)
        digest = digest_of(path)
    except _UNREADABLE as error:
        raise UserError(f"--encoder {path} cannot be read: {reason_of(error)}") from error
    tensors = unwrap(checkpoint) if isinstance(checkpoint, Mapping) else {}
    kind = next((kind for kind in KINDS if kind.holds(set(tensors))), None)
    if kind is None:
        known = " or ".join(kind.kind for kind in KINDS)
        raise UserError(f"--encoder {path} holds no encoder: expected a {known}")
    weights = kind.under_our_names(tensors)
    told = _shape_beside(path, kind)
    if told is None:
        if not isinstance(shape, kind):
            raise UserError(
                f"--encoder {path} holds a {kind.kind}: give a --preset with the shape of one, or "
                "the config.yaml of its run beside it"
            )
        in_channels = weights[kind.first_weight].shape[1]
        told = dataclasses.replace(shape, in_channels=in_channels)
    return EncoderFile(path, digest, told.read(weights), weights)


def _shape_beside(path: Path, kind: type[EncoderShape]) -> EncoderShape | None:
    """Read the shape from the `config.yaml` of the run that wrote an encoder."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return None
    try:
        model = read_yaml(file)["model"]
        names = {field.name for field in dataclasses.fields(kind)} - kind.inferred_fields
        values = {name: model[name] for name in names}
    except (UnreadableError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not tell the shape of a {kind.kind}: move it elsewhere"
        ) from error
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    try:
        return kind(**plain)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; move it elsewhere") from error


def build_encoder(
    shape: EncoderShape, *, seed: int, pool: Literal["mean", "token"] = "mean"
) -> Encoder:
    """Make an untrained encoder with the weights that a seed gives.

    Args:
        shape: Its shape.
        seed: The seed.
        pool: What its `pool` returns.

    Raises:
        UserError: The shape is none.
    """
    torch.manual_seed(seed)
    try:
        return shape.build(pool=pool)
    except ValueError as error:
        raise UserError(f"no encoder of this shape: {error}") from error


def build_classifier(
    shape: EncoderShape, *, seed: int, num_classes: int, drop_path: float
) -> Encoder:
    """Make an untrained encoder with a head, as `build_encoder` makes one without.

    Args:
        shape: Its shape.
        seed: The seed.
        num_classes: Width of the head.
        drop_path: Fraction of samples whose residual branches the last block leaves out.

    Raises:
        UserError: The shape is none.
    """
    torch.manual_seed(seed)
    try:
        return shape.build_classifier(num_classes=num_classes, drop_path=drop_path)
    except ValueError as error:
        raise UserError(f"no encoder of this shape: {error}") from error


def fill_encoder(encoder: Encoder, file: EncoderFile) -> None:
    """Load pre-trained weights; a new norm after pooling and a new head stay as they are.

    Tables of positions are resampled where the encoder is for another image size or window.

    Raises:
        UserError: Weights that are missing, left over, or of another shape.
    """
    own = encoder.state_dict()
    wanted = {name for name in own if not name.startswith(_CLASSIFIER)}
    weights = {
        name: tensor
        for name, tensor in file.weights.items()
        if name in wanted or not name.startswith((*_BEHIND_BLOCKS, *_CLASSIFIER))
    }
    advice = "give the --preset of this encoder, or the config.yaml of its run beside it"
    odd = sorted(wanted ^ weights.keys())
    if set(odd) == {"norm.weight", "norm.bias"} and "fc_norm.weight" in file.weights:
        raise UserError(
            f"--encoder {file.path} is a fine-tuned classifier, whose last norm is behind pooling: "
            "give the encoder.safetensors of its pre-training"
        )
    if odd:
        verb = "lacks" if odd[0] in wanted else "has a part that this shape lacks:"
        raise UserError(f"--encoder {file.path} {verb} {odd[0]}: {advice}")
    fitted = file.shape.resample(weights, encoder)
    for name, tensor in fitted.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"--encoder {file.path}: {name} is {tuple(tensor.shape)} "
                f"where {tuple(own[name].shape)} is wanted: {advice}"
            )
    encoder.load_state_dict({**own, **fitted})
