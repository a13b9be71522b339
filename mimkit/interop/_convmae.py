"""ConvMAE's names: pre-training, fine-tuning and detection; FastConvMAE's are the same.

Its convolutions of size 1 are linear layers here, and their weights lose two axes of size 1.
"""

import re
from collections.abc import Mapping

from torch import Tensor

Pairs = tuple[tuple[str, str], ...]

_BACKBONE = (
    ("pos_embed", "pos_embed"),
    ("patch_embed1.", "stages.0.embed."),
    ("patch_embed2.", "stages.1.embed."),
    ("patch_embed3.", "embed."),
    ("patch_embed4.", "embed_proj."),
    ("blocks1.", "stages.0.blocks."),
    ("blocks2.", "stages.1.blocks."),
    ("blocks3.", "blocks."),
)
_FUSIONS = (("stage1_output_decode.", "fusions.0."), ("stage2_output_decode.", "fusions.1."))
_NORM = (("norm.", "norm."),)
_PRETRAINING = (
    *((official, f"encoder.{ours}") for official, ours in (*_BACKBONE, *_FUSIONS, *_NORM)),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.pos_embed"),
    ("decoder_embed.", "decoder.embed."),
    ("decoder_blocks.", "decoder.blocks."),
    ("decoder_norm.", "decoder.norm."),
    ("decoder_pred.", "head."),
)
RENAMES: dict[str, Pairs] = {
    "convmae": _PRETRAINING,
    "fastconvmae": _PRETRAINING,
    "convmae_vit": (*_BACKBONE, *_NORM, ("fc_norm.", "fc_norm."), ("head.", "head.")),
    "convmae_det": (
        *_BACKBONE,
        (
            "windowed_rel_pos_bias.relative_position_bias_table",
            "window_bias.relative_position_bias_table",
        ),
        (
            "global_rel_pos_bias.relative_position_bias_table",
            "global_bias.relative_position_bias_table",
        ),
    ),
}

_OFFICIAL_BLOCK = re.compile(r"blocks[12]\.")
_OUR_BLOCK = re.compile(r"(encoder\.)?stages\.\d+\.blocks\.")
_POINTWISE = re.compile(r"\.(conv[12]|mlp\.fc[12])\.weight$")


def blocks_from_official(renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Finish what `RENAMES` began: the filters that the authors call attention, and linear layers.

    Args:
        renamed: Tensors of the authors, under the prefixes of mimkit.
    """
    finished = {}
    for name, tensor in renamed.items():
        if _OUR_BLOCK.match(name):
            if _POINTWISE.search(name):
                tensor = tensor.flatten(1)
            name = name.replace(".attn.", ".depthwise.")
        finished[name] = tensor
    return finished


def blocks_to_official(renamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `blocks_from_official`.

    Args:
        renamed: Tensors of mimkit, under the prefixes of the authors.
    """
    finished = {}
    for name, tensor in renamed.items():
        if _OFFICIAL_BLOCK.match(name):
            if _POINTWISE.search(name):
                tensor = tensor[..., None, None]
            name = name.replace(".depthwise.", ".attn.")
        finished[name] = tensor
    return finished
