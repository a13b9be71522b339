r"""Probing of a frozen encoder: k-NN, a linear classifier and an attentive one.

    python recipes/mae.py --out runs/mae
    python recipes/probe.py --encoder runs/mae/encoder.safetensors          # a minute on a CPU
    python recipes/probe.py --preset vit_base --encoder mae_pretrain_vit_base.pth \
        --data /path/to/imagenet --protocol paper --precision bf16

The protocol "small" fits classifiers to the features of 50 labelled images a class. "paper" trains
them for 90 epochs on random crops of all images: MAE's linear probe (arXiv:2111.06377, A.1: class
token, BatchNorm without affine, LARS) and CAE's attentive one (arXiv:2202.03026, 4.2: SGD with
Nesterov momentum). Each is shown beside the same probe of the untrained encoder and of raw pixels.
Published on ImageNet-1K for MAE's 1600 epochs, linear / attentive: ViT-B 68.0 / 74.2, ViT-L
75.8 / 78.8; ViT-H, linear, 76.6.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
import yaml
from jaxtyping import Float
from torch import Tensor, nn

from mimkit import viz
from mimkit.nn import AttentiveProbe
from recipes.engine import Training
from recipes.engine.classify import Classification, fit, score
from recipes.engine.data.augment import Augmentation
from recipes.engine.data.labelled import LabelledData, load_labelled
from recipes.engine.data.load import load_data
from recipes.engine.data.mixing import Mixing
from recipes.engine.data.sets import DataSet, ProbeData
from recipes.engine.errors import UserError
from recipes.engine.loop import make_plan
from recipes.engine.optim import LARS
from recipes.engine.pretrained.encoders import (
    EncoderFile,
    EncoderOptions,
    build_encoder,
    fill_encoder,
    open_encoder,
)
from recipes.engine.pretrained.shapes import (
    ConvViTShape,
    Encoder,
    EncoderShape,
    SwinShape,
    ViTShape,
)
from recipes.engine.probes import (
    Features,
    compute_features,
    evaluate,
    fit_attentive,
    knn,
    raw_pixels,
    standardize,
)
from recipes.engine.report import pixels_per_token
from recipes.engine.run.cli import options_of, override, run_command
from recipes.engine.run.config import (
    Preset,
    RunConfig,
    choose_preset,
    resolve,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import RunFolder, output_folder
from recipes.engine.run.world import World, check_shares, join

Pool = Literal["token", "mean"]
Protocol = Literal["small", "paper"]

_NAMES = {"knn": "k-NN", "linear": "linear", "attentive": "attentive"}
_ATTENTIVE_HEADS = 12
_ATTENTION_ROWS = 8  # images in the picture of attention
_ENLARGED = 4


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(EncoderOptions):
    """Options of probing.

    Attributes:
        protocol: "small" fits to the features of few labelled images; "paper" trains as MAE and
            CAE do.
        pool: What the k-NN and linear probes look at: the class token, or the mean of the patch
            tokens; by default the mean for "small", the token (if there is one) for "paper".
    """

    protocol: Protocol = "small"
    pool: Pool | None = None


@dataclass(frozen=True)
class ProbePreset(Preset):
    """An encoder's shape, and how the probes are trained; `training` is of the linear one."""

    attentive: Training = dataclasses.field(kw_only=True)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(RunConfig):
    """All that decides the result.

    Attributes:
        encoder: Digest of the weights.
        protocol: As in the options.
        pool: As in the options.
        probe: "linear" or "attentive" for the training of one probe; "all" for the whole.
        features: "trained", "untrained" or "pixels"; "all" for the whole.
    """

    encoder: str
    protocol: Protocol
    pool: Pool
    probe: str = "all"
    features: str = "all"


