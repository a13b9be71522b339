"""Time every kernel with other numbers of warps and block sizes.

    python -m benchmarks.sweep_launches --rows FILE [--jobs 8]

It prints the best setting of each case, and at the end a launch table: for each kernel the setting
that is best over all its cases. With `--jobs`, that many processes compile everything first. Run by
`run_gpu.sh`. The tables in the kernel files are set from its output by hand: mimkit makes no choice
by timing at run time. In Triton's interpreter it runs once with tiny shapes.
"""

import argparse
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean
from typing import Any
from unittest import mock

import torch

import mimkit
import mimkit_kernels as kernels
from benchmarks.harness import STAND_IN, Report, read_records, time_on_cpu, time_on_gpu
from mimkit import masking
from mimkit.patches import neighbors

WARPS = (1, 2, 4, 8)
TODAY = "num_warps=None"
# Constants of the launchers that choose block sizes: file, name, values to try.
CONSTANTS = {
    "move_tokens": {"_MAX_BLOCK": (256, 512, 1024, 2048)},
    "gather_patches": {"MAX_TILE": (512, 1024, 2048)},
    "linear_cross_entropy": {"_MAX_BLOCK": (2048, 4096, 8192)},
    "packed_depthwise_conv": {"_TILES": (4, 8, 16), "_PROGRAMS": (512, 1024, 2048)},
    "regressor_inputs": {"_PARTS": (256, 512, 1024)},
}
REPEATS = 1 if STAND_IN else 7
DEVICE = torch.device("cpu" if STAND_IN else "cuda")


@dataclass(frozen=True)
class Case:
    """A call of a kernel: its file, a name, the call, and its forward pass alone."""

    kernel: str
    name: str
    call: Callable[[], Any]
    forward: Callable[[], Any]


def cases() -> Iterator[Case]:
    """Return calls at the shapes of ImageNet pre-training."""
    batch, grid, width = (1, (2, 2), 32) if STAND_IN else (256, (14, 14), 768)
    tokens = grid[0] * grid[1]
    key = masking.key(torch.arange(batch, device=DEVICE), seed=0)
    mask = masking.uniform(key, grid, 0.75)
    for dtype in (torch.bfloat16, torch.float32):
        some = {"dtype": dtype, "device": DEVICE}
        full = torch.randn(batch, tokens, width, **some)
        seen = torch.randn(batch, mask.num_visible, width, **some)
        arguments = (mask.visible_ids, mask.masked_ids, None, 0)
        yield case("move_tokens", dtype, kernels.gather_tokens, full, mask.visible_ids, 0)
        yield case("move_tokens", dtype, kernels.restore_tokens, seen, seen[0, 0], *arguments)
        images = torch.randn(batch, 3, 16 * grid[0], 16 * grid[1], **some)
        values = torch.randn(batch, mask.num_masked, 768, **some)
        patch = (16, 16)
        yield case("gather_patches", dtype, kernels.gather_patches, images, mask.visible_ids, patch)
        yield case(
            "masked_pixel_loss", dtype, kernels.masked_pixel_loss,
            values, images.detach(), mask.masked_ids, patch,
        )  # fmt: skip
        for side, channels in ((4, 256), (2, 384)):
            channels = 16 if STAND_IN else channels
            cells = torch.randn(batch, mask.num_visible, side**2, channels, **some)
            taps = torch.randn(channels, 1, 5, 5, **some)
            yield case(
                "packed_depthwise_conv", dtype, kernels.packed_depthwise_conv,
                cells, taps, None, neighbors(mask), (side, side),
            )  # fmt: skip
        parameters = [torch.randn(width, **some) for _ in range(6)]
        regressor = (seen, seen, seen, seen, parameters, 1e-6)
        yield case("regressor_inputs", dtype, kernels.regressor_inputs, *regressor)
        words, rows = (64, 2) if STAND_IN else (8192, 4096)
        weight, x = (torch.randn(n, width, **some) for n in (words, rows))
        target = torch.randint(words, (rows,), device=DEVICE)
        yield case(
            "linear_cross_entropy", dtype, kernels.linear_cross_entropy, x, weight, None, target
        )
    samplers = {
        f"uniform {side}x{side}": lambda s=side: masking.uniform(key, (s, s), 0.75)
        for side in ((4,) if STAND_IN else (14, 28, 64))
    }
    samplers[f"blockwise {grid}"] = lambda: masking.blockwise(key, grid, 0.4, min_block=1)
    for name, draw in samplers.items():
        yield Case(f"{name.split()[0]}_sample", name, draw, draw)


