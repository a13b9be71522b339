r"""The papers' figures of finished runs.

    python recipes/mae.py --out runs/mae
    python recipes/figures.py runs/mae                                      # two minutes on a CPU
    python recipes/finetune.py --encoder runs/mae --blocks 0 1 2 4 --out runs/partial
    python recipes/figures.py runs/partial [runs/another ...]

Of a run with an encoder: t-SNE of patches by class beside the untrained encoder, with k-NN accuracy
(CAE, arXiv:2202.03026); the attention of the encoder's last block and, where the run was probed, of
the attentive probe; of a pre-training run also one picture at several mask ratios (MAE,
arXiv:2111.06377, figure 4). Of runs of `finetune.py --blocks`: accuracy over the number of trained
blocks (MAE, figure 9), of all these runs in the folder of the first. Pictures are written into the
run folders.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads


from recipes import cae, convmae, mae, simmim, vit_mpp
from recipes.engine import Recipe, fields
from recipes.engine.data.load import load_data
from recipes.engine.errors import UserError, say
from recipes.engine.figures import (
    draw_encoder_attention,
    draw_mask_ratios,
    draw_partial_fine_tuning,
    draw_tsne,
    partial_curves,
)
from recipes.engine.pictures import draw_attention, tiled_pictures
from recipes.engine.pretrain import build_model
from recipes.engine.pretrained.encoders import (
    ENCODER,
    build_encoder,
    check_no_windows,
    fill_encoder,
    load_encoder,
)
from recipes.engine.pretrained.shapes import Encoder, EncoderShape, SwinShape, ViTShape
from recipes.engine.probes import encoder_features
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.run.checkpoint import load_model
from recipes.engine.run.cli import Runs, refusing, run_command
from recipes.engine.run.config import RunConfig, choose_device
from recipes.engine.run.folder import CHECKPOINTS, RunFolder
from recipes.engine.run.state import read_summary

RECIPES = {one.RECIPE.name: one.RECIPE for one in (mae, simmim, cae, convmae, vit_mpp)}
_PICTURES = 6


@dataclass(frozen=True)
class FigureOptions:
    """Draw the papers' figures of finished runs.

    Attributes:
        runs: Folders of finished runs.
        ratios: Mask ratios at which a pre-training run reconstructs a picture.
        seed: Seed of scenes, of the patches in t-SNE, and of t-SNE.
        device: Where to compute; "auto" takes a GPU if there is one.
    """

    runs: Runs
    ratios: tuple[fields.OpenFraction, ...] = (0.5, 0.75, 0.85, 0.9, 0.95)
    seed: fields.Seed = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What is read of a run folder before anything is drawn.

    Attributes:
        path: The folder.
        config: Content of its `config.yaml`.
        summary: Content of its `summary.json`.
    """

    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of a pre-training run."""
        return RECIPES.get(str(self.config["recipe"]))

    @property
    def is_partial(self) -> bool:
        """Whether it is of `finetune.py --blocks`."""
        return "blocks" in self.config


def read_run(path: Path) -> FinishedRun:
    """Read a run folder.

    Raises:
        UserError: If it is no folder of a finished run, or none that a figure is made of.
    """
    try:
        summary = read_summary(path)
        config = read_yaml(path / "config.yaml") if summary is not None else None
    except UnreadableError as error:
        raise UserError(f"{path} holds a damaged file: {error}") from error
    if summary is None:
        raise UserError(f"{path} is not the folder of a finished run: it has no summary.json")
    if not isinstance(config, dict) or "recipe" not in config:
        raise UserError(f"{path} holds a config.yaml that is not of a run of mimkit")
    run = FinishedRun(path, config, summary)
    if not run.is_partial and not (path / ENCODER).is_file():
        raise UserError(
            f"{path} is a run of {config['recipe']} without {ENCODER}: give a run of pre-training, "
            "segment, detect, or finetune --blocks"
        )
    return run


def rebuild(like: Any, values: Any) -> Any:
    """Return a configuration of the type of `like` from the values of a `config.yaml`.

    Raises:
        ValueError: If the values are not those of this type.
    """
    if like is None:
        return None
    try:
        plain = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return dataclasses.replace(like, **plain)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"it has no values of {type(like).__name__}: {error}") from error


def config_of(run: FinishedRun, device: str) -> RunConfig:
    """Rebuild the configuration of a pre-training run, to compute on a device.

    Raises:
        UserError: If `config.yaml` is not of a run of this version.
    """
    assert run.recipe is not None
    values = dict(run.config)
    try:
        preset = run.recipe.presets[values["preset"]]
        for name in ("model", "training", "masking"):
            values[name] = rebuild(getattr(preset, name), values[name])
        return dataclasses.replace(RunConfig(**values), device=device)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{run.path / 'config.yaml'} cannot be read: {error}") from error


def encoder_config(run: FinishedRun, shape: EncoderShape, device: str) -> RunConfig:
    """Return what of the configuration of a dense run counts here: seed and device; float32.

    Raises:
        UserError: If `config.yaml` is not of a run.
    """
    training = mae.PRESETS["tiny"].training
    names = ("recipe", "preset", "data", "lr", "max_steps", "seed", "compile", "accumulate")
    try:
        known = {name: run.config[name] for name in names}
    except KeyError as error:
        raise UserError(f"{run.path / 'config.yaml'} cannot be read: it has no {error}") from error
    return RunConfig(model=shape, training=training, device=device, **known)


def draw_run(run: FinishedRun, options: FigureOptions) -> Iterator[Path | str]:
    """Draw what there is to draw of one run with an encoder.

    Yields:
        Files, and lines to print.

    Raises:
        UserError: If its files cannot be read.
    """
    device = choose_device(options.device)
    file = load_encoder(run.path / ENCODER, ViTShape())
    check_no_windows(file)
    shape, recipe = file.shape, run.recipe
    size = shape.image_axes()
    config = encoder_config(run, shape, device) if recipe is None else config_of(run, device)
    # The images of a dense run have other sizes than its encoder: the photographs stand for them.
    name, decode = "photos" if recipe is None else config.data, config.training.decoder
    data = load_data(name, image_size=size, seed=config.seed, decode=decode)
    if data.in_channels != shape.in_channels:
        raise UserError(
            f"{run.path / ENCODER} is for images of {shape.in_channels} channels, those of {name} "
            f"have {data.in_channels}: there is nothing to draw them from"
        )
    model = None
    if recipe is not None:
        model = build_model(recipe, config).eval()
        if not load_model(run.path / CHECKPOINTS, model):
            yield f"mask-ratios.png is not drawn: {run.path} has no checkpoint, thus no decoder"
            model = None
    encoders: dict[str, Encoder] = {
        name: build_encoder(shape, seed=config.seed) for name in ("trained", "untrained")
    }
    fill_encoder(encoders["trained"], file)
    features = {name: encoder_features(encoder, config) for name, encoder in encoders.items()}
    trained: Any = encoders["trained"]
    grid = getattr(trained, "out_grid", trained.grid)
    pictures = list(islice(tiled_pictures(data, size), _PICTURES))
    if recipe is not None and model is not None and pictures:
        with refusing():
            yield draw_mask_ratios(recipe, config, model, pictures[0], options.ratios, run.path)
    if isinstance(shape, SwinShape):
        yield f"encoder-attention.png is not drawn: a {shape.kind} attends in windows"
    elif pictures:
        yield draw_encoder_attention(encoders, config, pictures, run.path)
    if "probes" in run.summary and data.probe is not None:
        folder = RunFolder(run.path, config)
        draw_attention(features, data.probe, grid, folder, seed=config.seed)
        yield run.path / "attention.png"
    try:
        tsne, scores = draw_tsne(
            features, data.normalize, size, grid, shape.in_channels, run.path, seed=options.seed
        )
    except UserError as error:
        yield f"tsne.png is not drawn: {error}"
        return
    yield tsne
    numbers = ", ".join(f"{name} {score:.1f}" for name, score in scores.items())
    yield f"k-NN of patches of scenes, 11 classes (accuracy, %; chance 9.1): {numbers}"


def draw_partial(runs: Sequence[FinishedRun]) -> Path:
    """Draw the curves of all runs of partial fine-tuning, in the folder of the first."""
    each = {run.path.resolve().name: partial_curves(run.summary) for run in runs}
    if len(each) < len(runs):
        each = {str(run.path): partial_curves(run.summary) for run in runs}
    curves = {
        kind if len(runs) == 1 else f"{name}, {kind}": values
        for name, found in each.items()
        for kind, values in found.items()
    }
    return draw_partial_fine_tuning(curves, runs[0].path)


def run(options: FigureOptions) -> None:
    """Draw the figures of all runs, and print the files.

    Raises:
        UserError: If a folder is no finished run, or cannot be read or written.
    """
    if not options.runs:
        raise UserError("give the folder of a finished run, or of several")
    runs = [read_run(path) for path in options.runs]
    partial = [one for one in runs if one.is_partial]
    try:
        for one in runs:
            if not one.is_partial:
                for found in draw_run(one, options):
                    say(found)
        if partial:
            say(draw_partial(partial))
    except OSError as error:
        raise UserError(f"the pictures cannot be written: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, FigureOptions, name="figures", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
