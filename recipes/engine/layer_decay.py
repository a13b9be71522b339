"""Layer-wise learning rates for fine-tuning: the closer to the pixels, the slower."""

import re

from mimkit.nn import ViT

_BLOCK = re.compile(r"(?:blocks|rel_pos_bias)\.(\d+)\.")  # its table is the block's own
_FIRST_LAYER = ("cls_token", "pos_embed", "patch_embed.")
_NOT_DECAYED = ("cls_token", "pos_embed")


def layer_id(name: str, depth: int) -> int:
    """Count the layer that a parameter of `nn.ViT` belongs to.

    Args:
        name: Name of the parameter.
        depth: Blocks of the encoder.

    Returns:
        0 for what comes before the blocks, i + 1 for block i, `depth` + 1 for norm and head.

    Example:
        >>> [layer_id(name, 12) for name in ("pos_embed", "blocks.3.norm1.bias", "head.weight")]
        [0, 4, 13]
    """
    if name.startswith(_FIRST_LAYER):
        return 0
    block = _BLOCK.match(name)
    return int(block[1]) + 1 if block else depth + 1


def layer_decay_groups(
    encoder: ViT, *, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Group the trained parameters by layer, and by whether their weights decay.

    Args:
        encoder: The Vision Transformer, with its head.
        weight_decay: Of parameters with more than one axis, but for class token and positions.
        layer_decay: Factor from each layer's learning rate to that of the layer before it.

    Returns:
        Parameter groups for an optimizer. Each has an `lr_scale`, by which the schedule's rate must
        be multiplied at every step.

    Source:
        BEiT, arXiv:2106.08254; facebookresearch/mae `lr_decay.py`.

    Example:
        >>> encoder = ViT(image_size=32, patch_size=8, dim=16, depth=1, heads=2, num_classes=3)
        >>> groups = layer_decay_groups(encoder, weight_decay=0.05, layer_decay=0.5)
        >>> sorted({(group["lr_scale"], group["weight_decay"]) for group in groups})
        [(0.25, 0.0), (0.25, 0.05), (0.5, 0.0), (0.5, 0.05), (1.0, 0.0), (1.0, 0.05)]
    """
    depth = len(encoder.blocks)
    members: dict[tuple[int, float], list[object]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name not in _NOT_DECAYED
            key = layer_id(name, depth), weight_decay if is_decayed else 0.0
            members.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr_scale": layer_decay ** (depth + 1 - layer),
        }
        for (layer, decay), parameters in members.items()
    ]
