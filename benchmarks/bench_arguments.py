"""Time of a training step with the checks of arguments and without.

    python benchmarks/bench_arguments.py [--turns 40]

Each recipe's default preset, its batch, one thread: masks, forward and backward pass, no optimizer.
Both ways take turns; the minimum counts. CPU time is of the whole process. Without: the wrappers
of the public functions stay, and what they check is left out.
"""

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench_checkpoint import best
from mimkit import _arguments, masking
from recipes.engine import Recipe

RECIPES = ("mae", "simmim", "convmae")


@dataclass
class Options:
    """Options of this benchmark.

    Attributes:
        turns: Repeats of each way.
    """

    turns: int = 40


def make_step(recipe: Recipe) -> Callable[[], None]:
    """Return a step of the recipe's first preset."""
    preset = next(iter(recipe.presets.values()))
    torch.manual_seed(0)
    model = recipe.build(preset.model)
    batch_size = preset.training.batch_size
    images = torch.randn(batch_size, preset.model.in_channels, *model.encoder.image_size)

    def step() -> None:
        masks = preset.masking.draw(masking.key(range(batch_size), seed=0), model.encoder.grid)
        model.zero_grad(set_to_none=True)
        model(images, masks).loss.backward()

    return step


@contextlib.contextmanager
def checks_replaced(check: Callable[..., None]) -> Iterator[None]:
    """Call this instead of the checks."""
    before, _arguments._check = _arguments._check, check  # a `Mock` takes longer
    try:
        yield
    finally:
        _arguments._check = before


def unchecked(step: Callable[[], None]) -> None:
    """Run a step without the checks."""
    with checks_replaced(lambda *_: None):
        step()


def time_checks(step: Callable[[], None]) -> list[float]:
    """Return the CPU seconds of each check in a step."""
    spent = []
    check = _arguments._check

    def timed(*arguments: Any) -> None:
        start = time.thread_time()
        check(*arguments)
        spent.append(time.thread_time() - start)

    with checks_replaced(timed):
        step()
    return spent


def main(options: Options) -> None:
    """Run the benchmark."""
    torch.set_num_threads(1)
    for name in RECIPES:
        step = make_step(importlib.import_module(f"recipes.{name}").RECIPE)
        step()  # what is made once: rules, buffers
        turns = [time_checks(step) for _ in range(options.turns)]
        least = min(map(sum, turns))
        print(f"{name}: {len(turns[0])} checks a step, {least * 1e3:.2f} ms CPU together")
        best({"  unchecked": lambda s=step: unchecked(s), "  checked": step}, options.turns)


if __name__ == "__main__":
    main(tyro.cli(Options))
