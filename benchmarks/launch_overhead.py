"""CPU time of Python in the forward pass of each kernel: `python -m benchmarks.launch_overhead`.

Runs on a CPU, with tiny tensors and without the launch itself: checks of arguments, PyTorch's
dispatch, allocation, and the launcher. Triton's own launch comes on top, and so do PyTorch's
operations around a kernel, which are counted here as they run on a CPU.
"""

import os
import statistics
import sys
import time

# The launchers then take CPU tensors; Triton, imported later, must not interpret.
os.environ["TRITON_INTERPRET"] = "1"
import mimkit  # noqa: E402
from benchmarks.sweep_launches import cases  # noqa: E402

del os.environ["TRITON_INTERPRET"]

from triton.runtime.jit import JITFunction  # noqa: E402

CALLS, ROUNDS = 100, 7


def main() -> int:
    """Print the least and the median of the means over `CALLS` calls of each kernel."""
    JITFunction.run = lambda *arguments, **named: None
    for case in cases():
        if "bfloat16" in case.name:
            continue  # takes the same path as float32
        with mimkit.use("triton"):
            case.forward()
            means = []
            for _ in range(ROUNDS):
                start = time.process_time()
                for _ in range(CALLS):
                    case.forward()
                means.append(1e6 * (time.process_time() - start) / CALLS)
        name, least = case.name.split(" ")[0], min(means)
        print(f"{case.kernel:22} {name:22} {least:5.0f} us, median {statistics.median(means):.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
