"""Translation rules for ConvMAE's pre-training, fine-tuning and detection, and for FastConvMAE."""

from mimkit.interop._rules import BLOCK, Rule, Translation, renames, same, within

# The authors call the depth-wise convolution `attn`.
_CONV_BLOCK = (
    *(
        Rule(f"{{i}}.{name}.weight", f"{{i}}.{name}.weight", is_pointwise=True)
        for name in ("conv1", "conv2", "mlp.fc1", "mlp.fc2")
    ),
    *renames(("{i}.attn.{rest}", "{i}.depthwise.{rest}")),
    *same(*(f"{{i}}.{name}.{{rest}}" for name in ("norm1", "norm2", "conv1", "conv2"))),
    *same("{i}.mlp.fc1.bias", "{i}.mlp.fc2.bias"),
)
_BACKBONE = (
    *same("pos_embed"),
    *renames(
        ("patch_embed1.{rest}", "stages.0.embed.{rest}"),
        ("patch_embed2.{rest}", "stages.1.embed.{rest}"),
        ("patch_embed3.{rest}", "embed.{rest}"),
        ("patch_embed4.{rest}", "embed_proj.{rest}"),
    ),
    *within(BLOCK, theirs="blocks3.{i}.", ours="blocks.{i}."),
    *within(_CONV_BLOCK, theirs="blocks1.", ours="stages.0.blocks."),
    *within(_CONV_BLOCK, theirs="blocks2.", ours="stages.1.blocks."),
)
_PRETRAINING = Translation(
    (
        *within((*_BACKBONE, *same("norm.{rest}")), ours="encoder."),
        *renames(
            ("stage1_output_decode.{rest}", "encoder.fusions.0.{rest}"),
            ("stage2_output_decode.{rest}", "encoder.fusions.1.{rest}"),
            ("mask_token", "decoder.mask_token"),
            ("decoder_pos_embed", "decoder.pos_embed"),
            ("decoder_embed.{rest}", "decoder.embed.{rest}"),
            ("decoder_blocks.{rest}", "decoder.blocks.{rest}"),
            ("decoder_norm.{rest}", "decoder.norm.{rest}"),
            ("decoder_pred.{rest}", "head.{rest}"),
        ),
    )
)
_NOT_ENCODER = ("mask_token", "decoder_{rest}", "stage{i}_output_decode.{rest}")
_TABLE = "relative_position_bias_table"

TRANSLATIONS = {
    "convmae": _PRETRAINING,
    "fastconvmae": _PRETRAINING,
    "convmae_vit": Translation(
        (*_BACKBONE, *same("norm.{rest}", "fc_norm.{rest}", "head.{rest}")),
        left_out=_NOT_ENCODER,
        ours_left_out=("fusions.{rest}",),
    ),
    "convmae_det": Translation(
        (
            *_BACKBONE,
            *renames(
                (f"windowed_rel_pos_bias.{_TABLE}", "window_bias.table"),
                (f"global_rel_pos_bias.{_TABLE}", "global_bias.table"),
            ),
        ),
        left_out=(*_NOT_ENCODER, "norm.{rest}", "{rest}.relative_position_index"),
    ),
}
