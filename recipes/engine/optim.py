"""Optimizer groups and learning-rate schedules, as the authors have them."""

import math
from collections.abc import Iterable, Sequence

from torch import Tensor, nn


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into decayed and not decayed ones.

    Source:
        MAE's pre-training: timm's `add_weight_decay` leaves out what has one axis (norms, biases).
        Class and mask tokens have three, and are decayed; but a model may name parameters that are
        not, in an attribute `not_decayed`.

    Example:
        >>> groups = parameter_groups(nn.Linear(2, 3), weight_decay=0.05)
        >>> [(len(group["params"]), group["weight_decay"]) for group in groups]
        [(1, 0.05), (1, 0.0)]
    """
    not_decayed = getattr(model, "not_decayed", ())
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and name not in not_decayed
            (decayed if is_decayed else others).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def warmup_cosine(
    epoch: float,
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float,
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
    from_start: bool = False,
) -> float:
    """Rise linearly from `warmup_lr`, then fall along half a cosine to `min_lr`.

    Args:
        epoch: Epochs done, a fraction within an epoch: the rate changes every step.
        lr: The highest rate.
        epochs: Length of the run.
        warmup_epochs: Length of the rise.
        min_lr: The rate at the end.
        warmup_lr: The rate at the start.
        from_start: Whether the cosine begins with the run, so that what lies in the rise is left
            out, instead of where the rise ends.

    Source:
        facebookresearch/mae `lr_sched.py`; with `from_start`, timm's `CosineLRScheduler`, which
        microsoft/SimMIM uses.

    Example:
        >>> [warmup_cosine(e, lr=1.0, epochs=10, warmup_epochs=2) for e in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    before = 0.0 if from_start else warmup_epochs
    progress = (epoch - before) / max(epochs - before, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(
    epoch: float,
    *,
    lr: float,
    warmup_epochs: float,
    milestones: Sequence[float],
    factor: float = 0.1,
    warmup_lr: float = 0.0,
) -> float:
    """Rise linearly from `warmup_lr`, then multiply by `factor` at every milestone.

    Args:
        epoch: Epochs done.
        lr: The highest rate.
        warmup_epochs: Length of the rise.
        milestones: Epochs at which the rate falls.
        factor: By which it falls.
        warmup_lr: The rate at the start.

    Source:
        microsoft/SimMIM `lr_scheduler.py` `MultiStepLRScheduler`.

    Example:
        >>> [warmup_steps(e, lr=1.0, warmup_epochs=2, milestones=[8]) for e in (0, 1, 2, 7, 8)]
        [0.0, 0.5, 1.0, 1.0, 0.1]
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return lr * factor ** sum(milestone <= epoch for milestone in milestones)


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """List the gradients that exist."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
