"""Sampling: MAE's `random_masking` and `masking.uniform`; CAE's loop and `masking.blockwise`.

Axes: batch; tokens.
"""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Variant, nbytes, with_compiled
from mimkit import masking
from mimkit.masking import Key, Mask

RATIO = 0.75


def authors_random_masking(
    batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kept ids in the order of their noise, the mask (1 = masked) and ids_restore."""
    keep = int(length * (1 - RATIO))
    shuffle = torch.rand(batch, length, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    hidden = torch.ones(batch, length, device=device)
    hidden[:, :keep] = 0
    return shuffle[:, :keep], hidden.gather(1, restore), restore


def uniform(key: Key, grid: tuple[int, int]) -> Mask:
    """Sample visible and masked ids, which is all that MAE's model here needs."""
    return masking.uniform(key, grid, RATIO)


def uniform_in_full(key: Key, grid: tuple[int, int]) -> tuple[Mask, Tensor, Tensor]:
    """Compute all that the authors' function returns, too."""
    mask = masking.uniform(key, grid, RATIO)
    return mask, mask.is_masked, mask.restore_ids


def _partition_of_authors(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    kept, hidden, _restore = output
    masked = hidden.nonzero()[:, 1].view(len(kept), -1)
    return torch.cat([kept, masked], dim=1).sort(dim=1).values, hidden.sum(dim=1)


def _partition(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    mask = output if isinstance(output, Mask) else output[0]
    ids = torch.cat([mask.visible_ids, mask.masked_ids], dim=1).sort(dim=1).values
    return ids, mask.is_masked.flatten(1).sum(dim=1)


@pytest.mark.parametrize(("batch", "side"), [(256, 14), (64, 28)])
def bench_uniform(bench: Bench, batch: int, side: int) -> None:
    # Draws differ by design: what must agree is that each splits the grid, in the same counts.
    grid, length = (side, side), side * side
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    authors = Variant(
        "authors: two argsorts",
        authors_random_masking,
        (batch, length, bench.device),
        view=_partition_of_authors,
        is_baseline=True,
    )
    ours = [
        Variant("mimkit: uniform", uniform, (key, grid), view=_partition),
        Variant("mimkit: + is_masked, restore_ids", uniform_in_full, (key, grid), view=_partition),
    ]
    ids = masking.uniform(key, grid, RATIO)
    bench.compare(
        f"B={batch} L={length} ratio={RATIO}",
        with_compiled([authors, *ours]),
        dtype=torch.int64,
        tolerance=0,
        moved={"forward": nbytes(ids.visible_ids, ids.masked_ids)},
    )


def authors_blocks(batch: int, height: int, width: int, count: int) -> Tensor:
    """CAE's `MaskingGenerator`, image by image, cell by cell; True = masked."""
    masks = []
    for _ in range(batch):
        mask = np.zeros((height, width), dtype=int)
        masked = 0
        while masked != count:
            masked += _authors_block(mask, count - masked)
        masks.append(mask)
    return torch.from_numpy(np.stack(masks)).bool()


def _authors_block(mask: np.ndarray, most: int) -> int:
    height, width = mask.shape
    delta = 0
    for _ in range(10):
        area = random.uniform(16, most)
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            top, left = random.randint(0, height - h), random.randint(0, width - w)
            already = mask[top : top + h, left : left + w].sum()
            if 0 < h * w - already <= most:
                for i in range(top, top + h):
                    for j in range(left, left + w):
                        if mask[i, j] == 0:
                            mask[i, j] = 1
                            delta += 1
            if delta > 0:
                break
    return delta


def blockwise(key: Key, grid: tuple[int, int], count: int) -> Mask:
    """Sample visible and masked ids."""
    return masking.blockwise(key, grid, num_masked=count)


def _counts(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    is_masked = output.is_masked if isinstance(output, Mask) else output
    return (is_masked.cpu().flatten(1).sum(dim=1),)


@pytest.mark.parametrize("count", [75, 98])
def bench_blockwise(bench: Bench, count: int) -> None:
    # Draws differ by design: what must agree is the count of every sample.
    random.seed(0)
    grid, batch = (14, 14), 256
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    variants = [
        Variant(
            "authors' loop",
            authors_blocks,
            (batch, *grid, count),
            view=_counts,
            is_baseline=True,
        ),
        Variant("mimkit: blockwise", blockwise, (key, grid, count), view=_counts),
    ]
    bench.compare(f"B={batch} L=196 masked={count}", variants, dtype=torch.int64, tolerance=0)
