"""From the command line to a finished run."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mimkit import masking
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import DataSet
from recipes.engine.dry_run import describe
from recipes.engine.errors import UserError
from recipes.engine.report import print_summary, write_report
from recipes.engine.run.checkpoint import find_origin
from recipes.engine.run.cli import run_command
from recipes.engine.run.config import Options, PretrainConfig, Recipe, resolve
from recipes.engine.run.folder import RunFolder, default_path
from recipes.engine.run.world import World, check_shard, check_shares, join
from recipes.engine.train import (
    build_model,
    count_steps,
    train,
    warn_of_short_schedule,
    warn_of_slow_precision,
)


def run(recipe: Recipe, description: str, arguments: Sequence[str] | None = None) -> int:
    """Run a recipe.

    Args:
        recipe: The method.
        description: Text above the options of `--help`.
        arguments: Command line; that of the process if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is told on one line of stderr.
    """
    return run_command(
        partial(_run, recipe),
        recipe.options,
        name=recipe.name,
        description=description,
        arguments=arguments,
    )


def _run(recipe: Recipe, options: Options) -> None:
    config = resolve(options, recipe)
    data = load_data(
        config.data,
        image_size=_image_size(config),
        seed=config.seed,
        crop_area=config.training.crop_area,
        interpolation=config.training.interpolation,
    )
    config = _with_channels(config, data)
    _, num_steps = count_steps(config, data)
    _check_fit(recipe, config)  # before a folder is made
    check_shard(options.shard)
    check_shares(config.training.batch_size, World(), accumulate=config.accumulate)
    warn_of_slow_precision(config)
    warn_of_short_schedule(config)
    if options.dry_run:
        print(describe(recipe, config, data))
        return
    with join(config.device) as world:
        check_shares(config.training.batch_size, world, accumulate=config.accumulate)
        path = options.out or default_path(config)
        if not path.exists():
            find_origin(options.resume, world, num_steps)  # so that a mistake leaves no folder
        with RunFolder(path, config, world) as folder:
            summary = folder.read_summary()
            if summary is None:
                weights = train(recipe, config, data, folder, options, world)
                if world.is_main:
                    model = build_model(recipe, config).eval()
                    model.load_state_dict(weights)
                    names = [data.train.describe(image) for image in folder.read_unreadable()]
                    summary = write_report(recipe, config, data, folder, model, unreadable=names)
            if world.is_main and summary is not None:
                print_summary(summary, folder)


def _check_fit(recipe: Recipe, config: PretrainConfig) -> None:
    """Check that a model of this shape can be made, and that masks fit it and what it predicts."""
    try:
        with torch.device("meta"):  # shapes alone
            model: Any = recipe.build(config.model)
    except ValueError as error:
        raise UserError(f"preset {config.preset} on {config.data}: {error}") from error
    try:
        masks = config.masking.draw(masking.key([0], seed=config.seed), model.encoder.grid)
        getattr(model, "check_masks", lambda masks: None)(masks)
    except ValueError as error:
        raise UserError(f"masks of preset {config.preset}: {error}") from error


def _image_size(config: PretrainConfig) -> tuple[int, int]:
    size: Any = config.model.image_size
    return (size, size) if isinstance(size, int) else size


def _with_channels(config: PretrainConfig, data: DataSet) -> PretrainConfig:
    model = dataclasses.replace(config.model, in_channels=data.in_channels)
    return dataclasses.replace(config, model=model)
