"""The names that weights can have in a file, as one table, and the way from each to each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mimkit.interop._convert import from_official, to_official
from mimkit.interop._hf import ARCHITECTURES, from_hf, to_hf
from mimkit.interop._rules import Converted
from mimkit.interop._timm import from_timm, to_timm

# The encoder of a method's model, by what the weights load into.
ENCODERS = {
    "MAE": "ViT",
    "SimMIM with a ViT": "ViT",
    "SimMIM with a Swin": "SwinTransformer",
    "CAE": "ViT",
    "ConvMAE": "ConvViT",
}
_CLASSES = (*ENCODERS, "ViT", "SwinTransformer", "ConvViT", "ConvViTDetector", "AttentiveProbe")
# What only the names of a class hold, the special ones first.
_MARKS = {
    "CAE": ("regressor.",),
    "DiscreteVAE": ("encoder.blocks.input.", "decoder.blocks.input."),
    "ConvMAE": ("encoder.stages.",),
    "SimMIM with a Swin": ("encoder.layers.",),
    "MAE": ("decoder.",),
    "SimMIM with a ViT": ("encoder.",),
    "AttentiveProbe": ("query_token",),
    "ConvViTDetector": ("window_bias.", "global_bias."),
    "ConvViT": ("stages.",),
    "SwinTransformer": ("layers.",),
}
# The half of a discrete VAE that a format holds.
HALVES = {"dalle": "encoder", "dalle_decoder": "decoder"}


@dataclass(frozen=True)
class Format:
    """Names that weights can have.

    Attributes:
        models: What weights under these names can load into.
        to_ours: Converts to mimkit's names.
        to_theirs: Converts from mimkit's names.
    """

    models: tuple[str, ...]
    to_ours: Callable[..., Converted]
    to_theirs: Callable[[Mapping[str, Tensor]], Converted]


def _unchanged(tensors: Mapping[str, Any]) -> Converted:
    return Converted(tensors, ())


def _hugging_face(architecture: str, family: str, task: str) -> Format:
    encoder = "SwinTransformer" if family == "swin" else "ViT"
    simmim = f"SimMIM with a {'Swin' if family == 'swin' else 'ViT'}"
    return Format(
        ({"mae": "MAE", "simmim": simmim}.get(task, encoder),),
        partial(from_hf, architecture=architecture),
        partial(to_hf, architecture=architecture),
    )


OFFICIAL = {
    "mae": "MAE",
    "mae_vit": "ViT",
    "simmim_vit": "SimMIM with a ViT",
    "simmim_swin": "SimMIM with a Swin",
    "simmim_vit_finetune": "ViT",
    "simmim_swin_finetune": "SwinTransformer",
    "cae": "CAE",
    "cae_vit": "ViT",
    "cae_probe": "AttentiveProbe",
    "convmae": "ConvMAE",
    "fastconvmae": "ConvMAE",
    "convmae_vit": "ConvViT",
    "convmae_det": "ConvViTDetector",
    "dalle": "DiscreteVAE",
    "dalle_decoder": "DiscreteVAE",
}
FORMATS = {
    "mimkit": Format((*_CLASSES, "DiscreteVAE"), _unchanged, _unchanged),
    "timm": Format(("ViT", "SwinTransformer"), from_timm, to_timm),
    # As a source, any class of theirs; as a target, a folder of the class that computes the same.
    "hf": Format(("ViT", "SwinTransformer"), from_hf, _unchanged),
    **{
        method: Format((model,), partial(from_official, method), partial(to_official, method))
        for method, model in OFFICIAL.items()
    },
    **{name: _hugging_face(name, family, task) for name, (family, task) in ARCHITECTURES.items()},
}


def model_of(ours: Mapping[str, Tensor]) -> str:
    """Say which class weights with mimkit's names load into.

    Example:
        >>> import torch
        >>> model_of({"layers.0.blocks.0.norm1.bias": torch.zeros(8)})
        'SwinTransformer'
    """
    found = (
        model for model, marks in _MARKS.items() if any(name.startswith(marks) for name in ours)
    )
    return next(found, "ViT")


def select(ours: Converted, wanted: str) -> tuple[str, Converted]:
    """Select what a format holds: the whole model, its encoder, or half of a discrete VAE.

    Args:
        ours: Weights with mimkit's names.
        wanted: A format.

    Returns:
        The class, and its weights. `.dropped` also names what is outside of them.

    Raises:
        ValueError: If the format holds neither.
    """
    model, models = model_of(ours), FORMATS[wanted].models
    if model in models:
        return model, _half(ours, wanted) if wanted in HALVES else ours
    if ENCODERS.get(model) not in models:
        raise ValueError(f"these weights are of a {model}, and {wanted} holds a {models[0]}")
    prefix = "encoder."
    inside = {n.removeprefix(prefix): t for n, t in ours.items() if n.startswith(prefix)}
    outside = (name for name in ours if not name.startswith(prefix))
    dropped = (*ours.dropped, *outside)
    encoder = Converted(inside, dropped, filled=ours.filled, config=ours.config)
    return select(encoder, wanted)


def _half(ours: Converted, wanted: str) -> Converted:
    prefix = f"{HALVES[wanted]}."
    inside = {name: tensor for name, tensor in ours.items() if name.startswith(prefix)}
    if not inside:
        raise ValueError(
            f"these weights are of half a DiscreteVAE, and {wanted} holds a DiscreteVAE's "
            f"{HALVES[wanted]}"
        )
    outside = (name for name in ours if name not in inside)
    return Converted(inside, (*ours.dropped, *outside), filled=ours.filled)
