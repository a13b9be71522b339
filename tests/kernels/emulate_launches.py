"""A pytest plugin: the tests marked `launches` run compiled code in the emulator.

`TRITON_INTERPRET=1 python -m pytest -p tests.kernels.emulate_launches -m launches tests/kernels`
"""

import os

import pytest

import mimkit_kernels  # noqa: F401  reads the variable: launchers then take CPU tensors
from tests.kernels.emulated import emulated_launches

RUNNING = emulated_launches()  # kept, because the patch ends with the life of this object


def pytest_configure() -> None:
    """Emulate all launches of the session."""
    if os.environ.pop("TRITON_INTERPRET", None) != "1":
        raise pytest.UsageError("set TRITON_INTERPRET=1")
    # Triton is imported here, without the variable: it compiles.
    RUNNING.__enter__()
