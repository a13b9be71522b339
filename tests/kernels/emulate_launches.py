"""A pytest plugin: the tests marked `launches` run compiled code in the emulator.

`TRITON_INTERPRET=1 python -m pytest -p tests.kernels.emulate_launches -m launches tests/kernels`
"""

import os

# With the variable, launchers take CPU tensors; without it, Triton, imported later, compiles.
assert os.environ["TRITON_INTERPRET"] == "1", "set TRITON_INTERPRET=1"
import mimkit_kernels  # noqa: E402, F401

del os.environ["TRITON_INTERPRET"]

from tests.kernels.emulated import emulated_launches  # noqa: E402

# Kept, because the patch ends with the life of this object.
RUNNING = emulated_launches()
RUNNING.__enter__()
