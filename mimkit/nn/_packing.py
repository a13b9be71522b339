"""Packed sequences: samples of unequal lengths concatenated, without padding.

Axes: rows (tokens of all samples, concatenated); dim.
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
    """Boundaries of the samples in a packed sequence; made by `pack`.

    A block can return fewer tokens than it reads: the last `num_queries` of each sample.

    Attributes:
        lengths: Tokens of each sample.
        num_queries: Query tokens of each sample: its last ones.
        offsets: Start of each sample, then the total length.
        query_offsets: The same, counted in query tokens.
    """

    lengths: tuple[int, ...]
    num_queries: tuple[int, ...]
    offsets: Int64[Tensor, " samples_and_one"]
    query_offsets: Int64[Tensor, " samples_and_one"]

    def last(self, tokens: Float[Tensor, "1 rows dim"]) -> Float[Tensor, "1 queries dim"]:
        """Return the query tokens: the last `num_queries` tokens of each sample."""
        if self.num_queries == self.lengths:
            return tokens
        samples = zip(tokens.split(self.lengths, dim=1), self.num_queries, strict=True)
        return torch.cat([rows[:, rows.shape[1] - count :] for rows, count in samples], dim=1)

    def spread(self, values: Float[Tensor, " samples"]) -> Float[Tensor, "1 queries 1"]:
        """Repeat each sample's value for each of its query tokens."""
        counts = self.query_offsets.diff()
        spread = values.repeat_interleave(counts, output_size=sum(self.num_queries))
        return spread.view(1, -1, 1)

    def runs(self) -> list[tuple[int, int, int]]:
        """Group consecutive samples of equal lengths: (samples, queries each, tokens each)."""
        kinds = groupby(zip(self.num_queries, self.lengths, strict=True))
        return [(len(list(run)), queries, length) for (queries, length), run in kinds]


def pack(
    lengths: Sequence[int], device: torch.device, *, num_queries: Sequence[int] | None = None
) -> Packing:
    """Make the `Packing` of samples of these lengths; by default all tokens are queries."""
    counts = tuple(lengths), tuple(lengths if num_queries is None else num_queries)
    offsets = (torch.tensor([0, *accumulate(count)], device=device) for count in counts)
    return Packing(*counts, *offsets)


def order_by_length(mask: RaggedMask) -> list[int]:
    """Sort samples so that those of equal lengths are consecutive and share an attention call."""
    kinds = [
        (count_tokens(grid), grid, count)
        for grid, count in zip(mask.grids, mask.num_visible, strict=True)
    ]
    return sorted(range(mask.batch_size), key=kinds.__getitem__)


def reorder(
    rows: Float[Tensor, "rows dim"], lengths: Sequence[int], order: Iterable[int]
) -> Float[Tensor, "rows dim"]:
    """Reorder packed samples."""
    samples = rows.split(list(lengths))
    return torch.cat([samples[sample] for sample in order])


def inverse_order(order: Sequence[int]) -> list[int]:
    """Invert a permutation."""
    return sorted(range(len(order)), key=order.__getitem__)


def interleave(*columns: Sequence[Float[Tensor, "_ dim"]]) -> Float[Tensor, "rows dim"]:
    """Concatenate sample by sample: for each sample, its rows of every column."""
    return torch.cat([rows for sample in zip(*columns, strict=True) for rows in sample])


def positions_at(
    ids: Int64[Tensor, " rows"],
    counts: Sequence[int],
    grids: Sequence[Grid],
    table_of: Callable[[Grid], Float[Tensor, "tokens dim"]],
) -> Float[Tensor, "rows dim"]:
    """Look up each sample's position embeddings in the table of its grid.

    Args:
        ids: Positions of all samples, concatenated.
        counts: Number of positions of each sample.
        grids: Grid of each sample.
        table_of: Returns the position table of a grid.
    """
    kinds = groupby(zip(grids, counts, strict=True), key=lambda sample: sample[0])
    runs = [(grid, sum(count for _, count in run)) for grid, run in kinds]
    parts = ids.split([count for _, count in runs])
    return torch.cat(
        [F.embedding(part, table_of(grid)) for part, (grid, _) in zip(parts, runs, strict=True)]
    )
