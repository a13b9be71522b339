"""Masks that share an image out: every token is visible in exactly one of them."""

from collections.abc import Sequence

import torch

from mimkit._grids import as_integer, as_sizes, count_tokens
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask
from mimkit.masking._philox import MAX_TOKENS, UNIFORM, random_words


def complementary(key: Key, grid: Sequence[int], parts: int) -> list[Mask]:
    """Deal the tokens of every sample to `parts` masks, each token visible in exactly one.

    Args:
        key: What the masks are functions of.
        grid: Tokens per axis; at most 65536 in all.
        parts: Number of masks, at most the number of tokens. Where it does not divide that number,
            the first masks see one token more than the others.

    Returns:
        The masks; the first one is what `uniform` draws for as many visible tokens.

    Raises:
        TypeError: A number of parts that is not an integer.
        ValueError: Fewer than one part, more parts than tokens, or too many tokens.

    Source:
        FastConvMAE, Alpha-VL/FastConvMAE `random_masking`: four parts of a shuffled order.

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
        raise ValueError(f"grid {grid} has {num_tokens} tokens; at most {MAX_TOKENS} can be ranked")
    words = random_words(key, num_tokens, sampler=UNIFORM)
    ranks = (words << 16) | torch.arange(num_tokens, device=key.device)
    dealt = ranks.argsort(dim=1).tensor_split(parts, dim=1)
    return [Mask.from_visible_ids(ids, grid) for ids in dealt]
