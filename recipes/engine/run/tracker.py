"""Experiment trackers, which get the rows of `metrics.jsonl`."""

import importlib
from types import ModuleType
from typing import Any, Protocol

from recipes.engine.errors import UserError
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, row: dict[str, Any]) -> None:
        """Log a row."""

    def close(self) -> None:
        """Flush and close."""


class NoTracker:
    """A tracker that does nothing."""

    def log(self, row: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """TensorBoard: event files in the run's folder."""

    def __init__(self, folder: RunFolder) -> None:
        writer = _import("tensorboard", "torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder.path / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        """Log a row."""
        for name, value in flatten(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbStyle:
    """wandb, or trackio, which has the same API."""

    def __init__(self, name: str, config: RunConfig, folder: RunFolder) -> None:
        self._module = _import(name, name)
        self._module.init(project="mimkit", name=folder.path.name, config=config.as_dict())

    def log(self, row: dict[str, Any]) -> None:
        """Log a row."""
        self._module.log(flatten(row), step=row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._module.finish()


def make_tracker(name: str, config: RunConfig, folder: RunFolder) -> Tracker:
    """Make the tracker of a name.

    Raises:
        UserError: If its package is not installed.
    """
    if name == "none":
        return NoTracker()
    return TensorBoard(folder) if name == "tensorboard" else WandbStyle(name, config, folder)


def flatten(row: dict[str, Any]) -> dict[str, float]:
    """Flatten a nested row; names are joined with slashes.

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
