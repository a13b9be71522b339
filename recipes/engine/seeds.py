"""Random streams: each a pure function of a seed and integers.

A run that is resumed needs no other state.
"""

import numpy as np
import torch


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """Make the random generator that belongs to a key.

    Args:
        seed: Seed of the run.
        key: Integers from 0; keys of different lengths give different generators.

    Returns:
        A fresh generator.
    """
    # A list [seed, *key] would be padded with zeros, so that (1,) and (1, 0) would collide.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def stream_seed(seed: int, *key: int) -> int:
    """Mix integers into a seed for PyTorch, whose CPU generator looks at 32 bits of it only."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def step_generator(*, seed: int, step: int) -> torch.Generator:
    """Make the random generator of a step, on the CPU: a run that goes on needs no other state."""
    return torch.Generator().manual_seed(stream_seed(seed, step))
