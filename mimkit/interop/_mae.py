"""Translation rules for MAE's pre-training, fine-tuning and linear probing."""

from mimkit.interop._rules import VIT, Translation, renames, same, within

TRANSLATIONS = {
    "mae": Translation(
        (
            *within(VIT, ours="encoder."),
            *renames(
                ("mask_token", "decoder.mask_token"),
                ("decoder_pos_embed", "decoder.pos_embed"),
                ("decoder_embed.{rest}", "decoder.embed.{rest}"),
                ("decoder_blocks.{rest}", "decoder.blocks.{rest}"),
                ("decoder_norm.{rest}", "decoder.norm.{rest}"),
                ("decoder_pred.{rest}", "head.{rest}"),
            ),
        ),
        ours_left_out=("mask_token", "target.{rest}"),
    ),
    "mae_vit": Translation(
        (*VIT, *same("fc_norm.{rest}", "head.{rest}")),
        left_out=("mask_token", "decoder_{rest}"),
    ),
}
