"""Segmentation: the model, its task, and scores on held-out images.

Axes: batch images, channels, height and width in pixels; classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit.nn import ConvViT, FCNHead, FeaturePyramid, UPerHead, ViT
from recipes.engine.data.segmented import COLORS, IGNORED, SegmentedData, fitting_factor
from recipes.engine.data.sets import Batch, check_readable
from recipes.engine.loop import Moment, Task
from recipes.engine.optim import transfer_optimizer
from recipes.engine.pretrained.shapes import Encoder
from recipes.engine.run.config import RunConfig
from recipes.engine.run.loader import held_out_batches, on_device
from recipes.engine.run.world import World

SHIFT = 2 / 3  # from one window to the next, in windows: the authors' 341 of 512 pixels
_WINDOWS = 32  # in one batch
LEVELS = (4.0, 2.0, 1.0, 0.5)  # sizes of a ViT's maps, in grids
AUX_MAP = 2  # what the auxiliary head reads


class Segmenter(nn.Module):
    """UPerNet on an encoder, with an auxiliary FCN head.

    A ViT's maps come from four blocks and go through BEiT's pyramid. ConvMAE's are those of its
    three stages and a fourth, half as large; Swin's are those of its stages. The encoder's last
    norm is not used and stays as it is.

    Args:
        encoder: The encoder.
        num_classes: Number of classes.
        head_dim: Width of UPerNet's head.
        aux_dim: Width of the auxiliary head.
        layers: Blocks of a ViT whose outputs are used, or None for four at equal distances.
        dropout: Probability of dropping a channel before each classifier.

    Source:
        UPerNet, arXiv:1807.10221; as BEiT, MAE and CAE use it; ConvMAE's SEG `convmae.py` for the
        fourth map (3x3 convolution of stride 2, norm, GELU).
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_classes: int,
        head_dim: int,
        aux_dim: int,
        layers: Sequence[int] | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        encoder.get_submodule("norm").requires_grad_(False)
        self.layers = chosen_layers(encoder, layers)
        channels = [encoder.feature_channels[layer] for layer in self.layers]
        self.pyramid: nn.Module | None = None
        self.coarser: nn.Module | None = None
        if isinstance(encoder, ViT):
            self.pyramid = FeaturePyramid(dim=encoder.dim, out_dim=None, scales=LEVELS)
        elif isinstance(encoder, ConvViT):
            width = channels[-1]
            self.coarser = nn.Sequential(
                nn.Conv2d(width, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.GELU()
            )
            channels.append(width)
        self.head = UPerHead(
            in_dims=channels, num_classes=num_classes, dim=head_dim, dropout=dropout
        )
        self.aux = FCNHead(
            in_dim=channels[AUX_MAP], num_classes=num_classes, dim=aux_dim, dropout=dropout
        )

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of both heads, each on the grid of its map."""
        maps = self.encoder.features(images, self.layers)
        if self.pyramid is not None:
            maps = self.pyramid(maps)
        if self.coarser is not None:
            maps = [*maps, self.coarser(maps[-1])]
        return self.head(maps), self.aux(maps[AUX_MAP])


def chosen_layers(encoder: Encoder, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers of `encoder.features` that are used, from fine to coarse.

    Raises:
        ValueError: If a ViT has no such block, or a Swin Transformer less than three stages.
    """
    count = len(encoder.feature_channels)
    if isinstance(encoder, ConvViT):
        return (0, 1, count - 1)
    if isinstance(encoder, ViT):
        if max(layers or (0,)) >= count:
            raise ValueError(f"--layers must be blocks from 0 to {count - 1}; got {layers}")
        quarters = tuple(max(0, count * part // 4 - 1) for part in (1, 2, 3, 4))
        return quarters if layers is None else tuple(layers)
    if count <= AUX_MAP:
        raise ValueError(
            f"--encoder: a Swin Transformer of {count} stages has no third map, which segmentation "
            "reads: give one of at least three stages"
        )
    return tuple(range(count))


class Segmentation(Task):
    """Segmentation: the model maps images to the logits of two heads.

    Args:
        model: The model, on its device.
        config: The run's configuration.
        world: The processes.
        aux_weight: Weight of the auxiliary head's loss.
        shard: Whether to shard the weights (FSDP2) instead of copying them (DDP).
    """

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        world: World,
        *,
        aux_weight: float,
        shard: bool = False,
    ) -> None:
        self.aux_weight = aux_weight
        if world.size > 1 and config.device == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        super().__init__(model, config, world, shard=shard)

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return transfer_optimizer(self.model, self.config)

    def prepare(self, batch: Batch, at: Moment) -> tuple[Tensor, Tensor]:
        """Return images and labels."""
        items = batch.images.to(self.config.device, non_blocking=True)
        if len(items) == 0:  # this process must still take part in the step
            items = items.new_empty(0, COLORS + 1, *self.config.image_size, dtype=torch.float32)
        return items[:, :COLORS], items[:, COLORS].long()

    def forward(self, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        """Return the loss of both heads together, and that of UPerNet's."""
        images, labels = inputs
        number = len(images)
        missing = max(0, 2 - number)  # batch norm needs two; they are left out if unreadable
        images = F.pad(images, (0,) * 7 + (missing,))
        labels = F.pad(labels, (0,) * 5 + (missing,), value=IGNORED)
        main, aux = (pixel_loss(logits, labels, number) for logits in model(images))
        return {"loss": main + self.aux_weight * aux, "main_loss": main}


def pixel_loss(
    logits: Float[Tensor, "batch classes rows columns"],
    labels: Int64[Tensor, "batch height width"],
    number: int,
) -> Tensor:
    """Return the cross-entropy over all pixels of `number` images; ignored ones count as zero.

    Source:
        mmsegmentation `CrossEntropyLoss` with `avg_non_ignore=False`, as the papers use it. An
        image whose pixels are all ignored has loss 0.
    """
    resized = F.interpolate(logits.float(), labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(resized, labels, ignore_index=IGNORED, reduction="sum")
    return total / (max(number, 1) * math.prod(labels.shape[1:]))


@dataclass(frozen=True)
class Scores:
    """Scores of a segmentation, in percent.

    Attributes:
        miou: Mean intersection over union, over the classes that are in labels or predictions.
        mean_accuracy: Mean share of each class's pixels that are right.
        pixel_accuracy: Share of all pixels that are right.
        iou: Of each class; None if it is neither in labels nor in predictions.
    """

    miou: float
    mean_accuracy: float
    pixel_accuracy: float
    iou: tuple[float | None, ...]


def confusion_of(
    labels: Int64[Tensor, "..."], predicted: Int64[Tensor, "..."], num_classes: int
) -> Int64[Tensor, "classes classes"]:
    """Count pixels by their label (rows) and prediction (columns); ignored ones are left out.

    Example:
        >>> confusion_of(torch.tensor([0, 1, 255]), torch.tensor([1, 1, 0]), 2)
        tensor([[0, 1],
                [0, 1]])
    """
    counted = labels != IGNORED
    cells = labels[counted] * num_classes + predicted[counted]
    return cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def scores_of(confusion: Int64[Tensor, "classes classes"]) -> Scores:
    """Compute the scores from a confusion matrix; 0 if no pixel counts.

    Example:
        >>> scores_of(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]))
        Scores(miou=77.5, mean_accuracy=87.5, pixel_accuracy=87.5, iou=(75.0, 80.0, None))
    """
    right, labelled = confusion.diag().double(), confusion.sum(dim=1)
    union = labelled + confusion.sum(dim=0) - confusion.diag()
    iou, accuracy = 100 * right / union, 100 * right / labelled
    return Scores(
        miou=_mean(iou[union > 0]),
        mean_accuracy=_mean(accuracy[labelled > 0]),
        pixel_accuracy=float(100 * right.sum() / labelled.sum().clamp(min=1)),
        iou=tuple(None if math.isnan(each) else each for each in iou.tolist()),
    )


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


@torch.no_grad()
def score(
    model: nn.Module,
    config: RunConfig,
    data: SegmentedData,
    world: World,
    *,
    batch_size: int,
    workers: int,
) -> Scores:
    """Score a model on the held-out images, in all processes together.

    Args:
        model: The model.
        config: The run's configuration; windows have its `image_size`.
        data: The data.
        world: The processes; their confusion matrices are summed.
        batch_size: Images to read at once; 1 if their sizes differ.
        workers: Processes that load images.
    """
    model.eval()
    num_classes = len(data.class_names)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=config.device)
    unreadable: set[int] = set()
    for batch in held_out_batches(data.test, world, batch_size=batch_size, workers=workers):
        unreadable.update(batch.unreadable_ids)
        if len(batch.images):
            items = on_device(batch, data.test, config.device).images
            predicted = predict(model, items[:, :COLORS], config)
            confusion += confusion_of(items[:, COLORS].long(), predicted, num_classes)
    check_readable(data.test, set().union(*world.gather(unreadable)))
    return scores_of(world.total(confusion).cpu())


def predict(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], config: RunConfig
) -> Int64[Tensor, "batch height width"]:
    """Predict the class of each pixel, at the images' size.

    Images are resized so that their shorter side is that of a window, as in training.
    """
    size = tuple(images.shape[2:])
    window = config.image_size
    factor = fitting_factor(size, min(window))
    resized = tuple(max(1, round(length * factor)) for length in size)
    if resized != size:
        images = F.interpolate(images, resized, mode="bilinear", antialias=factor < 1)
    with config.autocast():
        logits = slide(lambda windows: model(windows)[0], images, window)
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear")
    return logits.argmax(dim=1)


def slide(
    head: Callable[[Tensor], Tensor],
    images: Float[Tensor, "batch channels height width"],
    window: Sequence[int],
) -> Float[Tensor, "batch classes height width"]:
    """Average the logits of overlapping windows.

    Args:
        head: Maps windows to logits on any grid.
        images: Images; smaller ones than a window are padded with zeros.
        window: Height and width of a window in pixels.

    Source:
        mmsegmentation `slide_inference` with stride 341 of windows of 512; the last window of a row
        or column is moved back to the edge.
    """
    height, width = images.shape[2:]
    missing = (max(0, window[0] - height), max(0, window[1] - width))
    images = F.pad(images, (0, missing[1], 0, missing[0]))
    places = [
        (top, left)
        for top in _starts(images.shape[2], window[0])
        for left in _starts(images.shape[3], window[1])
    ]
    total: Any = 0
    counts = images.new_zeros(images.shape[2:])
    for place, logits in _logits_of_windows(head, images, places, window):
        if isinstance(total, int):
            total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
        total[(slice(None), slice(None), *place)] += logits
        counts[place] += 1
    mean: Tensor = total / counts
    return mean[:, :, :height, :width]


def _logits_of_windows(
    head: Callable[[Tensor], Tensor],
    images: Tensor,
    places: Sequence[tuple[int, int]],
    window: Sequence[int],
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Give each window's place and its logits at the images' resolution."""
    per_batch = max(1, _WINDOWS // len(images))
    for start in range(0, len(places), per_batch):
        some = [
            (slice(top, top + window[0]), slice(left, left + window[1]))
            for top, left in places[start : start + per_batch]
        ]
        crops = torch.cat([images[(slice(None), slice(None), *place)] for place in some])
        logits = F.interpolate(head(crops).float(), tuple(window), mode="bilinear")
        yield from zip(some, logits.chunk(len(some)), strict=True)


def _starts(length: int, window: int) -> list[int]:
    """Return the first pixels of the windows along a side.

    Example:
        >>> _starts(512, 512), _starts(683, 512), _starts(1024, 512)
        ([0], [0, 171], [0, 341, 512])
    """
    step = max(1, int(window * SHIFT))
    count = max(0, math.ceil((length - window) / step)) + 1
    return [min(number * step, length - window) for number in range(count)]
