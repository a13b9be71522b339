"""LARS, the optimizer of linear probing at batches of thousands."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LARS(Optimizer):
    """Stochastic gradient descent whose steps are proportional to the size of the weights.

    Parameters with one axis (biases, norms) have neither the proportion nor weight decay.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        weight_decay: Factor of the weights in their gradient.
        momentum: Factor of the last step in the next one.
        trust_coefficient: Step at learning rate 1, as a fraction of the weights' norm.

    Source:
        You et al., arXiv:1708.03888; facebookresearch/mae `lars.py` (the learning rate multiplies
        the momentum buffer, not what goes into it).

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
            closure: Must be `None`: the gradients are those of the last backward pass.
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
    """Add weight decay, and give the update a fixed proportion to the weights."""
    update = gradient.add(parameter, alpha=group["weight_decay"])
    weight_norm, update_norm = parameter.norm(), update.norm()
    # Where one of them is 0 the proportion has no meaning. No branch: it would wait for the device.
    ratio = group["trust_coefficient"] * weight_norm / update_norm
    is_defined = (weight_norm > 0) & (update_norm > 0)
    return update * torch.where(is_defined, ratio, torch.ones_like(ratio))
