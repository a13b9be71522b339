"""Average precision of boxes and masks, by torchmetrics and faster-coco-eval."""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.engine.data.instances import InstanceImages, Instances, fitted
from recipes.engine.data.sets import check_readable
from recipes.engine.errors import UserError, say
from recipes.engine.run.config import RunConfig
from recipes.engine.run.loader import held_out_batches, on_device
from recipes.engine.run.world import World

KINDS = ("box", "mask")
_BATCH = 16


@dataclass(frozen=True, eq=False)
class DetectionData:
    """Images with objects.

    Attributes:
        train: Training images.
        test: Images to score on.
        class_names: Names of the classes, from 1 on.
        content: Number and digest of stored samples; None if images are composed.
    """

    train: InstanceImages
    test: InstanceImages
    class_names: tuple[str, ...]
    content: str | None = None


class AveragePrecision:
    """Average precision of the objects found in images, in percent.

    The numbers are those of COCO's tools: 101 points of recall, overlaps from .5 to .95, at most
    100 objects an image, crowds not missed.
    """

    def __init__(self) -> None:
        from torchmetrics.detection import MeanAveragePrecision

        # torchmetrics' own thresholds are rounded to float32, so that an overlap of exactly .6 or a
        # recall of exactly .3 counts differently from COCO's tools.
        self._metric = MeanAveragePrecision(
            iou_type=("bbox", "segm"),
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            backend="faster_coco_eval",
            sync_on_compute=False,
        )

    def add(self, found: dict[str, Tensor], instances: Instances) -> None:
        """Add an image.

        Args:
            found: `boxes`, `labels`, `scores` and `masks` of what was found.
            instances: The objects that are there.
        """
        truth = {
            "boxes": instances.boxes,
            "labels": instances.classes,
            "masks": instances.masks,
            "iscrowd": instances.is_crowd.long(),
        }
        self._metric.update([{name: one.cpu() for name, one in found.items()}], [truth])

    def compute(self, world: World) -> dict[str, dict[str, float]]:
        """Return the numbers of the images of all processes: for boxes, and for masks.

        Returns:
            For each `ap` (the mean over overlaps from .5 to .95), `ap50`, `ap75`, and `agnostic`:
            `ap` if all classes are one.

        Raises:
            UserError: If no image has an object.
        """
        # Gathered once: torchmetrics would wait for as many images from every process.
        states = world.gather(dict(self._metric.metric_state))
        for name in states[0]:
            setattr(self._metric, name, [one for state in states for one in state[name]])
        numbers = self._compute() if world.is_main else None
        numbers = world.agree(numbers)
        assert numbers is not None
        if numbers["box"]["ap"] < 0:
            raise UserError("none of the images to score on has an object, so nothing is scored")
        return numbers

    def _compute(self) -> dict[str, dict[str, float]]:
        agnostic = copy.deepcopy(self._metric)
        agnostic.average = "micro"
        by_class, of_all = self._metric.compute(), agnostic.compute()
        return {
            kind: {
                "ap": 100 * float(by_class[f"{prefix}_map"]),
                "ap50": 100 * float(by_class[f"{prefix}_map_50"]),
                "ap75": 100 * float(by_class[f"{prefix}_map_75"]),
                "agnostic": 100 * float(of_all[f"{prefix}_map"]),
            }
            for kind, prefix in zip(KINDS, ("bbox", "segm"), strict=True)
        }


@torch.no_grad()
def find(
    model: nn.Module, config: RunConfig, images: Tensor, targets: tuple[Instances, ...]
) -> list[dict[str, Tensor]]:
    """Find objects, and draw them into the stored images.

    Args:
        model: The detector.
        config: The run's configuration.
        images: Model inputs.
        targets: The objects that are there, which have the sizes of the stored images.
    """
    from recipes.engine.detection.model import paste

    model.eval()
    with config.autocast():
        found: list[dict[str, Tensor]] = model(images)
    return [
        paste(one, fitted=fitted(truth.size, max(images.shape[2:])), size=truth.size)
        for one, truth in zip(found, targets, strict=True)
    ]


def score(
    model: nn.Module, config: RunConfig, data: DetectionData, world: World, *, workers: int
) -> dict[str, dict[str, float]]:
    """Score a detector on the test images, as `AveragePrecision.compute` returns it."""
    precision = AveragePrecision()
    unreadable: set[int] = set()
    for batch in held_out_batches(data.test, world, batch_size=_BATCH, workers=workers):
        unreadable.update(batch.unreadable_ids)
        if len(batch.images):
            images: Any = on_device(batch, data.test, config.device).images
            found = find(model, config, images, batch.targets)
            for one, truth in zip(found, batch.targets, strict=True):
                precision.add(one, truth)
    missing = set().union(*world.gather(unreadable))
    check_readable(data.test, missing)
    if missing and world.is_main:
        say(f"note: {len(missing)} images to score on could not be read", file=sys.stderr)
    return precision.compute(world)
