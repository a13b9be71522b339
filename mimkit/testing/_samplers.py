"""Property test of mask samplers."""

import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mimkit._grids import Grid, as_sizes, count_tokens
from mimkit.masking import Key, Mask, RaggedMask, key
from mimkit.masking import num_masked as count_masked

# Called as `sampler(key, grid, ratio)`, or without a ratio as `sampler(key, grid)`.
Sampler = Callable[..., Mask | RaggedMask]
Drawn = Bool[Tensor, "batch *grid"]  # True where masked

_BATCH = 64
# Several single samples: one alone may happen to get the same mask as in the batch.
_SPLIT = [1] * 8 + [5, _BATCH - 13]
_MAX_DRAWN_TOKENS = 1 << 25
_SHOWN = 8  # positions listed in an error message
_GENERATORS = ("torch", "random", "numpy")
_MAX_LINES = 1_000_000  # Python lines run by one call; a vectorized sampler runs a few hundred


def assert_sampler_conforms(
    sampler: Sampler,
    grid: Sequence[int],
    ratio: float | None = None,
    *,
    num_masked: int | None = None,
    least: float = 0.1,
    fixed: Bool[Tensor, "*grid"] | None = None,
) -> None:
    """Check the properties that every sampler must have.

    Sampling ends. Masks are valid and have the requested count. They are a pure function of (seed,
    epoch, sample id): independent of batch size, batch order and global random generators. Other
    seeds, epochs and sample ids give other masks. Every position is masked in some masks and
    visible in others, but for those that are `fixed`, which are the same in all masks.

    Args:
        sampler: Called as `sampler(key, grid, ratio)`, without a ratio as `sampler(key, grid)`;
            returns a `Mask`, or a `RaggedMask` where counts may differ.
        grid: Tokens per axis.
        ratio: Fraction to mask, in (0, 1); `None` for a sampler that draws the count itself.
        num_masked: Expected number of masked tokens, if it is not `masking.num_masked` of the
            ratio, as for a sampler of larger units.
        least: Smallest allowed rate at which a position is masked, and visible, as a fraction of
            the mean rate, in (0, 1]. Lower it for a sampler that is uneven by design, as
            `blockwise` is at high ratios. A smaller value draws more masks, up to 33 million
            tokens; beyond that, only a whole row, column, ... that is never masked (or never
            visible) is reported.
        fixed: Which positions are the same in all masks by design: all of `prefix`, the first and
            the last of `random_prefix`. None if `None`.

    Raises:
        AssertionError: At the first property that fails, with expected and actual values.
        ValueError: If `least` is not in (0, 1], or `fixed` does not have the grid's shape.

    Source:
        mimkit's own, after faults of published samplers: a last row and column that are never
        masked, a rounding that keeps no token, a loop that does not end.

    Example:
        >>> from mimkit import masking
        >>> assert_sampler_conforms(masking.uniform, (4, 4), 0.75)
        >>> truncating = lambda k, grid, ratio: masking.uniform(k, grid, ratio, rounding="mae")
        >>> assert_sampler_conforms(truncating, (10,), 0.9)
        Traceback (most recent call last):
        AssertionError: expected 9 of 10 tokens masked at ratio 0.9; got 10
    """
    grid = as_sizes("grid", grid)
    if not 0 < least <= 1:
        raise ValueError(f"least must be a fraction in (0, 1]; got {least}")
    free = torch.ones(grid, dtype=torch.bool) if fixed is None else ~fixed
    if free.shape != grid:
        raise ValueError(f"fixed must have the shape of the grid {grid}; got {tuple(free.shape)}")
    ids = torch.arange(_BATCH) * 7919 + 2**40
    with _bounded(grid):
        drawn = _draw(sampler, key(ids, seed=1), grid, ratio)
    _check_count(drawn, grid, ratio, num_masked)
    _check_purity(sampler, drawn, ids, grid, ratio)
    _check_batching(sampler, drawn, ids, grid, ratio)
    if free.any():
        _check_variety(sampler, drawn, ids, grid, ratio)
    _check_support(sampler, grid, ratio, drawn, least, free)


