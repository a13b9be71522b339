"""Tests marked `launches` run on a GPU, or in child processes with Triton's interpreter."""

import os
from collections.abc import Iterator

import pytest

from tests.kernels.harness import CAN_LAUNCH
from tests.kernels.ownership import checked_owners


@pytest.fixture(autouse=True)
def _checked_owners() -> Iterator[None]:
    """In the interpreter, no two programs of a launch may access one address and write it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    with checked_owners():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CAN_LAUNCH:
        return
    elsewhere = [item for item in items if item.get_closest_marker("launches")]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)
