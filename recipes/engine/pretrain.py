"""Pre-training: the task of every masked-image-modelling recipe."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkit import masking
from mimkit.masking import Mask, RaggedMask
from mimkit.patches import grid_of
from recipes.engine.data.sets import Batch, DataSet, TrainSet, first_inputs
from recipes.engine.errors import UserError
from recipes.engine.loop import Moment, Task
from recipes.engine.masks import Masks, first
from recipes.engine.optim import parameter_groups
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.run.world import World

_FITTING_IMAGES = 256


def build_model(recipe: Recipe, config: RunConfig) -> nn.Module:
    """Build the model, with weights drawn from the run's seed."""
    torch.manual_seed(config.seed)
    try:
        return recipe.build(config.model).to(config.device)
    except ValueError as error:
        raise UserError(f"preset {config.preset} on {config.data}: {error}") from error


def check_memory(model: nn.Module, config: RunConfig) -> None:
    """Check that a model, its gradients and AdamW's two moments fit into memory.

    Raises:
        UserError: If they do not.
    """
    needed = 4 * sum(weight.nbytes for weight in model.parameters())
    if config.device == "cuda":
        present = torch.cuda.get_device_properties(0).total_memory
    else:
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > present:
        raise UserError(
            f"the model, its gradients and the optimizer need {needed / 2**30:,.1f} GiB, and this "
            f"machine has {present / 2**30:,.1f}: give a smaller model, or --shard it on several"
        )


def normalize_inside(model: nn.Module, data: TrainSet) -> bool:
    """Let a model normalise bytes while it reads them, so that no batch of floats is ever made.

    Its `readers` are all the parts of it that read images: each needs a method `normalize_bytes`.

    Returns:
        Whether it does; otherwise it takes what `data.to_inputs` returns.
    """
    statistics, readers = data.byte_statistics, getattr(model, "readers", ())
    if statistics is None or not readers:
        return False
    if not all(hasattr(reader, "normalize_bytes") for reader in readers):
        return False
    for reader in readers:
        reader.normalize_bytes(statistics.mean, statistics.std)
    return True


class Pretraining(Task):
    """Pre-training: the model of a recipe is called with images and masks.

    Args:
        recipe: The recipe.
        config: The run's configuration.
        data: The data set.
        world: The processes.
        shard: Whether to shard the weights (FSDP2) instead of copying them (DDP).
    """

    inputs: Any  # images and masks

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
        if recipe.fit is not None:  # same result in every process; a checkpoint overwrites it
            recipe.fit(model, first_inputs(data.train, _FITTING_IMAGES).to(config.device))
        self.takes_bytes = normalize_inside(model, data.train)
        self.to_inputs = data.train.to_inputs
        self.grid: tuple[int, ...] = model.encoder.grid
        self.image_shape = (data.in_channels, *model.encoder.image_size)
        super().__init__(model, config, world, shard=shard)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make AdamW, with weight decay for parameters with more than one axis."""
        training = self.config.training
        groups = parameter_groups(self.model, weight_decay=training.weight_decay)
        return torch.optim.AdamW(groups, betas=training.betas, fused=True)

    def prepare(self, batch: Batch, at: Moment) -> tuple[Any, Any]:
        """Move images to the device, and draw their masks there."""
        device = self.config.device
        images = batch.images.to(device, non_blocking=True)
        if len(images) == 0:  # this process must still take part in the step
            images = images.new_empty(0, *self.image_shape)
        sample_ids = batch.sample_ids.to(device, non_blocking=True)
        key = masking.key(sample_ids, seed=self.config.seed, epoch=int(at.epoch))
        return images, self.config.masking.draw(key, self.grid)

    def forward(self, model: nn.Module, inputs: tuple[Tensor, Masks]) -> Mapping[str, Tensor]:
        """Return the scalars of the model's output, which include the loss."""
        return scalars(model(*inputs))

    def extras(self) -> dict[str, Any]:
        """Return the losses of trivial predictors on the same images and masks."""
        images, masks = self.inputs
        scores = self.score_trivially(images, first(masks))
        return {"baselines": {name: score.item() for name, score in scores.items()}}

    def score_trivially(self, images: Tensor, mask: Mask) -> dict[str, Tensor]:
        """Score the trivial predictors, which take model inputs."""
        inputs = self.to_inputs(images) if images.dtype == torch.uint8 else images
        return self.recipe.baselines(self.model, inputs, mask)


class NativePretraining(Pretraining):
    """Pre-training on images of different sizes, each on its own grid of patches.

    The loss is the mean of the images' means, so that parts of a batch add up to it.
    """

    def __init__(self, recipe: Recipe, *arguments: Any, **options: Any) -> None:
        # Pixels, the only target that takes these images, have nothing to fit.
        super().__init__(dataclasses.replace(recipe, fit=None), *arguments, **options)

    def prepare(self, batch: Batch, at: Moment) -> tuple[list[Tensor], RaggedMask]:
        """Draw the masks of images that are on the device."""
        images: list[Tensor] = batch.images
        sample_ids = batch.sample_ids.to(self.config.device, non_blocking=True)
        if not images:  # this process must still take part in the step; it does not count
            images = [torch.zeros(self.image_shape, device=self.config.device)]
            sample_ids = sample_ids.new_zeros(1)
        key = masking.key(sample_ids, seed=self.config.seed, epoch=int(at.epoch))
        patch = tuple(n // g for n, g in zip(self.image_shape[1:], self.grid, strict=True))
        grids = [grid_of(image[None], patch) for image in images]
        return images, masking.ragged(self.config.masking.draw, key, grids)

    def take(self, inputs: tuple[list[Tensor], RaggedMask], rows: slice) -> Any:
        """Select some images; one that does not count, if there are none."""
        images, mask = inputs
        if rows.start == rows.stop:
            rows = slice(0, 1)
        return images[rows], mask[rows]

    def extras(self) -> dict[str, Any]:
        """Return the losses of trivial predictors, computed grid by grid."""
        images, mask = self.inputs
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row, grid in enumerate(mask.grids):
            rows_of.setdefault(grid, []).append(row)
        each, totals = mask.unbind(), dict[str, float]()
        for rows in rows_of.values():
            stacked = torch.stack([images[row] for row in rows])
            same = Mask.cat([each[row] for row in rows])
            for name, score in self.score_trivially(stacked, same).items():
                share = len(rows) / len(images)
                totals[name] = totals.get(name, 0.0) + score.item() * share
        return {"baselines": totals}


def scalars(output: Any) -> dict[str, Tensor]:
    """Return the scalar tensors of a model's output by name."""
    values = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and value.ndim == 0
    }
