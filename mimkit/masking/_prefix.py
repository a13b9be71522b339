"""Masks of everything after the first tokens in raster order."""

from collections.abc import Sequence
from fractions import Fraction

import torch

from mimkit._arguments import Size, checked
from mimkit._grids import as_sizes, count_tokens
from mimkit.masking._counts import Rounding, resolve_count
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import random_words
from mimkit.masking._ragged import RaggedMask, ragged

_LENGTH = 11  # stream number in the public format


@checked
def prefix(
    key: Key,
    grid: Sequence[int],
    ratio: float | Fraction | None = None,
    *,
    num_masked: int | None = None,
    rounding: Rounding = "nearest",
) -> Mask:
    """Keep the first tokens in raster order visible, the same tokens in every sample.

    Args:
        key: Gives the batch size and the device; this mask is not random.
        grid: Tokens per axis.
        ratio: Fraction of tokens to mask, in [0, 1].
        num_masked: Tokens to mask, instead of `ratio`.
        rounding: How `ratio` becomes a count (see `num_masked`).

    Returns:
        A mask on the device of `key`.

    Raises:
        ValueError: If both or neither of `ratio` and `num_masked` are given, or the count does not
            fit.

    Source:
        AIM, arXiv:2401.08541, section 3.2 "prefix", whose length is random: see `random_prefix`.

    Example:
        >>> from mimkit import masking
        >>> prefix(masking.key([0], seed=0), (2, 3), 0.5).visible_ids
        tensor([[0, 1, 2]])
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    count = resolve_count(num_tokens, ratio, num_masked, rounding)
    ids = torch.arange(num_tokens, device=key.device).expand(key.batch_size, -1)
    visible, masked = ids.split([num_tokens - count, count], dim=1)
    return Mask(visible.contiguous(), masked.contiguous(), grid)


@checked
def random_prefix(
    key: Key, grid: Sequence[int], *, shortest: Size = 1, longest: Size | None = None
) -> RaggedMask:
    """Keep the first tokens in raster order visible, a random number of them in each sample.

    Each length from `shortest` to `longest` is as likely. Lengths are read, which synchronises a
    GPU.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis.
        shortest: Fewest visible tokens.
        longest: Most visible tokens; all but one if `None`.

    Returns:
        A mask on the device of `key`, for encoders, decoders and losses that take different counts.

    Raises:
        ValueError: If the lengths do not fit the grid, or there are no samples.

    Source:
        AIM, arXiv:2401.08541, section 3.2: the loss is of the tokens after a prefix, whose length
        is drawn uniformly from 1 to all tokens but one. AIM predicts them one after the other,
        which is the model's task, not the mask's.

    Example:
        >>> from mimkit import masking
        >>> random_prefix(masking.key([7, 8, 9], seed=0), (14, 14)).num_visible
        (32, 74, 98)
    """
    if key.device.type == "meta":
        raise ValueError("key must hold numbers, from which lengths are drawn; got one on meta")
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    longest = max(num_tokens - 1, 1) if longest is None else longest
    if not shortest <= longest <= num_tokens:
        raise ValueError(
            f"lengths must have shortest <= longest <= {num_tokens}; got {shortest} and {longest}"
        )
    words = random_words(key, 1, sampler=_LENGTH).squeeze(1)
    # word * n >> 32 is uniform on [0, n), in integers.
    lengths = shortest + (words * (longest - shortest + 1) >> 32)
    return ragged(prefix, key, grid, num_masked=(num_tokens - lengths).tolist())
