r"""Detection and instance segmentation: Mask R-CNN on a pre-trained encoder, as ViTDet does it.

    python recipes/convmae.py
    python recipes/detect.py                        # six short trainings on the bundled scenes
    python recipes/detect.py --preset vitdet_base --encoder mae_pretrain_vit_base.pth \
        --data /path/to/coco --precision bf16 --workers 8

torchvision's Mask R-CNN with the heads of ViTDet (arXiv:2203.16527): on a ViT with the simple
feature pyramid, on ConvMAE's detector and on Swin with a feature pyramid network; `--cascade` for
Cascade Mask R-CNN. It needs `pip install "mimkit[detect]"`. On the bundled scenes, the same
training from an untrained encoder is shown beside it, with three seeds each.

Published box / mask AP on COCO val2017: ViTDet on MAE ViT-B 51.6 / 45.9, ViT-L 55.5 / 49.2, ViT-H
56.7 / 50.2; with the cascade 54.0 / 46.7, 57.6 / 50.0, 58.7 / 51.0; ConvMAE-B 53.2 / 47.1; CAE-B
(1600 epochs, 1x) 50.3 / 44.2, CAE-L 54.5 / 47.5. `docs/downstream.md` says where a preset differs
from the authors' settings.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from torch import nn

from recipes import convmae
from recipes.engine import fields
from recipes.engine.data.coco import is_coco, load_coco
from recipes.engine.data.images import NORMALIZE, NormalizeByConstants
from recipes.engine.data.instances import InstanceImages, InstanceSource, SceneInstances
from recipes.engine.data.scenes import CLASSES, Part, load_scenes
from recipes.engine.data.sets import DataSet
from recipes.engine.detection.encoder import build_backbone, encoder_weights, fill_backbone
from recipes.engine.detection.pictures import draw_found
from recipes.engine.detection.score import KINDS, DetectionData, score
from recipes.engine.detection.shape import DetectionTraining, DetectorShape
from recipes.engine.detection.task import Detection, detector_groups
from recipes.engine.errors import UserError, say
from recipes.engine.loop import Plan, make_plan, run_steps
from recipes.engine.pretrained.encoders import EncoderFile, EncoderOptions, open_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, ViTShape
from recipes.engine.report import print_unreadable
from recipes.engine.run.cli import FLAGS, options_of, override, parse_options, run_command
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import (
    Preset,
    RunConfig,
    choose_preset,
    resolve,
    warn_of_short_schedule,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import RunFolder, output_folder
from recipes.engine.run.world import World, check_shares, join
from recipes.engine.transfer import find_or_pretrain, print_comparison

SCENES = "scenes"
_SEEDS = 3
_TRAIN_SCENES, _TEST_SCENES = 800, 200


@dataclass(frozen=True)
class DetectionPreset(Preset):
    """Encoder, training and detector.

    Attributes:
        detector: Sizes of the detector.
    """

    detector: DetectorShape = DetectorShape()


@dataclass(frozen=True, kw_only=True)
class DetectOptions(EncoderOptions):
    """Options of detection.

    Attributes:
        data: "scenes", or a folder in COCO's layout: `train2017/`, `val2017/` and
            `annotations/instances_*.json`.
        encoder: An `encoder.safetensors` or the folder of its run; a checkpoint of the authors'
            MAE, CAE, SimMIM or ConvMAE, whose shape is the preset's; "none" to train from scratch;
            or "auto" for the newest ConvMAE or CAE in `runs`, or a new ConvMAE.
        scratch: Whether the same training is also run from an untrained encoder; "auto" does so
            for the bundled scenes.
        seeds: Number of seeds, from `--seed` on, with which each training is run; 3 for the
            bundled scenes, otherwise 1.
    """

    data: str = SCENES
    encoder: str = "auto"
    scratch: Literal["auto", "always", "never"] = "auto"
    seeds: fields.PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class DetectConfig(RunConfig):
    """All that decides the result; `encoder` is the digest of the weights, or "none"."""

    training: DetectionTraining
    detector: DetectorShape
    encoder: str


def check_packages() -> None:
    """Check that the packages of the extra `detect` can be imported.

    Raises:
        UserError: If one is missing, or torchvision does not fit this PyTorch.
    """
    for package in ("torchvision", "torchmetrics.detection", "faster_coco_eval"):
        try:
            __import__(package)
        except Exception as error:  # a torchvision of another PyTorch fails in ways of its own
            reason = " ".join(str(error).split())[:150]
            raise UserError(
                f"recipes/detect.py needs {package.partition('.')[0]}, which cannot be imported "
                f'({reason}): pip install "mimkit[detect]", with the torchvision that is made for '
                f"torch {torch.__version__}"
            ) from error


def build_model(config: DetectConfig, file: EncoderFile | None, num_classes: int) -> nn.Module:
    """Make the detector, and load the pre-trained encoder.

    Raises:
        UserError: The encoder does not fit.
    """
    from recipes.engine.detection.model import Detector

    encoder = build_backbone(
        config.model, config.detector, seed=config.seed, drop_path=config.training.drop_path
    )
    if file is not None:
        fill_backbone(encoder, file)
    return Detector(encoder, config.detector, num_classes).to(config.device)


def load_images(config: DetectConfig) -> DetectionData:
    """Load the images with their objects.

    Raises:
        UserError: If there is no such data set, or something in it does not fit.
    """
    side = config.image_size[0]
    train: InstanceSource
    test: InstanceSource
    if config.data == SCENES:
        parts: tuple[tuple[int, Part], ...] = ((_TRAIN_SCENES, "train"), (_TEST_SCENES, "test"))
        train, test = (
            SceneInstances(load_scenes(number, image_size=(side, side), seed=0, part=part))
            for number, part in parts
        )
        # Scenes are composed with this mean and contrast.
        names, normalize, content = CLASSES, NormalizeByConstants((0.5,) * 3, (0.19,) * 3), None
    elif is_coco(Path(config.data)):
        train, test, names = load_coco(Path(config.data), config.training.decoder)
        normalize, content = NORMALIZE, f"{train.content}; {test.content}"
    else:
        raise UserError(
            f'--data {config.data} is neither "{SCENES}" nor a folder with train2017/, val2017/ '
            "and annotations/instances_*.json"
        )
    to_train, to_test = (
        InstanceImages(source, len(names), side, normalize, jitter, config.seed)
        for source, jitter in ((train, config.training.jitter), (test, None))
    )
    images = DataSet(config.data, 3, to_train, names, normalize=normalize, content=content)
    return DetectionData(images, to_train, to_test)


def make_task(
    config: DetectConfig, file: EncoderFile | None, num_classes: int, world: World
) -> Detection:
    """Make the model with its optimizer."""
    training = config.training

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups = detector_groups(
            model, config, weight_decay=training.weight_decay, layer_decay=training.layer_decay
        )
        return torch.optim.AdamW(groups, lr=config.lr, betas=training.betas, fused=True)

    return Detection(build_model(config, file, num_classes), make_optimizer, config, world)


def train_and_score(
    config: DetectConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: DetectionData,
    options: DetectOptions,
    folder: RunFolder,
) -> dict[str, Any]:
    """Train from the last checkpoint, score, write weights and pictures; return the numbers."""
    task = make_task(config, file, data.num_classes, folder.world)
    train_set = data.train.seeded(config.seed)
    run_steps(task, plan, train_set, folder, options)
    model: Any = task.model
    scores = score(model, config, data, folder.world, workers=options.workers)
    weights = encoder_weights(model.encoder, config.model, file)
    folder.write_tensors("encoder.safetensors", weights)
    folder.write_weights("model.safetensors", model)
    draw_found(model, config, data, folder)
    unreadable = [data.train.describe(image) for image in folder.read_unreadable()]
    return {
        "steps": folder.read_metrics()[-1]["step"],
        "scores": scores,
        "unreadable_images": unreadable,
    }


def detect(
    config: DetectConfig,
    plan: Plan,
    file: EncoderFile | None,
    data: DetectionData,
    options: DetectOptions,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Train a detector, or go on with it, and return the summary.

    The run with the first seed is in the folder itself, the others in folders in it, named after
    start and seed.
    """
    with RunFolder(
        path, config, world, lock=options.lock, accept_changed=options.accept_changed_data
    ) as folder:
        summary = folder.read_summary()
        if summary is not None:
            return summary
        summary = train_and_score(config, plan, file, data, options, folder)
        found = {_start(file): [summary["scores"]]}
        for start, seed, other in others(config, file, options):
            alone = dataclasses.replace(options, scratch="never", seeds=1)
            given = file if start == "pretrained" else None
            one = detect(other, plan, given, data, alone, path / f"{start}-{seed}", world)
            found.setdefault(start, []).append(one["scores"])
        for kind in KINDS:
            summary[f"{kind}_ap"] = {
                start: [scores[kind]["ap"] for scores in all_scores]
                for start, all_scores in found.items()
            }
        summary["all_scores"] = found
        folder.write_summary(summary)
    return summary


