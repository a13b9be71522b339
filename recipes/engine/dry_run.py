"""Estimate the cost of a run without training."""

import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mimkit import masking
from mimkit.masking import Mask
from recipes.engine.data.folder import spread
from recipes.engine.data.on_gpu import EncodedCrops
from recipes.engine.data.sets import DataSet, StoredSet
from recipes.engine.flops import counting_flops
from recipes.engine.loop import IMAGENET, Plan, recompute_blocks
from recipes.engine.run.config import Recipe, RunConfig

_GIB = 2**30
# Float32: weight, gradient and AdamW's two moments; in a checkpoint no gradient; frozen: weight.
_TRAINED_BYTES, _SAVED_BYTES, _FROZEN_BYTES = 16, 12, 4
_GPUS = (1, 8, 64, 512)
# Dense rates of GPUs by precision, from NVIDIA's data sheets, and the share of them that a training
# step is assumed to reach. The plan is for the first one.
_PEAKS = {
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "H100": {"bf16": 989e12, "fp32": 67e12},
    "RTX 4090": {"bf16": 165e12, "fp32": 82.6e12},
}
_PEAK = _PEAKS["A100"]
_SHARE = 0.4
# How long loading a folder is measured, and how many images at once.
LOADER_SECONDS = 5.0
_LOADED = 16
_DECODED = 64


@dataclass(frozen=True)
class Cost:
    """What a step costs.

    Attributes:
        trained: Number of trained parameters.
        frozen: Number of frozen ones.
        flops: FLOPs of one image, forward and backward.
        activations: Bytes that one image keeps for the backward pass.
    """

    trained: int
    frozen: int
    flops: int
    activations: int

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint."""
        return self.trained * _SAVED_BYTES + self.frozen * _FROZEN_BYTES

    def memory(self, images: float, shards: int = 1) -> float:
        """Return the bytes of a process that computes this many images at once."""
        state = self.trained * _TRAINED_BYTES + self.frozen * _FROZEN_BYTES
        return state / shards + self.activations * images


def describe(
    recipe: Recipe, config: RunConfig, data: DataSet, plan: Plan, *, recompute: bool = False
) -> list[str]:
    """Describe a run: configuration, steps, parameters, FLOPs, memory, and a plan by GPUs."""
    with torch.device("meta"):
        model = recipe.build(config.model).train().to("meta")  # a teacher from a file is elsewhere
        measured: Any = model
        if config.training.native_size is not None:
            measured = recipe.build(shape_of_largest(config, model)).train().to("meta")
    if recompute:
        recompute_blocks(measured)
    encoder: Any = model.encoder
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = count_parameters(model) - trained
    cost = Cost(trained, frozen, *measure(config, data, measured))
    size = "image"
    if config.training.native_size is not None:
        size += " of " + " x ".join(map(str, measured.encoder.grid)) + " patches"
    batch_size = config.training.batch_size
    at_once = batch_size / config.accumulate
    num_images = len(data.train)
    is_small = num_images < batch_size
    small = f", fewer than a batch: steps are of ImageNet-1K's {IMAGENET:,}" if is_small else ""
    return [
        *config.as_lines(),
        "---",
        f"data          {data.name}: {num_images:,} images per epoch{small}",
        f"steps         {plan.num_steps:,} of {batch_size:,} images",
        f"parameters    {trained + frozen:,} ({trained:,} trained, "
        f"{count_parameters(encoder):,} in the encoder)",
        f"FLOPs         {cost.flops / 1e9:,.2f} G per {size}, forward and backward",
        f"memory        about {cost.memory(at_once) / _GIB:,.2f} GiB in a single process, for "
        f"weights, gradients, AdamW and the activations of {at_once:g} images",
        f"checkpoint    about {cost.checkpoint / _GIB:,.2f} GiB each; two are kept, and "
        "there is one more while it is written",
        *describe_loading(config, data, cost),
        "",
        *plan_by_gpus(config, plan, cost),
    ]


def describe_loading(config: RunConfig, data: DataSet, cost: Cost) -> list[str]:
    """Say how many cores of this machine feed a GPU; nothing of data that are not stored."""
    if not isinstance(data.train, StoredSet):
        return []
    rate = measure_loading(data.train, LOADER_SECONDS)
    without, decoding = "", []
    if isinstance(data.train, EncodedCrops):
        without = ", without decoding and cropping"
        decoding = describe_decoding(data.train, config.device)
    precision = config.training.precision
    needs = {name: _SHARE * peak[precision] / cost.flops for name, peak in _PEAKS.items()}
    cores = ", ".join(
        f"{name} {need:,.0f} ({max(math.ceil(need / rate), 1):,} cores)"
        for name, need in needs.items()
    )
    return [
        f"loading       {rate:,.0f} images/s a core of this machine{without}, measured for "
        f"{LOADER_SECONDS:g} s",
        *decoding,
        f"GPUs need     images/s, at {_SHARE:.0%} of their {precision} rate: {cores}",
    ]


def describe_decoding(train: EncodedCrops, device: str) -> list[str]:
    """Say what the GPU decodes, which the rate of a core leaves out."""
    rate = measure_decoding(train, device, LOADER_SECONDS)
    return [
        f"decoding      {rate:,.0f} images/s decoded and cropped by a GPU that does nothing else, "
        f"measured for {LOADER_SECONDS:g} s: it takes this time from training"
    ]


def measure_decoding(train: EncodedCrops, device: str, seconds: float) -> float:
    """Return the images that a device decodes and crops in a second."""
    ids = spread(len(train), _DECODED)[:_DECODED]
    batch = train.__getitems__([(0, sample_id) for sample_id in ids])

    def decode() -> int:
        images = train.to_device(batch, device).images
        images[:1].tolist()  # waits for the device
        return len(images)

    decode()  # warms up
    count, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        count += decode()
    return count / (time.perf_counter() - start)


def measure_loading(train: StoredSet, seconds: float) -> float:
    """Return the images that one core loads in a second of its time: read, decoded and cropped."""
    order = spread(len(train), 4_096)
    chunks = [order[start : start + _LOADED] for start in range(0, len(order), _LOADED)]

    def load(chunk: list[int], epoch: int) -> int:
        train.__getitems__([(epoch, sample_id) for sample_id in chunk])
        return len(chunk)

    load(chunks[0], 0)  # warms up
    count, start, end = 0, time.process_time(), time.perf_counter() + seconds
    for epoch in itertools.count(1):
        for chunk in chunks:
            count += load(chunk, epoch)
            if time.perf_counter() > end:
                return count / max(time.process_time() - start, 1e-6)
    raise AssertionError("the loop ends by returning")


def plan_by_gpus(config: RunConfig, plan: Plan, cost: Cost) -> list[str]:
    """Return a table: what one GPU and all GPUs do, hold and need, for several numbers of GPUs."""
    batch_size, precision = config.training.batch_size, config.training.precision
    rate = _SHARE * _PEAK[precision] / cost.flops
    lines = [
        f"The batch of {batch_size:,}, the {plan.num_steps:,} steps and the learning rate of "
        f"{config.lr:g} stay the same: they are of all GPUs together.",
        f"Estimated, not measured: A100 GPUs at {_SHARE:.0%} of {_PEAK[precision] / 1e12:g} "
        f"TFLOP/s ({precision}), without the time to communicate and to load.",
        "      images    GiB of a GPU          GiB of all GPUs         images/s    hours",
        "GPUs  a GPU         DDP    --shard        DDP    --shard     to load",
    ]
    for gpus in _GPUS:
        parts = gpus * config.accumulate
        if batch_size % parts:
            lines.append(
                f"{gpus:<4}  {batch_size:,} images cannot be divided among {parts:,} parts"
            )
            continue
        each = [cost.memory(batch_size / parts, shards) / _GIB for shards in (1, gpus)]
        memory = "".join(f"{size:>11,.1f}" for size in (*each, *(gpus * size for size in each)))
        hours = plan.num_steps * batch_size / (gpus * rate) / 3600
        images = batch_size // gpus
        lines.append(f"{gpus:<4}  {images:<6,}{memory}{gpus * rate:>12,.0f}{hours:>9,.1f}")
    return lines


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, including fixed position tables."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(config: RunConfig, data: DataSet, model: nn.Module) -> tuple[int, int]:
    """Return the FLOPs of a step on one image, and the bytes of its saved activations.

    Tensors have no values, but the device of the run: on the meta device there would be no
    autocast, and other attention. The model's weights are replaced by such tensors.
    """
    encoder: Any = model.encoder
    # Samplers read values.
    drawn = [
        config.masking.draw(masking.key(range(number), seed=config.seed), encoder.grid)
        for number in (1, 2)
    ]
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device=config.device)
        # What is kept once for all images, such as copies of the weights in bf16, is in both.
        (flops, one), (_, two) = (
            count_step(config, data, model, masks, num_images=number)
            for number, masks in enumerate(drawn, 1)
        )
    return flops, two - one


def shape_of_largest(config: RunConfig, model: Any) -> Any:
    """Return the model's shape for the largest square pictures of `--native-size`."""
    most: Any = config.training.native_size
    sides = tuple(math.isqrt(most) * side for side in model.encoder.patch_embed.patch_size)
    return replace(config.model, image_size=sides)


