"""The output folder of a run."""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
import yaml
from torch import Tensor, nn

from recipes.engine.data.statistics import Statistics
from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError, read_yaml, seal
from recipes.engine.run import state
from recipes.engine.run.checkpoint import check_checkpoints, steps_in
from recipes.engine.run.cli import Options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.world import World
from recipes.engine.writing import PARTIAL, put_aside, write_atomically, write_json

CHECKPOINTS = "checkpoints"
_CONFIG = "config.yaml"
_EARLIER = re.compile(r"before-\d+", re.ASCII)  # folders of runs on images that have changed since
_LOCK = ".lock"
# What a run that was killed at once leaves.
_BEFORE_CONFIG = (_LOCK, _CONFIG + PARTIAL)
_FILES = (
    _LOCK,
    *(
        name + suffix
        for name in (_CONFIG, state.ENVIRONMENT, state.METRICS, state.SUMMARY, state.SKIPPED)
        for suffix in ("", PARTIAL)
    ),
)
_RESULTS = (".safetensors", ".png")  # endings
_CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE
)  # fmt: skip


class RunFolder:
    """Context manager of a run's output folder; only one job at a time may enter it.

    The main process writes the files, and its values are broadcast to the others.

    Args:
        path: The folder, which is created if it does not exist.
        config: The run's configuration.
        world: The processes of the run.
        lock: Whether to lock it; without a lock, its user sees to it that no other job enters.
        accept_changed: Whether a run on images that have changed is begun again, from the weights
            of its last checkpoint; the run before it is moved to the folder `before-<n>`.

    Raises:
        UserError: On entering, if the path is a file, cannot be written, holds another
            configuration or anything that is not of a run, or is locked by a running process. On
            leaving, if a write failed.
    """

    def __init__(
        self,
        path: Path,
        config: RunConfig,
        world: World | None = None,
        *,
        lock: bool = True,
        accept_changed: bool = False,
    ) -> None:
        self.path = path
        self.config = config
        self.world = world or World()
        self._locks = lock
        self._accepts_changed = accept_changed
        self._lock_file = contextlib.ExitStack()
        self._summary: dict[str, Any] | None = None
        self._digests: dict[str, str] = {}  # of the weights that were written
        self._num_samples = self._num_steps = 0

    def __enter__(self) -> "RunFolder":
        self.world.share(self._open)
        return self

    def _open(self) -> None:
        with contextlib.ExitStack() as stack:
            try:
                self._check()
                self.path.mkdir(parents=True, exist_ok=True)
                if self._locks:
                    self._lock(stack.enter_context((self.path / _LOCK).open("a")))
                self._check()  # again, now that no other process writes
                if self._accepts_changed:
                    self._begin_again()
                self._write_config()
                self._summary = self._read_summary()
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
        if isinstance(error, OSError) and (error.errno in _CANNOT_WRITE or self._has(error)):
            raise UserError(
                f"cannot write to the output folder {self.path}: {error.strerror}; free some space "
                "or mend this, and start the same command again, which continues from the last "
                "checkpoint"
            ) from error

    def _has(self, error: OSError) -> bool:
        """Whether an error is about a file of this folder, which may have been removed or moved."""
        return Path(str(error.filename)).is_relative_to(self.path)

    def _lock(self, file: IO[str]) -> None:
        try:
            # The system releases the lock when the process ends, however it ends.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is writing to the output folder {self.path}: "
                "wait for it or choose another --out"
            ) from None
        except OSError as error:
            raise UserError(
                f"the file system of the output folder {self.path} refuses to lock a file (flock: "
                f"{error.strerror}): give --no-lock, and see to it that no other job writes there; "
                "or choose an --out on another file system"
            ) from error

    def _check(self) -> None:
        """Check, without writing anything, that this run may write to the folder."""
        check_content(self.path)
        check_checkpoints(self.path / CHECKPOINTS)
        file = self.path / _CONFIG
        if not file.exists():
            return
        wanted, found = self.config.as_dict(), _read_config(file)
        if not isinstance(found, dict) or "recipe" not in found:
            raise UserError(
                f"the output folder {self.path} holds a {_CONFIG} that is not of a run of mimkit: "
                "choose a new or an empty folder as --out"
            )
        if found.get("format") != wanted["format"]:
            raise UserError(
                f"the output folder {self.path} holds a run of another version of mimkit, "
                f"which cannot be resumed (format number in its {_CONFIG} must be "
                f"{wanted['format']}): choose another --out"
            )
        different = _differences(found, wanted)
        if different == ["contents.data"] and self._accepts_changed:
            return
        if different == ["contents.data"]:
            before, now = (known["contents"].get("data") for known in (found, wanted))
            raise UserError(
                f"the images of --data {self.config.data} are others than when the run in "
                f"{self.path} began ({before}; now {now}): restore them, accept them "
                "with --accept-changed-data, or choose another --out, where --resume can start "
                "from a checkpoint of this run"
            )
        if different:
            raise UserError(
                f"the output folder {self.path} holds a run with other values of "
                f"{', '.join(map(str, different))}: choose another --out"
            )

    def _begin_again(self) -> None:
        """Move a run on other images aside; what was killed in this is completed."""
        file = self.path / _CONFIG
        if not file.exists():
            return
        found, wanted = _read_config(file), self.config.as_dict()
        if _differences(found, wanted) != ["contents.data"]:
            return
        numbers = (self.path / f"before-{n}" for n in itertools.count(1))
        aside = next(path for path in numbers if not (path / _CONFIG).exists())
        aside.mkdir(exist_ok=True)
        stays = (_LOCK, _CONFIG)
        for entry in sorted(self.path.iterdir()):
            if entry.name not in stays and not _EARLIER.fullmatch(entry.name):
                os.rename(entry, aside / entry.name)
        os.rename(file, aside / _CONFIG)  # last: until then, this is begun again
        before, now = (known["contents"].get("data") for known in (found, wanted))
        say(
            f"note: the images have changed ({before}; now {now}): epochs are counted anew, from "
            f"the weights of the last checkpoint; the run before is in {aside}",
            file=sys.stderr,
        )

    def earlier(self) -> Path | None:
        """Return the folder of the last run on images that have changed since; None without one."""
        runs = [path for path in self.path.glob("before-*") if (path / _CONFIG).is_file()]
        numbered = [path for path in runs if _EARLIER.fullmatch(path.name)]
        return self.world.agree(
            max(numbered, key=lambda path: int(path.name.removeprefix("before-")), default=None)
        )

    def _write_config(self) -> None:
        file = self.path / _CONFIG
        if not file.exists():
            write_atomically(file, yaml.safe_dump(self.config.as_dict(), sort_keys=False))
            write_json(self.path / state.ENVIRONMENT, _environment(self.config))

    def _read_summary(self) -> dict[str, Any] | None:
        try:
            return state.read_summary(self.path)
        except UnreadableError as error:
            file = self.path / state.SUMMARY
            has_trained = os.path.lexists(self.path / state.METRICS)
            if has_trained and not steps_in(self.path / CHECKPOINTS):
                raise UserError(
                    f"{file} is damaged: {error}; the run has no checkpoint to make it again from: "
                    "choose another --out, or remove the file to train again from step 0"
                ) from error
            self._warn(
                f"{file} is damaged: {error}; the rest of the run is done again and writes it "
                f"again, the damaged file is {put_aside(file)}"
            )
            return None

    def _warn(self, sentence: str) -> None:
        say(f"warning: {sentence}", file=sys.stderr)

    def repair(self, *, num_samples: int, num_steps: int) -> None:
        """Check the state files before training, repair them, and say what was repaired."""
        self._num_samples, self._num_steps = num_samples, num_steps
        if self.world.is_main:
            repaired = state.repair(
                self.path,
                num_samples=num_samples,
                num_steps=num_steps,
                environment=lambda: _environment(self.config),
            )
            for sentence in repaired:
                self._warn(sentence)
        self.world.wait()

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append a row to `metrics.jsonl`."""
        if not self.world.is_main:
            return
        with (self.path / state.METRICS).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def start_metrics(self, *, first_step: int) -> None:
        """Remove the rows of steps after `first_step`, which will be run again."""
        if not self.world.is_main:
            return
        kept = [row for row in self.read_metrics() if row["step"] <= first_step]
        state.write_rows(self.path / state.METRICS, kept)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`, without damaged ones and an incomplete last line."""
        try:
            return state.read_metrics(self.path)[0]
        except UnreadableError as error:
            raise UserError(f"{self.path / state.METRICS} cannot be read: {error}") from error

    def read_skipped(self) -> list[int]:
        """Return the steps that are skipped because their loss or gradient was not finite."""
        file = self.path / state.SKIPPED
        return self.world.agree(self._read_numbers(file, self._num_steps))

    def write_skipped(self, steps: list[int]) -> None:
        """Write the steps that are skipped."""
        if self.world.is_main:
            write_json(self.path / state.SKIPPED, steps)

    def note_unreadable(self, sample_ids: list[int]) -> None:
        """Record images that could not be read. Each process writes its own file."""
        if not sample_ids:
            return
        file = self.path / f"unreadable.{self.world.rank}.json"
        known = set(self._read_numbers(file, self._num_samples))
        if not known.issuperset(sample_ids):
            write_json(file, sorted(known | set(sample_ids)))

    def read_unreadable(self) -> list[int]:
        """Return the ids of all images of the run that could not be read."""
        files = (file for file in self.path.iterdir() if state.UNREADABLE.fullmatch(file.name))
        return sorted({id for file in files for id in self._read_numbers(file, self._num_samples)})

    def _read_numbers(self, file: Path, below: int) -> list[int]:
        try:
            return state.read_numbers(file, below=below)
        except UnreadableError as error:  # since `repair`
            raise UserError(f"{file} is damaged: {error}; remove it or choose another --out") from (
                error
            )

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`, which marks the run as finished, with digests of the weights."""
        if self.world.is_main:
            plain = json.loads(json.dumps({**summary, state.DIGESTS: self._digests}))
            write_json(self.path / state.SUMMARY, seal(plain))

    def read_summary(self) -> dict[str, Any] | None:
        """Return the summary of a finished run; None if the run is not finished."""
        return self.world.agree(self._summary)

    def write_weights(self, name: str, module: nn.Module) -> None:
        """Write all weights and buffers of a module to a safetensors file."""
        self.write_tensors(name, module.state_dict())

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors to a safetensors file."""
        from safetensors.torch import save

        if self.world.is_main:
            content = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
            write_atomically(self.path / name, content)
            self._digests[name] = hashlib.sha256(content).hexdigest()


def open_folder(path: Path, config: RunConfig, world: World, options: Options) -> RunFolder:
    """Return the folder of a run, locked and compared with its configuration as the options ask."""
    return RunFolder(
        path, config, world, lock=options.lock, accept_changed=options.accept_changed_data
    )


def output_folder(out: str | None, config: RunConfig) -> Path:
    """Return the folder of `--out`; by default one named after the configuration."""
    if out is not None:
        return Path(out)
    data = Path(config.data).name or "folder"
    return Path("runs") / f"{config.recipe}-{config.preset}-{data}-{config.digest()}"


def find_statistics(
    out: str | None, config: RunConfig, channels: int, image_size: tuple[int, ...]
) -> Statistics | None:
    """Return the statistics of the arrays in the configuration of a run that is continued.

    Args:
        out: The value of `--out`.
        config: The run's configuration, before it is fitted to the arrays.
        channels: Channels of the arrays.
        image_size: Size of a crop.

    Returns:
        The statistics; None if no run is continued, or it has others than of arrays.
    """
    file = output_folder(out, config.for_images(channels, image_size)) / _CONFIG
    return read_statistics(file, channels) if file.is_file() else None


def read_statistics(file: Path, channels: int) -> Statistics | None:
    """Return the statistics of arrays in a `config.yaml`; None if it has none for so many channels.

    Raises:
        UserError: If the file is damaged.
    """
    config = _read_config(file)
    found = config.get("statistics") if isinstance(config, dict) else None
    names = {field.name for field in dataclasses.fields(Statistics)}
    if not isinstance(found, dict) or found.keys() != names:
        return None
    if not all(isinstance(values, list) for values in found.values()):
        return None
    statistics = Statistics(**{name: tuple(values) for name, values in found.items()})
    is_whole = all(
        len(values) == channels and all(isinstance(v, float) and math.isfinite(v) for v in values)
        for values in vars(statistics).values()
    )
    return statistics if is_whole and min(statistics.std) > 0 else None


def check_content(path: Path) -> None:
    """Check that a folder holds nothing but a run of mimkit, and its files are files.

    Raises:
        UserError: If there is anything else in it.
    """
    if not path.is_dir():  # there is none yet, or the attempt to make one says what is wrong
        return
    entries = sorted(path.iterdir())
    is_run = any(entry.name == _CONFIG for entry in entries)
    for entry in entries:
        is_known = entry.name in _BEFORE_CONFIG or _EARLIER.fullmatch(entry.name)
        if not is_run and not is_known:
            raise UserError(
                f"the output folder {path} holds {entry.name}, which is not of a run of mimkit: "
                "choose a new or an empty folder as --out"
            )
        is_state = entry.name in _FILES or state.UNREADABLE.fullmatch(entry.name)
        is_result = entry.name.removesuffix(PARTIAL).endswith(_RESULTS)
        is_link, is_file = entry.is_symlink(), entry.is_file()
        # A link in place of a result is replaced; what it names stays.
        if (is_state and (is_link or not is_file)) or (is_result and not is_link and not is_file):
            raise UserError(
                f"{entry} is a link or not a file, where a run of mimkit has a file: move it "
                "elsewhere or choose another --out"
            )


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
    for key in sorted({*old, *new}, key=str):
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
