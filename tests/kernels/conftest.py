"""Tests marked `launches` run on a GPU, or in child processes with Triton's interpreter."""

import pytest
import torch

from tests.kernels.harness import CAN_LAUNCH


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CAN_LAUNCH:
        return
    elsewhere = [item for item in items if item.get_closest_marker("launches")]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)
