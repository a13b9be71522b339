r"""Segmentation with a pre-trained encoder: UPerNet, as MAE, CAE and ConvMAE are judged on ADE20K.

    python recipes/convmae.py --out runs/convmae
    python recipes/segment.py --encoder runs/convmae
    python recipes/segment.py --preset mae_b_ade20k --encoder mae_pretrain_vit_base.pth \
        --data /path/to/ADEChallengeData2016

By default it learns composed scenes of 64 pixels, 11 classes, from a pre-trained encoder and from
an untrained one, with three seeds, same budget. Without `--encoder` it takes the newest run of
ConvMAE or CAE in `runs`, or pre-trains a small ConvMAE first. The other presets are the authors'
(UPerNet arXiv:1807.10221 with an auxiliary FCN head, AdamW, 160,000 steps of 16 images of 512
pixels, sliding windows). Published mIoU on ADE20K: MAE-B 48.15 (implus/mae_segmentation), MAE-L
53.6 (CAE's repository), CAE-B after 300, 800 and 1600 epochs 48.1, 49.7 and 50.3, CAE-L 54.9,
ConvMAE-B 51.66. `--data FOLDER` has `images/training/*.jpg` and `annotations/training/*.png`, and
`validation` beside `training`.
"""

import contextlib
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from torch import nn

