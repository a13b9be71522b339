"""The official implementations' numbers, from `tests/golden` (see `meta/config` in each file)."""

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
        # A copy, so that no test can change what another one reads.
        return torch.from_numpy(self[key].copy())

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """All arrays below `prefix`, by the rest of their name."""
        return {key[len(prefix) :]: self.tensor(key) for key in self if key.startswith(prefix)}


@functools.cache
def golden(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return Golden({key: arrays[key] for key in arrays.files})
