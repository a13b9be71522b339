"""Golden vectors: outputs of the authors' code, from `tests/golden` (see its README)."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


class Golden(dict[str, np.ndarray]):
    """The arrays of one file by key."""

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(str(self["meta/config"]))

    def tensor(self, key: str) -> Tensor:
        # A copy, so that no test can change the arrays of another one.
        return torch.from_numpy(self[key].copy())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return all arrays whose key starts with `prefix`, by the rest of their key."""
        return {key[len(prefix) :]: self.tensor(key) for key in self if key.startswith(prefix)}


@functools.cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return Golden({key: arrays[key] for key in arrays.files})