def _draw(sampler: Sampler, k: Key, grid: Grid, ratio: float | None) -> Drawn:
    try:
        mask = sampler(k, grid) if ratio is None else sampler(k, grid, ratio)
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(
            f"expected masks of grid {grid} at ratio {ratio}; the sampler raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(mask, Mask | RaggedMask):
        raise AssertionError(f"expected a Mask; got {type(mask).__name__}")
    grids = mask.grids if isinstance(mask, RaggedMask) else (mask.grid,) * mask.batch_size
    if grids != (grid,) * k.batch_size:
        raise AssertionError(f"expected {k.batch_size} masks of grid {grid}; got {mask}")
    try:
        mask.validate()
    except ValueError as error:
        raise AssertionError(f"expected valid masks: {error}") from error
    return mask.is_masked if isinstance(mask, Mask) else torch.stack(mask.is_masked)


@contextmanager
def _bounded(grid: Grid) -> Iterator[None]:
    """Stop code that runs too many Python lines; a time limit would depend on machine load."""
    left = _MAX_LINES

    def count(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        left -= event == "line"
        if left < 0:
            raise AssertionError(
                f"expected sampling to end; {_BATCH} masks of grid {grid} took more than "
                f"{_MAX_LINES} lines of Python, the last one in {frame.f_code.co_name}"
            )
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _check_count(drawn: Drawn, grid: Grid, ratio: float | None, num_masked: int | None) -> None:
    num_tokens, expected = count_tokens(grid), num_masked
    if expected is None:
        if ratio is None:
            return
        expected = count_masked(num_tokens, ratio)
    for count in drawn.flatten(1).sum(dim=1).tolist():
        if count != expected:
            at = "" if ratio is None else f" at ratio {ratio}"
            raise AssertionError(
                f"expected {expected} of {num_tokens} tokens masked{at}; got {count}"
            )


def _check_purity(
    sampler: Sampler, drawn: Drawn, ids: Tensor, grid: Grid, ratio: float | None
) -> None:
    before = _global_states()
    again = _draw(sampler, key(ids, seed=1), grid, ratio)
    if not torch.equal(again, drawn):
        raise AssertionError(
            f"expected equal masks from equal keys; got different ones: "
            f"{_first_difference(again, drawn, ids)}"
        )
    if _global_states() != before:
        changed = [
            n for n, a, b in zip(_GENERATORS, before, _global_states(), strict=True) if a != b
        ]
        raise AssertionError(
            f"expected global random generators to stay unchanged; drawing {len(ids)} masks of "
            f"grid {grid} advanced that of {' and '.join(changed)}"
        )


def _check_batching(
    sampler: Sampler, drawn: Drawn, ids: Tensor, grid: Grid, ratio: float | None
) -> None:
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    permuted = _draw(sampler, key(ids[order], seed=1), grid, ratio)
    cases = [("order", ids[order], permuted, drawn[order])]
    for rows in torch.arange(len(ids)).split(_SPLIT):
        part = _draw(sampler, key(ids[rows], seed=1), grid, ratio)
        cases.append(("size", ids[rows], part, drawn[rows]))
    for name, of, actual, expected in cases:
        if not torch.equal(actual, expected):
            raise AssertionError(
                f"expected masks that do not depend on the batch's {name}; in a batch of {len(of)} "
                f"of {len(ids)} samples, {_first_difference(actual, expected, of)}"
            )


def _first_difference(actual: Drawn, expected: Drawn, ids: Tensor) -> str:
    """Describe the first sample whose masks differ."""
    row = int((actual != expected).flatten(1).any(dim=1).nonzero()[0])
    both = [
        f"{len(masked)} positions, {masked[:_SHOWN]} ..."
        for masked in (_masked_ids(expected[row]), _masked_ids(actual[row]))
    ]
    return f"sample id {int(ids[row])} masks {both[0]} the first time, then {both[1]}"


def _masked_ids(is_masked: Bool[Tensor, "*grid"]) -> list[int]:
    ids: list[int] = is_masked.flatten().nonzero().flatten().tolist()
    return ids


def _check_variety(
    sampler: Sampler, drawn: Drawn, ids: Tensor, grid: Grid, ratio: float | None
) -> None:
    others = {
        "seeds": key(ids, seed=2),
        "epochs": key(ids, seed=1, epoch=1),
        "sample ids": key(ids + 1, seed=1),
    }
    for name, other in others.items():
        if torch.equal(_draw(sampler, other, grid, ratio), drawn):
            first = _masked_ids(drawn[0])[:_SHOWN]
            raise AssertionError(
                f"expected other masks for other {name}; all {_BATCH} are equal: the masked ids "
                f"of sample ids {int(ids[0])} and {int(other.sample_ids[0])} both start {first}"
            )


def _check_support(
    sampler: Sampler,
    grid: Grid,
    ratio: float | None,
    drawn: Drawn,
    least: float,
    free: Bool[Tensor, "*grid"],
) -> None:
    """Check that every free position is masked and visible in some of many masks, no other is both.

    Enough masks are drawn that a position at the smallest allowed rate is missed with a probability
    below 1e-9.
    """
    share = float(drawn.double().mean())
    rate = min(share, 1 - share) * least
    if not rate:
        return
    enough = math.ceil(math.log(free.numel() / 1e-9) / rate)
    num_draws = max(min(enough, _MAX_DRAWN_TOKENS // free.numel()), _BATCH)
    counts = torch.zeros(grid, dtype=torch.int64)
    for ids in torch.arange(num_draws).split(1024):
        counts += _draw(sampler, key(ids, seed=3), grid, ratio).sum(dim=0)
    varies = ~free & (counts > 0) & (counts < num_draws)
    if varies.any():
        raise AssertionError(
            f"expected fixed positions to be the same in all masks; in {num_draws} masks, position "
            f"{tuple(varies.nonzero()[0].tolist())} is masked {int(counts[varies][0])} times"
        )
    for name, missed in (("masked", counts == 0), ("visible", counts == num_draws)):
        missed &= free
        lines = _missed_lines(missed, least_positions=enough / num_draws)
        first = tuple(missed.nonzero()[0].tolist()) if missed.any() else None
        if lines or (first and num_draws >= enough):
            raise AssertionError(
                f"expected every position to be {name} in some masks; in {num_draws} masks, "
                f"{' and '.join(lines) or f'position {first}'} never was"
            )


def _missed_lines(missed: Tensor, *, least_positions: float) -> list[str]:
    """List rows, columns, ... that were missed as a whole and are long enough to be significant."""
    return [
        f"index {index} of axis {axis}"
        for axis, size in enumerate(missed.shape)
        for index in range(size)
        if missed.numel() / size >= least_positions and missed.select(axis, index).all()
    ]


def _global_states() -> tuple[Any, ...]:
    return (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state(legacy=False)),
    )
