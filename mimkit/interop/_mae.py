"""Translation rules for MAE's pre-training, fine-tuning and linear probing."""

from mimkit.interop._rules import Translation, renames, same, within

_VIT = same("cls_token", "pos_embed", "patch_embed.proj.{rest}", "blocks.{rest}", "norm.{rest}")

TRANSLATIONS = {
    "mae": Translation(
        (
            *within(_VIT, ours="encoder."),
            *renames(
                ("mask_token", "decoder.mask_token"),
                ("decoder_pos_embed", "decoder.pos_embed"),
                ("decoder_embed.{rest}", "decoder.embed.{rest}"),
                ("decoder_blocks.{rest}", "decoder.blocks.{rest}"),
                ("decoder_norm.{rest}", "decoder.norm.{rest}"),
                ("decoder_pred.{rest}", "head.{rest}"),
            ),
        )
    ),
    "mae_vit": Translation((*_VIT, *same("fc_norm.{rest}", "head.{rest}"))),
}
