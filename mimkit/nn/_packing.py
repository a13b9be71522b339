"""Samples of unequal lengths in one long sequence, without padding.

Axes: rows (tokens of all samples, one sample behind the other); dim.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from mimkit._grids import Grid, count_tokens
from mimkit.masking import RaggedMask


@dataclass(frozen=True)
class Packing:
    """Where samples begin and end in a sequence that holds them all; make one with `pack`.

    Attributes:
        lengths: Tokens of each sample.
        num_queries: How many of them, the last ones, are asked for.
        offsets: Where each sample begins, and the length of the whole at the end.
        query_offsets: The same among those that are asked for.
    """

    lengths: tuple[int, ...]
    num_queries: tuple[int, ...]
    offsets: Int64[Tensor, " samples_and_one"]
    query_offsets: Int64[Tensor, " samples_and_one"]

    def last(self, tokens: Float[Tensor, "1 rows dim"]) -> Float[Tensor, "1 queries dim"]:
        """Take the tokens of each sample that are asked for."""
        if self.num_queries == self.lengths:
            return tokens
        samples = zip(tokens.split(self.lengths, dim=1), self.num_queries, strict=True)
        return torch.cat([rows[:, rows.shape[1] - count :] for rows, count in samples], dim=1)

    def spread(self, values: Float[Tensor, " samples"]) -> Float[Tensor, "1 queries 1"]:
        """Repeat the value of each sample for each of its tokens that are asked for."""
        counts = self.query_offsets.diff()
        spread = values.repeat_interleave(counts, output_size=sum(self.num_queries))
        return spread.view(1, -1, 1)

    def runs(self) -> list[tuple[int, int, int]]:
        """Return (samples, queries of each, tokens of each) of neighbors that are alike."""
        kinds = groupby(zip(self.num_queries, self.lengths, strict=True))
        return [(len(list(run)), queries, length) for (queries, length), run in kinds]


def pack(
    lengths: Sequence[int], device: torch.device, *, num_queries: Sequence[int] | None = None
) -> Packing:
    """Describe samples of these lengths, all of whose tokens are asked for if nothing is said."""
    counts = tuple(lengths), tuple(lengths if num_queries is None else num_queries)
    offsets = (torch.tensor([0, *accumulate(count)], device=device) for count in counts)
    return Packing(*counts, *offsets)


def alike_together(mask: RaggedMask) -> list[int]:
    """Order samples so that those of equal lengths are neighbors, and share a call."""
    kinds = [
        (count_tokens(grid), grid, count)
        for grid, count in zip(mask.grids, mask.num_visible, strict=True)
    ]
    return sorted(range(mask.batch_size), key=kinds.__getitem__)


def reorder(
    rows: Float[Tensor, "rows dim"], lengths: Sequence[int], order: Iterable[int]
) -> Float[Tensor, "rows dim"]:
    """Put packed samples in another order."""
    samples = rows.split(list(lengths))
    return torch.cat([samples[sample] for sample in order])


def undo(order: Sequence[int]) -> list[int]:
    """Return the order that undoes `order`."""
    return sorted(range(len(order)), key=order.__getitem__)


def weave(*columns: Sequence[Float[Tensor, "_ dim"]]) -> Float[Tensor, "rows dim"]:
    """Pack what each sample consists of: of every column its rows, then the next sample."""
    return torch.cat([rows for sample in zip(*columns, strict=True) for rows in sample])


def positions_at(
    ids: Int64[Tensor, " rows"],
    counts: Sequence[int],
    grids: Sequence[Grid],
    table_of: Callable[[Grid], Float[Tensor, "tokens dim"]],
) -> Float[Tensor, "rows dim"]:
    """Look up positions: of each sample, so many as it counts, in the table of its grid."""
    kinds = groupby(zip(grids, counts, strict=True), key=lambda sample: sample[0])
    runs = [(grid, sum(count for _, count in run)) for grid, run in kinds]
    parts = ids.split([count for _, count in runs])
    return torch.cat(
        [F.embedding(part, table_of(grid)) for part, (grid, _) in zip(parts, runs, strict=True)]
    )
