r"""Fine-tuning of a pre-trained encoder, as MAE (arXiv:2111.06377, A.1) and SimMIM do it.

    python recipes/mae.py --out runs/mae
    python recipes/finetune.py --encoder runs/mae/encoder.safetensors       # two minutes on a CPU
    python recipes/finetune.py --preset vit_base --encoder mae_pretrain_vit_base.pth \
        --data /path/to/imagenet --precision bf16

All weights are trained on labelled images, with layer-wise learning rates, drop path, mixup,
cutmix and label smoothing; or with `--trained-blocks` the last few blocks only. `--blocks 0 1 2 4`
trains once for each of these numbers and draws the curve (figure 9). On the bundled sets, 50
labelled crops a class, the same training from an untrained encoder is shown beside it. The full
presets are the authors' (AdamW, batch 1024, 100 or 50 epochs,
RandAugment from timm or torchvision, random erasing). Published top-1 on ImageNet-1K after 1600
epochs of MAE: ViT-B 83.6, ViT-L 85.9, ViT-H 86.9; after 800 of SimMIM (arXiv:2111.09886; batch
2048): ViT-B 83.8, Swin-B 84.0, Swin-L 85.4. A Swin that was pre-trained at 192 pixels with windows
of 6 is fine-tuned at 224 by `--image-size 224 --window 7`.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recipes.engine import Training, fields
from recipes.engine.classify import Classification, plan_classifier, score
from recipes.engine.data.augment import Augmentation, rand_augment
from recipes.engine.data.labelled import LabelledData, load_labelled
from recipes.engine.data.mixing import Mixing
from recipes.engine.errors import UserError, say
from recipes.engine.figures import draw_partial_fine_tuning, partial_curves
from recipes.engine.loop import Plan, run_steps
from recipes.engine.optim import layer_decay_groups
from recipes.engine.pretrained import encoders
from recipes.engine.pretrained.encoders import (
    EncoderFile,
    EncoderOptions,
    check_channels,
    fill_encoder,
    loading_options,
    open_encoder,
    warn_of_other_values,
)
from recipes.engine.pretrained.shapes import (
    ConvViTShape,
    Encoder,
    EncoderShape,
    SwinShape,
    ViTShape,
    check_window,
)
from recipes.engine.report import print_unreadable
from recipes.engine.run.cli import ARRAY_FLAGS, FLAGS, Options, options_of, run_command
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import (
    Preset,
    RunConfig,
    choose_preset,
    resolve,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import open_folder, output_folder
from recipes.engine.run.world import World, check_shard, check_shares, join, whole_weights

Augment = Literal["crop", "randaugment"]


@dataclass(frozen=True)
class FineTuning(Training):
    """How an encoder is fine-tuned.

    Attributes:
        layer_decay: Factor from each layer's learning rate to that of the layer before it.
        drop_path: Fraction of samples whose residual branches the last block leaves out.
        mixup: Alpha of mixup's Beta distribution; 0 for none.
        cutmix: Alpha of cutmix's Beta distribution; 0 for none.
        smoothing: Share of each target that is spread over all classes.
        augment: Of a folder's images: random crops and flips alone, or also RandAugment (from timm
            or torchvision) and random erasing.
    """

    betas: tuple[fields.Beta, fields.Beta] = (0.9, 0.999)
    min_lr: fields.NonNegativeFloat = 1e-6
    layer_decay: fields.Fraction = 0.75
    drop_path: fields.Fraction = 0.1
    mixup: fields.NonNegativeFloat = 0.8
    cutmix: fields.NonNegativeFloat = 1.0
    smoothing: fields.Fraction = 0.1
    augment: Augment = "crop"


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(EncoderOptions):
    """Options of fine-tuning; `--encoder none` trains from scratch.

    Attributes:
        trained_blocks: Train the last N blocks, the last norm and the head only; 0 for no block;
            all weights by default.
        blocks: Partial fine-tuning: one training for each of these numbers of trained blocks; the
            number of all blocks trains all weights.
        scratch: Whether the same training is also run from an untrained encoder; "auto" does so
            for the bundled sets, without --blocks.
    """

    trained_blocks: fields.NonNegativeInt | None = None
    blocks: tuple[fields.NonNegativeInt, ...] | None = None
    scratch: Literal["auto", "always", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(RunConfig):
    """All that decides the result; `encoder` is the digest of the weights, or "none"."""

    training: FineTuning
    encoder: str
    trained_blocks: int | None


@dataclass(frozen=True, kw_only=True)
class PartialConfig(FineTuneConfig):
    """All that decides the results of partial fine-tuning: numbers of trained blocks, ascending."""

    blocks: tuple[int, ...]

    def training_of(self, blocks: int) -> FineTuneConfig:
        """Return the configuration of one training; that of all blocks trains all weights."""
        names = (field.name for field in dataclasses.fields(FineTuneConfig))
        trained_blocks = None if blocks == self.model.num_blocks else blocks
        whole = FineTuneConfig(**{name: getattr(self, name) for name in names})
        return dataclasses.replace(whole, trained_blocks=trained_blocks)


class FineTuned(nn.Module):
    """Classify images by an encoder and its linear head.

    Args:
        encoder: An encoder with a head.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of each image."""
        logits: Tensor = self.encoder.head(self.encoder.pool(self.encoder(images)))
        return logits


def build_model(config: FineTuneConfig, file: EncoderFile | None, num_classes: int) -> FineTuned:
    """Make the model, load the pre-trained encoder, and freeze what is not to be trained.

    Raises:
        UserError: The encoder does not fit.
    """
    encoder = encoders.build_classifier(
        config.model,
        seed=config.seed,
        num_classes=num_classes,
        drop_path=config.training.drop_path,
    )
    if file is not None:
        fill_encoder(encoder, file)
    if config.trained_blocks is not None:
        freeze(encoder, config.model, trained_blocks=config.trained_blocks)
    return FineTuned(encoder).to(config.device)


def freeze(encoder: Encoder, shape: EncoderShape, *, trained_blocks: int) -> None:
    """Leave only the last blocks, the last norm and the head to be trained.

    Raises:
        UserError: The encoder has fewer blocks.

    Source:
        MAE, arXiv:2111.06377, figure 9 "partial fine-tuning".
    """
    depth = shape.num_blocks
    if not 0 <= trained_blocks <= depth:
        raise UserError(f"--trained-blocks {trained_blocks} is out of range: give 0 to {depth}")
    for name, parameter in encoder.named_parameters():
        if shape.layer_id(name) <= depth - trained_blocks:
            parameter.requires_grad_(False)


def make_task(
    config: FineTuneConfig,
    file: EncoderFile | None,
    data: LabelledData,
    options: Options,
    world: World,
) -> Classification:
    """Make the model with its optimizer and its mixing."""
    training = config.training

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        encoder: Any = model.encoder
        groups = layer_decay_groups(
            encoder,
            config.model,
            weight_decay=training.weight_decay,
            layer_decay=training.layer_decay,
        )
        return torch.optim.AdamW(groups, lr=config.lr, betas=training.betas, fused=True)

    mixing = Mixing(
        data.num_classes,
        mixup=training.mixup,
        cutmix=training.cutmix,
        smoothing=training.smoothing,
    )
    model = build_model(config, file, data.num_classes)
    return Classification(model, make_optimizer, mixing, config, data, world, shard=options.shard)


def fine_tune(
    config: FineTuneConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: LabelledData,
    options: FineTuneOptions,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Fine-tune, or go on with it, and return the summary.

    Args:
        config: The configuration.
        plan: The steps.
        file: The pre-trained encoder.
        data: Labelled images.
        options: What does not decide the result.
        path: Output folder; the comparison run has the folder `scratch` in it.
        world: The processes.
    """
    with open_folder(path, config, world, options) as folder:
        summary = folder.read_summary()
        if summary is not None:
            return summary
        task = make_task(config, file, data, options, world)
        run_steps(task, plan, data.images.train, folder, options)
        model = build_model(config, None, data.num_classes)
        model.load_state_dict(whole_weights(task.model, everywhere=True))
        folder.write_weights("model.safetensors", model.encoder)
        summary = {
            "steps": folder.read_metrics()[-1]["step"],
            "accuracy": score(model, config, data, world, workers=options.workers),
            "unreadable_images": [
                data.images.train.describe(image) for image in folder.read_unreadable()
            ],
        }
        if file is not None and compares(options):
            scratch = dataclasses.replace(config, encoder="none")
            untrained = fine_tune(scratch, plan, None, data, options, path / "scratch", world)
            summary["from_scratch"] = untrained["accuracy"]
        folder.write_summary(summary)
    return summary


