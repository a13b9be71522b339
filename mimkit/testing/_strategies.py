"""Hypothesis strategies for the inputs of MIM code: grids, ratios, keys, masks, images."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mimkit._grids import Grid, count_tokens, per_axis
from mimkit.masking import Key, Mask, key

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("mimkit.testing needs hypothesis: pip install hypothesis") from error


def grids(
    *, min_axes: int = 1, max_axes: int = 3, min_tokens: int = 2, max_tokens: int = 256
) -> st.SearchStrategy[Grid]:
    """Draw grids of one to three axes, including square grids and lines of 1 x N.

    Args:
        min_axes: Smallest number of axes.
        max_axes: Largest number of axes.
        min_tokens: Smallest number of tokens.
        max_tokens: Largest number of tokens.

    Returns:
        A strategy of tuples.

    Source:
        mimkit's own.

    Example:
        >>> from hypothesis import find
        >>> find(grids(min_axes=2), lambda grid: len(grid) == 2 and grid[0] > 2)
        (3, 1)
    """

    def fits(grid: Grid) -> bool:
        return min_tokens <= count_tokens(grid) <= max_tokens

    def of_axes(axes: int) -> st.SearchStrategy[Grid]:
        side = max(round(max_tokens ** (1 / axes)), 1)
        any_shape = st.tuples(*[st.integers(1, max(side, 2)) for _ in range(axes)])
        line = st.builds(
            lambda length, axis: tuple(length if a == axis else 1 for a in range(axes)),
            st.integers(min_tokens, max_tokens),
            st.integers(0, axes - 1),
        )
        return (any_shape | line).filter(fits)

    return st.integers(min_axes, max_axes).flatmap(of_axes)


def ratios() -> st.SearchStrategy[float]:
    """Draw masking ratios in (0, 1): those of the papers, or any with up to four decimals.

    Returns:
        A strategy of fractions.

    Source:
        mimkit's own.

    Example:
        >>> from hypothesis import find
        >>> find(ratios(), lambda ratio: ratio > 0.5)
        0.6
    """
    return st.sampled_from([0.25, 0.4, 0.5, 0.6, 0.75, 0.9]) | st.builds(
        lambda parts: parts / 10_000, st.integers(1, 9_999)
    )


def keys(*, min_batch: int = 1, max_batch: int = 5) -> st.SearchStrategy[Key]:
    """Draw keys with any 64-bit seed, any epoch and any 64-bit sample ids, also negative ones.

    Args:
        min_batch: Smallest number of samples.
        max_batch: Largest number of samples.

    Returns:
        A strategy of keys with unique sample ids.

    Source:
        mimkit's own.

    Example:
        >>> from hypothesis import find
        >>> find(keys(min_batch=2), lambda key: True).batch_size
        2
    """
    ids = st.integers(-(2**63), 2**63 - 1)
    return st.builds(
        lambda sample_ids, seed, epoch: key(torch.tensor(sample_ids), seed=seed, epoch=epoch),
        st.lists(ids, min_size=min_batch, max_size=max_batch, unique=True),
        st.integers(-(2**63), 2**64 - 1),
        st.integers(0, 2**32 - 1),
    )


def masks(
    grid: Sequence[int] | None = None, *, batch_size: int | None = None
) -> st.SearchStrategy[Mask]:
    """Draw masks of any count, including all visible and all masked.

    Args:
        grid: Tokens per axis; any grid of `grids` if `None`.
        batch_size: Number of samples; one to four if `None`.

    Returns:
        A strategy of masks.

    Source:
        mimkit's own.

    Example:
        >>> from hypothesis import find
        >>> find(masks((2, 3), batch_size=4), lambda mask: mask.num_masked == 5)
        Mask(batch_size=4, grid=(2, 3), num_visible=1, num_masked=5, device='cpu')
    """

    def of_grid(drawn: Grid) -> st.SearchStrategy[Mask]:
        num_tokens = count_tokens(drawn)
        batch = st.integers(1, 4) if batch_size is None else st.just(batch_size)
        return st.builds(_random_mask, batch, st.just(drawn), st.integers(0, num_tokens), _seeds())

    return (grids() if grid is None else st.just(tuple(grid))).flatmap(of_grid)


def images(
    grid: Sequence[int],
    patch_size: int | Sequence[int],
    *,
    batch_size: int = 2,
    channels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> st.SearchStrategy[Tensor]:
    """Draw random images of `grid` patches of `patch_size` pixels, as floats or uint8.

    Args:
        grid: Patches per axis.
        patch_size: Pixels per patch; one integer, or one per axis.
        batch_size: Number of images.
        channels: Number of channels; one to five if `None`.
        dtype: A dtype of floats, or uint8.

    Returns:
        A strategy of tensors: floats are normal, bytes uniform.

    Source:
        mimkit's own.

    Example:
        >>> from hypothesis import find
        >>> find(images((2, 3), 4, channels=3), lambda drawn: True).shape
        torch.Size([2, 3, 8, 12])
    """
    patch = per_axis("patch_size", patch_size, len(grid))
    spatial = [size * pixels for size, pixels in zip(grid, patch, strict=True)]
    depth = st.integers(1, 5) if channels is None else st.just(channels)

    def make(depth: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, depth, *spatial)
        if dtype == torch.uint8:
            return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
        return torch.randn(shape, dtype=dtype, generator=generator)

    return st.builds(make, depth, _seeds())


def _seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


def _random_mask(batch_size: int, grid: Grid, num_masked: int, seed: int) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(batch_size, math.prod(grid), generator=generator)
    return Mask.from_noise(noise, grid, num_masked)
