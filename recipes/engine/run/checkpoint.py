"""Checkpoints of a run: written atomically and asynchronously.

A checkpoint is a folder `checkpoints/step-<n>`. `torch.distributed.checkpoint` writes it under a
temporary name; then it gets a completion marker and its final name. A folder without the marker or
with a temporary name is left from a killed run: it is ignored, and removed at the next save.

Training waits only until the state is copied. A separate thread writes the copy.
"""

import contextlib
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.optim import Optimizer

from recipes.engine.errors import UserError
from recipes.engine.run.world import World

_MARKER = "COMPLETE"
_NAME = re.compile(r"step-(\d+)")
_KEPT = 2


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Folder of the checkpoints.
        world: The processes; each writes its part.
        keep_every: Checkpoints at multiples of this many steps are never removed. Of the others,
            only the last two are kept.
    """

    def __init__(self, folder: Path, world: World, *, keep_every: int | None = None) -> None:
        self.folder = folder
        self.world = world
        self.keep_every = keep_every
        # A single process is fine. Not in a context manager, because the writing thread warns too.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # A separate group, so that writing cannot interfere with the collectives of training.
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread = ThreadPoolExecutor(1)
        self._writing: tuple[int, Future[None]] | None = None

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted(int(name[1]) for name, path in found if name and (path / _MARKER).exists())

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Copy the state and start to write it; `finish` waits until it is written.

        Raises:
            UserError: If this checkpoint or the one before cannot be written. Earlier ones are not
                touched.
        """
        self.finish()
        partial = self.folder / f"{self.path(step).name}.partial"
        with self._explaining(step):
            if self.world.is_main:
                self.clean()
                partial.mkdir(parents=True)
            self.world.wait()
            written: Any = dcp_async_save(
                _state(model, optimizer),
                checkpoint_id=partial,
                process_group=self._group,
                no_dist=self.world.size == 1,
            )
        self._writing = step, self._thread.submit(self._complete, step, partial, written)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete.

        Raises:
            UserError: If it cannot be written.
        """
        if self._writing is not None:
            (step, complete), self._writing = self._writing, None
            with self._explaining(step):
                complete.result()

    def _complete(self, step: int, partial: Path, written: Future[None]) -> None:
        """Mark a checkpoint as complete, then remove old ones."""
        written.result()  # in the main process: waits for the parts of all processes
        if self.world.is_main:
            (partial / _MARKER).touch()
            partial.rename(self.path(step))
            self._remove_old()

    @contextlib.contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            kept = self.steps()
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {_reason(error)}; "
                + (f"step {kept[-1]} is safe" if kept else "no earlier one exists")
            ) from error

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Load a checkpoint into a model and its optimizer, for any number of processes.

        Raises:
            UserError: If it belongs to another model.
        """
        path = self.path(step)
        try:
            state = _state(model, optimizer)
            dcp_load(state, checkpoint_id=path, no_dist=self.world.size == 1)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        except (CheckpointException, KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"the checkpoint {path} is not of this model: {_reason(error)}"
            ) from error

    def clean(self) -> None:
        """Remove incomplete checkpoints, which a killed run leaves."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            complete = _NAME.fullmatch(path.name) and (path / _MARKER).exists()
            if path.is_dir() and not complete:
                shutil.rmtree(path)

    def _remove_old(self) -> None:
        for step in self.steps()[:-_KEPT]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.path(step))


def start_from(
    resume: str, checkpoints: Checkpoints, model: nn.Module, optimizer: Optimizer, num_steps: int
) -> int:
    """Load the checkpoint to resume from, and return its step; 0 without one.

    Raises:
        UserError: If `--resume` names no checkpoint, or is "never" and there is one.
    """
    # The main process chooses: another process may see a folder that is being renamed.
    steps = checkpoints.world.agree(checkpoints.steps())
    if resume == "never" and steps:
        raise UserError(
            f"--resume never, but {checkpoints.folder} holds the checkpoint of step {steps[-1]}: "
            "choose another --out"
        )
    if steps:
        checkpoints.load(steps[-1], model, optimizer)
        return steps[-1]
    origin = find_origin(resume, checkpoints.world, num_steps)
    if origin is None:
        return 0
    others, step = origin
    others.load(step, model, optimizer)
    return step


def find_origin(resume: str, world: World, num_steps: int) -> tuple[Checkpoints, int] | None:
    """Return the checkpoint of another run that `--resume` names; None for "auto" and "never".

    Raises:
        UserError: If it is not a complete checkpoint, or is at or after the last step of this run.
    """
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    others = Checkpoints(path.parent, world)
    found = next((step for step in others.steps() if others.path(step) == path), None)
    if found is None:
        raise UserError(
            f"--resume {resume} is not a complete checkpoint: give auto, never or the folder of a "
            "checkpoint"
        )
    if found >= num_steps:
        raise UserError(
            f"--resume {resume} is of step {found}, and this run ends at step {num_steps}: nothing "
            "is left to train; give more --epochs or --max-steps"
        )
    return others, found


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def _reason(error: BaseException) -> str:
    """Return the innermost message, on one line."""
    if isinstance(error, CheckpointException):
        failures = [failure[0] for failure in error.failures.values()]
        return _reason(failures[0]) if failures else "unknown"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