def others(
    config: DetectConfig, file: EncoderFile | None, options: DetectOptions
) -> Iterator[tuple[str, int, DetectConfig]]:
    """Yield start, seed and configuration of all runs but the first."""
    is_bundled = options.data == SCENES
    seeds = options.seeds or (_SEEDS if is_bundled else 1)
    compares = options.scratch == "always" or (options.scratch == "auto" and is_bundled)
    starts = [_start(file), *(["scratch"] if compares and file is not None else [])]
    for start in starts:
        for seed in range(config.seed, config.seed + seeds):
            if (start, seed) != (starts[0], config.seed):
                encoder = config.encoder if start == "pretrained" else "none"
                yield start, seed, dataclasses.replace(config, seed=seed, encoder=encoder)


def _start(file: EncoderFile | None) -> str:
    return "scratch" if file is None else "pretrained"


def resolve_detection(options: DetectOptions) -> tuple[DetectConfig, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, PRESETS)
    file = open_encoder(options, preset.model)
    shape: EncoderShape = file.shape if file else preset.model
    config = resolve(
        options,
        "detect",
        PRESETS,
        config_type=DetectConfig,
        model=dataclasses.replace(shape, image_size=preset.model.image_size),
        detector=override(preset.detector, options),
        encoder=file.digest if file else "none",
    )
    height, width = config.model.image_axes()
    if height != width:
        raise UserError(f"--image-size {height} {width}: images are padded to a square, give one")
    if config.model.in_channels != 3:
        raise UserError(
            f"--encoder {options.encoder} is for images of {config.model.in_channels} channels, "
            f"those of {config.data} have 3"
        )
    for flag in ("compile", "shard"):
        if getattr(options, flag):
            raise UserError(f"--{flag}: torchvision's detectors do not support it, omit it")
    return config, file


