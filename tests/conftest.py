"""The two test tiers and their hypothesis profiles.

Quick tier (the default): 25 examples per property, the same in every run. Long tier (`-m full`):
200 random examples per property, and the tests with the marker `full`.
"""

import pytest
from hypothesis import is_hypothesis_test, settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("full", deadline=None, max_examples=200, print_blob=True)
settings.load_profile("ci")


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


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items if is_long(config) else []:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.full)
