"""Estimate the cost of a run without training."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mimkit import masking
from mimkit.masking import Mask
from recipes.engine.data.sets import DataSet
from recipes.engine.loop import Plan
from recipes.engine.run.config import Recipe, RunConfig

_GIB = 2**30
# Weights, gradients and AdamW's two moments, all float32.
_BYTES_PER_PARAMETER = 16


def describe(recipe: Recipe, config: RunConfig, data: DataSet, plan: Plan) -> list[str]:
    """Describe a run: configuration, steps, parameters, FLOPs per image and memory."""
    with torch.device("meta"):
        model = recipe.build(config.model).train()
    encoder: Any = model.encoder
    flops, activations = measure(recipe, config, data, model)
    num_parameters = count_parameters(model)
    batch_size = config.training.batch_size
    images_at_once = batch_size // config.accumulate
    memory = num_parameters * _BYTES_PER_PARAMETER + activations * images_at_once
    return [
        *config.as_lines(),
        "---",
        f"data          {data.name}: {len(data.train):,} images per epoch",
        f"steps         {plan.num_steps:,} of {batch_size:,} images",
        f"parameters    {num_parameters:,} "
        f"({sum(p.numel() for p in model.parameters() if p.requires_grad):,} trained, "
        f"{count_parameters(encoder):,} in the encoder)",
        f"FLOPs         {flops / 1e9:,.2f} G per image, forward and backward",
        f"memory        about {memory / _GIB:,.2f} GiB for weights, optimizer and activations",
    ]


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, including fixed position tables."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(recipe: Recipe, config: RunConfig, data: DataSet, model: nn.Module) -> tuple[int, int]:
    """Return the FLOPs of a step on one image, and the bytes of its saved activations."""
    encoder: Any = model.encoder
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            saved[storage._cdata] = storage.nbytes()
        return tensor

    masks = config.masking.draw(masking.key([0], seed=config.seed), encoder.grid)
    masks = masks.to("meta") if isinstance(masks, Mask) else [mask.to("meta") for mask in masks]
    images = torch.empty(1, data.in_channels, *encoder.image_size, device="meta")
    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        config.autocast(),
    ):
        model(images, masks).loss.backward()
    return int(counter.get_total_flops()), sum(saved.values())
