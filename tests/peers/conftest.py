"""The peers' tier: the real packages that users of mimkit also use, in an environment of its own.

pip install -e ".[peers]"
python -m pytest tests/peers
"""

import os
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # models are built from small configurations

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pinned() -> list[str]:
    """The packages of the extra `peers` that have an exact version."""
    extra = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["peers"]
    return [requirement.split("==")[0] for requirement in extra if "==" in requirement]


def pytest_report_header() -> str:
    try:
        return "peers: " + ", ".join(f"{name} {version(name)}" for name in pinned())
    except PackageNotFoundError as error:
        raise pytest.UsageError(
            f"{error}: install the extra `peers` in a new environment"
        ) from None
