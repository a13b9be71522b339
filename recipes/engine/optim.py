"""Parameter groups, learning-rate schedules and LARS, as in the authors' code."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recipes.engine.pretrained.shapes import Encoder, EncoderShape
from recipes.engine.run.config import DenseTraining, RunConfig


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Split trainable parameters into groups with and without weight decay.

    Parameters with one axis have no weight decay, nor do those that the model names in its
    attribute `not_decayed`.

    Source:
        MAE's pre-training uses timm's `add_weight_decay`, which excludes parameters with one axis
        (norms, biases). Class and mask tokens have three axes, so they are decayed.

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


def layer_decay_groups(
    encoder: Encoder, shape: EncoderShape, *, weight_decay: float, layer_decay: float
) -> list[dict[str, object]]:
    """Group trainable parameters by layer and weight decay.

    Args:
        encoder: The encoder, with its head.
        shape: Its shape, which gives the layer of each parameter.
        weight_decay: Weight decay of parameters with more than one axis, except those in
            `shape.not_decayed`.
        layer_decay: Each layer's learning rate is this factor times that of the next layer.

    Returns:
        Parameter groups for an optimizer. Each has an `lr_scale`, a factor of the scheduled
        learning rate.

    Source:
        BEiT, arXiv:2106.08254; facebookresearch/mae `lr_decay.py`; microsoft/SimMIM `optimizer.py`.

    Example:
        >>> from recipes.engine.pretrained.shapes import ViTShape
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


def transfer_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Make AdamW for a model on an encoder: layer decay in `model.encoder`, full rate elsewhere.

    Args:
        model: The model.
        config: The run's configuration, whose `model` is the encoder's shape.
    """
    training: Any = config.training
    encoder: Any = model.encoder
    own = {id(parameter) for parameter in encoder.parameters()}
    others = nn.ParameterList(p for p in model.parameters() if id(p) not in own)
    groups = [
        *layer_decay_groups(
            encoder,
            config.model,
            weight_decay=training.weight_decay,
            layer_decay=training.layer_decay,
        ),
        *parameter_groups(others, weight_decay=training.weight_decay),
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=training.betas, fused=True)


def scheduled_lr(epoch: float, config: RunConfig) -> float:
    """Return the learning rate: of steps if there are milestones, of a power or of a cosine."""
    training = config.training
    rise = {"warmup_epochs": training.warmup_epochs, "warmup_lr": training.warmup_lr}
    if isinstance(training, DenseTraining):
        return warmup_power(
            epoch, lr=config.lr, epochs=training.epochs, power=training.power, **rise
        )
    if training.milestones:
        return warmup_steps(epoch, lr=config.lr, milestones=training.milestones, **rise)
    return warmup_cosine(
        epoch,
        lr=config.lr,
        epochs=training.epochs,
        min_lr=training.min_lr,
        from_start=training.cosine_from_start,
        **rise,
    )


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
    """Cosine schedule with linear warm-up from `warmup_lr`.

    Args:
        epoch: Epochs done, with fractions: the learning rate changes every step.
        lr: Peak learning rate.
        epochs: Length of the run.
        warmup_epochs: Length of the warm-up.
        min_lr: Learning rate at the end.
        warmup_lr: Learning rate at the start.
        from_start: Whether the cosine starts with the run instead of after the warm-up. Then the
            warm-up replaces the first part of the cosine.

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


def warmup_power(
    epoch: float,
    *,
    lr: float,
    epochs: float,
    warmup_epochs: float,
    power: float = 1.0,
    warmup_lr: float = 0.0,
) -> float:
    """Polynomial schedule, multiplied by a linear warm-up from `warmup_lr`.

    Args:
        epoch: Epochs done, with fractions.
        lr: Learning rate from which the polynomial starts.
        epochs: Length of the run; the learning rate ends at 0.
        warmup_epochs: Length of the warm-up.
        power: Power of the share of the run that is left; 1 is linear.
        warmup_lr: Learning rate at the start.

    Source:
        mmcv `PolyLrUpdaterHook` with `warmup="linear"`.

    Example:
        >>> [warmup_power(e, lr=1.0, epochs=10, warmup_epochs=2) for e in (0, 1, 2, 5, 10)]
        [0.0, 0.45, 0.8, 0.5, 0.0]
    """
    rise = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0
    decayed: float = lr * max(0.0, 1 - epoch / epochs) ** power
    return rise * decayed + (1 - rise) * warmup_lr


def warmup_steps(
    epoch: float,
    *,
    lr: float,
    warmup_epochs: float,
    milestones: Sequence[float],
    factor: float = 0.1,
    warmup_lr: float = 0.0,
) -> float:
    """Step schedule with linear warm-up from `warmup_lr`.

    Args:
        epoch: Epochs done, with fractions.
        lr: Peak learning rate.
        warmup_epochs: Length of the warm-up.
        milestones: Epochs at which the learning rate is multiplied by `factor`.
        factor: The factor.
        warmup_lr: Learning rate at the start.

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
    """Return the gradients that are not None."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class LARS(Optimizer):
    """LARS: SGD with momentum whose updates are scaled to the norm of the weights.

    Parameters with one axis (biases, norms) are not scaled and have no weight decay.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        weight_decay: Weight decay, added to the gradient.
        momentum: Momentum.
        trust_coefficient: Norm of the update at learning rate 1, divided by the norm of the
            weights.

    Source:
        You et al., arXiv:1708.03888; facebookresearch/mae `lars.py` (the learning rate multiplies
        the momentum buffer, not the gradient).

    Example:
        >>> weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> weight.grad = torch.tensor([[0.0, 10.0]])
        >>> LARS([weight], lr=100.0).step()
        >>> weight.data
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: Not supported; must be None.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = _scaled_update(parameter, update, group)
                state = self.state[parameter]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(parameter)
                momentum = state["mu"].mul_(group["momentum"]).add_(update)
                parameter.add_(momentum, alpha=-group["lr"])


def _scaled_update(parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Add weight decay to a gradient, and scale it to the norm of the weights."""
    update = gradient.add(parameter, alpha=group["weight_decay"])
    weight_norm, update_norm = parameter.norm(), update.norm()
    # The ratio is undefined if one norm is 0. No `if`: it would synchronize with the device.
    ratio = group["trust_coefficient"] * weight_norm / update_norm
    is_defined = (weight_norm > 0) & (update_norm > 0)
    return update * torch.where(is_defined, ratio, torch.ones_like(ratio))
