"""Complementary masks: every token is visible in exactly one of them."""

from collections.abc import Sequence

import torch

from mimkit._arguments import checked
from mimkit._grids import as_integer, as_sizes, count_tokens
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, UNIFORM, random_words


@checked
def complementary(key: Key, grid: Sequence[int], parts: int) -> list[Mask]:
    """Draw `parts` masks for every sample, such that each token is visible in exactly one.

    Args:
        key: Seed, epoch and sample ids (see `masking.key`).
        grid: Tokens per axis; at most 65536 in all.
        parts: Number of masks, at most the number of tokens. If it does not divide that number, the
            first masks have one more visible token than the others.

    Returns:
        The masks. The first one equals that of `uniform` with the same number of visible tokens.

    Raises:
        TypeError: If `parts` is not an integer.
        ValueError: If there are fewer parts than one or more than tokens, or too many tokens.

    Source:
        FastConvMAE, Alpha-VL/FastConvMAE `random_masking`: four parts of a random permutation.

    Example:
        >>> from mimkit import masking
        >>> masks = complementary(masking.key([7], seed=0), (2, 4), parts=4)
        >>> sorted(int(i) for mask in masks for i in mask.visible_ids.flatten())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    grid = as_sizes("grid", grid)
    num_tokens = count_tokens(grid)
    parts = as_integer("parts", parts)
    if not 1 <= parts <= num_tokens:
        raise ValueError(f"parts must be in [1, {num_tokens}] for grid {grid}; got {parts}")
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} are supported")
    words = random_words(key, num_tokens, sampler=UNIFORM)
    ranks = (words << 16) | torch.arange(num_tokens, device=key.device)
    split = ranks.argsort(dim=1).tensor_split(parts, dim=1)
    return [Mask.from_visible_ids(ids, grid) for ids in split]
