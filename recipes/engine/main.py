"""Run a recipe from the command line."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from mimkit import masking
from recipes.engine.data.load import load_data
from recipes.engine.data.on_gpu import decoded_on
from recipes.engine.data.sets import DataSet
from recipes.engine.dry_run import describe
from recipes.engine.errors import UserError, say
from recipes.engine.loop import Plan, make_plan, run_steps
from recipes.engine.masks import first
from recipes.engine.pretrain import (
    NativePretraining,
    Pretraining,
    build_model,
    check_memory,
)
from recipes.engine.pretrained.tokenizers import missing_files_allowed
from recipes.engine.report import print_summary, write_report
from recipes.engine.run.checkpoint import find_origin
from recipes.engine.run.cli import (
    ARRAY_FLAGS,
    FLAGS,
    Options,
    options_of,
    parse_options,
    run_command,
)
from recipes.engine.run.config import (
    Recipe,
    RunConfig,
    resolve,
    warn_of_short_schedule,
    warn_of_slow_precision,
)
from recipes.engine.run.folder import RunFolder, find_statistics, open_folder, output_folder
from recipes.engine.run.world import World, check_shard, check_shares, join, whole_weights
from recipes.engine.targets import Target


def run(
    recipe: Recipe,
    description: str,
    arguments: Sequence[str] | None = None,
    *,
    data: DataSet | None = None,
) -> int:
    """Run a recipe.

    Args:
        recipe: The recipe.
        description: Text above the options in `--help`.
        arguments: Command-line arguments; by default those of the process.
        data: Data set to train on instead of the one that `--data` names.

    Returns:
        The exit code: 0, or 2 after a `UserError`, which is printed as one line on stderr.
    """
    return run_command(
        partial(_run, recipe, data),
        options_type(recipe),
        name=recipe.name,
        description=description,
        arguments=arguments,
    )


def pretrain(recipe: Recipe, arguments: Sequence[str]) -> None:
    """Run a recipe from another script, whose command line says what went wrong.

    Raises:
        UserError: If something that was asked for does not fit.
        Stopped: After a signal.
    """
    options = parse_options(
        options_type(recipe), arguments, program=f"recipes/{recipe.name}.py", description=""
    )
    _run(recipe, None, options)


def options_type(recipe: Recipe) -> type[Options]:
    """Derive the options of a recipe from its first preset."""
    preset = next(iter(recipe.presets.values()))
    names = (
        *FLAGS,
        "patch_size",
        *ARRAY_FLAGS,
        "native_size",
        "bands",
        "mask_ratio",
        *recipe.flags,
    )
    return options_of(preset.parts, names, Options, presets=recipe.presets)


def _run(recipe: Recipe, given: DataSet | None, options: Options) -> None:
    if given is not None:
        options = dataclasses.replace(options, data=given.name)
    config = resolve(options, recipe.name, recipe.presets, config_type=RunConfig)
    check_sizes(recipe, config)
    with join(config.device, timeout=options.timeout) as world:
        data = _load(config, options, world) if given is None else given
        data = decoded_on(options.decode, data)
        config = config.for_data(data)
        plan = make_plan(config, options, data.train)
        with missing_files_allowed() if options.dry_run else contextlib.nullcontext():
            model = check_fit(recipe, config)  # before a folder is made
            check_shard(options.shard)
            check_shares(config.training.batch_size, world, accumulate=config.accumulate)
            if world.is_main:
                warn_of_slow_precision(config)
                warn_of_short_schedule(config)
            if options.dry_run:
                if world.is_main:
                    say(*describe(recipe, config, data, plan, recompute=options.recompute))
                return
        if not options.shard:
            check_memory(model, config)
        path = output_folder(options.out, config)
        if not world.agree(path.exists()):
            find_origin(options.resume, world, plan.num_steps)  # fails before creating the folder
        with open_folder(path, config, world, options) as folder:
            summary = folder.read_summary()
            if summary is None:
                summary = _train(recipe, config, data, plan, folder, options)
            if world.is_main:
                print_summary(summary, folder)


def _load(config: RunConfig, options: Options, world: World) -> DataSet:
    return load_data(
        config.data,
        image_size=config.model.image_size,
        seed=config.seed,
        crop_area=config.training.crop_area,
        interpolation=config.training.interpolation,
        native=config.native,
        decode=config.training.decoder,
        options=config.training.arrays,
        find_statistics=partial(find_statistics, options.out, config),
        share=world.share,
    )


def check_sizes(recipe: Recipe, config: RunConfig) -> None:
    """Check that the recipe takes images of different sizes, if it shall.

    Raises:
        UserError: If it does not.
    """
    given = f"--native-size {config.training.native_size}"
    if config.training.native_size is None:
        return
    if not recipe.takes_any_size:
        raise UserError(f"{given}: {recipe.name} needs images of one size, omit it; mae takes it")
    if config.compile:
        raise UserError(f"{given}: a compiled model needs images of one size, omit --compile")
    if getattr(config.masking, "views", 1) > 1:
        raise UserError(f"{given} needs one mask an image: omit --views")


def check_fit(recipe: Recipe, config: RunConfig) -> nn.Module:
    """Check that the model can be built, and that the masks fit the model and its target.

    Returns:
        The model, without weights (on PyTorch's meta device).

    Raises:
        UserError: If something does not fit.
    """
    try:
        with torch.device("meta"):  # shapes only
            model: Any = recipe.build(config.model)
    except ValueError as error:
        raise UserError(f"preset {config.preset} on {config.data}: {error}") from error
    try:
        masks = config.masking.draw(masking.key([0], seed=config.seed), model.encoder.grid)
        if isinstance(target := getattr(model, "target", None), Target):
            target.group(first(masks))
        if config.training.native_size is not None:
            model.check_ragged()
    except ValueError as error:
        raise UserError(f"masks of preset {config.preset}: {error}") from error
    return cast(nn.Module, model)


def _train(
    recipe: Recipe,
    config: RunConfig,
    data: DataSet,
    plan: Plan,
    folder: RunFolder,
    options: Options,
) -> dict[str, Any]:
    """Train from the last checkpoint, evaluate, and return the summary."""
    kind = Pretraining if config.training.native_size is None else NativePretraining
    task = kind(recipe, config, data, folder.world, shard=options.shard)
    run_steps(task, plan, data.train, folder, options)
    weights = whole_weights(task.model)
    if not folder.world.is_main:
        return {}
    model = build_model(recipe, config).eval()
    model.load_state_dict(weights)
    names = [data.train.describe(image) for image in folder.read_unreadable()]
    return write_report(recipe, config, data, folder, model, unreadable=names)
