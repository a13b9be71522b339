"""Names of CAE, of what is trained on its encoder, and of DALL-E's tokenizer.

Patterns: `{i}` stands for a number, `{rest}` for the rest of a name; the first pattern that fits
counts. What is paired with `None` is left out.
"""

import re
from collections.abc import Iterable

Patterns = tuple[tuple[str, str | None], ...]

_REGRESSOR_BLOCK = (
    ("gamma_1_cross", "gamma_1"),
    ("gamma_2_cross", "gamma_2"),
    ("norm1_q.{rest}", "norm_q.{rest}"),
    ("norm1_k.{rest}", "norm_k.{rest}"),
    ("norm1_v.{rest}", "norm_v.{rest}"),
    ("norm2_cross.{rest}", "norm2.{rest}"),
    ("cross_attn.q_bias", "cross_attn.q.bias"),
    ("cross_attn.v_bias", "cross_attn.v.bias"),
    ("cross_attn.{rest}", "cross_attn.{rest}"),
    ("mlp_cross.{rest}", "mlp.{rest}"),
)
_CONVOLUTION = (("blocks.{rest}.w", "weight"), ("blocks.{rest}.b", "bias"))
_VIT: Patterns = (
    ("cls_token", "cls_token"),
    ("pos_embed", "pos_embed"),
    ("patch_embed.proj.{rest}", "patch_embed.proj.{rest}"),
    ("blocks.{i}.attn.relative_position_bias_table", "rel_pos_bias.{i}.table"),
    ("blocks.{i}.attn.relative_position_index", None),  # a constant
    ("blocks.{rest}", "blocks.{rest}"),
    ("norm.{rest}", "norm.{rest}"),
    ("fc_norm.{rest}", "fc_norm.{rest}"),
    ("head.{rest}", "head.{rest}"),
)

# (official, mimkit) patterns by method.
PATTERNS: dict[str, Patterns] = {
    "cae": (
        ("rd_pos_embed", "pos_embed"),
        ("mask_token", "mask_token"),
        ("encoder.{rest}", "encoder.{rest}"),
        ("encoder_to_regresser.{rest}", "project.linear.{rest}"),
        ("encoder_to_regresser_norm.{rest}", "project.norm.{rest}"),
        *(
            (f"regresser.regressor_blocks.{{i}}.{theirs}", f"regressor.blocks.{{i}}.{ours}")
            for theirs, ours in _REGRESSOR_BLOCK
        ),
        ("regresser.norm.{rest}", "regressor.norm.{rest}"),
        ("decoder.decoder_blocks.{rest}", "decoder.blocks.{rest}"),
        ("decoder.norm.{rest}", "decoder.norm.{rest}"),
        ("decoder.head.{rest}", "head.{rest}"),
    ),
    "cae_vit": _VIT,
    "cae_probe": (
        ("query_token", "query_token"),
        ("attentive_blocks.0.cross_attn.q_bias", "cross_attn.q.bias"),
        ("attentive_blocks.0.cross_attn.v_bias", "cross_attn.v.bias"),
        ("attentive_blocks.0.{rest}", "{rest}"),
        ("fc_norm.{rest}", "fc_norm.{rest}"),
        ("head.{rest}", "head.{rest}"),
    ),
    "dalle": tuple((old, f"encoder.blocks.{{rest}}.{new}") for old, new in _CONVOLUTION),
    "dalle_decoder": tuple((old, f"decoder.blocks.{{rest}}.{new}") for old, new in _CONVOLUTION),
}


def to_ours(method: str, name: str) -> str | None:
    """Translate an official name; `None` for what has no counterpart."""
    # A pre-training checkpoint gives its encoder.
    bare = name.removeprefix("encoder.") if method == "cae_vit" else name
    return _translate(bare, PATTERNS[method])


def to_theirs(method: str, name: str) -> str | None:
    """Undo `to_ours`."""
    swapped = [(ours, theirs) for theirs, ours in PATTERNS[method] if ours is not None]
    swapped.sort(key=lambda pair: pair[0] == "{rest}")  # what fits any name comes last
    return _translate(name, swapped)


def _translate(name: str, patterns: Iterable[tuple[str, str | None]]) -> str | None:
    for old, new in patterns:
        expression = re.escape(old)
        expression = expression.replace(r"\{i\}", r"(?P<i>\d+)")
        expression = expression.replace(r"\{rest\}", r"(?P<rest>.+)")
        match = re.fullmatch(expression, name)
        if match:
            return None if new is None else new.format(**match.groupdict())
    return None
