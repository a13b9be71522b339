"""What a finished run shows: loss beside trivial predictors, probes, pictures, weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from mimkit import masking, viz
from recipes.engine.data.sets import DataSet, ProbeData
from recipes.engine.errors import UserError
from recipes.engine.masks import first
from recipes.engine.pretrain import build_model, scalars
from recipes.engine.probes import Features, evaluate, raw_pixels
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.run.folder import RunFolder

_PROBE_NAMES = {"knn": "k-NN", "linear": "linear", "attentive": "attentive"}
_BATCH = 256


def write_report(
    recipe: Recipe,
    config: RunConfig,
    data: DataSet,
    folder: RunFolder,
    model: nn.Module,
    *,
    unreadable: list[str],
) -> dict[str, Any]:
    """Evaluate a trained model, write what it shows, and return the summary."""
    encoder: Any = model.encoder
    if not folder.read_metrics():
        raise UserError(f"{folder.path / 'metrics.jsonl'} holds no step: choose another --out")
    folder.write_weights("encoder.safetensors", encoder)
    draw_curves(folder)
    draw_reconstructions(recipe, config, data, folder, model)
    draw_more_pictures(recipe, config, data, folder, model)
    metrics = folder.read_metrics()
    last = metrics[-max(len(metrics) // 10, 1) :]
    summary: dict[str, Any] = {
        "steps": metrics[-1]["step"],
        "final_loss": sum(row["loss"] for row in last) / len(last),
        "images_per_s": sum(row["images_per_s"] for row in metrics[1:] or metrics)
        / len(metrics[1:] or metrics),
        "unreadable_images": unreadable,
    }
    if data.probe is not None:
        scores = score_held_out(recipe, config, data.probe, model)
        summary["held_out"], summary["held_out_numbers"] = scores
        summary["probes"] = run_probes(recipe, config, data.probe, model)
    folder.write_summary(summary)
    return summary


def draw_curves(folder: RunFolder) -> None:
    """Draw the loss over the steps, beside what trivial predictors score."""
    metrics = folder.read_metrics()
    names = metrics[0]["baselines"]
    series = {"loss": [row["loss"] for row in metrics]}
    series |= {name: [row["baselines"][name] for row in metrics] for name in names}
    picture = viz.curves([row["step"] for row in metrics], series, title="loss")
    picture.save(folder.path / "curves.png")


@torch.no_grad()
def draw_reconstructions(
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, model: nn.Module
) -> None:
    """Draw held-out pictures: as they are, masked, and reconstructed tile by tile."""
    encoder: Any = model.encoder
    height, width = encoder.image_size
    rows, share = [], 0.0
    for number, picture in enumerate(tiled_pictures(data, encoder.image_size)):
        ids = torch.arange(len(picture.tiles)) + (number << 32)
        mask = first(config.masking.draw(masking.key(ids, seed=config.seed), encoder.grid))
        share = mask.num_masked / mask.num_tokens
        patch_size = height // mask.grid[0], width // mask.grid[1]  # not always the encoder's
        with config.autocast():
            filled = recipe.reconstruct(
                model, picture.inputs.to(config.device), mask.to(config.device)
            )
        masked = viz.show_masked(picture.tiles, mask, patch_size)
        shown = (picture.tiles, masked, picture.from_inputs(filled))
        rows.append([picture.join(tiles) for tiles in shown])
    captions = ["input (not trained on)", f"masked, {share:.0%}", "reconstruction"]
    note = f"{_tile_note(encoder)} and filled in by itself.\n{_note(recipe, model)}"
    viz.panel(rows, captions, note=note).save(folder.path / "reconstructions.png")


def _note(recipe: Recipe, model: nn.Module) -> str:
    return recipe.note if isinstance(recipe.note, str) else recipe.note(model)


@torch.no_grad()
def draw_more_pictures(
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, model: nn.Module
) -> None:
    """Draw what the recipe shows of held-out pictures beside reconstructions."""
    encoder: Any = model.encoder
    for name, draw in recipe.pictures.items():
        rows, captions = [], []
        for picture in tiled_pictures(data, encoder.image_size):
            with config.autocast():
                columns = draw(model, picture.inputs.to(config.device))
            captions = ["input (not trained on)", *columns]
            shown = (picture.tiles, *(picture.from_inputs(tiles) for tiles in columns.values()))
            rows.append([picture.join(tiles) for tiles in shown])
        note = f"{_tile_note(encoder)}.\n{_note(recipe, model)}"
        viz.panel(rows, captions, note=note).save(folder.path / f"{name}.png")


@dataclass(frozen=True, eq=False)
class TiledPicture:
    """A picture cut into tiles of the encoder's size.

    Attributes:
        tiles: Tiles in [0, 1], row by row.
        inputs: Tiles as model inputs.
        mean: What was subtracted from them.
        std: What they were divided by then.
        down: Tiles in a column.
        across: Tiles in a row.
    """

    tiles: Tensor
    inputs: Tensor
    mean: Tensor
    std: Tensor
    down: int
    across: int

    def from_inputs(self, inputs: Tensor) -> Tensor:
        """Turn model inputs of the tiles into tiles."""
        return inputs.float().cpu() * self.std + self.mean

    def join(self, tiles: Tensor) -> Tensor:
        """Put the tiles together."""
        return rearrange(tiles, "(a b) c h w -> c (a h) (b w)", a=self.down, b=self.across)


def tiled_pictures(data: DataSet, size: tuple[int, int]) -> Iterator[TiledPicture]:
    """Cut each held-out picture into tiles of a height and width."""
    height, width = size
    for picture in data.pictures:
        down, across = picture.shape[1] // height, picture.shape[2] // width
        tiles = rearrange(picture, "c (a h) (b w) -> (a b) c h w", a=down, b=across)
        yield TiledPicture(tiles, *data.normalize(tiles), down, across)


def _tile_note(encoder: Any) -> str:
    height, width = encoder.image_size
    return f"Tiles of {height} x {width} px, each normalised"


@torch.no_grad()
def score_held_out(
    recipe: Recipe, config: RunConfig, probe: ProbeData, model: nn.Module
) -> tuple[dict[str, float], dict[str, float]]:
    """Score the model and trivial predictors on images it was not trained on, fixed masks.

    Returns:
        The loss beside the trivial predictors', and the other numbers of the model's output.
    """
    encoder: Any = model.encoder
    totals: dict[str, float] = {}
    names: dict[str, None] = {}
    for start, images in _batches(probe.test_images, config):
        ids = torch.arange(start, start + len(images), device=images.device)
        mask = first(config.masking.draw(masking.key(ids, seed=config.seed).view(1), encoder.grid))
        with config.autocast():
            numbers = scalars(model(images, mask))
        trivial = recipe.baselines(model, images, mask)
        names |= dict.fromkeys(["loss", *trivial])
        for name, value in (numbers | trivial).items():
            share = len(images) / len(probe.test_images)
            totals[name] = totals.get(name, 0.0) + value.item() * share
    others = {name: value for name, value in totals.items() if name not in names}
    return {name: totals[name] for name in names}, others


def run_probes(
    recipe: Recipe, config: RunConfig, probe: ProbeData, model: nn.Module
) -> dict[str, dict[str, float]]:
    """Probe the trained encoder, the same encoder untrained, and raw pixels."""
    untrained = build_model(recipe, config).eval()
    encoder: Any = model.encoder
    features = {
        "trained": encoder_features(model, config),
        "untrained": encoder_features(untrained, config),
        "pixels": raw_pixels(pixels_per_token(encoder)),
    }
    scores = {name: evaluate(f, probe, seed=config.seed) for name, f in features.items()}
    return {kind: {name: scores[name][kind] for name in features} for kind in _PROBE_NAMES}


def encoder_features(model: nn.Module, config: RunConfig) -> Features:
    """Return pooled features and tokens of the encoder, which sees whole images."""
    encoder: Any = model.encoder

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with config.autocast():
            tokens = encoder(images.to(config.device)).float()
        return encoder.pool(tokens), tokens

    return features


def pixels_per_token(encoder: Any) -> tuple[int, int]:
    """Return height and width, in pixels, of what an encoder's token stands for."""
    height, width = (
        size // tokens for size, tokens in zip(encoder.image_size, encoder.grid, strict=True)
    )
    return height, width


