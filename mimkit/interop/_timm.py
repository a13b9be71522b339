"""Conversion of timm's weights, and a wrapper that runs timm's Vision Transformers with a mask."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimkit._checks import check_device, check_mask
from mimkit._features import FeatureMaps
from mimkit._grids import Grid, as_sizes
from mimkit._state_dicts import unwrap
from mimkit.interop._convert import from_official, to_official
from mimkit.interop._recognize import register_taker, select_known
from mimkit.interop._rules import VIT, Converted, Rule, Translation, renames, same, state_of
from mimkit.interop._timm_blocks import blocks_of
from mimkit.masking import Mask, RaggedMask
from mimkit.patches import gather_visible, grid_of, interpolate_positions, restore

_VIT = Translation(
    (
        *renames(("blocks.{i}.ls1.gamma", "blocks.{i}.gamma_1")),
        *renames(("blocks.{i}.ls2.gamma", "blocks.{i}.gamma_2")),
        *renames(("blocks.{i}.attn.relative_position_bias_table", "rel_pos_bias.{i}.table")),
        *renames(("rel_pos_bias.relative_position_bias_table", "rel_pos_bias.0.table")),
        *VIT,
        *same("reg_token", "fc_norm.{rest}", "head.{rest}"),
    ),
    left_out=("{rest}.relative_position_index",),
    table_per_block=True,
)
Model = Literal["vit", "swin"]
# timm's BEiT has layer scale under mimkit's names, and no bias of keys, which softmax cancels.
_QV_BIAS = (
    Rule("blocks.{i}.attn.q_bias", "blocks.{i}.attn.qkv.bias", part=(0, 3)),
    Rule("blocks.{i}.attn.v_bias", "blocks.{i}.attn.qkv.bias", part=(2, 3)),
)
_BEIT = replace(_VIT, rules=(*_QV_BIAS, *_VIT.rules[2:]))
_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")


def to_timm(state_dict: nn.Module | Mapping[str, Any], *, model: Model | None = None) -> Converted:
    """Convert the weights of `nn.ViT` or `nn.SwinTransformer` to timm's names.

    Args:
        state_dict: A model, or name -> tensor with mimkit's names.
        model: "vit" (timm's `VisionTransformer`) or "swin" (timm's `SwinTransformer` of 0.9 or
            later, which merges patches at the start of a stage); inferred from the names if `None`.

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart. With registers
        they load into a model with `no_embed_class=True`; if the class token has a position that is
        not zero, into one with `no_embed_class=False`, where the registers' positions are zero.
        With relative positions they load into timm's `Beit` with `use_rel_pos_bias=True`: a table
        that all blocks share is copied to every block, and `.filled` lists the copies.

    Raises:
        ValueError: If `model` is unknown, or less than nine tenths of the tensors are known.

    Source:
        The names of timm's `VisionTransformer` and `SwinTransformer`.

    Example:
        >>> import torch
        >>> list(to_timm({"norm.weight": torch.ones(8)}))
        ['norm.weight']
        >>> list(to_timm({"layers.0.downsample.norm.weight": torch.ones(8)}))
        ['layers.1.downsample.norm.weight']
    """
    tensors = unwrap(state_of(state_dict, "to_timm"))
    if _model_of(tensors, model) == "vit":
        unknown = partial(_VIT.unknown, ours=True)
        is_beit = any(name.endswith((".q_bias", ".table")) for name in tensors)
        known = select_known(tensors, "to_timm", unknown)
        return _to_their_positions((_BEIT if is_beit else _VIT).to_theirs(known))
    official = to_official("simmim_swin_finetune", tensors)
    renamed = {_shift_merging(name, 1): tensor for name, tensor in official.items()}
    swin = {re.sub(r"^head\.", "head.fc.", name): tensor for name, tensor in renamed.items()}
    return Converted(swin, official.dropped)


def from_timm(
    state_dict: nn.Module | Mapping[str, Any],
    *,
    model: Model | None = None,
    grid: Sequence[int] | None = None,
) -> Converted:
    """Convert the weights of a timm `VisionTransformer` or `SwinTransformer` to mimkit's names.

    Args:
        state_dict: A model, or name -> tensor with timm's names.
        model: As in `to_timm`.
        grid: Patches per axis, which tell whether the class token has a position. A model carries
            its own; a square of the table's size if `None`. Give it for a state dict of another
            grid.

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart.

    Raises:
        ValueError: If the model has parts that `nn.ViT` lacks (query-key norms, a norm before the
            blocks, a distillation token, a gated MLP, registers with positions), so that the result
            would compute something else; if the grid does not fit the positions; or if less than
            nine tenths of the tensors are known. A state dict does not tell its activation: build
            `nn.ViT(act="gelu_tanh")` for a model with tanh-GELU.

    Source:
        As in `to_timm`.

    Example:
        >>> import torch
        >>> list(from_timm({"blocks.0.attn.qkv.weight": torch.ones(24, 8)}))
        ['blocks.0.attn.qkv.weight']
    """
    tensors = unwrap(state_of(state_dict, "from_timm"))
    if _model_of(tensors, model) == "swin":
        renamed = {_shift_merging(name, -1): tensor for name, tensor in tensors.items()}
        bare = {re.sub(r"^head\.fc\.", "head.", name): t for name, t in renamed.items()}
        return from_official("simmim_swin_finetune", bare)
    if grid is None and isinstance(state_dict, nn.Module):
        grid = getattr(getattr(state_dict, "patch_embed", None), "grid_size", None)
    converted = _VIT.to_ours(select_known(tensors, "from_timm", _VIT.unknown))
    return _to_our_positions(converted, None if grid is None else as_sizes("grid", grid))


def _to_our_positions(converted: Converted, grid: Sequence[int] | None) -> Converted:
    """Give the class token a position, zero where timm has none, and the registers none.

    Raises:
        ValueError: If registers have positions, or the grid does not fit.
    """
    positions, num_class = converted.get("pos_embed"), int("cls_token" in converted)
    registers = converted.get("reg_token")
    if positions is None or positions.ndim != 3:
        return converted
    num_registers = 0 if registers is None else len(registers.flatten(0, -2))
    num_prefix = _num_prefix(positions.shape[1], num_class, num_registers, grid)
    prefix, patches = positions.tensor_split([num_prefix], dim=1)
    of_class, of_registers = prefix.tensor_split([num_class], dim=1)
    if of_registers.any():
        raise ValueError(
            "nn.ViT has no positions for registers, and those of 'reg_token' in 'pos_embed' "
            "(timm's no_embed_class=False) are not zero"
        )
    if num_class and not num_prefix:
        of_class = torch.zeros_like(patches[:, :1])
    converted["pos_embed"] = torch.cat([of_class, patches], dim=1)
    return converted


def _num_prefix(rows: int, num_class: int, num_registers: int, grid: Sequence[int] | None) -> int:
    """Tell how many rows of a position table stand before those of the patches.

    None (timm's `no_embed_class`), or one for each prefix token: as fits the grid, or a square.

    Raises:
        ValueError: If the grid does not fit, or is needed.
    """
    choices = sorted({0, num_class + num_registers})
    fits = [n for n in choices if rows > n and math.isqrt(rows - n) ** 2 == rows - n]
    if grid is not None:
        fits = [n for n in choices if rows - n == math.prod(grid)]
    elif not fits and not num_registers:  # timm's default
        fits = [num_class]
    if not fits:
        shape = f"the grid {tuple(grid)}" if grid is not None else "a square grid (give grid=)"
        raise ValueError(
            f"pos_embed has {rows} rows, which are not those of {shape} with or without one for "
            f"each prefix token ({num_class} of cls_token, {num_registers} of reg_token)"
        )
    return fits[0]


def _to_their_positions(converted: Converted) -> Converted:
    """Leave out the class token's position beside registers, as timm's models with them do.

    If it is not zero, the registers get positions of zero instead.
    """
    positions, registers = converted.get("pos_embed"), converted.get("reg_token")
    if positions is None or registers is None or "cls_token" not in converted:
        return converted
    of_class, patches = positions.tensor_split([1], dim=1)
    if of_class.any():
        zeros = torch.zeros_like(of_class).expand(-1, len(registers.flatten(0, -2)), -1)
        patches = torch.cat([of_class, zeros, patches], dim=1)
    converted["pos_embed"] = patches
    return converted


def _model_of(tensors: Mapping[str, Tensor], model: Model | None) -> Model:
    if model not in (*get_args(Model), None):
        raise ValueError(f"model must be one of {get_args(Model)}; got {model!r}")
    inferred = "swin" if any(name.startswith("layers.") for name in tensors) else "vit"
    return model or cast(Model, inferred)


def _shift_merging(name: str, stages: int) -> str:
    return _MERGING.sub(lambda match: f"layers.{int(match[1]) + stages}.downsample.", name)


class _MaskedTimmViT(FeatureMaps):
    _last_norm = "model.norm"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.num_prefix_tokens = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        self.dim = int(model.embed_dim)  # type: ignore[arg-type]

    def forward(
        self,
        images: Float[Tensor, "batch channels *spatial"],
        mask: Mask | RaggedMask | None = None,
        *,
        mask_token: Float[Tensor, "*masked dim"] | None = None,
    ) -> Float[Tensor, "batch prefix_and_tokens dim"]:
        model: Any = self.model
        tokens = model.patch_embed(images)
        if mask is None and mask_token is not None:
            raise ValueError("mask_token replaces masked patches: pass a mask with it")
        if mask is not None:
            _check(mask, grid_of(images, model.patch_embed.patch_size), images, mask_token)
        if mask is not None and mask_token is not None:
            tokens, mask = _with_mask_token(tokens, mask, mask_token), None
        assert not isinstance(mask, RaggedMask)
        tokens, rope = self._with_positions(tokens)
        if mask is not None:
            tokens = gather_visible(tokens, mask, num_prefix=self.num_prefix_tokens)
        if hasattr(model, "norm_pre"):
            tokens = model.norm_pre(tokens)
        for block, options in blocks_of(model, rope, mask):
            tokens = self._run(block, tokens, options)
        encoded: Tensor = model.norm(tokens)
        return encoded

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps of `features`, one number for each block."""
        blocks: Any = self.model.blocks
        return tuple(self.dim for _ in blocks)

    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        model: Any = self.model
        grid = self._grid_for(images, model.patch_embed.patch_size)
        tokens, rope = self._embed(images, grid)
        if hasattr(model, "norm_pre"):
            tokens = model.norm_pre(tokens)
        for block, options in blocks_of(model, rope, None):
            tokens = self._run(block, tokens, options)
            yield tokens[:, self.num_prefix_tokens :], grid

    def _embed(self, images: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Embed images of any size; timm does so if it was built with `dynamic_img_size`.

        Raises:
            ValueError: If the size is another one, and the model has rotary or relative positions.
        """
        model: Any = self.model
        built = tuple(model.patch_embed.grid_size)
        if grid == built or getattr(model, "dynamic_img_size", False):
            return self._with_positions(model.patch_embed(images))
        if getattr(model, "rope", None) is not None or not hasattr(model, "_pos_embed"):
            raise ValueError(
                f"this model has rotary or relative positions for a grid of {built}, not of {grid}"
            )
        tokens: Tensor = model.patch_embed.norm(model.patch_embed.proj(images).flatten(2).mT)
        prefix = [p for p in (model.cls_token, model.reg_token) if p is not None]
        prefix = [token.expand(len(tokens), -1, -1) for token in prefix]
        if model.pos_embed is None:
            return torch.cat([*prefix, tokens], dim=1), None
        num_prefix = 0 if model.no_embed_class else self.num_prefix_tokens
        positions = interpolate_positions(model.pos_embed[0], built, grid, num_prefix=num_prefix)
        if model.no_embed_class:
            tokens = torch.cat([*prefix, tokens + positions], dim=1)
        else:
            tokens = torch.cat([*prefix, tokens], dim=1) + positions
        return model.pos_drop(tokens), None

    def _with_positions(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add prefix tokens and positions to all patches; also return Eva's rotary table."""
        model: Any = self.model
        if hasattr(model, "_pos_embed"):
            embedded = model._pos_embed(tokens)
            return embedded if isinstance(embedded, tuple) else (embedded, None)
        if model.cls_token is not None:  # BEiT, and models with relative positions alone
            tokens = torch.cat([model.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if getattr(model, "pos_embed", None) is not None:
            tokens = tokens + model.pos_embed
        return (model.pos_drop(tokens) if hasattr(model, "pos_drop") else tokens), None

    def _run(self, block: nn.Module, tokens: Tensor, options: dict[str, Any]) -> Tensor:
        is_kept = not getattr(self.model, "grad_checkpointing", False)
        if is_kept or not torch.is_grad_enabled():
            encoded: Tensor = block(tokens, **options)
            return encoded
        again: Tensor = checkpoint(block, tokens, **options, use_reentrant=False)
        return again

    def pool(
        self, tokens: Float[Tensor, "batch prefix_and_tokens dim"]
    ) -> Float[Tensor, "batch dim"]:
        pooled: Tensor = self.model.pool(tokens)  # type: ignore[operator]
        return pooled


def _check(mask: Mask | RaggedMask, grid: Grid, images: Tensor, mask_token: Tensor | None) -> None:
    """Check that a mask fits; without a mask token, all images must show as many patches."""
    if not isinstance(mask, RaggedMask) or mask_token is None:
        check_mask(mask, grid, images)  # type: ignore[arg-type]
    elif mask.grids != (grid,) * len(images):
        raise ValueError(f"{len(images)} images have grid {grid}, but the mask has {mask.grids}")
    else:
        check_device(mask, images, "images")


def _with_mask_token(tokens: Tensor, mask: Mask | RaggedMask, mask_token: Tensor) -> Tensor:
    """Put a mask token, or one for each masked patch, in place of the masked patches' embeddings.

    With `dynamic_img_size`, timm's embeddings are [batch, height, width, dim].
    """
    is_single = mask_token.numel() == mask_token.shape[-1]
    is_packed = isinstance(mask, RaggedMask)
    rows = gather_visible(tokens.flatten(0 if is_packed else 1, -2), mask)
    fill = mask_token.view(-1) if is_single else mask_token
    return restore(rows, mask, fill).view_as(tokens)


def wrap_timm(model: nn.Module) -> nn.Module:
    """Wrap a timm Vision Transformer so that it takes a mask.

    The result is an encoder like `nn.ViT`. With images and a mask, it encodes the prefix tokens and
    the visible patches; with a `mask_token` too, all patches, the masked ones replaced by it; with
    images only, it equals `model.forward_features`. It shares its weights with `model`, and its
    switch for checkpointing. All patches are embedded and get their position embedding; the blocks
    see visible patches only.

    Args:
        model: A timm `VisionTransformer`, `Eva`, `Beit`, `VisionTransformerRelPos`, or a subclass
            with the same parts, without patch dropout. Rotary and relative positions are those of
            the visible patches.

    Returns:
        `encoder(images, mask=None, *, mask_token=None)`, with `.model`, `.num_prefix_tokens`,
        `.pool(tokens)`, and `.features(images, layers)` as in `nn.ViT`, for images of any size.

    Raises:
        TypeError: If the model lacks a part of a `VisionTransformer`, has other relative positions
            (SAM's), or embeds its patches by more than one convolution, whose outputs see pixels
            of other patches.
        ValueError: If the model has patch dropout.

    Source:
        timm's `VisionTransformer.forward_features`, which it equals without a mask.

    Example:
        >>> import timm  # doctest: +SKIP
        >>> from mimkit import masking  # doctest: +SKIP
        >>> encoder = wrap_timm(timm.create_model("vit_tiny_patch16_224"))  # doctest: +SKIP
        >>> mask = masking.uniform(masking.key([0], seed=0), (14, 14), 0.75)  # doctest: +SKIP
        >>> encoder(torch.rand(1, 3, 224, 224), mask).shape  # doctest: +SKIP
        torch.Size([1, 50, 192])
        >>> wrap_timm(nn.Linear(8, 8))
        Traceback (most recent call last):
        TypeError: wrap_timm needs a timm VisionTransformer; got Linear without ...
    """
    parts = ("patch_embed", "_pos_embed", "blocks", "norm", "num_prefix_tokens")
    missing = [name for name in parts if not hasattr(model, name)]
    if hasattr(model, "rel_pos_bias") or hasattr(model, "shared_rel_pos"):  # BEiT, relpos
        missing = [name for name in missing if name != "_pos_embed"]
    kind = type(model).__name__
    if missing:
        raise TypeError(f"wrap_timm needs a timm VisionTransformer; got {kind} without {missing}")
    others = _positions_elsewhere(model)
    if others:
        raise TypeError(f"wrap_timm does not know the positions of a {kind} in {others[0]!r}")
    projection = getattr(model.patch_embed, "proj", None)
    is_plain = isinstance(projection, nn.Conv2d) and projection.stride == projection.kernel_size
    if not is_plain or hasattr(model.patch_embed, "backbone"):
        raise TypeError(
            f"wrap_timm needs patches that do not overlap, embedded by one convolution; got a "
            f"{kind} with {type(model.patch_embed).__name__} ({type(projection).__name__})"
        )
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        raise ValueError("the model has patch dropout: build it with patch_drop_rate=0")
    return _MaskedTimmViT(model)


def _positions_elsewhere(model: nn.Module) -> list[str]:
    """Return the relative positions of a model that `blocks_of` does not gather.

    Those of SAM and of windows are no bias between two tokens of the whole grid.
    """
    known = re.compile(
        r"blocks\.\d+\.attn\.(relative_position_bias_table|rel_pos\..*)"
        r"|(rel_pos_bias|shared_rel_pos)\..*"
    )
    names = [name for name, _ in model.named_parameters()]
    relative = [n for n in names if "rel_pos" in n or "relative_position" in n]
    return [name for name in relative if not known.fullmatch(name)]


register_taker("from_timm", _VIT.unknown)
register_taker("to_timm", partial(_VIT.unknown, ours=True))
