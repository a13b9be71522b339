"""Conversion between the authors' checkpoints and mimkit's."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from mimkit._state_dicts import unwrap
from mimkit.interop import _cae, _convmae, _mae, _simmim
from mimkit.interop._recognize import register_taker, select_known
from mimkit.interop._rules import Converted, Translation

_TRANSLATIONS = {
    **_mae.TRANSLATIONS,
    **_simmim.TRANSLATIONS,
    **_cae.TRANSLATIONS,
    **_convmae.TRANSLATIONS,
}
for _method, _rules in _TRANSLATIONS.items():
    if _method == "cae_probe":  # its rules know any name
        continue
    register_taker(f'from_official("{_method}", ...)', _rules.unknown)
    register_taker(f'to_official("{_method}", ...)', partial(_rules.unknown, ours=True))


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
        state_dict: Name -> tensor, or a checkpoint that contains it (`{"model": ...}`,
            `{"state_dict": ...}`, nested in any way). Prefixes that wrappers add (`module.`,
            `_orig_mod.`) and a prefix that all names have are taken off.

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart.

    Raises:
        TypeError: If `state_dict` is not a dictionary.
        ValueError: If the method is unknown, or less than nine tenths of the tensors are known to
            it; the message says what they look like, and which function takes them.

    Source:
        The names of facebookresearch/mae, microsoft/SimMIM, Atten4Vis/CAE, Alpha-VL/ConvMAE,
        Alpha-VL/FastConvMAE and openai/DALL-E.

    Example:
        >>> import torch
        >>> converted = from_official("mae_vit", {"model": {
        ...     "cls_token": torch.zeros(1, 1, 8), "mask_token": torch.zeros(1, 1, 4)}})
        >>> list(converted), converted.dropped
        (['cls_token'], ('mask_token',))
    """
    translation, tensors = _translation(method), unwrap(state_dict)
    call = f'from_official("{method}", ...)'
    return translation.to_ours(select_known(tensors, call, translation.unknown))


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
        ValueError: If the method is unknown, or has no duplicates, or if less than nine tenths of
            the tensors are known to it.

    Source:
        As in `from_official`.

    Example:
        >>> import torch
        >>> list(to_official("mae", {"head.weight": torch.zeros(12, 4)}))
        ['decoder_pred.weight']
    """
    if duplicates and method != "cae":
        raise ValueError(f'duplicates=True needs the method "cae"; got {method!r}')
    translation, call = _translation(method), f'to_official("{method}", ...)'
    unknown = partial(translation.unknown, ours=True)
    official = translation.to_theirs(select_known(unwrap(state_dict), call, unknown))
    return _cae.duplicate_encoder(official) if duplicates else official


def _translation(method: str) -> Translation:
    if method not in _TRANSLATIONS:
        raise ValueError(f"method must be one of {sorted(_TRANSLATIONS)}; got {method!r}")
    return _TRANSLATIONS[method]
