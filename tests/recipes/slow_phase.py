"""Run a recipe that dawdles in one phase, so that a signal can be sent there.

    python -m tests.recipes.slow_phase PHASE FILE mae --data ...

It touches FILE when the phase is reached. Nothing else differs from `python recipes/mae.py`.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recipes.script  # noqa: F401 -- first, as in a script

PHASES = ("start-up", "step", "checkpoint", "evaluation", "report")
SECONDS = 1.0
STEP = 5


def dawdle(holder: Any, name: str, reached: Path, *, number: int = 1, after: bool = False) -> None:
    """Let the given call of a function touch a file and take longer, at its start or its end."""
    original: Callable[..., Any] = getattr(holder, name)
    calls = iter(range(1, sys.maxsize))

    def slow(*arguments: Any, **keywords: Any) -> Any:
        is_time = next(calls) == number
        result = original(*arguments, **keywords) if after else None
        if is_time:
            reached.touch()
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:  # computing, not sleeping
                pass
        return result if after else original(*arguments, **keywords)

    setattr(holder, name, slow)


def main(phase: str, reached: Path, recipe: str, *arguments: str) -> int:
    if phase == "start-up":
        reached.touch()
    import importlib

    from recipes.engine import loop, report, run
    from recipes.engine.run.checkpoint import Checkpoints

    module = importlib.import_module(f"recipes.{recipe}")
    if phase == "step":
        dawdle(loop.Task, "_compute", reached, number=STEP)
    elif phase == "checkpoint":  # it is written by a thread after `save` has returned
        dawdle(Checkpoints, "save", reached, number=2, after=True)
    elif phase == "evaluation":
        dawdle(report, "run_probes", reached)
        dawdle(sys.modules[f"recipes.{recipe}"], "score", reached) if recipe == "finetune" else None
    elif phase == "report":
        dawdle(report, "draw_reconstructions", reached)
    sys.argv = [f"recipes/{recipe}.py", *arguments]
    if hasattr(module, "RECIPE"):
        return run(module.RECIPE, "")
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
