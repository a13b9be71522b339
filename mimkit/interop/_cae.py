"""Translation rules for CAE, its fine-tuning encoder and probe, and DALL-E's tokenizer."""

from collections.abc import Iterable, Mapping

from mimkit.interop._rules import VIT, Converted, Translation, renames, same, within

_CROSS_ATTENTION = (
    ("cross_attn.q_bias", "cross_attn.q.bias"),
    ("cross_attn.v_bias", "cross_attn.v.bias"),
)
_REGRESSOR_BLOCK = renames(
    ("gamma_1_cross", "gamma_1"),
    ("gamma_2_cross", "gamma_2"),
    ("norm1_q.{rest}", "norm_q.{rest}"),
    ("norm1_k.{rest}", "norm_k.{rest}"),
    ("norm1_v.{rest}", "norm_v.{rest}"),
    ("norm2_cross.{rest}", "norm2.{rest}"),
    *_CROSS_ATTENTION,
    ("cross_attn.{rest}", "cross_attn.{rest}"),
    ("mlp_cross.{rest}", "mlp.{rest}"),
)
_CONVOLUTION = renames(
    ("blocks.{rest}.w", "blocks.{rest}.weight"), ("blocks.{rest}.b", "blocks.{rest}.bias")
)


# Of a pre-training checkpoint, beside the encoder; of a probing checkpoint, the encoder.
_NOT_ENCODER = (
    "mask_token", "rd_pos_embed", "encoder_to_regresser{rest}", "regresser.{rest}",
    "decoder.{rest}", "alignment_{rest}", "query_token", "attentive_blocks.{rest}",
)  # fmt: skip
_PROBED = ("cls_token", "pos_embed", "patch_embed.{rest}", "blocks.{rest}", "norm.{rest}")


def _encoder_of(names: Iterable[str]) -> Mapping[str, str]:
    """Select the encoder from a pre-training checkpoint; other checkpoints stay unchanged."""
    return {name.removeprefix("encoder."): name for name in names}


TRANSLATIONS = {
    "cae": Translation(
        (
            *renames(
                ("rd_pos_embed", "pos_embed"),
                ("encoder_to_regresser.{rest}", "project.linear.{rest}"),
                ("encoder_to_regresser_norm.{rest}", "project.norm.{rest}"),
                ("regresser.norm.{rest}", "regressor.norm.{rest}"),
                ("decoder.decoder_blocks.{rest}", "decoder.blocks.{rest}"),
                ("decoder.head.{rest}", "head.{rest}"),
            ),
            *within(
                _REGRESSOR_BLOCK,
                theirs="regresser.regressor_blocks.{i}.",
                ours="regressor.blocks.{i}.",
            ),
            *within(VIT, theirs="encoder.", ours="encoder."),
            *same("mask_token", "decoder.norm.{rest}"),
        ),
        left_out=("alignment_{rest}",),
    ),
    "cae_vit": Translation(
        (
            *renames(
                ("blocks.{i}.attn.relative_position_bias_table", "rel_pos_bias.{i}.table"),
                ("blocks.{i}.attn.relative_position_index", None),  # constant
            ),
            *VIT,
            *same("fc_norm.{rest}", "head.{rest}"),
        ),
        _encoder_of,
        left_out=_NOT_ENCODER,
        table_per_block=True,
    ),
    "cae_probe": Translation(
        (
            *same("query_token", "fc_norm.{rest}", "head.{rest}"),
            *within(renames(*_CROSS_ATTENTION, ("{rest}", "{rest}")), theirs="attentive_blocks.0."),
        ),
        left_out=_PROBED,
    ),
    "dalle": Translation(
        within(_CONVOLUTION, ours="encoder."), ours_left_out=("decoder.blocks.{rest}",)
    ),
    "dalle_decoder": Translation(
        within(_CONVOLUTION, ours="decoder."), ours_left_out=("encoder.blocks.{rest}",)
    ),
}


def duplicate_encoder(official: Converted) -> Converted:
    """Add the authors' second copy of the encoder, which they use for alignment."""
    copies = {
        f"alignment_{name}": tensor
        for name, tensor in official.items()
        if name.startswith("encoder.")
    }
    return Converted({**official, **copies}, official.dropped)
