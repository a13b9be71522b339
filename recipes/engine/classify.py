"""Classification: the task of fine-tuning and of the papers' probes, and test accuracy."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.engine.data.labelled import LabelledData
from recipes.engine.data.mixing import Mixing
from recipes.engine.data.sets import Batch, check_readable
from recipes.engine.loop import Moment, Plan, Task, make_plan
from recipes.engine.run.cli import Options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.loader import held_out_batches, on_device
from recipes.engine.run.world import World
from recipes.engine.seeds import step_generator

# Epochs of few labelled images are short.
_LEAST_STEPS_BETWEEN_CHECKPOINTS = 100
_TEST_BATCH = 256

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Classification(Task):
    """Classification: the model maps images to logits.

    Args:
        model: The model, on its device.
        make_optimizer: Makes the optimizer of the model.
        mixing: Mixup, cutmix and label smoothing.
        config: The run's configuration.
        data: Labelled images.
        world: The processes.
        shard: Whether to shard the weights (FSDP2) instead of copying them (DDP).
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        mixing: Mixing,
        config: RunConfig,
        data: LabelledData,
        world: World,
        *,
        shard: bool = False,
    ) -> None:
        self._make_optimizer = make_optimizer
        self.mixing = mixing
        self.labels = data.train_labels
        self.image_shape = (data.images.in_channels, *config.image_size)
        super().__init__(model, config, world, shard=shard)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self._make_optimizer(self.model)

    def prepare(self, batch: Batch, at: Moment) -> tuple[Tensor, Tensor]:
        """Mix images within this process's share; all processes draw the same mixing ratio."""
        device = self.config.device
        images = batch.images.to(device, non_blocking=True)
        if len(images) == 0:  # this process must still take part in the step
            images = images.new_empty(0, *self.image_shape)
        labels = self.labels[batch.sample_ids].to(device, non_blocking=True)
        generator = step_generator(seed=self.config.seed, step=at.step)
        return self.mixing(images, labels, generator)

    def forward(self, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the cross-entropy."""
        images, targets = inputs
        return {"loss": F.cross_entropy(model(images).float(), targets)}


def plan_classifier(config: RunConfig, options: Options, data: LabelledData) -> Plan:
    """Plan the steps of a classifier.

    Raises:
        UserError: If a batch is larger than the data set.
    """
    at_least = _LEAST_STEPS_BETWEEN_CHECKPOINTS
    return make_plan(config, options, data.images.train, checkpoint_at_least=at_least)


@torch.no_grad()
def score(
    model: nn.Module, config: RunConfig, data: LabelledData, world: World, *, workers: int
) -> float:
    """Return the accuracy on the test images, in percent."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.int64, device=config.device)  # correct, total
    unreadable: set[int] = set()
    for batch in held_out_batches(data.test, world, batch_size=_TEST_BATCH, workers=workers):
        unreadable.update(batch.unreadable_ids)
        if len(batch.images):
            with config.autocast():
                logits = model(on_device(batch, data.test, config.device).images)
            labels = data.test_labels[batch.sample_ids].to(config.device)
            counts[0] += (logits.argmax(dim=1) == labels).sum()
            counts[1] += len(labels)
    check_readable(data.test, set().union(*world.gather(unreadable)))
    correct, total = world.total(counts).tolist()
    return 100 * float(correct) / float(total)
