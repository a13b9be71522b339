"""Translation rules for SimMIM's pre-training and fine-tuning, with ViT and Swin."""

import re
from collections.abc import Iterable, Mapping

from mimkit.interop._rules import VIT, Rule, Translation, renames, same, within

_CONSTANTS = renames(("{rest}.relative_position_index", None), ("{rest}.attn_mask", None))
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_BLOCK_TABLE = "blocks.{i}.attn.relative_position_bias_table"
_BLOCK_PARTS = (
    "norm1.{rest}", "norm2.{rest}", "attn.qkv.{rest}", "attn.proj.{rest}", "mlp.fc1.{rest}",
    "mlp.fc2.{rest}",
)  # fmt: skip
_SWIN = (
    *renames(
        ("layers.{rest}.relative_position_bias_table", "layers.{rest}.rel_pos_bias.table"),
    ),
    *same("patch_embed.proj.{rest}", "patch_embed.norm.{rest}", "norm.{rest}"),
    *same(*("layers.{i}.blocks.{j}." + part for part in _BLOCK_PARTS)),
    *same("layers.{i}.downsample.norm.{rest}", "layers.{i}.downsample.reduction.weight"),
)
_PRETRAINING = (
    Rule("encoder.mask_token", "mask_token"),
    Rule("decoder.0.weight", "head.predict.weight", is_pointwise=True),
    Rule("decoder.0.bias", "head.predict.bias"),
)


def _encoder_of(names: Iterable[str]) -> Mapping[str, str]:
    """Select the encoder from a pre-training checkpoint; other checkpoints stay unchanged.

    As in the authors' code, the shared relative position table is copied to every block.
    """
    encoder = {name.removeprefix("encoder."): name for name in names}
    shared = encoder.pop(_SHARED_TABLE, None)
    if shared is not None:
        numbers = (re.match(r"blocks\.(\d+)\.", name) for name in encoder)
        blocks = dict.fromkeys(number[1] for number in numbers if number)
        encoder |= {_BLOCK_TABLE.format(i=block): shared for block in blocks}
    return encoder


_HEADS = ("head.predict.{rest}", "target.{rest}")  # other heads and targets than the authors'
_NOT_ENCODER = ("mask_token", "decoder.{rest}")

TRANSLATIONS = {
    "simmim_vit": Translation(
        (
            *_CONSTANTS,
            *_PRETRAINING,
            *within(
                (*renames((_SHARED_TABLE, "rel_pos_bias.0.table")), *VIT),
                theirs="encoder.",
                ours="encoder.",
            ),
        ),
        ours_left_out=_HEADS,
    ),
    "simmim_swin": Translation(
        (*_CONSTANTS, *_PRETRAINING, *within(_SWIN, theirs="encoder.", ours="encoder.")),
        ours_left_out=_HEADS,
    ),
    "simmim_vit_finetune": Translation(
        (
            *_CONSTANTS,
            *renames((_BLOCK_TABLE, "rel_pos_bias.{i}.table")),
            *VIT,
            *same("fc_norm.{rest}", "head.{rest}"),
        ),
        _encoder_of,
        left_out=(*_NOT_ENCODER, f"encoder.{_SHARED_TABLE}"),
        table_per_block=True,
    ),
    "simmim_swin_finetune": Translation(
        (*_CONSTANTS, *_SWIN, *same("head.{rest}")), _encoder_of, left_out=_NOT_ENCODER
    ),
}
