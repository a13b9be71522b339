"""Set up a recipe that runs as a script or by `python -m`, before PyTorch is imported.

From here on, signals are handled.
"""

import os
import sys
from pathlib import Path

# Waiting threads that spin for long slow down a busy machine; OpenMP reads this as torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# A script's own folder comes first on the path: put the project's root there, as `-m` does.
_recipes = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == _recipes:
    sys.path[0] = str(_recipes.parent)

__import__("recipes.signals").signals.listen()