def describe(config: DetectConfig, data: DetectionData, plan: Plan, model: nn.Module) -> list[str]:
    """Describe a run: configuration, images, steps, parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder: Any = model.encoder
    return [
        *config.as_lines(),
        "---",
        f"data          {config.data}: {len(data.train):,} images of {data.num_classes} classes, "
        f"{len(data.test):,} to score on",
        f"steps         {plan.num_steps:,} of {config.training.batch_size:,} images",
        f"parameters    {trained:,} trained, "
        f"{sum(p.numel() for p in encoder.parameters()):,} in the encoder",
    ]


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print what the run showed."""
    say(f"average precision (%), {summary['steps']} steps")
    for start, all_scores in summary["all_scores"].items():
        for kind in KINDS:
            names = ("ap", "ap50", "ap75", "agnostic")
            means = (
                sum(scores[kind][name] for scores in all_scores) / len(all_scores) for name in names
            )
            numbers = "  ".join(
                f"{name} {mean:.1f}" for name, mean in zip(names, means, strict=True)
            )
            say(f"{start:<11} {kind:<5} {numbers}")
    for kind in KINDS:
        print_comparison(f"{kind} AP", summary[f"{kind}_ap"])
    print_unreadable(summary["unreadable_images"])
    print_closing(path)


# ViTDet on MAE: box / mask AP 51.6 / 45.9, with --cascade 54.0 / 46.7. 184,375 steps of 64 images.
VITDET = DetectionTraining(
    epochs=100,
    batch_size=64,
    base_lr=1e-4 * 256 / 64,
    warmup_epochs=250 / 1_843,
    milestones=(88.9, 96.3),
    layer_decay=0.7,
    drop_path=0.1,
)

# CAE on 32 images for 12 epochs. The authors draw the shorter side from 480 to 800 pixels, at most
# 1333 the longer one, and weigh a GIoU loss by 10.
CAE = DetectionTraining(
    epochs=12,
    batch_size=32,
    base_lr=3e-4 * 256 / 32,
    warmup_epochs=0.1,
    milestones=(9, 11),
    weight_decay=0.05,
    layer_decay=0.75,
    drop_path=0.2,
    jitter=(0.6, 1.0),
)
CAE_BASE = ViTShape(image_size=1056, layer_scale=0.1, qkv_bias="qv")
GLOBAL = DetectorShape(window=0, global_blocks=())