def recomputed_blocks(encoder: Any) -> list[nn.Module]:
    """Return the blocks of an encoder that checkpointing computes again: of Swin, of all stages."""
    stages = [encoder] if hasattr(encoder, "blocks") else encoder.layers
    return [block for stage in stages for block in stage.blocks]


def count_step(
    config: RunConfig, data: DataSet, model: nn.Module, masks: Any, *, num_images: int
) -> tuple[int, int]:
    """Run a step on images; return its FLOPs, and the bytes that it keeps for the backward pass."""
    encoder: Any = model.encoder
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter):
            saved[storage._cdata] = storage.nbytes()
        return tensor

    def note_inputs(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note what checkpointing keeps of a block, which passes no hook of saved tensors."""
        for value in inputs:
            if isinstance(value, torch.Tensor):
                note(value)

    blocks = recomputed_blocks(encoder) if getattr(encoder, "grad_checkpointing", False) else ()
    hooks = [block.register_forward_pre_hook(note_inputs) for block in blocks]
    device = config.device
    masks = masks.to(device) if isinstance(masks, Mask) else [mask.to(device) for mask in masks]
    images = torch.zeros(num_images, data.in_channels, *encoder.image_size, device=device)
    with (
        counting_flops() as counter,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        config.autocast(),
    ):
        model(images, masks).loss.backward()
    for hook in hooks:
        hook.remove()
    return int(counter.get_total_flops()), sum(saved.values())