def compares(options: FineTuneOptions) -> bool:
    """Whether the same training is to be run from an untrained encoder."""
    is_short = options.data in ("photos", "digits") and options.blocks is None
    return options.scratch == "always" or (options.scratch == "auto" and is_short)


def fine_tune_partly(
    config: PartialConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: LabelledData,
    options: FineTuneOptions,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Fine-tune once for each number of blocks, or go on with it, and return the summary.

    Args:
        config: The configuration.
        plan: The steps of each training.
        file: The pre-trained encoder.
        data: Labelled images.
        options: What does not decide the result.
        path: Output folder; each training has a folder `blocks-<number>` in it.
        world: The processes.

    Source:
        MAE, arXiv:2111.06377, section 4.3 and figure 9.
    """
    with open_folder(path, config, world, options) as folder:
        summary = folder.read_summary()
        if summary is not None:
            return summary
        found = {
            str(number): fine_tune(
                config.training_of(number), plan, file, data, options,
                path / f"blocks-{number}", world,
            )
            for number in config.blocks
        }  # fmt: skip
        first = next(iter(found.values()))
        summary = {"steps": first["steps"]}
        for name in ("accuracy", "from_scratch"):
            if name in first:
                summary[name] = {number: one[name] for number, one in found.items()}
        names = {name for one in found.values() for name in one["unreadable_images"]}
        summary["unreadable_images"] = sorted(names)
        if world.is_main:
            draw_partial_fine_tuning(partial_curves(summary), path)
        folder.write_summary(summary)
    return summary


def resolve_fine_tuning(options: FineTuneOptions) -> tuple[FineTuneConfig, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, PRESETS)
    file = open_encoder(options, preset.model)
    shape: EncoderShape = file.shape if file else preset.model
    check_window(shape, getattr(options, "window", None))
    more: dict[str, Any] = {"encoder": file.digest if file else "none"}
    more["trained_blocks"] = options.trained_blocks
    config_type: type[FineTuneConfig] = FineTuneConfig
    if options.blocks is not None:
        config_type, more["blocks"] = PartialConfig, check_blocks(options, shape)
    config = resolve(options, "finetune", PRESETS, config_type=config_type, model=shape, **more)
    return config, file


def check_blocks(options: FineTuneOptions, shape: EncoderShape) -> tuple[int, ...]:
    """Return the numbers of `--blocks`, ascending.

    Raises:
        UserError: The encoder has fewer blocks, a number is there twice, or `--trained-blocks` is
            given, too.
    """
    blocks = tuple(sorted(options.blocks or ()))
    given = f"--blocks {' '.join(map(str, options.blocks or ()))}"
    if options.trained_blocks is not None:
        raise UserError(f"{given} and --trained-blocks {options.trained_blocks}: give one of them")
    if blocks[-1] > shape.num_blocks:
        raise UserError(f"{given}: {blocks[-1]} is out of range, give 0 to {shape.num_blocks}")
    if len(set(blocks)) < len(blocks):
        raise UserError(f"{given} has a number twice: give each once")
    return blocks


def load_images(
    config: FineTuneConfig, file: EncoderFile | None, options: FineTuneOptions, world: World
) -> LabelledData:
    """Load the labelled images, augmented as the configuration says."""
    augmentation = Augmentation()
    if config.training.augment == "randaugment":
        augmentation = Augmentation(policy=rand_augment(config.model.image_axes()), erase=0.25)
    how = loading_options(config, file, options, world)
    data = load_labelled(config.data, augmentation=augmentation, **how)
    return data.decoded_on(options.decode)


def describe(config: FineTuneConfig, data: LabelledData, plan: Plan, model: nn.Module) -> list[str]:
    """Describe a run: configuration, images, steps, parameters."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    each = ", for each of blocks" if isinstance(config, PartialConfig) else ""
    return [
        *config.as_lines(),
        "---",
        f"data          {config.data}: {len(data.images.train):,} labelled images of "
        f"{data.num_classes} classes, {len(data.test):,} to score on",
        f"steps         {plan.num_steps:,} of {config.training.batch_size:,} images{each}",
        f"parameters    {sum(p.numel() for p in parameters):,} ({trained:,} trained)",
    ]


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print what the run showed."""
    say(f"accuracy (%), {summary['steps']} steps")
    rows = {"fine-tuned": summary["accuracy"]}
    if "from_scratch" in summary:
        rows["from scratch, same budget"] = summary["from_scratch"]
    if isinstance(summary["accuracy"], dict):
        say(f"{'trained blocks':<29}" + "".join(f"{int(n):6}" for n in summary["accuracy"]))
    for name, values in rows.items():
        numbers = values.values() if isinstance(values, dict) else [values]
        say(f"{name:<29}" + "".join(f"{number:6.1f}" for number in numbers))
    print_unreadable(summary["unreadable_images"])
    print_closing(path)


PAPER = FineTuning(
    epochs=100,
    batch_size=1024,
    base_lr=5e-4,
    warmup_epochs=5,
    layer_decay=0.65,
    drop_path=0.1,
    augment="randaugment",
)
PAPER_LARGE = dataclasses.replace(PAPER, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)

# 1.25e-3 per 512 images.
SIMMIM = FineTuning(
    epochs=100,
    batch_size=2048,
    base_lr=6.25e-4,
    warmup_epochs=20,
    warmup_lr=1e-6,
    cosine_from_start=True,
    layer_decay=0.8,
    clip_grad=5.0,
    augment="randaugment",
)

CAE_BASE = ViTShape(layer_scale=0.1, qkv_bias="qv")

PRESETS = {
    # About a minute on two CPU cores, the comparison included.
    "tiny": Preset(
        ViTShape(image_size=32, patch_size=4, dim=128, depth=4, heads=4),
        FineTuning(epochs=8, batch_size=64, base_lr=4e-3, warmup_epochs=1, clip_grad=1.0),
    ),
    "vit_base": Preset(ViTShape(), PAPER),
    "vit_large": Preset(ViTShape(dim=1024, depth=24, heads=16), PAPER_LARGE),
    "vit_huge": Preset(
        ViTShape(patch_size=14, dim=1280, depth=32, heads=16),
        dataclasses.replace(PAPER_LARGE, drop_path=0.3),
    ),
    # Of CAE: the same but for the batch; rates 8e-3 and 2e-3 are not scaled there.
    "cae_base": Preset(CAE_BASE, dataclasses.replace(PAPER, batch_size=4096)),
    "cae_large": Preset(
        dataclasses.replace(CAE_BASE, dim=1024, depth=24, heads=16, layer_scale=1e-5),
        dataclasses.replace(PAPER_LARGE, batch_size=4096, base_lr=2e-3 * 256 / 4096),
    ),
    "convmae_base": Preset(ConvViTShape(), PAPER),
    "simmim_vit_base": Preset(ViTShape(), dataclasses.replace(SIMMIM, layer_decay=0.65)),
    # Of 800 epochs of pre-training; after 100, the authors' layer decay is .9.
    "swin_base": Preset(SwinShape(), SIMMIM),
    "swin_large": Preset(
        SwinShape(dim=192, heads=(6, 12, 24, 48), window=14),
        dataclasses.replace(SIMMIM, layer_decay=0.7, drop_path=0.2),
    ),
}


def run(options: FineTuneOptions) -> None:
    """Fine-tune an encoder, and print its accuracy.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    config, file = resolve_fine_tuning(options)
    with join(config.device, timeout=options.timeout) as world:
        data = load_images(config, file, options, world)
        if file is not None:
            check_channels(file.path, file.shape, config.data, data.images.in_channels)
        config = config.for_data(data.images)
        plan = plan_classifier(config, options, data)
        check_shard(options.shard)
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        if world.is_main:
            warn_of_slow_precision(config)
            warn_of_other_values(file, data.images)
        model = build_model(config, file, data.num_classes)  # what does not fit is found here
        if options.dry_run:
            if world.is_main:
                say(*describe(config, data, plan, model))
            return
        path = output_folder(options.out, config)
        if isinstance(config, PartialConfig):
            summary = fine_tune_partly(config, plan, file, data, options, path, world)
        else:
            summary = fine_tune(config, plan, file, data, options, path, world)
        if world.is_main:
            print_summary(summary, path)


# The command line. A Swin has windows, which the first preset has not.
OPTIONS = options_of(
    (*PRESETS["tiny"].parts, SwinShape()),
    (
        *FLAGS,
        "patch_size",
        *ARRAY_FLAGS,
        "window",
        "layer_decay",
        "drop_path",
        "mixup",
        "cutmix",
        "smoothing",
        "augment",
    ),
    FineTuneOptions,
    presets=PRESETS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, OPTIONS, name="finetune", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
