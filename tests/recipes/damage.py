"""Damage to files, as a failing disk does it."""

import random
from pathlib import Path


def flip_a_bit(file: Path, rng: random.Random) -> None:
    """Flip a random bit of a file."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
