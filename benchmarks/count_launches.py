"""Count the kernels that a step of each recipe launches: no GPU is needed.

    python -m benchmarks.count_launches

The presets of ViT-B and ConvMAE-B run on the meta device, where PyTorch's own operators take the
place of mimkit's kernels (which are fewer). An operator that computes or moves counts as one; those
that only make or view a tensor do not. The meta device has no autocast: in bf16, casts of weights
and activations come on top.

The fused optimizer launches a kernel for as many pieces of 65,536 values, of as many tensors, as
fit into its arguments: `LIMITS`, from ATen/native/cuda/MultiTensorApply.cuh.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimkit import masking
from recipes import cae, convmae, mae, simmim
from recipes.engine.optim import parameter_groups
from recipes.engine.run.config import Recipe

BATCH = 2
PIECE = 65_536
# Most pieces and tensors of one launch, for CUDA 13.
LIMITS = {"PyTorch 2.11": (320, 36), "2.13": (2240, 252)}
MAKES = ("empty", "new_empty", "detach", "alias", "lift", "_unsafe_view", "is_", "_has_")


class Launches(TorchDispatchMode):
    """Counts operators that compute or move."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Count an operator and run it."""
        name = func._schema.name.split("::")[1]
        self.count += not (func.is_view or name.startswith(MAKES))
        return func(*args, **(kwargs or {}))


def models() -> Iterator[tuple[str, Recipe, Any, Any]]:
    """Return name, recipe, configuration of the model and masking of each recipe."""
    for recipe, preset in (
        (mae.RECIPE, "vit_base"),
        (simmim.RECIPE, "vit_base"),
        (convmae.RECIPE, "convmae_base"),
        (cae.RECIPE, "vit_base"),
    ):
        chosen = recipe.presets[preset]
        model: Any = chosen.model
        if recipe is cae.RECIPE:
            model = replace(model, tokenizer="patches")
        yield recipe.name, recipe, model, chosen.masking


def count_step(model: Any, masks: Any) -> tuple[int, int]:
    """Return how many kernels the forward and the backward pass launch."""
    images = torch.empty(BATCH, 3, *model.encoder.image_size, device="meta")
    with Launches() as forward:
        loss = model(images, masks.to("meta")).loss
    with Launches() as backward:
        loss.backward()
    return forward.count, backward.count


def count_update(sizes: Iterable[int], pieces: int, tensors: int) -> int:
    """Return how many kernels the fused optimizer launches for a group of tensors.

    Args:
        sizes: Number of values of each tensor.
        pieces: Most pieces of a launch.
        tensors: Most tensors of a launch.
    """
    launches = held_pieces = held_tensors = 0
    for size in sizes:
        held_tensors += 1
        last = -(-size // PIECE) - 1
        for piece in range(last + 1):
            held_pieces += 1
            if held_pieces == pieces or (held_tensors == tensors and piece == last):
                launches += 1
                held_pieces, held_tensors = 0, int(piece < last)
    return launches + (held_pieces > 0)


def count_updates(model: nn.Module, pieces: int, tensors: int) -> int:
    """Return how many kernels the fused optimizer launches for a model."""
    groups: list[Any] = parameter_groups(model, weight_decay=0.05)
    return sum(
        count_update((weight.numel() for weight in group["params"]), pieces, tensors)
        for group in groups
    )


def main() -> int:
    """Print the table."""
    updates = " | ".join(f"AdamW, {version}" for version in LIMITS)
    print(f"| | forward | backward | {updates} | not fused, at least one a tensor |")
    print("|---" * (4 + len(LIMITS)) + "|")
    for name, recipe, config, drawn in models():
        with torch.device("meta"):
            model: Any = recipe.build(config).train().to("meta")
        masks = drawn.draw(masking.key(range(BATCH), seed=0), model.encoder.grid)
        cells = [
            *count_step(model, masks),
            *(count_updates(model, *limits) for limits in LIMITS.values()),
            sum(weight.requires_grad for weight in model.parameters()),
        ]
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
