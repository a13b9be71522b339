"""SimMIM's prediction heads: linear, two layers, and Swin backwards.

Axes: batch; tokens (of the encoder's grid, or some of them); cells (what a head's output stands
for); dim; out.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mimkit._grids import Grid
from mimkit.nn._swin import PatchSplitting, SwinStage, initialize_swin

HeadName = Literal["linear", "mlp", "inverse_swin_t", "inverse_swin_b"]

# Width and blocks of Swin's stages, and heads, from the last stage to the first.
_INVERSE = {
    "inverse_swin_t": ((768, 384, 192, 96), (2, 6, 2, 2), (24, 12, 6, 3)),
    "inverse_swin_b": ((1024, 512, 256, 128), (2, 18, 2, 2), (32, 16, 8, 4)),
}


class InverseSwin(nn.Module):
    """Swin backwards: every stage behind the first one splits a token into 2x2 of half the width.

    Args:
        grid: Tokens per axis of the encoder's output.
        in_dim: Their width.
        dim: Width of each stage.
        depth: Blocks of each stage.
        heads: Attention heads of each stage.
        window: Tokens per axis of a window, as in `SwinTransformer`.
        out_dim: Values predicted for each cell of the last stage.

    Source:
        SimMIM, arXiv:2111.09886, section 4.1.3 and table 2 "inverse Swin-T", "inverse Swin-B";
        neither described further there nor in the released code. This is our reading: the stages of
        Swin in reverse order, a learned split in the place of the merging.

    Example:
        >>> import torch
        >>> head = InverseSwin(grid=(2, 2), in_dim=48, dim=(32, 16), depth=(2, 2), heads=(2, 1),
        ...                    window=4, out_dim=12)
        >>> head(torch.randn(1, 4, 48)).shape
        torch.Size([1, 16, 12])
    """

    def __init__(
        self,
        *,
        grid: Grid,
        in_dim: int,
        dim: Sequence[int],
        depth: Sequence[int],
        heads: Sequence[int],
        window: int,
        out_dim: int,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim[0])
        self.stages = nn.ModuleList(
            SwinStage(
                grid=(grid[0] * 2**stage, grid[1] * 2**stage),
                dim=width,
                depth=depth[stage],
                heads=heads[stage],
                window=window,
                mlp_ratio=4.0,
                drop_path=[0.0] * depth[stage],
                resample=PatchSplitting if stage < len(dim) - 1 else None,
            )
            for stage, width in enumerate(dim)
        )
        self.norm = nn.LayerNorm(dim[-1])
        self.predict = nn.Linear(dim[-1], out_dim)
        self.apply(initialize_swin)

    def forward(
        self, tokens: Float[Tensor, "batch tokens in_dim"]
    ) -> Float[Tensor, "batch cells out_dim"]:
        """Predict the cells, row-major, from all tokens of the grid."""
        tokens = self.embed(tokens)
        for stage in self.stages:
            _, tokens = stage(tokens)
        predicted: Tensor = self.predict(self.norm(tokens))
        return predicted


def make_head(
    name: HeadName, *, grid: Grid, dim: int, cell: Grid, finest: int, window: int, values: int
) -> tuple[nn.Module, Grid]:
    """Make a head by name.

    Args:
        name: "linear", "mlp" (two layers), "inverse_swin_t" or "inverse_swin_b".
        grid: Tokens per axis of the encoder's output.
        dim: Their width.
        cell: What one of them stands for: predicted points per axis.
        finest: Fewest points per axis that a cell of an inverse Swin may have.
        window: Of an inverse Swin.
        values: Values of a predicted point.

    Returns:
        The head, which gives `values` times the points of a cell, and the points of its cells.

    Raises:
        ValueError: An unknown name, or an inverse Swin with nothing to split.
    """
    if name not in get_args(HeadName):
        raise ValueError(f"head must be one of {get_args(HeadName)}; got {name!r}")
    points = values * cell[0] * cell[1]
    if name == "linear":
        return nn.Linear(dim, points), cell
    if name == "mlp":
        return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, points)), cell
    widths, depth, heads = _INVERSE[name]
    splits = 0
    while splits < len(depth) - 1 and _splits_evenly(cell, finest):
        cell, splits = (cell[0] // 2, cell[1] // 2), splits + 1
    if splits == 0:
        raise ValueError(
            f"head {name!r} has nothing to split: a token stands for {cell[0]}x{cell[1]} predicted "
            "points; choose a linear or an mlp head, or a finer target"
        )
    head = InverseSwin(
        grid=grid,
        in_dim=dim,
        dim=widths[: splits + 1],
        depth=depth[: splits + 1],
        heads=heads[: splits + 1],
        window=window,
        out_dim=values * cell[0] * cell[1],
    )
    return head, cell


def _splits_evenly(cell: Grid, finest: int) -> bool:
    return all(side % 2 == 0 and side // 2 >= finest for side in cell)


def points_of_patches(
    cells: Float[Tensor, "batch cells cell_values"], grid: Grid, cell: Grid, patch: Grid
) -> Float[Tensor, "batch patches patch_values"]:
    """Sort predicted points from cells into patches, for each patch in the order "c p1 p2".

    Args:
        cells: Points of row-major cells, each in `torch.nn.PixelShuffle`'s order "c p1 p2".
        grid: Cells per axis.
        cell: Points per axis of a cell.
        patch: Points per axis of a patch; cells consist of whole patches, or patches of cells.
    """
    if cell == patch:
        return cells
    maps = rearrange(cells, "b (y x) (c p q) -> b c (y p) (x q)", y=grid[0], p=cell[0], q=cell[1])
    return rearrange(maps, "b c (y p) (x q) -> b (y x) (c p q)", p=patch[0], q=patch[1])
