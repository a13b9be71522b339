"""Find addresses that two programs of a launch access, one of them writing, in the interpreter.

Nothing orders programs of a launch. The interpreter runs them one after another, so a result can be
right by luck.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


class Conflict(AssertionError):
    """Two programs of a launch access the same address, and one of them writes."""


class Owners:
    """Stands for Triton's module of memory accesses, and records who accesses what."""

    def __init__(self, module: Any, current_program: Callable[[], tuple[int, int, int]]) -> None:
        self._module, self._current_program = module, current_program
        self.clear()

    def clear(self) -> None:
        """Forget all accesses; a launch begins."""
        self._accesses: dict[str, list[np.ndarray]] = {"read": [], "write": []}
        self._programs: dict[tuple[int, int, int], int] = {}

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        """Load, and record the addresses."""
        self._record("read", pointers, mask)
        return self._module.load(pointers, mask, *rest)

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        """Store, and record the addresses."""
        self._record("write", pointers, mask)
        return self._module.store(pointers, values, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _record(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        place = self._current_program()
        number = self._programs.setdefault(place, len(self._programs))
        addresses = np.unique(pointers[np.broadcast_to(mask, pointers.shape).astype(bool)])
        rows = np.stack([addresses, np.full_like(addresses, number)], axis=1)
        self._accesses[kind].append(rows)

    def check(self, kernel: str) -> None:
        """Raise if two programs accessed the same address and one of them wrote."""
        written, read = (
            np.unique(
                np.concatenate([np.zeros((0, 2), np.uint64), *found]).astype(np.uint64), axis=0
            )
            for found in (self._accesses["write"], self._accesses["read"])
        )
        addresses, writers = written.T
        if len(np.unique(addresses)) < len(addresses):
            raise Conflict(f"two programs of {kernel} write the same address")
        if len(addresses):
            place = np.minimum(np.searchsorted(addresses, read[:, 0]), len(addresses) - 1)
            if ((addresses[place] == read[:, 0]) & (writers[place] != read[:, 1])).any():
                raise Conflict(f"a program of {kernel} reads what another one writes")


@contextmanager
def checked_owners() -> Iterator[None]:
    """Check every launch in the interpreter."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    owners = Owners(interpreter._interpreter, lambda: builder.grid_idx)
    run = interpreter.GridExecutor.__call__

    def launch(executor: Any, *arguments: Any, **named: Any) -> None:
        owners.clear()
        run(executor, *arguments, **named)
        owners.check(executor.fn.__name__)

    with (
        mock.patch.object(interpreter, "_interpreter", owners),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield
