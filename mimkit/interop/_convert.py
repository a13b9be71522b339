"""Names: from other people's checkpoints to mimkit's, and back.

A converter is a list of renames, applied to any name -> tensor dictionary and any part of one:
weights, gradients or optimizer moments. Every converter keeps the values as they are.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from mimkit.interop import _cae, _simmim


class Converted(dict[str, Tensor]):
    """A name -> tensor dictionary that knows what was left out.

    Attributes:
        dropped: Names of the input that have no counterpart.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dropped: tuple[str, ...]) -> None:
        super().__init__(tensors)
        self.dropped = dropped


_VIT = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.",
    "blocks.",
    "norm.",
)

# (official, mimkit) pairs: what ends in a dot covers all names below it, the rest are whole names.
_RENAMES = {
    "mae": (
        *((name, f"encoder.{name}") for name in _VIT),
        ("mask_token", "decoder.mask_token"),
        ("decoder_pos_embed", "decoder.pos_embed"),
        ("decoder_embed.", "decoder.embed."),
        ("decoder_blocks.", "decoder.blocks."),
        ("decoder_norm.", "decoder.norm."),
        ("decoder_pred.", "head."),
    ),
    "mae_vit": tuple((name, name) for name in (*_VIT, "fc_norm.", "head.")),
}


def from_official(method: str, state_dict: Mapping[str, Any]) -> Converted:
    """Rename a checkpoint of the authors' code to mimkit's names.

    Args:
        method: "mae" (loads into `recipes.mae.MAE`) or "mae_vit" (the fine-tuning or probing
            encoder, loads into `nn.ViT`; a pre-training checkpoint gives its encoder). "simmim_vit"
            and "simmim_swin" (load into `recipes.simmim.SimMIM`), "simmim_vit_finetune" and
            "simmim_swin_finetune" (into `nn.ViT` and `nn.SwinTransformer`; a pre-training
            checkpoint gives its encoder, the shared table of relative positions in every block).
            "cae" (loads into `recipes.cae.CAE`), "cae_vit" (as "mae_vit") or "cae_probe" (its
            attentive probe, loads into `nn.AttentiveProbe`). "dalle" and "dalle_decoder" (encoder
            and decoder of the tokenizer, load into `nn.DiscreteVAE`).
        state_dict: Name -> tensor, or the checkpoint around it (`{"model": ...}`).

    Returns:
        The renamed tensors; `.dropped` names the others.

    Raises:
        ValueError: An unknown method.

    Example:
        >>> import torch
        >>> converted = from_official("mae_vit", {"model": {
        ...     "cls_token": torch.zeros(1, 1, 8), "mask_token": torch.zeros(1, 1, 4)}})
        >>> list(converted), converted.dropped
        (['cls_token'], ('mask_token',))
    """
    if method in _simmim.METHODS:
        converted, dropped = _simmim.from_official(method, unwrap(state_dict))
        return Converted(converted, tuple(dropped))
    if method in _cae.PATTERNS:
        return rename(unwrap(state_dict), partial(_cae.to_ours, method))
    pairs = _pairs(method)
    return rename(unwrap(state_dict), lambda name: _simmim.replace_prefix(name, pairs))


def to_official(
    method: str, state_dict: Mapping[str, Any], *, duplicates: bool = False
) -> Converted:
    """Undo `from_official`.

    Args:
        method: As in `from_official`.
        state_dict: mimkit's names -> tensors.
        duplicates: Whether to write what the authors store twice a second time, too: CAE's encoder
            as `alignment_encoder`, which `from_official` leaves out.

    Raises:
        ValueError: An unknown method.

    Example:
        >>> import torch
        >>> list(to_official("mae", {"head.weight": torch.zeros(12, 4)}))
        ['decoder_pred.weight']
    """
    if method in _simmim.METHODS:
        converted, dropped = _simmim.to_official(method, unwrap(state_dict))
        return Converted(converted, tuple(dropped))
    if method in _cae.PATTERNS:
        converted = rename(unwrap(state_dict), partial(_cae.to_theirs, method))
        if duplicates:
            for name in list(converted):
                if name.startswith("encoder."):
                    converted[f"alignment_{name}"] = converted[name]
        return converted
    pairs = tuple((ours, theirs) for theirs, ours in _pairs(method))
    return rename(unwrap(state_dict), lambda name: _simmim.replace_prefix(name, pairs))


def unwrap(state_dict: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Take the tensors out of a checkpoint of the form `{"model": ...}`."""
    while isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    return state_dict


def rename(tensors: Mapping[str, Tensor], new_name: Callable[[str], str | None]) -> Converted:
    """Rename every tensor; those whose new name is `None` are dropped."""
    names = {name: new_name(name) for name in tensors}
    kept = {new: tensors[old] for old, new in names.items() if new is not None}
    return Converted(kept, tuple(old for old, new in names.items() if new is None))


def _pairs(method: str) -> tuple[tuple[str, str], ...]:
    if method not in _RENAMES:
        known = sorted({*_RENAMES, *_simmim.METHODS, *_cae.PATTERNS})
        raise ValueError(f"method must be one of {known}; got {method!r}")
    return _RENAMES[method]
