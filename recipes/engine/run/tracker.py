"""Trackers: the rows of `metrics.jsonl`, sent elsewhere too."""

import importlib
from types import ModuleType
from typing import Any, Protocol

from recipes.engine.errors import UserError
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, row: dict[str, Any]) -> None:
        """Send a row."""

    def close(self) -> None:
        """Send what is left."""


class NoTracker:
    """Nowhere."""

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        writer = _import("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder.path / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Write a point of every curve."""
        for name, value in flatten(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandbStyle:
    """wandb, or trackio, which has the same calls."""

    def __init__(self, name: str, config: RunConfig, folder: RunFolder) -> None:
        self._module = _import(name, name)
        self._module.init(project="mimkit", name=folder.path.name, config=config.as_dict())

    def log(self, row: dict[str, Any]) -> None:
        """Send a point of every curve."""
        self._module.log(flatten(row), step=row["step"])

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()


def make_tracker(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    """Make the tracker of that name.

    Raises:
        UserError: Its package is not installed.
    """
    if name == "none":
        return NoTracker()
    return TensorBoard(folder) if name == "tensorboard" else WandbStyle(name, config, folder)


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """Join the names of nested entries by slashes.

    Example:
        >>> flatten({"loss": 0.5, "baselines": {"zero": 1.0}})
        {'loss': 0.5, 'baselines/zero': 1.0}
    """
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{inner}": number for inner, number in value.items()}
        else:
            flat[name] = value
    return flat


def _import(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--tracker {package} needs the package {package}: pip install {package}"
        ) from error
