"""The kinds of encoders that can be fine-tuned and probed: one class each, listed in `KINDS`."""

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from mimkit._grids import NUM_CLASS_ROWS, per_axis
from mimkit.interop import from_official
from mimkit.nn import ConvViT, SwinTransformer, ViT
from mimkit.patches import interpolate_positions, interpolate_relative_positions
from recipes.engine.errors import UserError
from recipes.engine.fields import Depth, Pixels, PositiveFloat, PositiveInt, Width, check_fields

Encoder = ViT | SwinTransformer | ConvViT


@dataclass(frozen=True)
class EncoderShape(ABC):
    """Shape of an encoder: the arguments of its module, and the properties of its kind.

    Attributes:
        kind: Name of the kind.
        has_class_token: Whether the encoder has a class token, for `pool="token"`.
        not_decayed: Suffixes of the names of parameters that have more than one axis but no weight
            decay.
        inferred_fields: Fields that `read` infers from the weights.
        optional_fields: Fields that a run's configuration may lack, or leave at None.
        first_weight: Name of a weight whose second axis is the image channels.
    """

    kind: ClassVar[str]
    has_class_token: ClassVar[bool]
    not_decayed: ClassVar[tuple[str, ...]]
    inferred_fields: ClassVar[frozenset[str]] = frozenset()
    optional_fields: ClassVar[frozenset[str]] = frozenset({"norm_eps", "act"})
    first_weight: ClassVar[str] = "patch_embed.proj.weight"

    image_size: Pixels | tuple[Pixels, ...] = 224
    in_channels: PositiveInt = 3

    def __post_init__(self) -> None:
        check_fields(self)

    def image_axes(self) -> tuple[int, int]:
        """Return height and width in pixels.

        Raises:
            UserError: The images have another number of axes.
        """
        axes = self.sides
        if len(axes) != 2:
            raise UserError(f"image_size {axes} must have two axes: height and width")
        return axes[0], axes[1]

    @property
    def sides(self) -> tuple[int, ...]:
        """Size per axis; one integer is the side of a square."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2

    @classmethod
    @abstractmethod
    def holds(cls, names: set[str]) -> bool:
        """Whether weights with these names, mimkit's or the authors', are of this kind."""

    @classmethod
    @abstractmethod
    def under_our_names(cls, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an encoder's weights under mimkit's names, from the authors' names or ours."""

    def read(self, weights: Mapping[str, Tensor]) -> Self:
        """Infer the fields `inferred_fields` from the weights."""
        return self

    @abstractmethod
    def build(self, *, pool: Literal["mean", "token"] = "mean") -> Encoder:
        """Build an untrained encoder."""

    @abstractmethod
    def build_classifier(self, *, num_classes: int, drop_path: float) -> Encoder:
        """Build an untrained encoder with a `head`, as its authors fine-tune it."""

    @abstractmethod
    def build_backbone(self, *, drop_path: float) -> Encoder:
        """Build an untrained encoder without a head, to be trained for its feature maps."""

    @abstractmethod
    def resample(self, weights: Mapping[str, Tensor], encoder: Encoder) -> Mapping[str, Tensor]:
        """Resample position tables in weights of this shape to the shape of `encoder`."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of blocks for layer decay."""

    @abstractmethod
    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter, for layer decay.

        Returns:
            0 before the blocks, i + 1 in the i-th block, `num_blocks` + 1 in the last norm and the
            head.
        """


@dataclass(frozen=True)
class ViTShape(EncoderShape):
    """Shape of a Vision Transformer: the arguments of `nn.ViT`. The defaults are ViT-B/16.

    Example:
        >>> names = "pos_embed", "blocks.3.norm1.bias", "rel_pos_bias.3.table", "head.weight"
        >>> [ViTShape().layer_id(name) for name in names]
        [0, 4, 4, 13]
    """

    kind = "Vision Transformer"
    has_class_token = True
    not_decayed = ("cls_token", "pos_embed")
    inferred_fields = frozenset(
        {"layer_scale", "qkv_bias", "absolute_positions", "relative_positions"}
    )

    patch_size: Pixels | tuple[Pixels, ...] = 16
    dim: Width = 768
    depth: Depth = 12
    heads: PositiveInt = 12
    mlp_ratio: PositiveFloat = 4.0
    layer_scale: float | None = None
    qkv_bias: bool | Literal["qv"] = True
    absolute_positions: bool = True
    relative_positions: Literal["block"] | None = None
    norm_eps: PositiveFloat = 1e-6
    act: Literal["gelu", "gelu_tanh"] = "gelu"

    @classmethod
    def holds(cls, names: set[str]) -> bool:
        """Whether these are the names of a ViT, or of MAE, CAE or SimMIM with a ViT."""
        inner = {name.removeprefix("encoder.") for name in names}
        return "patch_embed.proj.weight" in inner and "blocks.0.norm1.weight" in inner

    @classmethod
    def under_our_names(cls, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an encoder's weights under mimkit's names, from the authors' names or ours.

        A table of relative positions that is shared by all blocks is copied to each block.
        """
        if "rel_pos_bias.0.table" in tensors:
            blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
            shared = {f"rel_pos_bias.{i}.table": tensors["rel_pos_bias.0.table"] for i in blocks}
            return {**shared, **tensors}
        if any(name.startswith("encoder.rel_pos_bias.") for name in tensors):
            return from_official("simmim_vit_finetune", tensors)
        is_cae = any(name.startswith("encoder.") for name in tensors)
        return from_official("cae_vit" if is_cae else "mae_vit", tensors)

    def read(self, weights: Mapping[str, Tensor]) -> Self:
        """Infer from the weights which optional parts the encoder has."""
        return dataclasses.replace(
            self,
            layer_scale=1.0 if "blocks.0.gamma_1" in weights else None,
            qkv_bias="qv" if "blocks.0.attn.q_bias" in weights else True,
            absolute_positions="pos_embed" in weights,
            relative_positions="block" if "rel_pos_bias.0.table" in weights else None,
        )

    def build(self, *, pool: Literal["mean", "token"] = "mean") -> ViT:
        """Build an untrained encoder."""
        return ViT(**dataclasses.asdict(self), pool=pool)

    def build_classifier(self, *, num_classes: int, drop_path: float) -> ViT:
        """Build an untrained encoder with mean pooling, a norm and a head."""
        encoder = ViT(
            **dataclasses.asdict(self),
            drop_path=drop_path,
            pool_norm=True,
            learn_positions=True,
            num_classes=num_classes,
        )
        _init_head(encoder)
        return encoder

    def build_backbone(self, *, drop_path: float) -> ViT:
        """Build an untrained encoder without a head, with a trained position table."""
        return ViT(**dataclasses.asdict(self), drop_path=drop_path, learn_positions=True)

    def resample(self, weights: Mapping[str, Tensor], encoder: Encoder) -> Mapping[str, Tensor]:
        """Resample absolute and relative position tables to another grid."""
        fitted, own = dict(weights), encoder.state_dict()
        patch = per_axis("patch_size", self.patch_size, len(self.sides))
        grid = tuple(size // side for size, side in zip(self.sides, patch, strict=True))
        if "pos_embed" in own:
            fitted["pos_embed"] = _resampled(weights["pos_embed"], grid, encoder)
        for name, table in weights.items():
            if name.startswith("rel_pos_bias.") and grid != encoder.grid:
                fitted[name] = interpolate_relative_positions(
                    table, grid, encoder.grid, num_extra=NUM_CLASS_ROWS
                )
        return fitted

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.depth

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter, as in facebookresearch/mae `lr_decay.py`."""
        if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
            return 0
        block = re.match(r"(?:blocks|rel_pos_bias)\.(\d+)\.", name)  # each block has its own table
        return int(block[1]) + 1 if block else self.depth + 1


def _init_head(encoder: Encoder) -> None:
    """Initialize a head close to zero, as facebookresearch/mae and ConvMAE do."""
    head: Any = encoder.head
    nn.init.trunc_normal_(head.weight, std=2e-5)


def _resampled(table: Tensor, old_grid: tuple[int, ...], encoder: Encoder) -> Tensor:
    """Resample a position table to the encoder's grid; unchanged if its size fits no grid."""
    num_prefix = encoder.num_prefix_tokens
    side = math.isqrt(max(table.shape[1] - num_prefix, 0))
    for grid in (old_grid, (side,) * len(encoder.grid)):
        if len(grid) == len(encoder.grid) and math.prod(grid) + num_prefix == table.shape[1]:
            resampled = interpolate_positions(table[0], grid, encoder.grid, num_prefix=num_prefix)
            return resampled.unsqueeze(0)
    return table


@dataclass(frozen=True)
class SwinShape(EncoderShape):
    """Shape of a Swin Transformer: the arguments of `nn.SwinTransformer`. The defaults are Swin-B.

    Example:
        >>> names = ["patch_embed.norm.bias", "layers.1.blocks.0.norm1.bias", "norm.bias"]
        >>> names.append("layers.1.downsample.reduction.weight")
        >>> [SwinShape().layer_id(name) for name in names]
        [0, 3, 25, 4]
    """

    kind = "Swin Transformer"
    has_class_token = False
    not_decayed = ("rel_pos_bias.table",)

    patch_size: Pixels | tuple[Pixels, ...] = 4
    dim: Width = 128
    depth: tuple[Depth, ...] = (2, 2, 18, 2)
    heads: tuple[PositiveInt, ...] = (4, 8, 16, 32)
    window: PositiveInt = 7
    mlp_ratio: PositiveFloat = 4.0
    norm_eps: PositiveFloat = 1e-5
    act: Literal["gelu", "gelu_tanh"] = "gelu"

    @classmethod
    def holds(cls, names: set[str]) -> bool:
        """Whether these are the names of a Swin, or of SimMIM with a Swin."""
        inner = {name.removeprefix("encoder.") for name in names}
        return {"patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"} <= inner

    @classmethod
    def under_our_names(cls, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an encoder's weights under mimkit's names, from the authors' names or ours."""
        is_ours = any(name.endswith(".rel_pos_bias.table") for name in tensors)
        return tensors if is_ours else from_official("simmim_swin_finetune", tensors)

    def build(self, *, pool: Literal["mean", "token"] = "mean") -> SwinTransformer:
        """Build an untrained encoder.

        Raises:
            ValueError: If `pool` is "token".
        """
        if pool != "mean":
            raise ValueError(f'a {self.kind} has no class token: pool must be "mean"')
        return SwinTransformer(**dataclasses.asdict(self))

    def build_classifier(self, *, num_classes: int, drop_path: float) -> SwinTransformer:
        """Build an untrained encoder with mean pooling and a head."""
        return SwinTransformer(
            **dataclasses.asdict(self), drop_path=drop_path, num_classes=num_classes
        )

    def build_backbone(self, *, drop_path: float) -> SwinTransformer:
        """Build an untrained encoder without a head."""
        return SwinTransformer(**dataclasses.asdict(self), drop_path=drop_path)

    def resample(self, weights: Mapping[str, Tensor], encoder: Encoder) -> Mapping[str, Tensor]:
        """Resample tables of relative positions to other windows; both windows must be square."""
        own = encoder.state_dict()
        return {
            name: _other_window(tensor, own[name])
            if name.endswith("rel_pos_bias.table") and tensor.shape != own[name].shape
            else tensor
            for name, tensor in weights.items()
        }

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all stages."""
        return sum(self.depth)

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter, as in microsoft/SimMIM `optimizer.py`.

        Patch merging belongs to the layer of the block before it.
        """
        if name.startswith("patch_embed."):
            return 0
        inside = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
        if inside is None:
            return self.num_blocks + 1
        stage, block = int(inside[1]), inside[2]
        if block is None:
            return sum(self.depth[: stage + 1])
        return sum(self.depth[:stage]) + int(block) + 1


def _other_window(table: Tensor, own: Tensor) -> Tensor:
    """Resample a table to the window of `own`; unchanged if its size fits no square window."""
    old, new = ((math.isqrt(len(t)) + 1) // 2 for t in (table, own))
    if (2 * old - 1) ** 2 != len(table):
        return table
    return interpolate_relative_positions(table, (old, old), (new, new))


@dataclass(frozen=True)
class ConvViTShape(EncoderShape):
    """Shape of ConvMAE's hybrid encoder: the arguments of `nn.ConvViT`. The defaults are base.

    Example:
        >>> names = "pos_embed", "stages.1.blocks.0.norm1.bias", "embed_proj.bias"
        >>> names += "blocks.3.norm1.bias", "fc_norm.bias"
        >>> [ConvViTShape().layer_id(name) for name in names]
        [0, 0, 0, 4, 12]
    """

    kind = "ConvViT"
    has_class_token = False
    not_decayed = ("pos_embed",)
    inferred_fields = frozenset({"multi_scale"})
    first_weight = "stages.0.embed.proj.weight"

    patch_sizes: tuple[Pixels, Pixels, Pixels] = (4, 2, 2)
    dim: tuple[Width, Width, Width] = (256, 384, 768)
    depth: tuple[Depth, Depth, Depth] = (2, 2, 11)
    heads: PositiveInt = 12
    mlp_ratio: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (4.0, 4.0, 4.0)
    multi_scale: bool = False

    @classmethod
    def holds(cls, names: set[str]) -> bool:
        """Whether these are the names of a ConvViT, ConvMAE or its fine-tuned encoder."""
        return cls.first_weight in names or "patch_embed1.proj.weight" in names

    @classmethod
    def under_our_names(cls, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return an encoder's weights under mimkit's names, from the authors' names or ours."""
        if cls.first_weight in tensors:
            return tensors
        if "stage1_output_decode.weight" not in tensors:
            return from_official("convmae_vit", tensors)
        model = from_official("convmae", tensors)
        inner = (name for name in model if name.startswith("encoder."))
        return {name.removeprefix("encoder."): model[name] for name in inner}

    def read(self, weights: Mapping[str, Tensor]) -> Self:
        """Infer from the weights whether the output fuses all stages."""
        return dataclasses.replace(self, multi_scale="fusions.0.weight" in weights)

    def build(self, *, pool: Literal["mean", "token"] = "mean") -> ConvViT:
        """Build an untrained encoder with the output of the pre-trained one."""
        return ConvViT(**dataclasses.asdict(self), pool=pool)

    def build_classifier(self, *, num_classes: int, drop_path: float) -> ConvViT:
        """Build an untrained encoder with mean pooling of its last stage, a norm and a head."""
        encoder = ConvViT(
            **(dataclasses.asdict(self) | {"multi_scale": False}),
            drop_path=drop_path,
            pool_norm=True,
            learn_positions=True,
            num_classes=num_classes,
        )
        _init_head(encoder)
        return encoder

    def build_backbone(self, *, drop_path: float) -> ConvViT:
        """Build an untrained encoder without a head or fused stages."""
        return ConvViT(
            **(dataclasses.asdict(self) | {"multi_scale": False}),
            drop_path=drop_path,
            learn_positions=True,
        )

    def resample(self, weights: Mapping[str, Tensor], encoder: Encoder) -> Mapping[str, Tensor]:
        """Resample the position table to another grid."""
        token = math.prod(self.patch_sizes)
        grid = tuple(size // token for size in self.image_axes())
        return {**weights, "pos_embed": _resampled(weights["pos_embed"], grid, encoder)}

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the last stage; the earlier stages count as one layer."""
        return self.depth[-1]

    def layer_id(self, name: str) -> int:
        """Return the layer of a parameter, as in Alpha-VL/ConvMAE `lr_decay.py`."""
        if name.startswith(("pos_embed", "stages.", "embed.", "embed_proj.")):
            return 0
        block = re.match(r"blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else self.num_blocks + 1


KINDS: tuple[type[EncoderShape], ...] = (ViTShape, SwinShape, ConvViTShape)


def check_window(shape: EncoderShape, window: int | None) -> None:
    """Check that `--window` is given for an encoder with windows only.

    Raises:
        UserError: If it is given for another one.
    """
    if window is not None and not isinstance(shape, SwinShape):
        raise UserError(f"--window {window}: a {shape.kind} has no windows, leave it out")
