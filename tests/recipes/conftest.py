"""What the tests of recipes share."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.pictures import write_noise


@pytest.fixture(autouse=True)
def loading_is_measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.engine.dry_run.LOADER_SECONDS", 0.01)


@pytest.fixture(autouse=True)
def hangups_are_not_ignored() -> Iterator[None]:
    """Under nohup they are, and a run leaves it at that: also those that tests start."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 images of noise, not to be changed."""
    return write_noise(tmp_path_factory.mktemp("noise") / "pictures", 24)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise images in two classes."""
    folder = tmp_path_factory.mktemp("signals") / "pictures"
    for part in ("train", "val"):
        for name in ("a", "b"):
            write_noise(folder / part / name, 8)
    return folder
