"""Checkpoints of a run: written atomically and asynchronously, read only if they are whole.

A checkpoint is a folder `checkpoints/step-<n>`. It is written under a temporary name
(`storage.py`), and then gets a completion marker, which has the digests of all its files and of
itself, and its final name. What is left from a killed run has the temporary name: it is ignored,
and removed at the next save. A checkpoint whose digests do not agree with its files is damaged: it
is named and kept under another name, and the newest whole one is taken.

Nothing is removed or replaced but folders that this module has made: the first file in them is
`.mimkit`.

Training waits only until the state is copied. A separate thread writes the copy.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.optim import Optimizer

from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError, read_sealed, seal, sha256_of
from recipes.engine.run.config import FORMAT
from recipes.engine.run.storage import (
    METADATA,
    PART,
    FileDigest,
    LoadJSON,
    Reader,
    SaveJSON,
    Writer,
)
from recipes.engine.run.world import World
from recipes.engine.writing import PARTIAL, new_file, put_aside, sync_folder, write_json

_MARKER = "COMPLETE"
_OURS = ".mimkit"
_OURS_SAYS = b"a checkpoint of mimkit\n"
_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,18})", re.ASCII)
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
        """Return the steps of the checkpoints, ascending. Some may be damaged."""
        return steps_in(self.folder)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def newest(self) -> int | None:
        """Return the step of the newest whole checkpoint, None without one, in every process.

        Newer ones, which are damaged, are named on stderr and renamed.
        """
        # The main process chooses: another process may see a folder that is being renamed.
        return self.world.agree(self._newest() if self.world.is_main else None)

    def _newest(self) -> int | None:
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            damage = find_damage(self.path(step))
            if damage is None:
                self._put_aside(damaged, f"going on from step {step}")
                return step
            damaged.append((step, damage))
        self._put_aside(damaged, "no whole one is left: starting again")
        return None

    def _put_aside(self, damaged: list[tuple[int, str]], what_next: str) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again."""
        for step, damage in damaged:
            kept = put_aside(self.path(step))
            say(
                f"warning: the checkpoint of step {step} is damaged ({damage}) and now called "
                f"{kept}; {what_next}",
                file=sys.stderr,
            )

    def save(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Copy the state and start to write it; `finish` waits until it is written.

        Raises:
            UserError: If this checkpoint or the one before cannot be written. Earlier ones are not
                touched.
        """
        self.finish()
        partial = self.folder / f"{self.path(step).name}{PARTIAL}"
        with self._explaining(step):
            if self.world.is_main:
                self.clean()
                partial.mkdir(parents=True)
                with new_file(partial / _OURS) as file:
                    file.write(_OURS_SAYS)
            self.world.wait()
            writer = Writer(partial)
            written: Any = dcp_async_save(
                _state(model, optimizer),
                storage_writer=writer,
                planner=SaveJSON(),
                process_group=self._group,
                no_dist=self.world.size == 1,
            )
        self._writing = step, self._thread.submit(self._complete, step, writer, written)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete.

        Raises:
            UserError: If it cannot be written.
        """
        if self._writing is not None:
            (step, complete), self._writing = self._writing, None
            with self._explaining(step):
                complete.result()

    def _complete(self, step: int, writer: Writer, written: Future[None]) -> None:
        """Mark a checkpoint as complete, then remove old ones."""
        written.result()  # in the main process: waits for the parts of all processes
        if self.world.is_main:
            digests = {**writer.files, _OURS: FileDigest.of(_OURS_SAYS)}
            files = {name: [digest.size, digest.sha256] for name, digest in digests.items()}
            marker = {"format": FORMAT, "step": step, "files": files}
            write_json(writer.folder / _MARKER, seal(marker))
            writer.folder.rename(self.path(step))
            sync_folder(self.folder)
            self._remove_old()

    @contextlib.contextmanager
    def _explaining(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, CheckpointException) as error:
            raise UserError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {_reason(error)}; "
                + self.safe()
            ) from error

    def safe(self) -> str:
        """Say which step is safe. Its checkpoint has been verified, in the main process."""
        steps = self.steps() if self.world.is_main else []
        for step in reversed(steps):
            if find_damage(self.path(step)) is None:
                return f"the checkpoint of step {step} is safe"
        return "no checkpoint is whole" if steps else "no checkpoint was written"

    def load(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        """Load a whole checkpoint into a model and its optimizer, for any number of processes.

        Raises:
            UserError: If it belongs to another model.
        """
        path = self.path(step)
        try:
            state = _state(model, optimizer)
            dcp_load(
                state,
                storage_reader=Reader(path),
                planner=LoadJSON(),
                no_dist=self.world.size == 1,
            )
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
        except (
            CheckpointException, UnreadableError, KeyError, RuntimeError, TypeError, ValueError,
        ) as error:  # fmt: skip
            raise UserError(
                f"the checkpoint {path} is not of this model: {_reason(error)}"
            ) from error

    def clean(self) -> None:
        """Remove incomplete checkpoints, which a killed run leaves."""
        for path in _entries(self.folder):
            is_partial = path.name.endswith(PARTIAL)
            if is_partial and _NAME.fullmatch(path.name.removesuffix(PARTIAL)) and _is_ours(path):
                _remove(path)

    def _remove_old(self) -> None:
        for step in self.steps()[:-_KEPT]:
            if not (self.keep_every and step % self.keep_every == 0):
                _remove(self.path(step))


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, ascending. Some may be damaged."""
    found = ((_NAME.fullmatch(path.name), path) for path in _entries(folder))
    return sorted(int(name[1]) for name, path in found if name and _is_ours(path))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def check_checkpoints(folder: Path) -> None:
    """Check that nothing is in the way of a run's checkpoints.

    Raises:
        UserError: If their folder is a link or a file, or something else in it has the name of a
            checkpoint.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is not a folder: move it elsewhere or choose another --out")
    for path in _entries(folder):
        if _NAME.fullmatch(path.name.removesuffix(PARTIAL)) and not _is_ours(path):
            raise UserError(
                f"{path} is not a checkpoint of this run: move it elsewhere or choose another --out"
            )


def _is_ours(folder: Path) -> bool:
    """Whether a folder is one that this module has made: by its first file, or still empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        return (folder / _OURS).is_file() or not any(folder.iterdir())
    except FileNotFoundError:  # another thread or process has just renamed it
        return False


def _remove(folder: Path) -> None:
    """Remove the files of a checkpoint, and their folder if nothing else is in it."""
    ours = (_MARKER, _MARKER + PARTIAL, METADATA, METADATA + PARTIAL)
    for path in folder.iterdir():
        if (path.name in ours or PART.fullmatch(path.name)) and not path.is_symlink():
            path.unlink()
    # Last, so that the rest of a folder is still recognised if the process is killed here.
    (folder / _OURS).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it
        folder.rmdir()


def find_damage(path: Path) -> str | None:
    """Compare the files of a checkpoint with the digests in its completion marker.

    Returns:
        None if it is whole; otherwise what is wrong, with the name of the file.
    """
    try:
        marker = read_sealed(path / _MARKER)
        if path.name != f"step-{marker['step']:08d}" or METADATA not in marker["files"]:
            raise UnreadableError("it is of another step")
        digests = {name: FileDigest(*digest) for name, digest in marker["files"].items()}
        if any(type(one.size) is not int or not 0 <= one.size < 2**63 for one in digests.values()):
            raise UnreadableError("a size in it is no number of bytes")
    except (UnreadableError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{_MARKER}: {_reason(error)}"
    for name, digest in digests.items():
        if name not in (_OURS, METADATA) and not PART.fullmatch(name):
            return f"{_MARKER}: it names {name}"
        try:
            size = (path / name).lstat().st_size
            if size != digest.size:  # known without reading it
                return f"{name}: it has {size:,} bytes instead of {digest.size:,}"
            if sha256_of(path / name, follow=False) != digest.sha256:
                return f"{name}: its content does not have its digest"
        except (OSError, UnreadableError) as error:
            return f"{name}: {_reason(error)}"
    return None


def load_model(folder: Path, model: nn.Module) -> bool:
    """Load the weights of the newest checkpoint in a folder; return whether there is one.

    Raises:
        UserError: If it is damaged, or of another model. Nothing in the folder is changed.
    """
    steps = steps_in(folder)
    if not steps:
        return False
    path = folder / f"step-{steps[-1]:08d}"
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"the checkpoint {path} is damaged ({damage})")
    state = {"model": get_model_state_dict(model)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp_load(state, storage_reader=Reader(path), planner=LoadJSON(), no_dist=True)
        set_model_state_dict(model, state["model"])
    except (
        CheckpointException, UnreadableError, KeyError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise UserError(f"the checkpoint {path} is not of this model: {_reason(error)}") from error
    return True


def start_from(
    resume: str,
    checkpoints: Checkpoints,
    model: nn.Module,
    optimizer: Optimizer,
    num_steps: int,
    *,
    earlier: Checkpoints | None = None,
) -> int:
    """Load the checkpoint to resume from, and return its step; 0 without one.

    Args:
        resume: The value of `--resume`.
        checkpoints: Checkpoints of the run.
        model: The model.
        optimizer: Its optimizer.
        num_steps: Steps of the run.
        earlier: Checkpoints of the run before the images changed, whose weights step 0 has.

    Raises:
        UserError: If `--resume` names no checkpoint, or is "never" and there is one.
    """
    steps = checkpoints.world.agree(checkpoints.steps())
    if resume == "never" and steps:
        raise UserError(
            f"--resume never, but {checkpoints.folder} holds the checkpoint of step {steps[-1]}: "
            "choose another --out"
        )
    newest = checkpoints.newest()
    if newest is not None:
        checkpoints.load(newest, model, optimizer)
        return newest
    origin = find_origin(resume, checkpoints.world, num_steps)
    if origin is None:
        newest = None if earlier is None or resume == "never" else earlier.newest()
        if earlier is not None and newest is not None:
            earlier.load(newest, model, optimizer)
        return 0
    others, step = origin
    others.load(step, model, optimizer)
    return step


def find_origin(resume: str, world: World, num_steps: int) -> tuple[Checkpoints, int] | None:
    """Return the checkpoint of another run that `--resume` names; None for "auto" and "never".

    Raises:
        UserError: If it is not a complete checkpoint, is damaged, or is at or after the last step
            of this run.
    """
    if resume in ("auto", "never"):
        return None
    path = Path(resume)
    others = Checkpoints(path.parent, world)
    # The main process looks: the others may see a folder that is being changed.
    steps, is_old = world.agree((others.steps(), (path / _MARKER).is_file()))
    found = next((step for step in steps if others.path(step) == path), None)
    if found is None and is_old:
        raise UserError(
            f"--resume {resume} is of an earlier version of mimkit, whose checkpoints have no "
            "digests and could run code: start without it"
        )
    if found is None:
        raise UserError(
            f"--resume {resume} is not a complete checkpoint: give auto, never or the folder of a "
            "checkpoint"
        )
    damage = world.agree(find_damage(path) if world.is_main else None)
    if damage is not None:
        raise UserError(f"--resume {resume} is damaged ({damage}): give another checkpoint")
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
    return " ".join(text.split()) or type(error).__name__