class FrozenProbe(nn.Module):
    """Classify images by frozen features; only the classifier has weights here.

    Args:
        features: Computes pooled features and tokens.
        head: Classifies one of them.
        on_tokens: Whether it looks at the tokens.
    """

    def __init__(self, features: Features, head: nn.Module, *, on_tokens: bool) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.on_tokens = on_tokens

    def forward(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of each image."""
        with torch.no_grad():
            pooled, tokens = self.features(images)
        logits: Tensor = self.head(tokens if self.on_tokens else pooled)
        return logits


def linear_probe(features: Features, dim: int, num_classes: int) -> FrozenProbe:
    """Make MAE's linear probe.

    Source:
        facebookresearch/mae `main_linprobe.py`.
    """
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)
    return FrozenProbe(features, head, on_tokens=False)


def attentive_probe(features: Features, dim: int, num_classes: int, *, heads: int) -> FrozenProbe:
    """Make CAE's attentive probe, with as many heads as divide the width.

    Source:
        Atten4Vis/CAE `run_attentive.py`.
    """
    heads = next(number for number in range(heads, 0, -1) if dim % number == 0)
    head = AttentiveProbe(dim=dim, heads=heads, num_classes=num_classes)
    return FrozenProbe(features, head, on_tokens=True)


def probe_optimizer(config: ProbeConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a probe: LARS for the linear one, SGD for the attentive one."""
    if config.probe == "linear":
        return LARS(model.parameters(), config.lr)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, nesterov=True)


def load_features(config: ProbeConfig, file: EncoderFile) -> dict[str, Features]:
    """Make the features to probe: of the encoder, of the same untrained, and the pixels."""
    trained, untrained = (
        build_encoder(config.model, seed=config.seed, pool=config.pool) for _ in range(2)
    )
    fill_encoder(trained, file)
    return {
        "trained": encoder_features(trained, config),
        "untrained": encoder_features(untrained, config),
        "pixels": raw_pixels(pixels_per_token(trained)),
    }


def encoder_features(encoder: Encoder, config: RunConfig) -> Features:
    """Return pooled features and tokens of a frozen encoder."""
    encoder.to(config.device).eval().requires_grad_(False)

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with config.autocast():
            tokens = encoder(images.to(config.device)).float()
        return encoder.pool(tokens), tokens

    return features


def probe_small(
    config: ProbeConfig, features: dict[str, Features], probe: ProbeData
) -> dict[str, dict[str, float]]:
    """Fit every probe to few labelled images: accuracy in percent by probe and features."""
    scores = {name: evaluate(f, probe, seed=config.seed) for name, f in features.items()}
    return {kind: {name: scores[name][kind] for name in features} for kind in _NAMES}


def probe_as_papers(
    config: ProbeConfig,
    preset: ProbePreset,
    features: dict[str, Features],
    probe: ProbeData,
    options: ProbeOptions,
    path: Path,
    world: World,
) -> dict[str, dict[str, float]]:
    """Train the papers' probes on all images, k-NN on few: accuracy by probe and features."""
    data = load_all(config)
    found: dict[str, dict[str, float]] = {
        "knn": {name: nearest(f, probe) for name, f in features.items()}
    }
    for kind in ("linear", "attentive"):
        training = override(preset.training if kind == "linear" else preset.attentive, options)
        found[kind] = {
            name: train_probe(
                dataclasses.replace(
                    config,
                    training=training,
                    lr=options.lr or training.scaled_lr,
                    probe=kind,
                    features=name,
                ),
                one,
                data,
                options,
                path / f"{kind}-{name}",
                world,
            )
            for name, one in features.items()
        }
    return found


def load_all(config: ProbeConfig) -> LabelledData:
    """Load all labelled images, cropped as MAE's linear probe does: one draw, cut to fit."""
    return load_labelled(
        config.data,
        image_size=config.model.image_axes(),
        augmentation=Augmentation(attempts=1),
        seed=config.seed,
    )


def nearest(features: Features, probe: ProbeData) -> float:
    """Score the k-NN probe."""
    train, _ = compute_features(features, probe.train_images, 256)
    test, _ = compute_features(features, probe.test_images, 256)
    labels = probe.train_labels.to(train.device), probe.test_labels.to(train.device)
    return knn(train, labels[0], test, labels[1])


