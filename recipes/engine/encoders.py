"""Pre-trained encoders: reading them from files, and checking that they fit."""

import dataclasses
import hashlib
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from mimkit.interop import from_official, load_checkpoint
from mimkit.interop._convert import unwrap
from mimkit.nn import ViT
from mimkit.nn._layers import QKVBias
from mimkit.nn._relative import NUM_CLASS_ROWS
from mimkit.patches import interpolate_positions, interpolate_relative_positions
from recipes.engine.cli import CommonOptions
from recipes.engine.errors import UserError

_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
# What stands between the encoder's tokens and classes: pre-training's is not fine-tuning's.
_LAST_NORM = "norm."
_TOLD_BY_WEIGHTS = {"layer_scale", "qkv_bias", "absolute_positions", "relative_positions"}
_CLASSIFIER = ("fc_norm.", "head.")


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(CommonOptions):
    """Options of what is done to a finished encoder.

    Attributes:
        encoder: An `encoder.safetensors`, whose shape is in the `config.yaml` beside it, or a
            checkpoint of the authors' MAE or CAE, whose shape is the preset's; "none" for none.
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


@dataclass(frozen=True)
class EncoderShape:
    """Shape of a Vision Transformer, in the words of `nn.ViT`; the defaults are ViT-B/16.

    What weights tell (`layer_scale`, `qkv_bias`, the kinds of positions) is taken from them.
    """

    image_size: int | tuple[int, ...] = 224
    patch_size: int | tuple[int, ...] = 16
    in_channels: int = 3
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    qkv_bias: QKVBias = True
    absolute_positions: bool = True
    relative_positions: Literal["block"] | None = None

    def image_axes(self) -> tuple[int, int]:
        """Return height and width in pixels."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width


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
        path: An `encoder.safetensors`, or a checkpoint of the authors' MAE, CAE or SimMIM.
        shape: Its shape, where no `config.yaml` beside it tells.

    Raises:
        UserError: The file cannot be read, or there is no Vision Transformer in it.
    """
    if not path.is_file():
        raise UserError(f"--encoder {path} is no file: give an encoder.safetensors or a checkpoint")
    try:
        checkpoint = load_checkpoint(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"--encoder {path} cannot be read: {reason}") from error
    weights = _under_our_names(checkpoint) if isinstance(checkpoint, Mapping) else {}
    if isinstance(checkpoint, Mapping) and _holds_swin(unwrap(checkpoint)):
        raise UserError(f"--encoder {path} holds a Swin Transformer: this recipe takes a ViT")
    if "patch_embed.proj.weight" not in weights:
        raise UserError(f"--encoder {path} holds no Vision Transformer")
    in_channels = weights["patch_embed.proj.weight"].shape[1]
    told = _shape_beside(path) or dataclasses.replace(shape, in_channels=in_channels)
    told = dataclasses.replace(
        told,
        layer_scale=1.0 if "blocks.0.gamma_1" in weights else None,
        qkv_bias="qv" if "blocks.0.attn.q_bias" in weights else True,
        absolute_positions="pos_embed" in weights,
        relative_positions="block" if "rel_pos_bias.0.table" in weights else None,
    )
    return EncoderFile(path, digest, told, weights)


def _under_our_names(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Rename the encoder of the authors' MAE, CAE or SimMIM, or take ours.

    A table of relative positions that all blocks shared becomes the first one of each.
    """
    tensors = unwrap(checkpoint)
    if "rel_pos_bias.0.table" in tensors:
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
        shared = {f"rel_pos_bias.{i}.table": tensors["rel_pos_bias.0.table"] for i in blocks}
        return {**shared, **tensors}
    if any(name.startswith("encoder.rel_pos_bias.") for name in tensors):
        return from_official("simmim_vit_finetune", tensors)
    is_cae = any(name.startswith("encoder.") for name in tensors)
    return from_official("cae_vit" if is_cae else "mae_vit", tensors)


def _holds_swin(tensors: Mapping[str, Any]) -> bool:
    return any(name.removeprefix("encoder.").startswith("layers.") for name in tensors)


def _shape_beside(path: Path) -> EncoderShape | None:
    """Read the shape from the `config.yaml` of the run that wrote an encoder."""
    file = path.with_name("config.yaml")
    if not file.is_file():
        return None
    try:
        model = yaml.safe_load(file.read_text())["model"]
        names = {field.name for field in dataclasses.fields(EncoderShape)} - _TOLD_BY_WEIGHTS
        values = {name: model[name] for name in names}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not tell the shape of a ViT: move it elsewhere") from error
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return EncoderShape(**plain)


def build_encoder(shape: EncoderShape, *, seed: int, **options: Any) -> ViT:
    """Make an untrained encoder with the weights that a seed gives.

    Args:
        shape: Its shape.
        seed: The seed.
        options: Other arguments of `nn.ViT`.

    Raises:
        UserError: The shape is none.
    """
    torch.manual_seed(seed)
    try:
        return ViT(**dataclasses.asdict(shape), **options)
    except ValueError as error:
        raise UserError(f"no encoder of this shape: {error}") from error


def fill_encoder(encoder: ViT, file: EncoderFile) -> None:
    """Load pre-trained weights; a new norm after pooling and a new head stay as they are.

    The position table is resampled where the encoder is for another image size.

    Raises:
        UserError: Weights that are missing, left over, or of another shape.
    """
    own = encoder.state_dict()
    wanted = {name for name in own if not name.startswith(_CLASSIFIER)}
    weights = {
        name: tensor
        for name, tensor in file.weights.items()
        if name in wanted or not name.startswith((_LAST_NORM, *_CLASSIFIER))
    }
    advice = "give the --preset of this encoder, or the config.yaml of its run beside it"
    odd = sorted(wanted ^ weights.keys())
    if odd:
        verb = "lacks" if odd[0] in wanted else "has a part that this shape lacks:"
        raise UserError(f"--encoder {file.path} {verb} {odd[0]}: {advice}")
    if "pos_embed" in own and weights["pos_embed"].shape[1:] != own["pos_embed"].shape[1:]:
        weights["pos_embed"] = _resampled(weights["pos_embed"], encoder, file)
    for name, table in weights.items():
        if name.startswith("rel_pos_bias.") and table.shape != own[name].shape:
            weights[name] = interpolate_relative_positions(
                table, _grid_of_file(encoder, file), encoder.grid, num_extra=NUM_CLASS_ROWS
            )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"--encoder {file.path}: {name} is {tuple(tensor.shape)} "
                f"where {tuple(own[name].shape)} is wanted: {advice}"
            )
    encoder.load_state_dict({**own, **weights})


def _resampled(table: Tensor, encoder: ViT, file: EncoderFile) -> Tensor:
    """Resample a position table to the encoder's grid; as it is where that cannot be done."""
    num_prefix = encoder.num_prefix_tokens
    side = math.isqrt(max(table.shape[1] - num_prefix, 0))
    for old_grid in (_grid_of_file(encoder, file), (side, side)):
        if math.prod(old_grid) + num_prefix == table.shape[1]:
            resampled = interpolate_positions(
                table[0], old_grid, encoder.grid, num_prefix=num_prefix
            )
            return resampled.unsqueeze(0)
    return table


def _grid_of_file(encoder: ViT, file: EncoderFile) -> tuple[int, ...]:
    """Return the tokens per axis that a file's encoder had."""
    patch = encoder.patch_embed.patch_size
    return tuple(s // p for s, p in zip(file.shape.image_axes(), patch, strict=True))
