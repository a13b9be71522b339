"""Time to save, verify and load a checkpoint, beside `torch.distributed.checkpoint`'s own files.

    python benchmarks/bench_checkpoint.py [--megabytes 400] [--turns 7]

Each turn saves the same state (a model and AdamW's moments) in both ways; the minimum counts. CPU
time is of the whole process. Both write to the disk before they end.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.engine.run.checkpoint import Checkpoints, _state, find_damage
from recipes.engine.run.world import World


@dataclass
class Options:
    """Options of this benchmark.

    Attributes:
        megabytes: Size of the state.
        turns: Repeats of each way.
    """

    megabytes: int = 400
    turns: int = 7


def make(megabytes: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Make a model of layers of 1024 x 1024 whose state has about this size."""
    layers = max(megabytes * 1_000_000 // (3 * 4 * 1024 * 1025), 1)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def best(ways: dict[str, Callable[[], object]], turns: int) -> None:
    """Run the ways in turns, and print the least wall and CPU time of each."""
    least = {name: (float("inf"), float("inf")) for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            least[name] = tuple(map(min, zip(least[name], spent, strict=True)))  # type: ignore[assignment]
    for name, (wall, cpu) in least.items():
        print(f"{name:<42}{wall * 1e3:10.2f} ms wall {cpu * 1e3:10.2f} ms CPU")


def main(options: Options) -> None:
    """Run the benchmark."""
    model, optimizer = make(options.megabytes)
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = Path(folder) / "dcp", Checkpoints(Path(folder) / "ours", World())

        def save_theirs() -> None:
            shutil.rmtree(theirs, ignore_errors=True)
            dcp_async_save(_state(model, optimizer), checkpoint_id=theirs, no_dist=True).result()

        def save_ours() -> None:
            shutil.rmtree(ours.folder, ignore_errors=True)
            ours.save(1, model, optimizer)
            ours.finish()

        best({"save, PyTorch's files": save_theirs, "save, ours": save_ours}, options.turns)
        state = _state(model, optimizer)
        size = sum(file.stat().st_size for file in ours.path(1).iterdir()) / 2**30
        print(f"{size:.2f} GiB")
        best(
            {
                "load, PyTorch's files": lambda: dcp_load(
                    state, checkpoint_id=theirs, no_dist=True
                ),
                "load, ours": lambda: ours.load(1, model, optimizer),
                "verify": lambda: find_damage(ours.path(1)),
            },
            options.turns,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
