"""Registration of operators: one schema, a launcher for GPUs, a reference for CPUs."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import INTERPRETED

# Kept in a global: registrations end with the life of the library object.
LIBRARY = torch.library.Library("mimkit", "FRAGMENT")


def on_one_device(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse tensors on several devices: a kernel would read memory of another one.

    Raises:
        ValueError: In a call: not all tensors are on one device.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        tensors = [
            value
            for argument in args
            for value in (argument if isinstance(argument, list | tuple) else (argument,))
            if isinstance(value, Tensor)
        ]
        if any(tensor.device != tensors[0].device for tensor in tensors):
            devices = [str(tensor.device) for tensor in tensors]
            raise ValueError(f"all tensors of mimkit::{name} must be on one device; got {devices}")
        return function(*args)

    return call


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
        launch: Runs the kernels, for the dispatch key "CUDA" (ROCm too) and in the interpreter.
        reference: Runs on CPU tensors. Its results must not share memory with its arguments.
        fake: Returns empty results of the right shapes.
        backward: Computes gradients with operators only. Without it, a backward pass raises:
            kernels that compute gradients cannot be differentiated again.
        setup_context: Saves what `backward` needs (see `torch.library.register_autograd`).
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, on_one_device(name, launch), "CUDA")
    LIBRARY.impl(name, on_one_device(name, launch if INTERPRETED else reference), "CPU")
    torch.library.register_fake(f"mimkit::{name}", on_one_device(name, fake), lib=LIBRARY)

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"mimkit::{name} has no derivative on the kernel path; "
            'mimkit.use("reference") supports higher derivatives'
        )

    torch.library.register_autograd(
        f"mimkit::{name}", backward or refuse, setup_context=setup_context, lib=LIBRARY
    )
    return getattr(torch.ops.mimkit, name).default
