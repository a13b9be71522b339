"""Every sampler against the published code, with the paper's settings.

Masks differ by design. Checked are the counts and, if ids are returned, that they are a partition
of the grid.

Axes: batch; tokens; height, width; time.
"""

import math
import os
import random
import statistics
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Variant, alternate, nbytes, time_on_cpu, with_compiled
from mimkit import masking
from mimkit.masking import Key, Mask

RATIO = 0.75


def authors_random_masking(
    batch: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's `random_masking`: visible ids in order of noise, mask (1 = masked), ids_restore."""
    keep = int(length * (1 - RATIO))
    shuffle = torch.rand(batch, length, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    hidden = torch.ones(batch, length, device=device)
    hidden[:, :keep] = 0
    return shuffle[:, :keep], hidden.gather(1, restore), restore


def uniform(key: Key, grid: tuple[int, int]) -> Mask:
    """Sample visible and masked ids, which is all that mimkit's MAE needs."""
    return masking.uniform(key, grid, RATIO)


def uniform_in_full(key: Key, grid: tuple[int, int]) -> tuple[Mask, Tensor, Tensor]:
    """Also compute everything that the authors' function returns."""
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


def authors_blocks(batch: int, height: int, width: int, count: int, exact: bool = True) -> Tensor:
    """CAE's `MaskingGenerator` (or BEiT's: not exact), image by image; True = masked."""
    masks = []
    for _ in range(batch):
        mask = np.zeros((height, width), dtype=int)
        masked, new = 0, 1
        while masked < count and (exact or new):
            new = _authors_block(mask, count - masked)
            masked += new
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
    random.seed(0)
    grid, batch = (14, 14), 256
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)

    def within(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Check that no mask exceeds the count; BEiT's loop may mask fewer."""
        return (_counts(output, ())[0] <= count,)

    cae = Variant("authors' loop", authors_blocks, (batch, *grid, count), view=_counts,
                  is_baseline=True)  # fmt: skip
    beit = Variant("BEiT's loop, may fall short", authors_blocks, (batch, *grid, count, False),
                   view=within)  # fmt: skip
    ours = Variant("mimkit: blockwise", blockwise, (key, grid, count), view=_counts)
    case = f"B={batch} L=196 masked={count}"
    bench.compare(case, [cae, ours], dtype=torch.int64, tolerance=0)
    bench.compare(case, [beit], dtype=torch.int64, tolerance=0)
    if bench.device.type == "cpu":
        _note_beside_a_busy_core(bench, case, [cae, ours])


def _note_beside_a_busy_core(bench: Bench, case: str, variants: list[Variant]) -> None:
    """Time variants with and without a busy process on the last core."""
    timed = {variant.name: lambda v=variant: time_on_cpu(v.forward) for variant in variants}
    times = {}
    for busy in (False, True):
        command = [sys.executable, "-c", "while True: pass" if busy else "input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(other.pid, {max(os.sched_getaffinity(0))})
            times[busy] = alternate(timed, bench.seconds, min_repeats=10)
            other.kill()
    for name in timed:
        quiet, loud = (1e3 * statistics.median(times[busy][name]) for busy in (False, True))
        bench.note(
            [f"{case}: {name}: median {quiet:.1f} ms, beside a busy process {loud:.1f} ms "
             f"({loud / quiet:.2f}x)"],
            kind="busy core", case=case, variant=name, quiet_ms=quiet, busy_ms=loud,
        )  # fmt: skip


def authors_inverse_block(batch: int, side: int, ratio: float, block: int) -> Tensor:
    """data2vec 2.0's `compute_block_mask_2d`: all blocks at once, then a loop over images."""
    length, keep = side * side, 1 - ratio
    count = int(length * keep)
    starts = torch.randint(0, length, (batch, int(length * (keep + 0.07) / block**2)))
    shown = torch.zeros(batch, length).scatter_(1, starts, 1).view(batch, side, side)
    sample, row, column = shown.nonzero(as_tuple=True)
    around = range(-(block // 2), block - block // 2)
    rows = torch.cat([row + i for i in around for _ in around]).clamp_(0, side - 1)
    columns = torch.cat([column + j for _ in around for j in around]).clamp_(0, side - 1)
    shown[sample.repeat(block**2), rows, columns] = 1
    shown = shown.view(batch, length)
    for one, seen in zip(shown, shown.sum(dim=1).int().tolist(), strict=True):
        if seen > count:
            one[torch.multinomial(one, seen - count)] = 0
        elif seen < count:
            one[torch.multinomial(1 - one, count - seen)] = 1
    return shown == 0


def inverse_block(key: Key, grid: tuple[int, int], count: int) -> Mask:
    """Sample visible and masked ids."""
    return masking.inverse_block(key, grid, num_masked=count)


def bench_inverse_block(bench: Bench) -> None:
    batch, grid, ratio = 256, (14, 14), 0.8
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    count = 196 - int(196 * (1 - ratio))
    authors = Variant("authors: blocks, then a loop", authors_inverse_block, (batch, 14, ratio, 3),
                      view=_counts, is_baseline=True)  # fmt: skip
    ours = Variant("mimkit: inverse_block", inverse_block, (key, grid, count), view=_counts)
    variants = [authors, ours, ours.compiled()]
    bench.compare(f"B={batch} L=196 ratio=0.8", variants, dtype=torch.int64, tolerance=0)


def authors_tubes(batch: int, frames: int, tokens: int, count: int) -> Tensor:
    """VideoMAE's `TubeMaskingGenerator`: one numpy shuffle per video."""
    masks = []
    for _ in range(batch):
        frame = np.hstack([np.zeros(tokens - count), np.ones(count)])
        np.random.shuffle(frame)
        masks.append(np.tile(frame, (frames, 1)).flatten())
    return torch.from_numpy(np.stack(masks)).bool()


def tube(key: Key, grid: tuple[int, ...], count: int) -> Mask:
    """Sample visible and masked ids."""
    return masking.tube(key, grid, num_masked=count)


def bench_tube(bench: Bench) -> None:
    batch, grid, count = 64, (8, 14, 14), 176
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    authors = Variant("authors' loop", authors_tubes, (batch, 8, 196, count), view=_counts,
                      is_baseline=True)  # fmt: skip
    ours = Variant("mimkit: tube", tube, (key, grid, 8 * count), view=_counts)
    variants = [authors, ours, ours.compiled()]
    bench.compare(f"B={batch} L=8x196 ratio=0.9", variants, dtype=torch.int64, tolerance=0)


def authors_multiblock(batch: int, side: int) -> tuple[Tensor, list[Tensor]]:
    """I-JEPA's `MaskCollator`: contexts and four targets, truncated to the batch's shortest."""

    def size(scale: tuple[float, float], aspect: tuple[float, float]) -> tuple[int, int]:
        share = torch.rand(1).item()
        area = int(side * side * (scale[0] + share * (scale[1] - scale[0])))
        ratio = aspect[0] + share * (aspect[1] - aspect[0])
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        return min(h, side - 1), min(w, side - 1)

    def place(h: int, w: int, free: list[Tensor]) -> tuple[Tensor, Tensor]:
        misses = 0
        while True:
            top, left = int(torch.randint(0, side - h, (1,))), int(torch.randint(0, side - w, (1,)))
            inside = torch.zeros(side, side, dtype=torch.int32)
            inside[top : top + h, left : left + w] = 1
            for region in free[: max(len(free) - misses // 20, 0)]:
                inside *= region
            ids = inside.flatten().nonzero().squeeze(1)
            if len(ids) > 10:
                outside = torch.ones(side, side, dtype=torch.int32)
                outside[top : top + h, left : left + w] = 0
                return ids, outside
            misses += 1

    target, context = size((0.15, 0.2), (0.75, 1.5)), size((0.85, 1.0), (1.0, 1.0))
    contexts, targets = [], []
    for _ in range(batch):
        ids, free = zip(*(place(*target, []) for _ in range(4)), strict=True)
        targets.append(ids)
        contexts.append(place(*context, list(free))[0])
    kept, predicted = min(map(len, contexts)), min(len(i) for ids in targets for i in ids)
    columns = [torch.stack([ids[n][:predicted] for ids in targets]) for n in range(4)]
    return torch.stack([ids[:kept] for ids in contexts]), columns


def multiblock(key: Key, grid: tuple[int, int]) -> masking.MultiBlock:
    """Sample contexts and four targets."""
    return masking.multiblock(key, grid)


def _overlap(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the numbers of samples and targets, and of context tokens that lie in a target."""
    if isinstance(output, masking.MultiBlock):
        context, targets = output.context.visible_ids, [t.masked_ids for t in output.targets]
    else:
        context, targets = output
    shared = sum((context.unsqueeze(2) == t.unsqueeze(1)).sum() for t in targets)
    return torch.tensor([len(context), len(targets)]), torch.as_tensor(shared).cpu()


def bench_multiblock(bench: Bench) -> None:
    batch, side = 256, 14
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    authors = Variant("authors' loop", authors_multiblock, (batch, side), view=_overlap,
                      is_baseline=True)  # fmt: skip
    ours = Variant("mimkit: multiblock", multiblock, (key, (side, side)), view=_overlap)
    variants = [authors, ours, ours.compiled()]
    bench.compare(f"B={batch} L=196, 4 targets", variants, dtype=torch.int64, tolerance=0)


def authors_weighted(weights: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """MILAN's `attention_masking`: one multinomial draw of all tokens without replacement.

    In MILAN the first tokens stay visible. The order is reversed here, so that they are masked.
    """
    batch, length = weights.shape
    shuffle = torch.multinomial(weights, length).flip(1)
    restore = shuffle.argsort(dim=1)
    hidden = torch.ones(batch, length, device=weights.device)
    hidden[:, : length - count] = 0
    return shuffle[:, : length - count], hidden.gather(1, restore), restore


def weighted(key: Key, grid: tuple[int, int], weights: Tensor, count: int) -> Mask:
    """Sample visible and masked ids."""
    return masking.weighted(key, grid, weights=weights, num_masked=count)


def bench_weighted(bench: Bench) -> None:
    batch, grid, count = 256, (14, 14), 147
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    weights = torch.rand(batch, 196, device=bench.device) + 0.1
    authors = Variant("authors: multinomial", authors_weighted, (weights, count),
                      view=_partition_of_authors, is_baseline=True)  # fmt: skip
    ours = Variant("mimkit: weighted", weighted, (key, grid, weights, count), view=_partition)
    variants = [authors, ours, ours.compiled()]
    bench.compare(f"B={batch} L=196 ratio=0.75", variants, dtype=torch.int64, tolerance=0)


def authors_complementary(
    batch: int, length: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """FastConvMAE's `random_masking`: four slices of a random permutation, and ids_restore."""
    keep = length // 4
    shuffle = torch.rand(batch, length, device=device).argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    return [shuffle[:, i * keep : (i + 1) * keep] for i in range(4)], restore


def complementary(key: Key, grid: tuple[int, int]) -> list[Mask]:
    """Sample the four masks: visible and masked ids of each."""
    return masking.complementary(key, grid, 4)


def _groups(output: Any, _: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    groups = output[0] if isinstance(output, tuple) else [mask.visible_ids for mask in output]
    return torch.cat(groups, dim=1).sort(dim=1).values, torch.tensor([g.shape[1] for g in groups])


def bench_complementary(bench: Bench) -> None:
    batch, grid = 256, (14, 14)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    authors = Variant("authors: two argsorts", authors_complementary, (batch, 196, bench.device),
                      view=_groups, is_baseline=True)  # fmt: skip
    ours = Variant("mimkit: complementary", complementary, (key, grid), view=_groups)
    variants = with_compiled([authors, ours])
    bench.compare(f"B={batch} L=196, 4 parts", variants, dtype=torch.int64, tolerance=0)