from mimkit import viz
from recipes import convmae
from recipes.engine import fields
from recipes.engine.data.images import to_unit
from recipes.engine.data.segmented import (
    COLORS,
    IGNORED,
    Augmentation,
    SegmentedData,
    load_segmented,
)
from recipes.engine.data.sets import read_first
from recipes.engine.errors import UserError, say
from recipes.engine.loop import Plan, make_plan, run_steps
from recipes.engine.main import pretrain
from recipes.engine.optim import layer_decay_groups, parameter_groups
from recipes.engine.pictures import draw_curves, save_picture
from recipes.engine.pretrained import encoders
from recipes.engine.pretrained.encoders import ENCODER, EncoderFile, fill_encoder, load_encoder
from recipes.engine.pretrained.files import read_weights
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, SwinShape, ViTShape
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.report import print_unreadable
from recipes.engine.run.cli import FLAGS, Options, options_of, run_command
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import (
    DenseTraining,
    Preset,
    RunConfig,
    choose_preset,
    resolve,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import RunFolder, output_folder
from recipes.engine.run.world import (
    World,
    check_shard,
    check_shares,
    join,
    whole_weights,
    world_from_environment,
)
from recipes.engine.seeds import sample_rng
from recipes.engine.segmentation import Segmentation, Segmenter, predict, score

SCENES = "scenes"
SCORES = ("miou", "mean_accuracy", "pixel_accuracy")
MODEL = "model.safetensors"
_SCENES_AT_ONCE = 50
_PICTURE_SIDE = 128
_PICTURES = 6
_PRETRAINED = ("convmae", "cae")  # recipes whose runs are taken without --encoder
_LEAST_STEPS_BETWEEN_CHECKPOINTS = 100


@dataclass(frozen=True)
class SegmentationTraining(DenseTraining):
    """How a segmentation is trained.

    Attributes:
        num_classes: Number of classes in the labels of a folder.
        ignore_label: Value of pixels in the labels of a folder that do not count.
        zero_is_ignored: Whether 0 is such a value too, and 1 the first class, as in ADE20K.
        scale: Least and largest shorter side of an image before a crop of it is taken, in shorter
            sides of the crop.
        distort: Whether to change brightness, contrast, saturation and hue at random.
        head_dim: Width of UPerNet's head.
        aux_dim: Width of the auxiliary head.
        aux_weight: Weight of the auxiliary head's loss.
        layers: Blocks of a ViT whose outputs are used, from 0; by default four at equal distances.
    """

    num_classes: fields.PositiveInt | None = None
    ignore_label: fields.NonNegativeInt = IGNORED
    zero_is_ignored: bool = False
    scale: tuple[fields.PositiveFloat, fields.PositiveFloat] = (0.5, 2.0)
    distort: bool = True
    head_dim: fields.Width = 512
    aux_dim: fields.Width = 256
    aux_weight: fields.NonNegativeFloat = 0.4
    layers: tuple[fields.NonNegativeInt, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise fields.FieldError("scale", self.scale, "two numbers, the smaller one first")
        if self.layers is not None and len(self.layers) != 4:
            raise fields.FieldError("layers", self.layers, "four blocks, from 0")
        if self.num_classes is not None and self.num_classes >= IGNORED:
            raise fields.FieldError("num_classes", self.num_classes, f"less than {IGNORED}")


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(Options):
    """Options of segmentation.

    Attributes:
        data: "scenes", or a folder of images and labels.
        encoder: A finished run, its `encoder.safetensors`, or a checkpoint of the authors' MAE,
            CAE, SimMIM or ConvMAE, whose shape is the preset's; "none" trains from scratch only. By
            default the newest run of ConvMAE or CAE in `runs`.
        runs: Trainings with different seeds; by default 3 on scenes, else 1.
        scratch: Whether the same training is also run from an untrained encoder; "auto" does so on
            scenes.
        resume: "auto" continues from the last checkpoint in the output folder, "never" refuses to
            continue a run.
    """

    data: str = SCENES
    encoder: str | None = None
    runs: fields.PositiveInt | None = None
    scratch: Literal["auto", "always", "never"] = "auto"
    resume: Literal["auto", "never"] = "auto"


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(RunConfig):
    """All that decides the result; `encoder` is the digest of the weights, or "none"."""

    training: SegmentationTraining
    encoder: str
    runs: int = 1
    scratch: bool = False


def build_model(config: SegmentConfig, file: EncoderFile | None, num_classes: int) -> Segmenter:
    """Make the model and load the pre-trained encoder.

    Raises:
        UserError: The encoder does not fit.
    """
    training = config.training
    encoder = encoders.build_backbone(config.model, seed=config.seed, drop_path=training.drop_path)
    if file is not None:
        fill_encoder(encoder, file)
    try:
        model = Segmenter(
            encoder,
            num_classes=num_classes,
            head_dim=training.head_dim,
            aux_dim=training.aux_dim,
            layers=training.layers,
        )
    except (ValueError, IndexError) as error:
        raise UserError(f"--layers {training.layers}: {error}") from error
    return model.to(config.device)


def make_task(
    config: SegmentConfig,
    file: EncoderFile | None,
    data: SegmentedData,
    options: Options,
    world: World,
) -> Segmentation:
    """Make the model with its optimizer."""
    training = config.training

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        encoder: Any = model.encoder
        groups = layer_decay_groups(
            encoder,
            config.model,
            weight_decay=training.weight_decay,
            layer_decay=training.layer_decay,
        )
        for name, part in model.named_children():
            if name != "encoder":
                groups += parameter_groups(part, weight_decay=training.weight_decay)
        return torch.optim.AdamW(groups, lr=config.lr, betas=training.betas, fused=True)

    model = build_model(config, file, len(data.class_names))
    return Segmentation(
        model,
        make_optimizer,
        config,
        world,
        aux_weight=training.aux_weight,
        shard=options.shard,
    )


def train(
    config: SegmentConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: SegmentedData,
    options: SegmentOptions,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Train, or go on with it, then the runs to compare with, and return the summary.

    Args:
        config: The configuration.
        plan: The steps.
        file: The pre-trained encoder.
        data: Images with labels.
        options: What does not decide the result.
        path: Output folder; the other runs have the folders `scratch`, `seed-1`, ... in it.
        world: The processes.
    """
    with RunFolder(
        path, config, world, lock=options.lock, accept_changed=options.accept_changed_data
    ) as folder:
        summary = folder.read_summary()
        if summary is not None:
            return summary
        task = make_task(config, file, data, options, world)
        run_steps(task, plan, data.train, folder, options)
        model = build_model(config, None, len(data.class_names))
        model.load_state_dict(whole_weights(task.model, everywhere=True))
        folder.write_weights(MODEL, model)
        folder.write_weights(ENCODER, model.encoder)
        if world.is_main:
            draw_curves(folder)
        start = "pretrained" if file else "scratch"
        batch_size = _SCENES_AT_ONCE if data.name == SCENES else 1  # files have several sizes
        scores = score(model, config, data, world, batch_size=batch_size, workers=options.workers)
        summary = {
            "steps": folder.read_metrics()[-1]["step"],
            **{name: {start: [getattr(scores, name)]} for name in SCORES},
            "iou": dict(zip(data.class_names, scores.iou, strict=True)),
            "unreadable_images": [data.train.describe(image) for image in folder.read_unreadable()],
        }
        for name, other in others(config).items():
            weights = file if other.encoder != "none" else None
            found = train(other, plan, weights, data, options, path / name, world)
            for each in SCORES:
                for kind, values in found[each].items():
                    summary[each].setdefault(kind, []).extend(values)
        if world.is_main:
            models = {"pre-trained" if file else "scratch": model}
            if config.scratch:
                models["scratch"] = read_model(path / "scratch", config, len(data.class_names))
            draw_segmentations(models, config, data, path / "segmentations.png")
        folder.write_summary(summary)
    return summary


def others(config: SegmentConfig) -> dict[str, SegmentConfig]:
    """Return the configurations of the runs to compare with, by the names of their folders."""
    found = {}
    for number in range(config.runs):
        one = dataclasses.replace(config, seed=config.seed + number, runs=1, scratch=False)
        if number:
            found[f"seed-{number}"] = one
        if config.scratch:
            name = f"scratch-seed-{number}" if number else "scratch"
            found[name] = dataclasses.replace(one, encoder="none")
    return found


def read_model(path: Path, config: SegmentConfig, num_classes: int) -> Segmenter:
    """Read the model of a finished run."""
    model = build_model(config, None, num_classes)
    model.load_state_dict(dict(read_weights("--out", path / MODEL).tensors))
    return model


@torch.no_grad()
def draw_segmentations(
    models: dict[str, Segmenter], config: SegmentConfig, data: SegmentedData, file: Path
) -> None:
    """Draw held-out images, their labels, and what each model predicts."""
    colors = torch.from_numpy(sample_rng(0).uniform(0.15, 1.0, (IGNORED + 1, COLORS))).float()
    colors[0], colors[IGNORED] = 0.15, 1.0
    rows, side = [], max(config.image_size)
    for item, _ in read_first(data.test, range(len(data.test)), _PICTURES, set()):
        inputs = data.test.to_inputs(item[None].to(config.device))[:, :COLORS]
        found = [predict(model.eval(), inputs, config)[0].cpu() for model in models.values()]
        labels = item[COLORS].long()
        columns = [colors[classes].movedim(-1, 0) for classes in (labels, *found)]
        scale = max(1, round(_PICTURE_SIDE / side))
        rows.append(
            [
                column.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                for column in (to_unit(item[:COLORS]), *columns)
            ]
        )
    note = "Held-out images. Dark: the first class; white: pixels that do not count."
    save_picture(viz.panel(rows, ["image", "truth", *models], note=note), file)


def resolve_segmentation(
    options: SegmentOptions,
) -> tuple[SegmentConfig, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, PRESETS)
    encoder = options.encoder or find_encoder(Path("runs"), options)
    file = None if encoder == "none" else load_encoder(Path(encoder), preset.model)
    shape: EncoderShape = file.shape if file else preset.model
    window = getattr(options, "window", None)
    if window is not None and not isinstance(shape, SwinShape):
        raise UserError(f"--window {window}: a {shape.kind} has no windows, leave it out")
    is_scenes = options.data == SCENES
    shape = dataclasses.replace(shape, image_size=preset.model.image_size)
    config = resolve(
        options,
        "segment",
        PRESETS,
        config_type=SegmentConfig,
        model=shape,
        encoder=file.digest if file else "none",
        runs=options.runs or (3 if is_scenes else 1),
        scratch=file is not None
        and (options.scratch == "always" or (options.scratch == "auto" and is_scenes)),
    )
    if config.model.in_channels != COLORS:
        raise UserError(
            f"--encoder {encoder} is for images of {config.model.in_channels} channels, those of "
            f"{config.data} have {COLORS}"
        )
    return config, file


def find_encoder(runs: Path, options: SegmentOptions) -> str:
    """Return the newest finished run of ConvMAE or CAE, or pre-train a small ConvMAE.

    Raises:
        UserError: The preset is for another encoder, or there are several processes.
    """
    if options.preset not in (None, "tiny"):
        raise UserError(f"--preset {options.preset} needs --encoder: a checkpoint, a run, or none")
    found = []
    for file in runs.glob(f"*/{ENCODER}"):
        with contextlib.suppress(UnreadableError, TypeError, KeyError):
            is_finished = file.with_name("summary.json").is_file()
            if is_finished and read_yaml(file.with_name("config.yaml"))["recipe"] in _PRETRAINED:
                found.append(file)
    if found:
        newest = max(found, key=lambda file: file.stat().st_mtime)
        if world_from_environment().is_main:
            say(f"note: no --encoder is given: taking {newest.parent}", file=sys.stderr)
        return str(newest)
    none = f"no --encoder is given and {runs} holds no finished run of ConvMAE or CAE"
    if options.dry_run:
        say(f"note: {none}: without --dry-run one is pre-trained", file=sys.stderr)
        return "none"
    if world_from_environment().size > 1:
        raise UserError(f"{none}: start recipes/convmae.py first")
    path = runs / "convmae-for-segment"
    say(f"note: {none}: pre-training one in {path}, some minutes", file=sys.stderr)
    pretrain(convmae.RECIPE, ["--out", str(path)])
    return str(path)


def load_images(config: SegmentConfig) -> SegmentedData:
    """Load the images and labels, augmented as the configuration says."""
    training = config.training
    return load_segmented(
        config.data,
        image_size=config.model.image_axes(),
        augmentation=Augmentation(training.scale, training.distort),
        num_classes=training.num_classes,
        ignore_label=training.ignore_label,
        zero_is_ignored=training.zero_is_ignored,
        seed=config.seed,
        decode=training.decoder,
    )


def describe(config: SegmentConfig, data: SegmentedData, plan: Plan, model: nn.Module) -> list[str]:
    """Describe a run: configuration, images, steps, parameters, published score."""
    parameters = list(model.parameters())
    trainings = config.runs * (1 + config.scratch)
    return [
        *config.as_lines(),
        "---",
        f"data          {config.data}: {len(data.train):,} images with labels of "
        f"{len(data.class_names)} classes, {len(data.test):,} to score on",
        f"steps         {plan.num_steps:,} of {config.training.batch_size:,} images, "
        f"{trainings} training(s)",
        f"parameters    {sum(p.numel() for p in parameters):,} "
        f"({sum(p.numel() for p in parameters if p.requires_grad):,} trained)",
        *(
            [f"published     {PUBLISHED[config.preset]} mIoU on ADE20K"]
            if config.preset in PUBLISHED
            else []
        ),
    ]


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print what the run showed."""
    say(f"held-out images (%), {summary['steps']} steps; mean (least to largest) of the seeds")
    kinds = list(summary["miou"])
    say("                   " + "".join(f"{kind:>24}" for kind in kinds))
    for name in SCORES:
        values = [summary[name][kind] for kind in kinds]
        texts = (f"{statistics.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values)
        say(f"{name.replace('_', ' '):19}" + "".join(f"{text:>24}" for text in texts))
    print_unreadable(summary["unreadable_images"])
    print_closing(path)


def ade20k(steps_lr: float, **more: Any) -> SegmentationTraining:
    """Return the settings that all the papers share, with a rate for a batch of 16.

    160,000 steps of the 20,210 images; warm-up over 1,500 steps.
    """
    settings: dict[str, Any] = {
        "epochs": 127,
        "batch_size": 16,
        "base_lr": steps_lr * 256 / 16,
        "warmup_epochs": 1_500 / 1_263,
        "num_classes": 150,
        "zero_is_ignored": True,
        "head_dim": 768,
    }
    return SegmentationTraining(**(settings | more))


MAE_BASE = ViTShape(image_size=512)
CAE_BASE = dataclasses.replace(MAE_BASE, layer_scale=0.1, qkv_bias="qv")
BASE_LAYERS = (3, 5, 7, 11)
LARGE: dict[str, Any] = {
    "layers": (7, 11, 15, 23),
    "layer_decay": 0.95,
    "drop_path": 0.15,
    "head_dim": 1024,
}

PRESETS = {
    # By an estimate, 90 seconds of a CPU core a training, of which there are six by default.
    "tiny": Preset(
        ConvViTShape(
            image_size=64, patch_sizes=(2, 2, 2), dim=(32, 64, 128), depth=(2, 2, 4), heads=4
        ),
        SegmentationTraining(
            epochs=5,
            batch_size=8,
            base_lr=4e-3 * 256 / 8,
            warmup_epochs=0.3,
            layer_decay=0.9,
            drop_path=0.0,
            clip_grad=1.0,
            scale=(1.0, 1.0),
            distort=False,
            head_dim=64,
            aux_dim=16,
        ),
    ),
    "mae_b_ade20k": Preset(MAE_BASE, ade20k(1e-4, layers=BASE_LAYERS)),
    # MAE's own settings of the large model are not published: these are CAE's.
    "mae_l_ade20k": Preset(
        dataclasses.replace(MAE_BASE, dim=1024, depth=24, heads=16), ade20k(4e-5, **LARGE)
    ),
    "cae_b300_ade20k": Preset(CAE_BASE, ade20k(3e-4, layers=BASE_LAYERS)),
    "cae_b800_ade20k": Preset(CAE_BASE, ade20k(2e-4, layers=BASE_LAYERS)),
    "cae_b1600_ade20k": Preset(CAE_BASE, ade20k(1e-4, layers=BASE_LAYERS)),
    "cae_l_ade20k": Preset(
        dataclasses.replace(CAE_BASE, dim=1024, depth=24, heads=16, layer_scale=1e-5),
        ade20k(4e-5, **LARGE),
    ),
    "convmae_b_ade20k": Preset(
        ConvViTShape(image_size=512), ade20k(1e-4, drop_path=0.2, layer_decay=0.75)
    ),
}
PUBLISHED = {
    "mae_b_ade20k": 48.15,
    "mae_l_ade20k": 53.6,
    "cae_b300_ade20k": 48.1,
    "cae_b800_ade20k": 49.7,
    "cae_b1600_ade20k": 50.3,
    "cae_l_ade20k": 54.9,
    "convmae_b_ade20k": 51.66,
}


def run(options: SegmentOptions) -> None:
    """Train a segmentation, and print its scores.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    config, file = resolve_segmentation(options)
    data = load_images(config)
    config = config.with_data(data.content)
    at_least = _LEAST_STEPS_BETWEEN_CHECKPOINTS
    plan = make_plan(config, options, data.train, checkpoint_at_least=at_least)
    check_shard(options.shard)
    warn_of_slow_precision(config)
    model = build_model(config, file, len(data.class_names))  # what does not fit is found here
    check_parts(config, world_from_environment())
    if options.dry_run:
        say(*describe(config, data, plan, model))
        return
    path = output_folder(options.out, config)
    with join(config.device, timeout=options.timeout) as world:
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        summary = train(config, plan, file, data, options, path, world)
        if world.is_main:
            print_summary(summary, path)


def check_parts(config: SegmentConfig, world: World) -> None:
    """Check that batch norm gets two images at least.

    Raises:
        UserError: It gets one.
    """
    batch_size, parts = config.training.batch_size, world.size * config.accumulate
    if batch_size < 2 * parts:
        raise UserError(
            f"--batch-size {batch_size} leaves batch norm less than two images in {world.size} "
            f"process(es) with --accumulate {config.accumulate}: give {2 * parts} or more"
        )


# The command line. A Swin has windows, which the first preset has not.
OPTIONS = options_of(
    (*PRESETS["tiny"].parts, SwinShape()),
    (
        *FLAGS,
        "window",
        "power",
        "layer_decay",
        "drop_path",
        "num_classes",
        "ignore_label",
        "zero_is_ignored",
        "scale",
        "head_dim",
        "aux_dim",
        "aux_weight",
        "layers",
    ),
    SegmentOptions,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, OPTIONS, name="segment", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
