"""What all recipes share: options, data, the training loop, probes and reports.

In this namespace `run` is the function; the package of that name is reached by its modules, as in
`from recipes.engine.run.config import RunConfig`.
"""

from recipes.engine.data.sets import DataSet, TrainSet
from recipes.engine.main import run
from recipes.engine.masks import Masking
from recipes.engine.run.config import Preset, Recipe, Training

__all__ = ["DataSet", "Masking", "Preset", "Recipe", "TrainSet", "Training", "run"]
