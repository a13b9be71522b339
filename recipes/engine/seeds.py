"""Random generators and seeds: pure functions of the run's seed and integers.

So a resumed run needs no saved generator state.
"""

import numpy as np
import torch


def sample_rng(seed: int, *key: int) -> np.random.Generator:
    """Make the random generator of a key, such as an epoch and a sample id.

    Args:
        seed: Seed of the run.
        key: Integers, 0 or more. Keys of different lengths give different generators.

    Returns:
        A new generator.
    """
    # A list [seed, *key] would be padded with zeros, so that (1,) and (1, 0) would collide.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def stream_seed(seed: int, *key: int) -> int:
    """Hash integers into a seed of 32 bits: PyTorch's CPU generator ignores the other bits."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0])


def step_generator(*, seed: int, step: int) -> torch.Generator:
    """Make the random generator of a step, on the CPU."""
    return torch.Generator().manual_seed(stream_seed(seed, step))
