"""The output folder of a run."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
import yaml
from torch import nn

from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError, read_json, read_yaml
from recipes.engine.run.config import RunConfig
from recipes.engine.run.world import World

_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class RunFolder:
    """Context manager of a run's output folder; only one job at a time may enter it.

    The main process writes the files, and its values are broadcast to the others.

    Args:
        path: The folder, which is created if it does not exist.
        config: The run's configuration.
        world: The processes of the run.

    Raises:
        UserError: On entering, if the path is a file, cannot be written, holds another
            configuration, or is locked by a running process. On leaving, if a write failed.
    """

    def __init__(self, path: Path, config: RunConfig, world: World | None = None) -> None:
        self.path = path
        self.config = config
        self.world = world or World()
        self._lock_file = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        message = None
        if self.world.is_main:
            try:
                self._open()
            except UserError as error:
                message = str(error)
        message = self.world.agree(message)
        if message is not None:
            raise UserError(message)
        return self

    def _open(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock(stack.enter_context((self.path / ".lock").open("a")))
                self._write_or_check_config(self.config)
            except OSError as error:
                raise UserError(
                    f"cannot write to the output folder {self.path}: {error.strerror}"
                ) from error
            self._lock_file = stack.pop_all()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock_file.close()
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            raise UserError(
                f"cannot write to the output folder {self.path}: {error.strerror}; free some space "
                "and start the same command again, which continues from the last checkpoint"
            ) from error

    def _lock(self, file: IO[str]) -> None:
        try:
            # The system releases the lock when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to the output folder {self.path}: "
                "wait for it or choose another --out"
            ) from None

    def _write_or_check_config(self, config: RunConfig) -> None:
        """Write `config.yaml`; if it exists, check that it holds the same configuration."""
        file = self.path / "config.yaml"
        wanted = config.as_dict()
        if file.exists():
            found = _read_config(file)
            if not isinstance(found, dict) or found.get("format") != wanted["format"]:
                raise UserError(
                    f"the output folder {self.path} holds a run of another version of mimkit, "
                    "which cannot be resumed (format number in its config.yaml must be "
                    f"{wanted['format']}): choose another --out"
                )
            different = _differences(found, wanted)
            if different == ["contents.data"]:
                before, now = (known["contents"]["data"] for known in (found, wanted))
                raise UserError(
                    f"the images of --data {config.data} are others than when the run in "
                    f"{self.path} began ({before}; now {now}): restore them or choose another "
                    f"--out, where --resume can start from a checkpoint of this run"
                )
            if different:
                raise UserError(
                    f"the output folder {self.path} holds a run with other values of "
                    f"{', '.join(different)}: choose another --out"
                )
        else:
            write_atomically(file, yaml.safe_dump(wanted, sort_keys=False))
            write_atomically(
                self.path / "environment.json", json.dumps(_environment(config), indent=2)
            )

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        if not self.world.is_main:
            return
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def start_metrics(self, *, first_step: int) -> None:
        """Remove the rows of steps after `first_step`, which will be run again."""
        if not self.world.is_main:
            return
        kept = [row for row in self.read_metrics() if row["step"] <= first_step]
        write_atomically(
            self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept)
        )

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`, without an incomplete last line."""
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        complete = file.read_text().split("\n")[:-1]
        return [json.loads(line) for line in complete if line]

    def read_skipped(self) -> list[int]:
        """Return the steps that are skipped because their loss or gradient was not finite."""
        return self.world.agree(_read_state(self.path / "skipped_steps.json") or [])

    def write_skipped(self, steps: list[int]) -> None:
        """Write the steps that are skipped."""
        if self.world.is_main:
            write_atomically(self.path / "skipped_steps.json", json.dumps(steps) + "\n")

    def note_unreadable(self, sample_ids: list[int]) -> None:
        """Record images that could not be read. Each process writes its own file."""
        if not sample_ids:
            return
        file = self.path / f"unreadable.{self.world.rank}.json"
        known = set(_read_state(file) or [])
        if not known.issuperset(sample_ids):
            write_atomically(file, json.dumps(sorted(known | set(sample_ids))) + "\n")

    def read_unreadable(self) -> list[int]:
        """Return the ids of all images of the run that could not be read."""
        files = self.path.glob("unreadable.*.json")
        return sorted({sample_id for file in files for sample_id in _read_state(file)})

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, which marks the run as finished."""
        if self.world.is_main:
            write_atomically(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run; None if the run is not finished."""
        summary: dict[str, Any] | None = _read_state(self.path / "summary.json")
        return self.world.agree(summary)

    def write_weights(self, name: str, module: nn.Module) -> None:
        """Write all weights and buffers of a module to a safetensors file."""
        from safetensors.torch import save

        if self.world.is_main:
            state = module.state_dict().items()
            weights = {name: tensor.cpu().contiguous() for name, tensor in state}
            write_atomically(self.path / name, save(weights))


def output_folder(out: str | None, config: RunConfig) -> Path:
    """Return the folder of `--out`; by default one named after the configuration."""
    if out is not None:
        return Path(out)
    data = Path(config.data).name or "folder"
    return Path("runs") / f"{config.recipe}-{config.preset}-{data}-{config.digest()}"


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, file)


def _read_state(file: Path) -> Any:
    """Read a JSON file of a run; None if it does not exist.

    Raises:
        UserError: If it is damaged.
    """
    try:
        return read_json(file) if file.exists() else None
    except UnreadableError as error:
        raise UserError(f"{file} is damaged: {error}; remove it or choose another --out") from error


def _read_config(file: Path) -> Any:
    try:
        return read_yaml(file)
    except UnreadableError as error:
        raise UserError(f"{file} is damaged: {error}; choose another --out") from error


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return the names of the entries that differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [name or "config.yaml"]
    found: list[str] = []
    for key in sorted({*old, *new}):
        found += _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    return found


def _environment(config: RunConfig) -> dict[str, Any]:
    packages = ("mimkit", "torch", "numpy", "einops", "triton", "pillow", "scikit-image")
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in packages},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the git commit of this checkout; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