def print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print what the run showed."""
    print(f"{summary['steps']} steps, {summary['images_per_s']:.0f} images/s")
    print(f"training loss  {summary['final_loss']:.3f}")
    held_out = summary.get("held_out")
    if held_out:
        others = (f"{name} {value:.3f}" for name, value in held_out.items() if name != "loss")
        print(f"held-out loss  {held_out['loss']:.3f}   trivial predictors: {', '.join(others)}")
    numbers = summary.get("held_out_numbers")
    if numbers:
        print("held out:      " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    probes = summary.get("probes")
    if probes:
        print(f"{'probe (accuracy, %)':<22}{'trained':>10}{'untrained':>11}{'raw pixels':>12}")
        for kind, name in _PROBE_NAMES.items():
            row = probes[kind]
            print(
                f"{name:<22}{row['trained']:>10.1f}{row['untrained']:>11.1f}{row['pixels']:>12.1f}"
            )
    print_unreadable(summary["unreadable_images"])
    print(f"pictures, curves, weights and numbers: {folder.path}")


def _batches(images: Tensor, config: RunConfig) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(images), _BATCH):
        yield start, images[start : start + _BATCH].to(config.device)


def print_unreadable(names: Sequence[str]) -> None:
    """Name the images that were left out, if any."""
    if names:
        print(f"{len(names)} images could not be read and were left out:")
        print("\n".join(f"  {name}" for name in names))
