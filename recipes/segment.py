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

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
from torch import Tensor, nn

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
from recipes.engine.errors import UserError
from recipes.engine.pictures import save_picture
from recipes.engine.pretrained import encoders
from recipes.engine.pretrained.encoders import EncoderFile, fill_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, SwinShape, ViTShape
from recipes.engine.run.cli import FLAGS, options_of, run_command
from recipes.engine.run.config import DenseTraining, Preset
from recipes.engine.run.world import World, world_from_environment
from recipes.engine.seeds import sample_rng
from recipes.engine.segmentation import Segmentation, Segmenter, predict, score
from recipes.engine.transfer import (
    SCENES,
    Scores,
    Transfer,
    TransferConfig,
    TransferOptions,
    resolve_transfer,
    run_transfer,
)

SCORES = ("miou", "mean_accuracy", "pixel_accuracy")
_SCENES_AT_ONCE = 50
_PICTURE_SIDE = 128
_PICTURES = 6


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
class SegmentOptions(TransferOptions):
    """Options of segmentation.

    Attributes:
        data: "scenes", or a folder of images and labels.
        runs: Trainings with different seeds; by default 3 on scenes, else 1.
    """

    runs: fields.PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(TransferConfig):
    """All that decides the result."""

    training: SegmentationTraining


def resolve_segmentation(options: Any) -> tuple[SegmentConfig, EncoderFile | None]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    config, file = resolve_transfer(options, "segment", PRESETS, SegmentConfig, runs=options.runs)
    batch_size = config.training.batch_size
    parts = world_from_environment().size * config.accumulate
    if batch_size < 2 * parts:
        raise UserError(
            f"--batch-size {batch_size} leaves batch norm less than two images in "
            f"{parts // config.accumulate} process(es) with --accumulate {config.accumulate}: give "
            f"{2 * parts} or more"
        )
    return config, file


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


def build_model(config: SegmentConfig, file: EncoderFile | None, num_classes: int) -> Segmenter:
    """Make the model, and load the pre-trained encoder.

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
    except ValueError as error:
        raise UserError(str(error)) from error
    return model.to(config.device)


def make_task(model: nn.Module, config: SegmentConfig, world: World, options: Any) -> Segmentation:
    """Make the task of training a model."""
    weight = config.training.aux_weight
    if not options.shard:  # FSDP2 takes contiguous weights only
        cast(Any, model).to(memory_format=torch.channels_last)  # in place; heads convolve
    return Segmentation(model, config, world, aux_weight=weight, shard=options.shard)


def encoder_weights(
    model: Segmenter, config: SegmentConfig, file: EncoderFile | None
) -> Mapping[str, Tensor]:
    """Return the weights of the encoder."""
    weights: Mapping[str, Tensor] = model.encoder.state_dict()
    return weights


def score_model(
    model: nn.Module, config: SegmentConfig, data: SegmentedData, world: World, workers: int
) -> dict[str, Any]:
    """Score a model on the held-out images; `iou` holds that of each class."""
    batch_size = _SCENES_AT_ONCE if data.name == SCENES else 1  # files have several sizes
    scores = score(model, config, data, world, batch_size=batch_size, workers=workers)
    return {
        **{name: getattr(scores, name) for name in SCORES},
        "iou": dict(zip(data.class_names, scores.iou, strict=True)),
    }


def rows_of(summary: dict[str, Any]) -> Mapping[str, Scores]:
    """Return the rows of the printed table."""
    return {name.replace("_", " "): summary[name] for name in SCORES}


def folder_of(first: SegmentConfig, other: SegmentConfig) -> str:
    """Return the name of a training's folder: `scratch`, `seed-1`, `scratch-seed-1`, ..."""
    start = ["scratch"] if other.encoder != first.encoder else []
    seed = [f"seed-{other.seed - first.seed}"] if other.seed != first.seed else []
    return "-".join(start + seed)


@torch.no_grad()
def draw_segmentations(
    models: Mapping[str, nn.Module], config: SegmentConfig, data: SegmentedData, path: Path
) -> None:
    """Draw held-out images, their labels, and what each model predicts."""
    colors = torch.from_numpy(sample_rng(0).uniform(0.15, 1.0, (IGNORED + 1, COLORS))).float()
    colors[0], colors[IGNORED] = 0.15, 1.0
    scale = max(1, round(_PICTURE_SIDE / max(config.image_size)))
    rows = []
    for item, _ in read_first(data.test, range(len(data.test)), _PICTURES, set()):
        inputs = data.test.to_inputs(item[None].to(config.device))[:, :COLORS]
        found = [predict(model.eval(), inputs, config)[0].cpu() for model in models.values()]
        columns = [colors[classes].movedim(-1, 0) for classes in (item[COLORS].long(), *found)]
        rows.append(
            [
                column.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
                for column in (to_unit(item[:COLORS]), *columns)
            ]
        )
    note = "Held-out images. Dark: the first class; white: pixels that do not count."
    captions = ["image", "truth", *models]
    save_picture(viz.panel(rows, captions, note=note), path / "segmentations.png")


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
    # 75 seconds of a CPU core a training, of which there are six by default. With beta2 .999 and an
    # auxiliary width of 16, some seeds told cut-outs from surfaces and learned no classes.
    "tiny": Preset(
        ConvViTShape(
            image_size=64, patch_sizes=(2, 2, 2), dim=(32, 64, 128), depth=(2, 2, 4), heads=4
        ),
        SegmentationTraining(
            epochs=16,
            batch_size=8,
            base_lr=4e-3 * 256 / 8,
            warmup_epochs=0.6,
            betas=(0.9, 0.95),
            layer_decay=0.65,
            drop_path=0.0,
            clip_grad=1.0,
            scale=(1.0, 1.0),
            distort=False,
            head_dim=64,
            aux_dim=64,
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


TRANSFER = Transfer(
    presets=PRESETS,
    pretraining=convmae.RECIPE,
    resolve=resolve_segmentation,
    load=load_images,
    build=build_model,
    make_task=make_task,
    encoder_weights=encoder_weights,
    score=score_model,
    compared=SCORES,
    table=rows_of,
    folder_of=folder_of,
    draw=draw_segmentations,
    published={name: f"{miou} mIoU on ADE20K" for name, miou in PUBLISHED.items()},
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
    presets=PRESETS,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    run = partial(run_transfer, TRANSFER)
    return run_command(run, OPTIONS, name="segment", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
