"""Weights of a pre-trained encoder, fitted to another encoder with the same blocks."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mimkit._arguments import checked
from mimkit._grids import NUM_CLASS_ROWS, Grid, as_sizes, count_tokens
from mimkit._state_dicts import unwrap
from mimkit.interop._rules import Converted
from mimkit.nn import RelativePositionBias
from mimkit.patches import interpolate_positions, interpolate_relative_positions

_ENCODER = "encoder."  # prefix of the encoder's weights in a method's model
# Parts that other encoders do without: they are after the blocks, or the encoder has other ones.
_DROPPABLE = re.compile(
    r"(cls_token|reg_token)$|(norm|fc_norm|head|fusions|rel_pos_bias|window_bias|global_bias)\."
)
_NOT_FROM_PRETRAINING = re.compile(r"(fc_norm|head)\.|blocks\.\d+\.gamma_[12]$")
_ZERO = re.compile(r"(rel_pos_bias\.\d+|window_bias|global_bias)\.table$")


@checked
def fit_encoder(
    state_dict: Mapping[str, Any], encoder: nn.Module, *, grid: Sequence[int] | None = None
) -> Converted:
    """Fit the weights of a pre-trained encoder to one of another size, or to a detector's backbone.

    Position tables and tables of relative positions are resampled where the grids differ. Tables of
    relative positions that the weights lack are zero, which changes nothing at first. The class
    token, a last norm, fused stages and a classifier are left out where `encoder` has none.

    Args:
        state_dict: Name -> tensor with mimkit's names: `encoder.safetensors` of a run, what
            `from_official` and `from_timm` give, or the weights of a whole model of a recipe.
        encoder: The encoder to fit to: an `nn.ViT`, `nn.ConvViT`, `nn.ConvViTDetector` or
            `nn.SwinTransformer` with blocks of the same shapes.
        grid: Tokens per axis that the weights are for; `None` for a square grid.

    Returns:
        What `encoder.load_state_dict` takes. `.dropped` lists the names that were left out,
        `.filled` those that the weights lack: zero tables, and layer scales, norms after pooling
        and heads as they are in `encoder`.

    Raises:
        ValueError: If other weights are missing, of other shapes or without a place in `encoder`,
            or if the tables do not fit `grid`.

    Source:
        MAE and ConvMAE resample absolute positions bicubically; detectron2's ViTDet drops the class
        token. Alpha-VL/ConvMAE loads its detector with `strict=False`, so that its tables stay
        zero.

    Example:
        >>> from mimkit.nn import ConvViT, ConvViTDetector
        >>> shape = {"dim": (4, 8, 16), "depth": (1, 1, 2), "heads": 2}
        >>> pretrained = ConvViT(image_size=64, multi_scale=True, **shape)
        >>> backbone = ConvViTDetector(image_size=128, window=4, global_layers=(1,), **shape)
        >>> weights = fit_encoder(pretrained.state_dict(), backbone)
        >>> backbone.load_state_dict(weights)
        <All keys matched successfully>
        >>> weights.dropped[:2], weights.filled
        (('fusions.0.bias', 'fusions.0.weight'), ('global_bias.table', 'window_bias.table'))
    """
    given, outside = _encoder_of(unwrap(state_dict))
    own = encoder.state_dict()
    given = _shared_tables(given, own)
    old_grid = _grid_of(given, grid)
    fitted: dict[str, Tensor] = {}
    odd_rows: list[str] = []
    for name, tensor in given.items():
        if name not in own:
            continue
        if name == "pos_embed":
            fitted[name], odd_rows = _fit_positions(tensor, given, own[name], old_grid, encoder)
        elif isinstance(bias := _module_of(encoder, name), RelativePositionBias):
            fitted[name] = _fit_relative(name, tensor, bias, old_grid)
        else:
            fitted[name] = tensor
    extra = sorted(given.keys() - own.keys())
    missing = sorted(own.keys() - given.keys())
    _check(fitted, own, extra, missing)
    filled = {
        name: own[name].new_zeros(own[name].shape) if _ZERO.match(name) else own[name]
        for name in missing
    }
    dropped = (*odd_rows, *extra, *outside)
    return Converted({**fitted, **filled}, dropped, filled=tuple(filled))


def _encoder_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take the encoder out of a method's model; also return the names outside of it."""
    if not any(name.startswith(_ENCODER) for name in tensors):
        return dict(tensors), []
    inside = {n.removeprefix(_ENCODER): t for n, t in tensors.items() if n.startswith(_ENCODER)}
    return inside, [name for name in tensors if not name.startswith(_ENCODER)]


