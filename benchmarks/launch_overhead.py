"""CPU time of Python in the forward pass of each kernel: `python -m benchmarks.launch_overhead`.

Runs on a CPU, with tiny tensors and without the launch itself: checks of arguments, PyTorch's
dispatch, allocation, and the launcher, whose part is printed too. Triton's own launch comes on top,
and so do PyTorch's operations around a kernel, which are counted here as they run on a CPU. Of the
cross-entropy, the launcher is that of one chunk's kernel: the rest are PyTorch's operations, among
them three matrix products.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

LAUNCHERS = {"seconds": 0.0}
CHUNKED = "linear_cross_entropy"
_impl = torch.library.Library.impl


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a launcher add up its time."""

    def call(*arguments: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments)
        finally:
            LAUNCHERS["seconds"] += time.process_time() - start

    return call


def _register(
    library: Any, name: str, function: Callable[..., Any], key: str = "", **more: Any
) -> Any:
    """Register a function; that for CPU tensors is here a launcher."""
    is_launcher = key == "CPU" and not name.startswith(CHUNKED)
    return _impl(library, name, _timed(function) if is_launcher else function, key, **more)


torch.library.Library.impl = _register  # type: ignore[method-assign]
# The launchers then take CPU tensors; Triton, imported later, must not interpret.
os.environ["TRITON_INTERPRET"] = "1"
import mimkit  # noqa: E402
from benchmarks.sweep_launches import cases  # noqa: E402

del os.environ["TRITON_INTERPRET"]

from triton.runtime.jit import JITFunction  # noqa: E402

# Short rounds: on a busy machine, some are not disturbed.
CALLS, ROUNDS = 20, 100


def main() -> int:
    """Print the least and the median of the means over `CALLS` calls of each kernel."""
    JITFunction.run = lambda *arguments, **named: None
    chunked: Any = sys.modules[f"mimkit_kernels.{CHUNKED}"]
    chunked._launch = _timed(chunked._launch)
    for case in cases():
        if "bfloat16" in case.name:
            continue  # takes the same path as float32
        with mimkit.use("triton"):
            case.forward()
            means, launchers = [], []
            for _ in range(ROUNDS):
                LAUNCHERS["seconds"] = 0
                start = time.process_time()
                for _ in range(CALLS):
                    case.forward()
                means.append(1e6 * (time.process_time() - start) / CALLS)
                launchers.append(1e6 * LAUNCHERS["seconds"] / CALLS)
        name = case.name.split(" ")[0]
        print(
            f"{case.kernel:22} {name:22} {min(means):5.0f} us, median "
            f"{statistics.median(means):3.0f}; launcher {min(launchers):2.0f} us"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
