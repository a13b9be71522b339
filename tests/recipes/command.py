"""What a command line means to a recipe, without running it."""

from recipes.engine import Recipe
from recipes.engine.main import check_fit, options_type
from recipes.engine.run.cli import Options, parse_options
from recipes.engine.run.config import RunConfig, resolve


def options_for(recipe: Recipe, *arguments: str) -> Options:
    return parse_options(options_type(recipe), arguments, program=recipe.name, description="")


def config_for(recipe: Recipe, *arguments: str) -> RunConfig:
    options = options_for(recipe, *arguments)
    return resolve(options, recipe.name, recipe.presets, config_type=RunConfig)


def check_command(recipe: Recipe, *arguments: str) -> None:
    """Resolve a command line and check that model, masks and target fit, before any data."""
    check_fit(recipe, config_for(recipe, *arguments))