def _shared_tables(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy a table that all blocks share to every block, where each block has its own."""
    tables = [name for name in given if re.match(r"rel_pos_bias\.\d+\.table$", name)]
    if tables != ["rel_pos_bias.0.table"]:
        return given
    wanted = (name for name in own if re.match(r"rel_pos_bias\.\d+\.table$", name))
    return {**given, **dict.fromkeys(wanted, given["rel_pos_bias.0.table"])}


def _grid_of(given: Mapping[str, Tensor], grid: Sequence[int] | None) -> Grid | None:
    """Return the grid that the position table is for; `None` if there is none and no grid."""
    if grid is not None:
        grid = as_sizes("grid", grid)
    if "pos_embed" not in given:
        return grid
    tokens = given["pos_embed"].shape[1] - int("cls_token" in given)
    if grid is None:
        side = math.isqrt(tokens)
        grid = (side, side)
    if count_tokens(grid) != tokens:
        raise ValueError(
            f"the position table is for {tokens} tokens, not for a grid of {grid}: pass the grid= "
            "that the weights are for"
        )
    return grid


def _fit_positions(
    table: Tensor, given: Mapping[str, Tensor], own: Tensor, old_grid: Grid | None, encoder: Any
) -> tuple[Tensor, list[str]]:
    """Resample the position table; also return the name of a class token's row left out."""
    assert old_grid is not None
    theirs = int("cls_token" in given)
    ours = own.shape[1] - count_tokens(encoder.grid)
    if ours > theirs:
        raise ValueError("the encoder has a class token, but the weights have none")
    fitted = interpolate_positions(table[0], old_grid, encoder.grid, num_prefix=theirs)
    return fitted[None, theirs - ours :], ["pos_embed[:, :1]"] * (theirs - ours)


def _fit_relative(
    name: str, table: Tensor, bias: RelativePositionBias, old_grid: Grid | None
) -> Tensor:
    """Resample a table of relative positions to the grid or the window of its module."""
    for extra in (0, NUM_CLASS_ROWS):
        side = (math.isqrt(len(table) - extra) + 1) // 2
        for grid in (old_grid, bias.grid, (side,) * len(bias.grid)):
            if grid and len(table) == count_tokens([2 * n - 1 for n in grid]) + extra:
                fitted = interpolate_relative_positions(table, grid, bias.grid, num_extra=extra)
                return fitted if bias.num_prefix else fitted[: len(fitted) - extra]
    raise ValueError(
        f"{name} has {len(table)} rows, which fit neither a grid of {old_grid} nor a square one"
    )


def _module_of(encoder: nn.Module, name: str) -> nn.Module:
    return encoder.get_submodule(name.rpartition(".")[0])


def _check(
    fitted: Mapping[str, Tensor], own: Mapping[str, Tensor], extra: list[str], missing: list[str]
) -> None:
    lost = [name for name in extra if not _DROPPABLE.match(name)]
    lacking = [n for n in missing if not (_ZERO.match(n) or _NOT_FROM_PRETRAINING.match(n))]
    wrong = [name for name, tensor in fitted.items() if tensor.shape != own[name].shape]
    if lost:
        raise ValueError(
            f"the encoder has no place for {len(lost)} of the weights, such as {lost[0]!r}"
        )
    if lacking:
        raise ValueError(f"the weights lack {len(lacking)} tensors, such as {lacking[0]!r}")
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} has shape {tuple(fitted[name].shape)}, but the encoder needs "
            f"{tuple(own[name].shape)}"
        )