PRESETS = {
    # 200 steps, six times: 8 min 30 s on two cores. Chosen on the validation part of the scenes.
    "tiny": DetectionPreset(
        ConvViTShape(
            image_size=64, patch_sizes=(2, 2, 2), dim=(32, 64, 128), depth=(2, 2, 4), heads=4
        ),
        DetectionTraining(
            epochs=1,
            batch_size=4,
            base_lr=1e-3 * 256 / 4,
            warmup_epochs=0.1,
            weight_decay=0.05,
            layer_decay=1.0,
            drop_path=0.0,
            clip_grad=1.0,
            jitter=(1.0, 1.0),
        ),
        detector=DetectorShape(
            window=4,
            global_blocks=(1, 3),
            dim=64,
            fc_dim=128,
            convs=1,
            anchors=(16, 20, 28, 36, 48),
            proposals=100,
            samples=32,
            detections=20,
            least_score=0.01,
        ),
    ),
    "vitdet_base": DetectionPreset(ViTShape(image_size=1024), VITDET),
    # 55.5 / 49.2; cascade 57.6 / 50.0.
    "vitdet_large": DetectionPreset(
        ViTShape(image_size=1024, dim=1024, depth=24, heads=16),
        dataclasses.replace(VITDET, layer_decay=0.8, drop_path=0.4),
        detector=DetectorShape(global_blocks=(5, 11, 17, 23)),
    ),
    # 56.7 / 50.2; cascade 58.7 / 51.0. MAE's patches of 14 pixels do not divide 1024.
    "vitdet_huge": DetectionPreset(
        ViTShape(image_size=1024, dim=1280, depth=32, heads=16),
        dataclasses.replace(
            VITDET, epochs=75, milestones=(66.7, 72.2), layer_decay=0.9, drop_path=0.5
        ),
        detector=DetectorShape(global_blocks=(7, 15, 23, 31)),
    ),
    # 48.3 / 42.7, 49.9 / 43.9 and 50.3 / 44.2 after 300, 800 and 1600 epochs.
    "cae_base": DetectionPreset(CAE_BASE, CAE, detector=GLOBAL),
    # 54.5 / 47.5.
    "cae_large": DetectionPreset(
        dataclasses.replace(CAE_BASE, dim=1024, depth=24, heads=16, layer_scale=1e-5),
        dataclasses.replace(CAE, base_lr=2e-4 * 256 / 32, layer_decay=0.85),
        detector=GLOBAL,
    ),
    # 53.2 / 47.1. The authors' other norms are SyncBN.
    "convmae_base": DetectionPreset(
        ConvViTShape(image_size=1024),
        DetectionTraining(
            epochs=25, batch_size=32, base_lr=8e-5 * 256 / 32, warmup_epochs=0.1, drop_path=0.1
        ),
        detector=DetectorShape(window=16, global_blocks=(0, 3, 6, 10)),
    ),
}


def run(options: DetectOptions) -> None:
    """Train detectors, and print their average precision.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    check_packages()
    encoder = find_or_pretrain(
        options.encoder,
        ("convmae", "cae"),
        convmae.RECIPE,
        convmae.__doc__ or "",
        dry_run=options.dry_run,
    )
    options = dataclasses.replace(options, encoder=encoder)
    config, file = resolve_detection(options)
    data = load_images(config)
    config = config.with_data(data.images.content)
    plan = make_plan(config, options, data.train)
    warn_of_slow_precision(config)
    warn_of_short_schedule(config)
    model = build_model(config, file, data.num_classes)  # what does not fit is found here
    if options.dry_run:
        say(*describe(config, data, plan, model))
        return
    path = output_folder(options.out, config)
    with join(config.device, timeout=options.timeout) as world:
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        summary = detect(config, plan, file, data, options, path, world)
        if world.is_main:
            print_summary(summary, path)


# The command line.
OPTIONS = options_of(
    PRESETS["tiny"].parts,
    (*FLAGS, "layer_decay", "drop_path", "jitter", "cascade", "proposals", "detections"),
    DetectOptions,
)


def parse(arguments: Sequence[str]) -> DetectOptions:
    """Parse a command line."""
    options: DetectOptions = parse_options(OPTIONS, arguments, program="detect", description="")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, OPTIONS, name="detect", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