def case(kernel: str, dtype: torch.dtype, function: Callable[..., Any], *inputs: Any) -> Case:
    """Return a call of a function with tensors, and of its backward pass.

    Gradients are those of the first tensor and, of a convolution, of its filter.
    """
    leaves = inputs[: 2 if kernel == "packed_depthwise_conv" else 1]
    for leaf in leaves:
        leaf.requires_grad_()

    def call() -> None:
        made = function(*inputs)
        parts = made if isinstance(made, tuple) else (made,)
        outputs = [part for part in parts if part.requires_grad]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(part) for part in outputs])

    shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
    return Case(kernel, f"{function.__name__} {dtype} {shapes}", call, lambda: function(*inputs))


@contextmanager
def warps(number: int | None) -> Iterator[None]:
    """Launch all kernels with another number of warps."""
    if number is None or STAND_IN:  # the interpreter ignores it
        yield
        return
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def changed(kernel: Any, *arguments: Any, **named: Any) -> Any:
        return run(kernel, *arguments, **named | {"num_warps": number})

    with mock.patch.object(JITFunction, "run", changed):
        yield


def settings(kernel: str) -> Iterator[dict[str, int]]:
    """Return the values of the constants of a kernel's file to try; those of today first."""
    yield {}
    tried = CONSTANTS.get(kernel, {})
    for values in itertools.product(*tried.values()) if tried else ():
        yield dict(zip(tried, values, strict=True))


def trials(kernel: str) -> Iterator[tuple[int | None, dict[str, int]]]:
    """Return the numbers of warps and constants to try; those of today first."""
    for number, constants in itertools.product((None, *WARPS), settings(kernel)):
        if not (STAND_IN and number is not None):
            yield number, constants


def measured(file: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a file whose settings of today worked, by case."""
    return {
        record["case"]: record
        for record in read_records(file)
        if record["bench"] == "sweep" and not isinstance(record["us"][TODAY], str)
    }


def launch_table(file: Path) -> Iterator[str]:
    """Return a line for each kernel: the setting that is best over all its cases.

    It has the least geometric mean of times, each over that of today's setting, among the settings
    that worked in all cases.
    """
    records = sorted(measured(file).values(), key=lambda record: str(record["kernel"]))
    for kernel, group in itertools.groupby(records, lambda record: str(record["kernel"])):
        times = [record["us"] for record in group]
        mean = {
            setting: geometric_mean([us[setting] / us[TODAY] for us in times])
            for setting in times[0]
            if all(isinstance(us.get(setting), float) for us in times)
        }
        best = min(mean, key=mean.__getitem__)
        yield f"{kernel:22} {best}: {mean[best]:.2f} of today's time, {len(times)} cases"


def compile_part(part: int, parts: int, done: Collection[str]) -> None:
    """Call one in `parts` of all trials once, which leaves its kernels in Triton's cache."""
    number = itertools.count()
    for case in cases():
        if case.name in done:
            continue
        for trial in trials(case.kernel):
            if next(number) % parts == part:
                measure(case, *trial, repeats=1)


def measure(
    case: Case, number: int | None, constants: dict[str, int], repeats: int = REPEATS
) -> float | str:
    """Return the shortest time of a call in microseconds, or why it failed."""
    module = import_module(f"mimkit_kernels.{case.kernel}")
    with ExitStack() as stack:
        for name, value in constants.items():
            stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(warps(number))
        stack.enter_context(mimkit.use("triton"))
        try:
            case.call()
            clock = time_on_cpu if STAND_IN else time_on_gpu
            return 1e6 * min(clock(case.call) for _ in range(repeats))
        except Exception as error:  # a setting that the compiler refuses must not end the sweep
            return f"{type(error).__name__}: {str(error).splitlines()[:1]}"


def main() -> int:
    """Sweep all cases; skip those whose result is in the file already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    report = Report(file=options.rows)
    done = measured(options.rows)
    failed = False
    if options.jobs > 1:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            parts = [(part, options.jobs, list(done)) for part in range(options.jobs)]
            pool.starmap(compile_part, parts)
    for case in cases():
        if case.name in done:
            continue
        times = {}
        for number, constants in trials(case.kernel):
            setting = ", ".join(f"{n}={v}" for n, v in (constants | {"num_warps": number}).items())
            times[setting] = measure(case, number, constants)
        worked = {name: us for name, us in times.items() if isinstance(us, float)}
        best = min(worked, key=worked.get, default=None)
        report.save({"bench": "sweep", "kernel": case.kernel, "case": case.name, "us": times})
        today = times[TODAY]
        failed |= isinstance(today, str)
        print(f"{case.kernel:22} {case.name}: today {today} us; best {best}: {worked.get(best)} us",
              flush=True)  # fmt: skip
    print("\nThe launch table that this would choose, one setting for all cases of a kernel:")
    print(*launch_table(options.rows), sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
