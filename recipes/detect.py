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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from torch import Tensor, nn

from recipes import convmae
from recipes.engine import fields
from recipes.engine.data.coco import is_coco, load_coco
from recipes.engine.data.images import NORMALIZE, NormalizeByConstants
from recipes.engine.data.instances import InstanceImages, InstanceSource, SceneInstances
from recipes.engine.data.scenes import CLASSES, Part, load_scenes
from recipes.engine.detection.encoder import build_backbone, encoder_weights, fill_backbone
from recipes.engine.detection.pictures import draw_found
from recipes.engine.detection.score import KINDS, DetectionData, score
from recipes.engine.detection.shape import DetectionTraining, DetectorShape
from recipes.engine.detection.task import Detection
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import EncoderFile
from recipes.engine.pretrained.shapes import ConvViTShape, ViTShape
from recipes.engine.run.cli import FLAGS, options_of, override, parse_options, run_command
from recipes.engine.run.config import Preset, choose_preset
from recipes.engine.run.world import World
from recipes.engine.transfer import (
    SCENES,
    Scores,
    Transfer,
    TransferConfig,
    TransferOptions,
    resolve_transfer,
    run_transfer,
)

NUMBERS = ("ap", "ap50", "ap75", "agnostic")
_TRAIN_SCENES, _TEST_SCENES = 800, 100


@dataclass(frozen=True)
class DetectionPreset(Preset):
    """Encoder, training and detector.

    Attributes:
        detector: Sizes of the detector.
    """

    detector: DetectorShape = DetectorShape()


@dataclass(frozen=True, kw_only=True)
class DetectOptions(TransferOptions):
    """Options of detection.

    Attributes:
        data: "scenes", or a folder in COCO's layout: `train2017/`, `val2017/` and
            `annotations/instances_*.json`.
        seeds: Number of seeds, from `--seed` on, with which each training is run; 3 for the
            bundled scenes, otherwise 1.
    """

    seeds: fields.PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class DetectConfig(TransferConfig):
    """All that decides the result."""

    training: DetectionTraining
    detector: DetectorShape


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
                f"mimkit detect needs {package.partition('.')[0]}, which cannot be imported "
                f'({reason}): pip install "mimkit[detect]", with the torchvision that is made for '
                f"torch {torch.__version__}"
            ) from error


def resolve_detection(options: Any) -> tuple[DetectConfig, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, PRESETS)
    config, file = resolve_transfer(
        options,
        "detect",
        PRESETS,
        DetectConfig,
        runs=options.seeds,
        detector=override(preset.detector, options),
    )
    height, width = config.model.image_axes()
    if height != width:
        raise UserError(f"--image-size {height} {width}: images are padded to a square, give one")
    for flag in ("compile", "shard"):
        if getattr(options, flag):
            raise UserError(f"--{flag}: torchvision's detectors do not support it, omit it")
    return config, file


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
    return DetectionData(to_train, to_test, names, content)


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


def make_task(model: nn.Module, config: DetectConfig, world: World, options: Any) -> Detection:
    """Make the task of training a detector."""
    return Detection(model, config, world)


def weights_of_encoder(
    model: Any, config: DetectConfig, file: EncoderFile | None
) -> Mapping[str, Tensor]:
    """Return the weights of the encoder, with those that only pre-training uses."""
    return encoder_weights(model.encoder, config.model, file)


def score_model(
    model: nn.Module, config: DetectConfig, data: DetectionData, world: World, workers: int
) -> dict[str, Any]:
    """Score a detector on the test images."""
    scores = score(model, config, data, world, workers=workers)
    return {
        **{f"{kind}_ap": scores[kind]["ap"] for kind in KINDS},
        "scores": scores,
        "all_scores": scores,
    }


def rows_of(summary: dict[str, Any]) -> Mapping[str, Scores]:
    """Return the rows of the printed table."""
    return {
        f"{kind} {name}": {
            start: [scores[kind][name] for scores in all_scores]
            for start, all_scores in summary["all_scores"].items()
        }
        for kind in KINDS
        for name in NUMBERS
    }


def folder_of(first: DetectConfig, other: DetectConfig) -> str:
    """Return the name of a training's folder: `scratch-0`, `pretrained-1`, `scratch-1`, ..."""
    return f"{other.start}-{other.seed}"


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
    # 200 steps, six times. Chosen on the validation part of the scenes.
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
            proposals=50,
            samples=16,
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


# Box / mask AP on COCO val2017.
PUBLISHED = {
    "vitdet_base": "51.6 / 45.9; with --cascade 54.0 / 46.7",
    "vitdet_large": "55.5 / 49.2; with --cascade 57.6 / 50.0",
    "vitdet_huge": "56.7 / 50.2; with --cascade 58.7 / 51.0",
    "cae_base": "50.3 / 44.2",
    "cae_large": "54.5 / 47.5",
    "convmae_base": "53.2 / 47.1",
}

TRANSFER = Transfer(
    presets=PRESETS,
    pretraining=convmae.RECIPE,
    resolve=resolve_detection,
    load=load_images,
    build=build_model,
    make_task=make_task,
    encoder_weights=weights_of_encoder,
    score=score_model,
    compared=("box_ap", "mask_ap", "all_scores"),
    table=rows_of,
    folder_of=folder_of,
    draw=draw_found,
    published={name: f"{text} box / mask AP on COCO" for name, text in PUBLISHED.items()},
)


def run(options: Any) -> None:
    """Train detectors, and print their average precision.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    check_packages()
    run_transfer(TRANSFER, options)


# The command line.
OPTIONS = options_of(
    PRESETS["tiny"].parts,
    (*FLAGS, "layer_decay", "drop_path", "jitter", "cascade", "proposals", "detections"),
    DetectOptions,
    presets=PRESETS,
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
