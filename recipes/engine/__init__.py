"""What all recipes share: options, data, the training loop, probes and reports."""

from recipes.engine.main import run
from recipes.engine.masks import Masking
from recipes.engine.run.config import Preset, Recipe, Training

# Last: the function takes the place of the room of the same name in this namespace.

__all__ = ["Masking", "Preset", "Recipe", "Training", "run"]
