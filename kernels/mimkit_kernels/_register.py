"""Registration of operators: one schema, a launcher for GPUs, a reference for CPUs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import INTERPRETED

LIBRARY = torch.library.Library("mimkit", "FRAGMENT")  # its registrations live as long as it does


def register(
    schema: str,
    *,
    launch: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Any:
    """Define `torch.ops.mimkit.<name>`, and return it.

    Args:
        schema: Name, arguments and results.
        launch: Runs the kernels; on the key "CUDA", which ROCm shares, and in the interpreter.
        reference: Runs for CPU tensors; its results must not share memory with its arguments.
        fake: Makes empty results of the right shapes.
        backward: Gradients, from operators alone. Without it, a backward pass through the operator
            raises: the kernels that compute gradients are differentiated no further.
        setup_context: What `backward` needs (see `torch.library.register_autograd`).
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, launch, "CUDA")
    LIBRARY.impl(name, launch if INTERPRETED else reference, "CPU")
    torch.library.register_fake(f"mimkit::{name}", fake, lib=LIBRARY)

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"mimkit::{name} has no derivative on the kernel path; "
            'mimkit.use("reference") differentiates any number of times'
        )

    torch.library.register_autograd(
        f"mimkit::{name}", backward or refuse, setup_context=setup_context, lib=LIBRARY
    )
    return getattr(torch.ops.mimkit, name).default


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the device of `tensor`, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_2_from(n: int) -> int:
    """Return the smallest power of 2 that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()
