"""Names of SimMIM: its pre-training, and the encoders that it fine-tunes.

Constant buffers of the authors (`relative_position_index`, `attn_mask`) have no counterpart.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_VIT = ("cls_token", "pos_embed", "patch_embed.proj.", "blocks.", "norm.")
_SWIN = ("patch_embed.proj.", "patch_embed.norm.", "layers.", "norm.")
_TABLE, _OUR_TABLE = ".relative_position_bias_table", ".rel_pos_bias.table"
_PRETRAINING = (("encoder.mask_token", "mask_token"), ("decoder.0.", "head."))

# (official, mimkit) pairs: what ends in a dot covers all names below it, the rest are whole names.
_RENAMES = {
    "simmim_vit": (
        ("encoder.rel_pos_bias.relative_position_bias_table", "encoder.rel_pos_bias.0.table"),
        *((f"encoder.{name}", f"encoder.{name}") for name in _VIT),
        *_PRETRAINING,
    ),
    "simmim_swin": (*((f"encoder.{name}", f"encoder.{name}") for name in _SWIN), *_PRETRAINING),
    "simmim_vit_finetune": tuple((name, name) for name in (*_VIT, "fc_norm.", "head.")),
    "simmim_swin_finetune": tuple((name, name) for name in (*_SWIN, "head.")),
}
METHODS = tuple(_RENAMES)

_BUFFER = re.compile(r"(^|\.)(relative_position_index|attn_mask)$")
_SHARED_TABLE = "encoder.rel_pos_bias.relative_position_bias_table"
_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")
_BLOCK_TABLE = re.compile(r"blocks\.(\d+)\.attn\.relative_position_bias_table")
_OUR_BLOCK_TABLE = re.compile(r"rel_pos_bias\.(\d+)\.table")


def from_official(
    method: str, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Translate the authors' tensors; return ours, and the names that have no counterpart."""
    if method.endswith("_finetune"):
        tensors = _encoder_of(method, tensors)
    converted, dropped = {}, []
    for name, tensor in tensors.items():
        ours = _to_ours(method, name)
        if ours is None:
            dropped.append(name)
        else:
            # The head is a convolution of size 1 there.
            is_head = name == "decoder.0.weight"
            converted[ours] = tensor.flatten(1) if is_head else tensor
    return converted, dropped


def to_official(method: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Undo `from_official`."""
    converted, dropped = {}, []
    for name, tensor in tensors.items():
        theirs = _to_theirs(method, name)
        if theirs is None:
            dropped.append(name)
        else:
            is_head = theirs == "decoder.0.weight"
            converted[theirs] = tensor[:, :, None, None] if is_head else tensor
    return converted, dropped


def _encoder_of(method: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take the encoder out of a pre-training checkpoint, if it is one.

    As the authors do, each block starts from the table that all of them shared.
    """
    if not any(name.startswith("encoder.") for name in tensors):
        return tensors
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items()}
    table = encoder.pop(_SHARED_TABLE.removeprefix("encoder."), None)
    if table is not None:
        blocks = dict.fromkeys(match[1] for name in tensors if (match := _BLOCK.match(name)))
        encoder |= {f"blocks.{i}.attn{_TABLE}": table for i in blocks}
    return encoder


def _to_ours(method: str, name: str) -> str | None:
    if _BUFFER.search(name):
        return None
    if method == "simmim_vit_finetune" and (match := _BLOCK_TABLE.fullmatch(name)):
        return f"rel_pos_bias.{match[1]}.table"
    renamed = replace_prefix(name, _RENAMES[method])
    if renamed is not None and "swin" in method and renamed.endswith(_TABLE):
        return renamed.removesuffix(_TABLE) + _OUR_TABLE
    return renamed


def _to_theirs(method: str, name: str) -> str | None:
    if method == "simmim_vit_finetune" and (match := _OUR_BLOCK_TABLE.fullmatch(name)):
        return f"blocks.{match[1]}.attn{_TABLE}"
    swapped = tuple((ours, theirs) for theirs, ours in _RENAMES[method])
    renamed = replace_prefix(name, swapped)
    if renamed is not None and "swin" in method and renamed.endswith(_OUR_TABLE):
        return renamed.removesuffix(_OUR_TABLE) + _TABLE
    return renamed


def replace_prefix(name: str, pairs: tuple[tuple[str, str], ...]) -> str | None:
    """Rename by the first pair that fits; `None` if none does."""
    for old, new in pairs:
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name[len(old) :]
    return None