def train_probe(
    config: ProbeConfig,
    features: Features,
    data: LabelledData,
    options: ProbeOptions,
    path: Path,
    world: World,
) -> float:
    """Train one probe on one kind of features, or go on with it; return its accuracy."""
    with RunFolder(path, config, world) as folder:
        summary = folder.read_summary()
        if summary is None:
            height, width = config.model.image_axes()
            blank = torch.zeros(1, data.images.in_channels, height, width)
            with torch.no_grad():
                pooled, tokens = features(blank.to(config.device))
            torch.manual_seed(config.seed)
            model = (
                linear_probe(features, pooled.shape[1], data.num_classes)
                if config.probe == "linear"
                else attentive_probe(
                    features, tokens.shape[2], data.num_classes, heads=_ATTENTIVE_HEADS
                )
            ).to(config.device)
            task = Classification(
                model,
                partial(probe_optimizer, config),
                Mixing(data.num_classes, mixup=0.0, cutmix=0.0, smoothing=0.0),
                config,
                data,
                world,
            )
            fit(task, data, folder, options)
            accuracy = score(model, config, data, world, workers=options.workers)
            summary = {"accuracy": accuracy}
            folder.write_summary(summary)
    return float(summary["accuracy"])


def probe_encoder(
    config: ProbeConfig,
    preset: ProbePreset,
    file: EncoderFile,
    data: DataSet,
    options: ProbeOptions,
    path: Path,
    world: World,
) -> dict[str, Any]:
    """Probe an encoder, and return the summary."""
    assert data.probe is not None
    with RunFolder(path, config, world) as folder:
        summary = folder.read_summary()
        if summary is None:
            features = load_features(config, file)
            if config.protocol == "small":
                found = probe_small(config, features, data.probe)
            else:
                found = probe_as_papers(config, preset, features, data.probe, options, path, world)
            encoder = build_encoder(config.model, seed=config.seed)
            grid = getattr(encoder, "out_grid", encoder.grid)
            if world.is_main:
                draw_attention(features, data.probe, grid, folder, seed=config.seed)
            summary = {"probes": found}
            folder.write_summary(summary)
    return summary


