"""The task of detection: a detector with its optimizer, and its loss."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recipes.engine.data.instances import Instances, join_targets, no_instances
from recipes.engine.data.sets import Batch
from recipes.engine.loop import Moment, Task
from recipes.engine.optim import transfer_optimizer

Inputs = tuple[Tensor, list[dict[str, Tensor]]]


class Detection(Task):
    """Detection: the model maps images and their objects to losses by name."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return transfer_optimizer(self.model, self.config)

    def prepare(self, batch: Batch, at: Moment) -> Inputs:
        """Move images and objects to the device."""
        device = self.config.device
        targets = join_targets(batch.targets)
        return batch.images.to(device, non_blocking=True), [
            {name: one.to(device, non_blocking=True) for name, one in target.items()}
            for target in targets
        ]

    def take(self, inputs: Inputs, rows: slice) -> Inputs:
        """Select some images with their objects."""
        images, targets = inputs
        return images[rows], targets[rows]

    def forward(self, model: nn.Module, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the sum of the losses, and each of them."""
        images, targets = inputs
        if not len(images):
            # Nothing could be read here, or there are fewer images than parts. This process must
            # take part; the loop multiplies its loss by 0.
            size = self.config.image_size
            images = torch.zeros(1, self.config.model.in_channels, *size, device=images.device)
            targets = self._nothing(images)
        losses: Mapping[str, Tensor] = model(images, targets)
        return {"loss": torch.stack([*losses.values()]).sum(), **losses}

    def _nothing(self, images: Tensor) -> list[dict[str, Tensor]]:
        nothing: Instances = no_instances((images.shape[2], images.shape[3]))
        return [{name: one.to(images.device) for name, one in join_targets([nothing])[0].items()}]
