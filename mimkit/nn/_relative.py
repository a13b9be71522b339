"""Relative position bias, as in BEiT and Swin.

Axes: heads; positions (rows of the table); tokens (of the grid); prefix (the class token, if any).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Size, checked
from mimkit._checks import check_mask
from mimkit._grids import NUM_CLASS_ROWS, Grid, as_sizes, count_tokens
from mimkit.masking import Mask
from mimkit.patches import interpolate_relative_positions

# Larger grids are spread: their index would need much memory (128 MiB at 64x64). Smaller ones are
# gathered, which is two to five times as fast at 14x14 and 7x7.
_MOST_INDEXED = 1024


class RelativePositionBias(nn.Module):
    """Relative position bias: a learned value per head and offset, added to attention logits.

    Args:
        grid: Tokens per axis.
        heads: Attention heads.
        class_token: Whether the first token is a class token.

    Attributes:
        table: One row per offset from key to query, row-major, most negative first. With a class
            token, three more rows: class to patch, patch to class, class to class. Initialised to
            zero.

    Source:
        Swin, arXiv:2103.14030, equation 4; BEiT, arXiv:2106.08254, `RelativePositionBias`. The
        authors also save the constant index; here it is computed when it is needed.

    Example:
        >>> RelativePositionBias(grid=(2, 3), heads=4, class_token=True)().shape
        torch.Size([1, 4, 7, 7])
    """

    codes: Tensor

    @checked
    def __init__(self, *, grid: Sequence[int], heads: Size, class_token: bool = False) -> None:
        super().__init__()
        self.grid = as_sizes("grid", grid)
        self.num_prefix = int(class_token)
        offsets = count_tokens([2 * size - 1 for size in self.grid])
        self.table = nn.Parameter(torch.zeros(offsets + NUM_CLASS_ROWS * self.num_prefix, heads))
        self.register_buffer("codes", offset_codes(self.grid), persistent=False)

    @checked
    def forward(
        self, mask: Mask | None = None, *, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "#batch heads tokens tokens"]:
        """Return the bias between all tokens, or with a mask between the visible ones.

        Args:
            mask: Which patches are visible.
            grid: Tokens per axis of images of another size; the table is resampled to them.

        Returns:
            Values to add to the attention logits; a batch axis of 1 without a mask.

        Raises:
            ValueError: If the mask has another grid.
        """
        grid = self.grid if grid is None else as_sizes("grid", grid)
        if mask is not None:
            check_mask(mask, self.grid, self.table.expand(mask.batch_size, -1, -1), "this bias")
            return self._gather(self.table, self.grid, self.codes[mask.visible_ids]).movedim(0, 1)
        table: Tensor = self.table
        codes = self.codes
        if grid != self.grid:
            extra = NUM_CLASS_ROWS * self.num_prefix
            table = interpolate_relative_positions(table, self.grid, grid, num_extra=extra)
            codes = offset_codes(grid).to(codes.device)
        if len(codes) > _MOST_INDEXED:
            return self._spread(table, grid).unsqueeze(0)
        return self._gather(table, grid, codes).unsqueeze(0)

    @property
    def index(self) -> Int64[Tensor, "tokens tokens"]:
        """The row of the table for every two tokens, indexed [query, key]; computed when read."""
        return self._index(self.grid, self.codes)

    def _gather(
        self, table: Tensor, grid: Grid, codes: Int64[Tensor, "*batch places"]
    ) -> Float[Tensor, "heads *batch tokens tokens"]:
        """Take the row of the table for every two tokens."""
        # Heads first, so that the matrix of each head is contiguous.
        index = self._index(grid, codes)
        rows = table.T.contiguous().index_select(1, index.flatten())
        return rows.view(len(rows), *index.shape)  # the index may be empty

    def _index(
        self, grid: Grid, codes: Int64[Tensor, "*batch places"]
    ) -> Int64[Tensor, "*batch tokens tokens"]:
        """Return the row of the table for every two tokens, indexed [query, key]."""
        offsets = count_tokens([2 * size - 1 for size in grid])
        index = codes.unsqueeze(-1) - codes.unsqueeze(-2) + offsets // 2
        if self.num_prefix:
            index = F.pad(index, (1, 0, 1, 0), value=offsets)
            index[..., 1:, 0] = offsets + 1
            index[..., 0, 0] = offsets + 2
        return index

    def _spread(self, table: Tensor, grid: Grid) -> Float[Tensor, "heads tokens tokens"]:
        """Do what `_gather` does without an index, which is n x n: axis by axis, in views.

        Along an axis, the keys of a query are consecutive offsets.
        """
        sides = [2 * size - 1 for size in grid]
        rows, extra = table.T.split([count_tokens(sides), len(table) - count_tokens(sides)], dim=1)
        bias: Tensor = rows.unflatten(1, sides)[..., None, None]
        for size in reversed(grid):  # [..., offsets, queries, keys] of the axes done so far
            by_key = bias.flip(-3)
            of_queries = [
                by_key.narrow(-3, size - 1 - query, size).transpose(-3, -2) for query in range(size)
            ]
            bias = torch.stack(of_queries, dim=-4).flatten(-4, -3).flatten(-2)
        if self.num_prefix:
            count = bias.shape[-1]
            to_patch, to_class, to_itself = extra[:, :, None].unbind(1)
            first = torch.cat([to_itself, to_patch.expand(-1, count)], dim=1).unsqueeze(1)
            others = torch.cat([to_class.expand(-1, count).unsqueeze(2), bias], dim=2)
            return torch.cat([first, others], dim=1)
        return bias


def offset_codes(grid: Sequence[int]) -> Int64[Tensor, " tokens"]:
    """Return a number for each token such that differences of two are rows of the table.

    Row 0 of the table is the most negative difference.

    Example:
        >>> offset_codes((2, 3))
        tensor([0, 1, 2, 5, 6, 7])
    """
    codes = torch.zeros((), dtype=torch.int64)
    for size in grid:
        codes = codes.unsqueeze(-1) * (2 * size - 1) + torch.arange(size)
    return codes.flatten()
