"""What all recipes share: options, data, the training loop, probes and reports."""

from recipes.engine.config import Options, Preset, Recipe, Training
from recipes.engine.main import run
from recipes.engine.masks import Masking

__all__ = ["Masking", "Options", "Preset", "Recipe", "Training", "run"]
