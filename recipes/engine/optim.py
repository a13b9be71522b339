"""Optimizer groups and learning-rate schedules, as the authors have them."""

import math
from collections.abc import Iterable

from torch import Tensor, nn


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into decayed and not decayed ones.

    Source:
        MAE's pre-training: timm's `add_weight_decay` leaves out what has one axis (norms, biases).
        Class and mask tokens have three, and are decayed.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), weight_decay=0.05)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.05), (1, 0.0)]
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    others = [parameter for parameter in trainable if parameter.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def warmup_cosine(
    epoch: float, *, lr: float, epochs: float, warmup_epochs: float, min_lr: float = 0.0
) -> float:
    """Rise linearly from 0, then fall along half a cosine to `min_lr`.

    Args:
        epoch: Epochs done, a fraction within an epoch: the rate changes every step.
        lr: The highest rate.
        epochs: Length of the run.
        warmup_epochs: Length of the rise.
        min_lr: The rate at the end.

    Source:
        facebookresearch/mae `lr_sched.py`.

    Example:
        >>> [warmup_cosine(e, lr=1.0, epochs=10, warmup_epochs=2) for e in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """List the gradients that exist."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
