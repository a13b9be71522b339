"""What a finished run shows: loss beside trivial predictors, probes, pictures, weights."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimkit import masking
from recipes.engine.data.sets import DataSet, ProbeData
from recipes.engine.errors import say
from recipes.engine.masks import first
from recipes.engine.pictures import draw_curves, draw_more_pictures, draw_reconstructions
from recipes.engine.pretrain import build_model, scalars
from recipes.engine.probes import features_to_compare, print_probes, run_probes
from recipes.engine.run.closing import print_closing
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.run.folder import RunFolder

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
    if data.probe is not None and len(data.class_names) > 1:  # train/all/ holds no classes
        untrained: Any = build_model(recipe, config)
        features = features_to_compare(encoder, untrained.encoder, config)
        summary["probes"] = run_probes(features, data.probe, seed=config.seed)
    folder.write_summary(summary)
    return summary


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


def print_summary(summary: dict[str, Any], folder: RunFolder) -> None:
    """Print what the run showed."""
    say(f"{summary['steps']} steps, {summary['images_per_s']:.0f} images/s")
    say(f"training loss  {summary['final_loss']:.3f}   mean of the last tenth of the steps")
    held_out = summary.get("held_out")
    if held_out:
        others = (f"{name} {value:.3f}" for name, value in held_out.items() if name != "loss")
        say(f"held-out loss  {held_out['loss']:.3f}   trivial predictors: {', '.join(others)}")
    numbers = summary.get("held_out_numbers")
    if numbers:
        say("held out:      " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    probes = summary.get("probes")
    if probes:
        print_probes(probes)
    print_unreadable(summary["unreadable_images"])
    print_closing(folder.path)


def _batches(images: Tensor, config: RunConfig) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(images), _BATCH):
        yield start, images[start : start + _BATCH].to(config.device)


def print_unreadable(names: Sequence[str]) -> None:
    """Name the images that were left out, if any."""
    if names:
        say(f"{len(names)} images could not be read and were left out:")
        say(*(f"  {name}" for name in names))
