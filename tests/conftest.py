"""The two test tiers and their hypothesis profiles.

Quick tier (the default): 25 examples per property, the same in every run. Long tier (`-m full`):
200 random examples per property, and the tests with the marker `full`.

A worker of `pytest -n` computes with one thread, and so do the processes that its tests start.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

TESTS = Path(__file__).parent

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("full", deadline=None, max_examples=200, print_blob=True)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """What earlier tests compiled would count towards the limit of recompilations."""
    if "torch._dynamo" in sys.modules:  # importing it takes a second
        torch.compiler.reset()


def is_long(config: pytest.Config) -> bool:
    return "full" in config.getoption("-m").replace("not full", "")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "untyped: cannot run with jaxtyping and beartype enabled, because it passes wrong types on "
        "purpose or compiles; run the typed tests with `-m 'not full and not untyped'`",
    )
    if is_long(config):
        settings.load_profile("full")
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # files are handed out in the order of below


def slow_first(item: pytest.Item) -> int:
    """The folders whose files take long, so that no worker begins one when the other is done."""
    folders = [str(TESTS / folder) for folder in ("kernels", "recipes", "house")]
    return next((n for n, f in enumerate(folders) if str(item.path).startswith(f)), len(folders))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=slow_first)
    for item in items if is_long(config) else []:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.full)
