"""What the tests of recipes share."""

from pathlib import Path

import pytest

from tests.recipes.pictures import write_noise


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 images of noise, not to be changed."""
    return write_noise(tmp_path_factory.mktemp("noise") / "pictures", 24)
