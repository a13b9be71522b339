"""`jit`: Triton functions in files that import without Triton."""

from collections.abc import Callable
from typing import Any


class jit:
    """Mark a Triton function; Triton is imported and compiles it at its first launch.

    A kernel file also holds the PyTorch reference, which must run without Triton. So importing the
    file does nothing. The first launch defines `tl` in the function's file and replaces every
    marked function in it by Triton's own; the same in each file that it imports functions from.
    Such files need `from __future__ import annotations`, as `tl` is undefined at import.
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
        """Raise: only other Triton functions can call it, and Triton compiles those calls."""
        raise TypeError(f"{self.function.__name__} is a Triton function: launch it over a grid")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.resolve()[grid]
