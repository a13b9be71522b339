"""A folder of noise to train on."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_noise(folder: Path, number: int) -> Path:
    """Write images without labels, so that a run trains and does not probe."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(number):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder
