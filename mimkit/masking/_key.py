"""Keys: the inputs that determine a mask."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64, Integer
from torch import Tensor

from mimkit._arguments import Count, checked
from mimkit._containers import container, static
from mimkit._grids import as_integer

_MAX_VIEWS = 1 << 8
_MAX_EPOCHS = 1 << 32


@checked
@container
class Key:
    """Everything that a mask depends on: sample ids, seed, epoch and view. Make one with `key`.

    Attributes:
        sample_ids: Id of every sample of the batch.
        seed_and_epoch: Seed and epoch in one tensor, so that a new epoch neither recompiles a
            graph nor invalidates a captured one.
        view_index: Which of the independent masks of these samples is drawn, in [0, 256).

    Source:
        mimkit's own; its words come from Philox4x32-10 (see `philox4x32`).

    Example:
        >>> from mimkit import masking
        >>> key = masking.key([3, 1], seed=7, epoch=5)
        >>> key.sample_ids, key.seed_and_epoch
        (tensor([3, 1]), tensor([7, 5]))
    """

    sample_ids: Int64[Tensor, " batch"]
    seed_and_epoch: Int64[Tensor, "2"]
    view_index: int = static(default=0)

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.sample_ids.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the ids, and of the masks drawn with this key."""
        return self.sample_ids.device

    def view(self, n: int) -> "Key":
        """Return the key of the `n`-th independent mask of the same samples.

        Views are not cumulative: `key.view(2).view(1)` is `key.view(1)`. `key.view(0)` is the key
        that `masking.key` returns.

        Args:
            n: Number of the mask, in [0, 256).

        Returns:
            A key of the same samples, seed and epoch.

        Raises:
            TypeError: If `n` is not an integer.
            ValueError: If `n` is outside [0, 256).

        Example:
            >>> from mimkit import masking
            >>> k = masking.key(torch.arange(2), seed=0)
            >>> one, other = (masking.uniform(k.view(n), (4, 4), 0.5) for n in (0, 1))
            >>> one.equal(other)
            False
        """
        n = as_integer("n of view", n)
        if not 0 <= n < _MAX_VIEWS:
            raise ValueError(f"n of view must be in [0, {_MAX_VIEWS}); got {n}")
        return Key(self.sample_ids, self.seed_and_epoch, n)


@checked
def key(sample_ids: Integer[Tensor, " batch"] | Sequence[int], *, seed: int, epoch: int = 0) -> Key:
    """Make the key of a batch: a mask is a pure function of (seed, epoch, sample id).

    Args:
        sample_ids: One id per sample, such as its index in the data set. Masks are drawn on the
            device of this tensor.
        seed: Any 64-bit integer, signed or unsigned.
        epoch: In [0, 2**32).

    Returns:
        A key on the device of the ids.

    Raises:
        TypeError: If the ids, the seed or the epoch are not integers.
        ValueError: If the ids are not one-dimensional, or the seed or the epoch is out of range.

    Source:
        mimkit's own. The authors draw from global random generators, so that their masks depend on
        batch, order and process.

    Example:
        >>> from mimkit import masking
        >>> batch = masking.uniform(masking.key([3, 1, 2], seed=0, epoch=5), (4, 4), 0.75)
        >>> alone = masking.uniform(masking.key([1], seed=0, epoch=5), (4, 4), 0.75)
        >>> batch[1].equal(alone)
        True
    """
    if not isinstance(sample_ids, Tensor):
        if not isinstance(sample_ids, Sequence | np.ndarray):
            raise TypeError(f"sample_ids must be one integer per sample; got {sample_ids!r}")
        # An empty list has no dtype of its own.
        sample_ids = torch.as_tensor(sample_ids, dtype=None if len(sample_ids) else torch.int64)
    ids = sample_ids
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"sample_ids must be integers; got {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"sample_ids must have one axis (batch); got shape {tuple(ids.shape)}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        if not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an integer; got {value!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must fit in 64 bits; got {seed}")
    if not 0 <= epoch < _MAX_EPOCHS:
        raise ValueError(f"epoch must be in [0, 2**32); got {epoch}")
    signed = seed - (1 << 64) if seed >= 1 << 63 else seed
    return Key(ids.long(), torch.tensor([signed, epoch], device=ids.device))


@checked
def fresh_key(
    batch_size: Count,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Key:
    """Make a key with a random seed, for masks that need not be drawn again.

    Args:
        batch_size: Number of samples; their ids are 0, 1, 2, ...
        device: Where the masks are drawn. The seed stays there, so nothing is synchronised.
        generator: Random generator for the seed, on `device`; PyTorch's default one if `None`.

    Returns:
        A key of epoch 0, on `device`.

    Raises:
        TypeError: If the batch size is not an integer.

    Source:
        mimkit's own.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> fresh_key(2, generator=generator).sample_ids
        tensor([0, 1])
    """
    batch_size = as_integer("batch_size", batch_size)
    bounds = torch.iinfo(torch.int64)
    seed = torch.randint(bounds.min, bounds.max, (1,), device=device, generator=generator)
    return Key(torch.arange(batch_size, device=device), torch.cat([seed, torch.zeros_like(seed)]))
