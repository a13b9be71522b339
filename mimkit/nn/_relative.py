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
        authors also save the constant index; here it is not part of the state dict.

    Example:
        >>> RelativePositionBias(grid=(2, 3), heads=4, class_token=True)().shape
        torch.Size([1, 4, 7, 7])
    """

    index: Tensor

    @checked
    def __init__(self, *, grid: Sequence[int], heads: Size, class_token: bool = False) -> None:
        super().__init__()
        self.grid = as_sizes("grid", grid)
        self.num_prefix = int(class_token)
        offsets = count_tokens([2 * size - 1 for size in self.grid])
        self.table = nn.Parameter(torch.zeros(offsets + NUM_CLASS_ROWS * self.num_prefix, heads))
        self.register_buffer("index", self._index_on(self.grid), persistent=False)

    @checked
    def forward(
        self, mask: Mask | None = None, *, grid: Sequence[int] | None = None
    ) -> Float[Tensor, "#batch heads tokens tokens"]:
        """Return the bias between all tokens, or with a mask between the visible ones.

        Args:
            mask: Which patches are visible.
            grid: Tokens per axis of images of another size; the table is resampled to them.
        """
        grid = self.grid if grid is None else as_sizes("grid", grid)
        if grid != self.grid:
            return self._gather(self._resampled(grid), self._index_on(grid))
        return self._gather(self.table, self.index if mask is None else self._visible_index(mask))

    def _index_on(self, grid: Grid) -> Int64[Tensor, "tokens tokens"]:
        index = relative_index(grid)
        if self.num_prefix:
            offsets = count_tokens([2 * size - 1 for size in grid])
            index = F.pad(index, (1, 0, 1, 0), value=offsets)
            index[1:, 0] = offsets + 1
            index[0, 0] = offsets + 2
        return index.to(self.table.device)

    def _gather(self, table: Tensor, index: Tensor) -> Tensor:
        # Heads first, so that the matrix of each head is contiguous.
        bias = table.T.contiguous().index_select(1, index.flatten())
        if index.ndim == 2:
            return bias.view(1, len(bias), *index.shape)
        return bias.view(len(bias), *index.shape).movedim(0, 1)

    def _resampled(self, grid: Grid) -> Tensor:
        extra = NUM_CLASS_ROWS * self.num_prefix
        return interpolate_relative_positions(self.table, self.grid, grid, num_extra=extra)

    def _visible_index(self, mask: Mask) -> Int64[Tensor, "batch visible visible"]:
        check_mask(mask, self.grid, self.table.expand(mask.batch_size, -1, -1), "this bias")
        ids = F.pad(mask.visible_ids + self.num_prefix, (self.num_prefix, 0))
        return self.index[ids.unsqueeze(2), ids.unsqueeze(1)]


def relative_index(grid: Sequence[int]) -> Int64[Tensor, "tokens tokens"]:
    """Return the table row of the offset between every two tokens, indexed [query, key].

    Example:
        >>> relative_index((1, 2))
        tensor([[1, 0],
                [2, 1]])
    """
    axes = torch.meshgrid([torch.arange(size) for size in grid], indexing="ij")
    index = torch.zeros(count_tokens(grid), count_tokens(grid), dtype=torch.int64)
    for size, axis in zip(grid, axes, strict=True):
        position = axis.flatten()
        index = index * (2 * size - 1) + (position[:, None] - position + size - 1)
    return index
