"""Conversion between the authors' checkpoints and mimkit's."""

from collections.abc import Mapping
from typing import Any

from mimkit._checks import unwrap
from mimkit.interop import _cae, _convmae, _mae, _simmim
from mimkit.interop._rules import Converted, Translation

_TRANSLATIONS = {
    **_mae.TRANSLATIONS,
    **_simmim.TRANSLATIONS,
    **_cae.TRANSLATIONS,
    **_convmae.TRANSLATIONS,
}


def from_official(method: str, state_dict: Mapping[str, Any]) -> Converted:
    """Convert a checkpoint of the authors' code to mimkit's names and shapes.

    The methods, and the class that the result loads into:

    - "mae": `recipes.mae.MAE`; "mae_vit": `nn.ViT`.
    - "simmim_vit", "simmim_swin": `recipes.simmim.SimMIM`; "simmim_vit_finetune": `nn.ViT`;
      "simmim_swin_finetune": `nn.SwinTransformer`.
    - "cae": `recipes.cae.CAE`; "cae_vit": `nn.ViT`; "cae_probe": `nn.AttentiveProbe`.
    - "convmae", "fastconvmae": `recipes.convmae.ConvMAE`; "convmae_vit": `nn.ConvViT`;
      "convmae_det": `nn.ConvViTDetector`.
    - "dalle" and "dalle_decoder": the two halves of `nn.DiscreteVAE`.

    The fine-tuning methods also take a pre-training checkpoint, and select its encoder as the
    authors' code does: SimMIM's shared relative position table is copied to every block, ConvMAE's
    multi-scale fusions are dropped.

    Args:
        method: One of the names above.
        state_dict: Name -> tensor, or a checkpoint that contains it (`{"model": ...}`).

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart.

    Raises:
        TypeError: If `state_dict` is not a dictionary.
        ValueError: If the method is unknown.

    Example:
        >>> import torch
        >>> converted = from_official("mae_vit", {"model": {
        ...     "cls_token": torch.zeros(1, 1, 8), "mask_token": torch.zeros(1, 1, 4)}})
        >>> list(converted), converted.dropped
        (['cls_token'], ('mask_token',))
    """
    return _translation(method).to_ours(unwrap(state_dict))


def to_official(
    method: str, state_dict: Mapping[str, Any], *, duplicates: bool = False
) -> Converted:
    """Convert a mimkit state dict to the authors' names and shapes: the inverse of `from_official`.

    Args:
        method: As in `from_official`.
        state_dict: Name -> tensor, with mimkit's names.
        duplicates: For "cae": whether to also write the authors' second copy of the encoder.

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart.

    Raises:
        TypeError: If `state_dict` is not a dictionary.
        ValueError: If the method is unknown, or has no duplicates.

    Example:
        >>> import torch
        >>> list(to_official("mae", {"head.weight": torch.zeros(12, 4)}))
        ['decoder_pred.weight']
    """
    if duplicates and method != "cae":
        raise ValueError(f'duplicates=True needs the method "cae"; got {method!r}')
    official = _translation(method).to_theirs(unwrap(state_dict))
    return _cae.duplicate_encoder(official) if duplicates else official


def _translation(method: str) -> Translation:
    if method not in _TRANSLATIONS:
        raise ValueError(f"method must be one of {sorted(_TRANSLATIONS)}; got {method!r}")
    return _TRANSLATIONS[method]