def draw_attention(
    features: dict[str, Features],
    probe: ProbeData,
    grid: tuple[int, ...],
    folder: RunFolder,
    *,
    seed: int,
) -> None:
    """Draw where the attentive probe looks in test images, with a line around half of it.

    Source:
        CAE, arXiv:2202.03026, its figure of attention maps; there the encoders are trained.
    """
    # One image a class, so that each row shows something else.
    labels = probe.test_labels
    rows = [int((labels == label).nonzero()[0]) for label in labels.unique()[:_ATTENTION_ROWS]]
    images = probe.test_images[rows]
    low, high = (f(images, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    stretched = (images - low) / (high - low).clamp(min=1e-6)
    shown = stretched.repeat_interleave(_ENLARGED, 2).repeat_interleave(_ENLARGED, 3)
    columns = {"input (contrast stretched)": shown}
    for name, encode in features.items():
        train, some = (
            compute_features(encode, part, 256)[1] for part in (probe.train_images, images)
        )
        train, some = standardize(train, some)
        classifier = fit_attentive(train, probe.train_labels.to(train.device), seed=seed)
        attention = classifier.attention(some).mean(dim=1).cpu()
        columns[name] = viz.show_attention(
            shown, attention[:, -math.prod(grid) :].unflatten(1, grid)
        )
    panel = [list(row) for row in zip(*columns.values(), strict=True)]
    note = "The line encloses the patches that hold half of the attention (mean over heads)."
    viz.panel(panel, list(columns), note=note).save(folder.path / "attention.png")


def resolve_probing(options: ProbeOptions) -> tuple[ProbeConfig, EncoderFile]:
    """Fill in the preset's values, and read the encoder.

    Raises:
        UserError: A value that does not fit, or an encoder that cannot be read.
    """
    _, preset = choose_preset(options, PRESETS)
    file = open_encoder(options, preset.model)
    if file is None:
        raise UserError("--encoder none leaves nothing to probe: give an encoder.safetensors")
    config = resolve(
        options,
        "probe",
        PRESETS,
        config_type=ProbeConfig,
        model=file.shape,
        encoder=file.digest,
        protocol=options.protocol,
        pool=options.pool or _default_pool(options.protocol, file.shape),
    )
    if options.protocol == "paper" and config.training.batch_size == 1:
        raise UserError("--batch-size 1: these probes normalise over a batch, give 2 or more")
    return config, file


def _default_pool(protocol: Protocol, shape: EncoderShape) -> Pool:
    return "token" if protocol == "paper" and shape.has_class_token else "mean"


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print what the run showed."""
    print(f"{'probe (accuracy, %)':<22}{'trained':>10}{'untrained':>11}{'raw pixels':>12}")
    for kind, name in _NAMES.items():
        row = summary["probes"][kind]
        print(f"{name:<22}{row['trained']:>10.1f}{row['untrained']:>11.1f}{row['pixels']:>12.1f}")
    print(f"numbers: {path}")


def _training(epochs: int, batch_size: int, base_lr: float, min_lr: float) -> Training:
    return Training(
        epochs=epochs,
        batch_size=batch_size,
        base_lr=base_lr,
        warmup_epochs=10,
        weight_decay=0.0,
        min_lr=min_lr,
    )


# MAE's linear rate is per 256 images; CAE's attentive one is .4 at its batch of 8192.
LINEAR = _training(90, 16_384, 0.1, 0.0)
ATTENTIVE = _training(90, 8_192, 0.4 * 256 / 8_192, 1e-6)

PRESETS = {
    # The papers' highest rates, 6.4 and .4, at a batch that fits the bundled sets.
    "tiny": ProbePreset(
        ViTShape(image_size=32, patch_size=4, dim=128, depth=4, heads=4),
        _training(90, 64, 6.4 * 256 / 64, 0.0),
        attentive=_training(90, 64, 0.4 * 256 / 64, 1e-6),
    ),
    "vit_base": ProbePreset(ViTShape(), LINEAR, attentive=ATTENTIVE),
    "vit_large": ProbePreset(
        ViTShape(dim=1024, depth=24, heads=16),
        dataclasses.replace(LINEAR, epochs=50),
        attentive=ATTENTIVE,
    ),
    "vit_huge": ProbePreset(
        ViTShape(patch_size=14, dim=1280, depth=32, heads=16),
        dataclasses.replace(LINEAR, epochs=50),
        attentive=ATTENTIVE,
    ),
    "convmae_base": ProbePreset(
        ConvViTShape(), dataclasses.replace(LINEAR, batch_size=4_096), attentive=ATTENTIVE
    ),
    # SimMIM's, as pre-trained.
    "swin_base": ProbePreset(SwinShape(image_size=192, window=6), LINEAR, attentive=ATTENTIVE),
    "swin_large": ProbePreset(
        SwinShape(image_size=192, dim=192, heads=(6, 12, 24, 48), window=12),
        LINEAR,
        attentive=ATTENTIVE,
    ),
}


def run(options: ProbeOptions) -> None:
    """Probe an encoder, and print the accuracies.

    Raises:
        UserError: Something that was asked for does not fit.
    """
    config, file = resolve_probing(options)
    _, preset = choose_preset(options, PRESETS)
    data = load_data(config.data, image_size=config.model.image_axes(), seed=config.seed)
    check_data(config, file, data)
    warn_of_slow_precision(config)
    load_features(config, file)  # what does not fit is found before the folder is made
    if config.protocol == "paper":
        make_plan(config, options, load_all(config).images.train)
    if options.dry_run:
        print(yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip())
        return
    path = output_folder(options.out, config)
    with join(config.device) as world:
        check_shares(config.training.batch_size, world)
        summary = probe_encoder(config, preset, file, data, options, path, world)
        if world.is_main:
            print_summary(summary, path)


def check_data(config: ProbeConfig, file: EncoderFile, data: DataSet) -> None:
    """Check that the images have labels, and the encoder's channels.

    Raises:
        UserError: They do not.
    """
    if data.load_probe is None:
        raise UserError(f"--data {config.data} has no labels: expected train/<class>/<image> in it")
    if data.in_channels != file.shape.in_channels:
        raise UserError(
            f"--encoder {file.path} is for images of {file.shape.in_channels} channels, "
            f"those of {config.data} have {data.in_channels}"
        )


# The command line.
OPTIONS = options_of(PRESETS["tiny"].parts, ("epochs", "batch_size", "precision"), ProbeOptions)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, OPTIONS, name="probe", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
