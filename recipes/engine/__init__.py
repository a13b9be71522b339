"""What all recipes share: options, data, the training loop, probes and reports."""

from recipes.engine.config import Preset, Recipe, Training
from recipes.engine.main import run

__all__ = ["Preset", "Recipe", "Training", "run"]
