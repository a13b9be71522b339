"""What a state dict looks like, for the error about one that a converter does not know."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from mimkit._state_dicts import shared_prefix

LEAST_SHARE = 0.9  # of a state dict's tensors that must be known

_GATED = "an Eva, or another ViT with rotary positions or a gated MLP"
# Architectures by what only their names hold, the special ones first: patterns that must all be
# found somewhere in the names, and a description.
_LOOKS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("regress[eo]r",), "a CAE"),
    ((r"patch_embed4\.|stages\.0\.embed\.proj",), "a ConvMAE"),
    (("text_model.", "vision_model."), "a CLIP or SigLIP of Hugging Face"),
    (("vision_model.encoder",), "the vision tower of a CLIP or SigLIP of Hugging Face"),
    (("transformer.resblocks.", "visual|token_embedding|class_embedding"), "a CLIP of OpenAI"),
    (("distillation_token",), "a distilled DeiT of Hugging Face"),
    (("dist_token",), "a distilled DeiT of timm"),
    (("word_embeddings", "LayerNorm|layer_norm"), "a language model of Hugging Face"),
    ((r"wte\.weight|embed_tokens\.weight",), "a language model"),
    (("patch_embeddings.projection", "logit_scale"), "a Swin V2 of Hugging Face"),
    ((r"features\.\d+\.\d+\.attn\.logit_scale",), "a Swin V2 of torchvision"),
    (("logit_scale|cpb_mlp",), "a Swin V2"),
    (
        (
            "patch_embeddings.projection",
            r"encoder\.layers\.\d+\.blocks\.\d+\.layernorm_before|swin\.",
        ),
        "a Swin of Hugging Face",
    ),
    (("rope_embeddings|rope.inv_freq",), "a DINOv3 of Hugging Face"),
    (("patch_embeddings.projection", "layer_scale1.lambda1"), "a DINOv2 of Hugging Face"),
    (("patch_embeddings.projection", "lambda_1"), "a BEiT or Data2Vec of Hugging Face"),
    (("decoder.decoder_pred", "decoder.decoder_layers"), "a ViTMAE of Hugging Face"),
    (
        (r"patch_embeddings\.projection|layernorm_before|attention\.(q_proj|attention\.query)",),
        "a ViT of Hugging Face",
    ),
    (("conv_proj.", "encoder.layers.encoder_layer_"), "a ViT of torchvision"),
    ((r"features\.\d+\.\d+\.attn\.relative_position_bias_table",), "a Swin of torchvision"),
    ((r"features\.\d+\.\d+\.layer_scale",), "a ConvNeXt of torchvision"),
    ((r"convnextv2|grn\.(weight|bias|gamma|beta)",), "a ConvNeXt V2"),
    ((r"stages\.\d+\.blocks\.\d+\.conv_dw\.|\.dwconv\.|layer_scale_parameter",), "a ConvNeXt"),
    ((r"encoder\.stages\.\d+\.layers\.\d+\.layer\.\d+\.convolution",), "a ResNet of Hugging Face"),
    ((r"layer1\.0\.conv1\.weight", r"layer1\.0\.bn1\."), "a ResNet"),
    ((r"conv_stem|features\.\d+\.\d+\.block\.\d+\.fc1\.", "bn|features"), "an EfficientNet"),
    (("denseblock1",), "a DenseNet"),
    ((r"features\.0\.(weight|0\.weight)",), "a convolutional network of torchvision"),
    ((r"token_mixer|mlp_tokens|mlp_channels",), "an MLP-Mixer or a MetaFormer of timm"),
    ((r"ls1\.gamma", "register_tokens"), "a DINOv2 of its authors"),
    ((r"rope|\.attn\.(q_proj|k_proj)|mlp\.fc1_g|mlp\.w12",), _GATED),
    ((r"layers\.\d+\.blocks\.\d+\.attn\.relative_position",), "a Swin"),
    ((r"blocks\.\d+\.(norm1|attn\.qkv)\.",), "a ViT under timm's names"),
)  # fmt: skip

# Parts that change what a model computes: a single one that is not known is too much.
_CHANGES_THE_FUNCTION = re.compile(
    r"dist(illation)?_token|reg(ister)?_tokens?\b|norm_pre|fc_norm|rope|rel_pos_bias\."
    r"|patch_embed\."
    r"|\b(blocks|layers?)\.\d+\."
)

# Functions that take a state dict, each with a function that gives the names it does not know.
Unknown = Callable[[Mapping[str, Any]], list[str]]
_TAKERS: dict[str, Unknown] = {}


def register_taker(call: str, unknown: Unknown) -> None:
    """Make a function known for the advice in errors: how to call it, what it does not know."""
    _TAKERS[call] = unknown


def looks_like(names: Iterable[str]) -> str | None:
    """Say in a few words what architecture parameter names belong to; `None` if unknown.

    Example:
        >>> looks_like(["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight"])
        'a ResNet'
    """
    text = "\n".join(names)
    for patterns, description in _LOOKS:
        if all(re.search(pattern, text) for pattern in patterns):
            return description
    return None


def select_known(tensors: Mapping[str, Any], call: str, unknown: Unknown) -> Mapping[str, Any]:
    """Return the state dict without a prefix that all names have, if it is known then.

    Args:
        tensors: The state dict, unwrapped.
        call: How the converter is called, for the message.
        unknown: Gives the names that it does not know.

    Raises:
        ValueError: If less than nine tenths of the tensors are known, or one that is not known
            changes what the model computes.
    """
    inner = tensors
    while not _takes(unknown, inner):
        prefix = shared_prefix(inner)
        if prefix is None:
            raise _refusal(tensors, call, unknown)
        inner = {name.removeprefix(prefix): tensor for name, tensor in inner.items()}
    return inner


def _takes(unknown: Unknown, tensors: Mapping[str, Any]) -> bool:
    names = unknown(tensors)
    if _gated(tensors) or any(_CHANGES_THE_FUNCTION.search(name) for name in names):
        return False
    return len(names) <= (1 - LEAST_SHARE) * _count(tensors)


def _gated(tensors: Mapping[str, Any]) -> list[str]:
    """Find gated MLPs (GLU), whose two layers have the usual names but not the usual shapes."""
    pairs = {name: tensors.get(name.replace("mlp.fc1", "mlp.fc2")) for name in tensors}
    return [
        name
        for name, second in pairs.items()
        if name.endswith("mlp.fc1.weight")
        and isinstance(second, Tensor)
        and second.ndim > 1
        and tensors[name].shape[0] != second.shape[1]
    ]


def _count(tensors: Mapping[str, Any]) -> int:
    return sum(isinstance(tensor, Tensor) for tensor in tensors.values())


def _refusal(tensors: Mapping[str, Any], call: str, unknown: Unknown) -> ValueError:
    names, count = unknown(tensors), _count(tensors)
    gated = _gated(tensors)
    names = sorted(names + gated, key=lambda name: not _CHANGES_THE_FUNCTION.search(name))
    kind = _GATED if gated else looks_like(tensors)
    takers = [f"interop.{taker}" for taker, other in _TAKERS.items() if _takes(other, tensors)]
    looks = f"they look like {kind}" if kind else "they look like no model that mimkit knows"
    advice = ", which no function of mimkit takes"
    if takers or not kind:
        advice = f"; {' or '.join(takers[:3])} takes them" if takers else ""
    return ValueError(
        f"{call} does not know {len(names)} of {count} tensors, such as {names[0]!r}: "
        f"{looks}{advice}"
    )
