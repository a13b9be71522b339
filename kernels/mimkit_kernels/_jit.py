"""`jit`: Triton kernels in files that can be imported without Triton."""

from collections.abc import Callable
from typing import Any


class jit:
    """Mark a Triton function; Triton is imported and the function compiled at its first launch.

    A kernel file holds the PyTorch reference too, which machines without Triton run. So at import
    nothing happens; the first launch gives the function's file its `tl` and replaces every marked
    function in it, and in the files it takes functions from, by Triton's own.
    Files that use it need `from __future__ import annotations`: `tl` is not there yet.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._compiled: Any = None

    def resolve(self) -> Any:
        """Return Triton's function."""
        if self._compiled is None:
            import triton

            scope = self.function.__globals__
            scope["tl"] = triton.language
            self._compiled = triton.jit(self.function)
            for name, value in list(scope.items()):
                if isinstance(value, jit):
                    scope[name] = value.resolve()
        return self._compiled

    def __call__(self, *arguments: Any) -> Any:
        """Refuse: what calls a marked function is another one, which Triton compiles with it."""
        raise TypeError(f"{self.function.__name__} is a Triton function: launch it over a grid")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.resolve()[grid]
