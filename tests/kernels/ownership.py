"""Find addresses that two programs of a launch access, one of them writing, in the interpreter.

Nothing orders programs of a launch. The interpreter runs them one after another, so a result can be
right by luck. Atomic operations are writes too: in another order, sums of floats differ.
"""

import math
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
        self._accesses: dict[str, list[tuple[np.ndarray, int]]] = {"read": [], "write": []}
        self._programs: dict[tuple[int, int, int], int] = {}

    def load(self, pointers: np.ndarray, mask: np.ndarray, *rest: Any) -> Any:
        """Load, and record the addresses."""
        result = self._module.load(pointers, mask, *rest)
        self._record("read", pointers, mask, result.itemsize)
        return result

    def store(self, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray) -> Any:
        """Store, and record the addresses."""
        self._record("write", pointers, mask, values.itemsize)
        return self._module.store(pointers, values, mask)

    def atomic_rmw(
        self, operation: Any, pointers: np.ndarray, values: np.ndarray, mask: np.ndarray, order: Any
    ) -> Any:
        """Read, change and write, and record the addresses."""
        self._record("write", pointers, mask, values.itemsize)
        return self._module.atomic_rmw(operation, pointers, values, mask, order)

    def atomic_cas(self, pointers: np.ndarray, *rest: Any) -> Any:
        """Compare and swap, and record the addresses."""
        result = self._module.atomic_cas(pointers, *rest)
        self._record("write", pointers, np.array(True), result.itemsize)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def _record(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        place = self._current_program()
        number = self._programs.setdefault(place, len(self._programs))
        taken = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = np.unique(pointers[taken]).astype(np.uint64)
        rows = np.stack([addresses, np.full_like(addresses, number)], axis=1)
        self._accesses[kind].append((rows, size))

    def check(self, kernel: str) -> None:
        """Raise if two programs accessed the same address and one of them wrote."""
        written, read = (
            np.unique(np.concatenate([np.zeros((0, 2), np.uint64), *rows]), axis=0)
            for rows in self._in_units()
        )
        addresses, writers = written.T
        if len(np.unique(addresses)) < len(addresses):
            raise Conflict(f"two programs of {kernel} write the same address")
        if len(addresses):
            place = np.minimum(np.searchsorted(addresses, read[:, 0]), len(addresses) - 1)
            if ((addresses[place] == read[:, 0]) & (writers[place] != read[:, 1])).any():
                raise Conflict(f"a program of {kernel} reads what another one writes")

    def _in_units(self) -> Iterator[list[np.ndarray]]:
        """Return writes and reads, split into the largest units of memory of which all consist.

        Each is a list of pairs: number of the unit, number of the program.
        """
        every = self._accesses["write"] + self._accesses["read"]
        unit = math.gcd(*(math.gcd(size, int(np.gcd.reduce(rows[:, 0]))) for rows, size in every))
        for kind in ("write", "read"):
            yield [
                np.stack([rows[:, 0] // np.uint64(unit) + np.uint64(part), rows[:, 1]], axis=1)
                for rows, size in self._accesses[kind]
                for part in range(size // unit)
            ]


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
