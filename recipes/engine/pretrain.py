"""Pre-training: the task of every masked-image-modelling recipe."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkit import masking
from recipes.engine.data.sets import Batch, DataSet
from recipes.engine.errors import UserError
from recipes.engine.loop import Moment, Task
from recipes.engine.masks import Masks, first
from recipes.engine.optim import parameter_groups
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.run.world import World

_FITTING_IMAGES = 256


def build_model(recipe: Recipe, config: RunConfig) -> nn.Module:
    """Make the model with the weights that the run's seed gives."""
    torch.manual_seed(config.seed)
    try:
        return recipe.build(config.model).to(config.device)
    except ValueError as error:
        raise UserError(f"preset {config.preset} on {config.data}: {error}") from error


class Pretraining(Task):
    """A model of a recipe, called with images and masks.

    Args:
        recipe: The method.
        config: The run's configuration.
        data: The images.
        world: The processes.
        shard: Whether weights are spread over the processes, or copied to each.
    """

    inputs: tuple[Tensor, Masks]

    def __init__(
        self,
        recipe: Recipe,
        config: RunConfig,
        data: DataSet,
        world: World,
        *,
        shard: bool = False,
    ) -> None:
        self.recipe = recipe
        model: Any = build_model(recipe, config)
        if recipe.fit is not None:  # the same in every process; a checkpoint overwrites it
            recipe.fit(model, fitting_images(data).to(config.device))
        self.grid: tuple[int, ...] = model.encoder.grid
        self.image_shape = (data.in_channels, *model.encoder.image_size)
        super().__init__(model, config, world, shard=shard)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make AdamW, which decays weights with more than one axis."""
        training = self.config.training
        groups = parameter_groups(self.model, weight_decay=training.weight_decay)
        return torch.optim.AdamW(groups, betas=training.betas, fused=True)

    def prepare(self, batch: Batch, at: Moment) -> tuple[Tensor, Masks]:
        """Move images to the device, and draw their masks there."""
        device = self.config.device
        images = batch.images.to(device, non_blocking=True)
        if len(images) == 0:  # this process takes part in the step all the same
            images = images.new_empty(0, *self.image_shape)
        sample_ids = batch.sample_ids.to(device, non_blocking=True)
        key = masking.key(sample_ids, seed=self.config.seed, epoch=int(at.epoch))
        return images, self.config.masking.draw(key, self.grid)

    def forward(self, model: nn.Module, inputs: tuple[Tensor, Masks]) -> Mapping[str, Tensor]:
        """Return the numbers of the model's output."""
        return scalars(model(*inputs))

    def extras(self) -> dict[str, Any]:
        """Return what trivial predictors score on the same images under the same masks."""
        images, masks = self.inputs
        scores = self.recipe.baselines(self.model, images, first(masks))
        return {"baselines": {name: score.item() for name, score in scores.items()}}


def fitting_images(data: DataSet) -> Tensor:
    """Take some model inputs for `Recipe.fit`.

    Raises:
        UserError: None of them can be read.
    """
    count = min(len(data.train), _FITTING_IMAGES)
    items = (data.train[0, sample_id] for sample_id in range(count))
    images = [image for image, _ in items if image is not None]
    if not images:
        raise UserError(f"none of the first {count} images of {data.name} can be read")
    return torch.stack(images)


def scalars(output: Any) -> dict[str, Tensor]:
    """Return the numbers of a model's output, the loss among them, by name."""
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim == 0
    }
