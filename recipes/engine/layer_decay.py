"""Layer-wise learning rates for fine-tuning: the closer to the pixels, the slower."""

from recipes.engine.encoder_kinds import Encoder, EncoderShape


def layer_decay_groups(
    encoder: Encoder, shape: EncoderShape, *, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Group the trained parameters by layer, and by whether their weights decay.

    Args:
        encoder: The encoder, with its head.
        shape: Its shape, which tells the layer of a parameter.
        weight_decay: Of parameters with more than one axis, but for those that `shape` names.
        layer_decay: Factor from each layer's learning rate to that of the layer before it.

    Returns:
        Parameter groups for an optimizer. Each has an `lr_scale`, by which the schedule's rate must
        be multiplied at every step.

    Source:
        BEiT, arXiv:2106.08254; facebookresearch/mae `lr_decay.py`; microsoft/SimMIM `optimizer.py`.

    Example:
        >>> from recipes.engine.encoder_kinds import ViTShape
        >>> shape = ViTShape(image_size=32, patch_size=8, dim=16, depth=1, heads=2)
        >>> encoder = shape.build_classifier(num_classes=3, drop_path=0.0)
        >>> groups = layer_decay_groups(encoder, shape, weight_decay=0.05, layer_decay=0.5)
        >>> sorted({(group["lr_scale"], group["weight_decay"]) for group in groups})
        [(0.25, 0.0), (0.25, 0.05), (0.5, 0.0), (0.5, 0.05), (1.0, 0.0), (1.0, 0.05)]
    """
    last = shape.num_blocks + 1
    members: dict[tuple[int, float], list[object]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not name.endswith(shape.not_decayed)
            key = shape.layer_id(name), weight_decay if is_decayed else 0.0
            members.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr_scale": layer_decay ** (last - layer)}
        for (layer, decay), parameters in members.items()
    ]
