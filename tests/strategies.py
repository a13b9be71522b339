"""Hypothesis strategies of the tests: grids, patch sizes, keys, masks, images."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from mimkit import masking
from mimkit.masking import Key, Mask, RaggedMask

Sizes = tuple[int, ...]

seeds = st.integers(-(1 << 63), (1 << 64) - 1)
epochs = st.integers(0, (1 << 32) - 1)
views = st.integers(0, 255)
sample_ids = st.integers(-(1 << 63), (1 << 63) - 1)
orders = st.sampled_from(["p1 p2 c", "c p1 p2"])


def grids(
    *, min_axes: int = 1, max_axes: int = 3, min_tokens: int = 1, max_tokens: int = 200
) -> st.SearchStrategy:
    """Draw grids with `min_axes` to `max_axes` axes, rarely square."""

    def of_axes(axes: int) -> st.SearchStrategy:
        side = st.integers(1, min(max_tokens, int(2 * max_tokens ** (1 / axes))))
        return st.tuples(*[side] * axes)

    fits = st.integers(min_axes, max_axes).flatmap(of_axes)
    return fits.filter(lambda grid: min_tokens <= math.prod(grid) <= max_tokens)


def patch_sizes(axes: int, *, max_side: int = 4) -> st.SearchStrategy:
    """Draw patch sizes with `axes` axes, rarely square."""
    return st.tuples(*[st.integers(1, max_side)] * axes)


@st.composite
def keys(draw: st.DrawFn, *, min_batch: int = 1, max_batch: int = 4) -> Key:
    ids = draw(st.lists(sample_ids, min_size=min_batch, max_size=max_batch))
    key = masking.key(ids, seed=draw(seeds), epoch=draw(epochs))
    return key.view(draw(views))


@st.composite
def masks(draw: st.DrawFn, *, grid: Sizes | None = None, batch_size: int | None = None) -> Mask:
    """Draw masks of any count, including all visible and all masked."""
    grid = draw(grids(max_tokens=60)) if grid is None else grid
    batch = draw(st.integers(1, 4)) if batch_size is None else batch_size
    count = draw(st.integers(0, math.prod(grid)))
    noise = torch.rand(batch, math.prod(grid), generator=draw(generators()))
    return Mask.from_noise(noise, grid, count)


@st.composite
def ragged_masks(
    draw: st.DrawFn, *, axes: int | None = None, max_tokens: int = 20, min_visible: int = 0
) -> RaggedMask:
    """Draw ragged masks: each sample has its own grid and count."""
    drawn_axes = draw(st.integers(1, 3)) if axes is None else axes
    of_axes = grids(min_axes=drawn_axes, max_axes=drawn_axes, max_tokens=max_tokens)
    few = st.lists(of_axes, min_size=1, max_size=3)
    shared = draw(few)  # so that some samples share a grid
    samples = draw(st.lists(st.sampled_from(shared), min_size=1, max_size=4))
    return RaggedMask.cat(
        [
            Mask.from_noise(
                torch.rand(1, math.prod(grid), generator=draw(generators())),
                grid,
                draw(st.integers(0, math.prod(grid) - min_visible)),
            )
            for grid in samples
        ]
    )


def generators() -> st.SearchStrategy:
    """Draw seeded generators for tensor values, which hypothesis need not shrink."""
    return st.integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


@st.composite
def images(
    draw: st.DrawFn,
    grid: Sizes,
    patch: Sizes,
    *,
    batch_size: int | None = None,
    channels: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw images of `grid` patches of `patch` pixels."""
    batch = draw(st.integers(1, 3)) if batch_size is None else batch_size
    channels = draw(st.integers(1, 4)) if channels is None else channels
    shape = (batch, channels, *(n * p for n, p in zip(grid, patch, strict=True)))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=draw(generators()), dtype=dtype)
    return torch.randn(shape, generator=draw(generators()), dtype=torch.float64).to(dtype)


@st.composite
def masked_images(
    draw: st.DrawFn, *, max_tokens: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Mask, Sizes]:
    """Draw images, a mask on their patch grid, and the patch size."""
    grid = draw(grids(max_tokens=max_tokens))
    patch = draw(patch_sizes(len(grid)))
    batch = draw(images(grid, patch, dtype=dtype))
    return batch, draw(masks(grid=grid, batch_size=len(batch))), patch


@st.composite
def masked_maps(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Mask, Sizes]:
    """Draw feature maps, a mask on their grid of cells, and the positions per axis of a cell."""
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    cell = draw(patch_sizes(2))
    batch = draw(images(grid, cell, dtype=dtype))
    return batch, draw(masks(grid=grid, batch_size=len(batch))), cell
