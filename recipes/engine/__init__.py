"""What all recipes share: options, data, the training loop, probes and reports."""

from recipes.engine.main import run
from recipes.engine.masks import Masking
from recipes.engine.run.config import Options, Preset, Recipe, Training

__all__ = ["Masking", "Options", "Preset", "Recipe", "Training", "run"]
