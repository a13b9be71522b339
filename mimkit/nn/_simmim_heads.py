"""SimMIM's prediction heads: linear, MLP and inverse Swin.

A point is the unit of prediction: a pixel, or a pixel of a downsampled target.

Axes: batch; tokens (of the encoder's grid, or some of them); cells (positions of a head's output,
each with a block of predicted points); dim; out.
"""

import math
from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from mimkit._arguments import Depth, Size, checked
from mimkit._grids import Grid, as_sizes, count_tokens
from mimkit.masking import Mask
from mimkit.nn._swin import PatchSplitting, SwinStage, initialize_swin
from mimkit.patches import gather_masked, patchify, unpatchify

HeadName = Literal["linear", "mlp", "inverse_swin_t", "inverse_swin_b"]

# Widths, depths and heads of Swin's stages, from the last stage to the first.
_INVERSE = {
    "inverse_swin_t": ((768, 384, 192, 96), (2, 6, 2, 2), (24, 12, 6, 3)),
    "inverse_swin_b": ((1024, 512, 256, 128), (2, 18, 2, 2), (32, 16, 8, 4)),
}


class InverseSwin(nn.Module):
    """Inverse Swin: Swin stages with patch splitting, which doubles resolution and halves width.

    Args:
        grid: Tokens per axis of the encoder's output.
        in_dim: Width of the encoder's output.
        dim: Width of each stage.
        depth: Blocks of each stage.
        heads: Attention heads of each stage.
        window: Tokens per axis of a window, as in `SwinTransformer`.
        out_dim: Values predicted for each token of the last stage.

    Raises:
        ValueError: If the grid does not have two axes, `dim`, `depth` and `heads` differ in length,
            windows do not fill a stage's grid, or a stage's heads do not divide its width.

    Source:
        SimMIM, arXiv:2111.09886, section 4.1.3 and table 2 "inverse Swin-T", "inverse Swin-B".
        Neither the paper nor the released code describes them further. This is our reading: Swin's
        stages in reverse order, with a learned patch splitting in place of patch merging.

    Example:
        >>> import torch
        >>> head = InverseSwin(grid=(2, 2), in_dim=48, dim=(32, 16), depth=(2, 2), heads=(2, 1),
        ...                    window=4, out_dim=12)
        >>> head(torch.randn(1, 4, 48)).shape
        torch.Size([1, 16, 12])
    """

    @checked
    def __init__(
        self,
        *,
        grid: Grid,
        in_dim: Size,
        dim: Sequence[Size],
        depth: Sequence[Depth],
        heads: Sequence[Size],
        window: Size,
        out_dim: Size,
    ) -> None:
        super().__init__()
        if not len(dim) == len(depth) == len(heads) >= 1 or len(as_sizes("grid", grid)) != 2:
            raise ValueError(
                "grid must have two axes, and dim, depth and heads one number per stage; got "
                f"grid {grid}, dim {dim}, depth {depth} and heads {heads}"
            )
        self.axis_sizes = {"tokens": count_tokens(grid), "in_dim": in_dim}
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

    @checked
    def forward(
        self, tokens: Float[Tensor, "batch tokens in_dim"]
    ) -> Float[Tensor, "batch cells out_dim"]:
        """Predict all cells, in row-major order, from all tokens of the grid.

        Args:
            tokens: All tokens of the encoder, row-major.

        Returns:
            One prediction per cell.
        """
        tokens = self.embed(tokens)
        for stage in self.stages:
            _, tokens = stage(tokens)
        predicted: Tensor = self.predict(self.norm(tokens))
        return predicted


class SimMIMHead(nn.Module):
    """SimMIM's prediction head: from encoder tokens to predicted points of masked patches.

    A token may cover many patches (Swin), one patch (ViT), or a part of one.

    Args:
        name: "linear", "mlp" (two layers), "inverse_swin_t" or "inverse_swin_b".
        grid: Tokens per axis of the encoder's output.
        dim: Width of the encoder's output.
        token: Predicted points per axis of a token.
        patch: Predicted points per axis of a patch; masks are on the grid of patches. A token must
            consist of whole patches, or a patch of whole tokens.
        values: Values per point: 3 for a pixel of a color image.
        window: Tokens per axis of an inverse Swin's windows.
        finest: An inverse Swin splits tokens until another split would leave fewer than this many
            points per axis.

    Raises:
        ValueError: If the name is unknown, or if an inverse Swin has nothing to split.

    Source:
        SimMIM, arXiv:2111.09886, section 3.2 "prediction head" and table 2; microsoft/SimMIM, a
        1x1 convolution and `PixelShuffle`, which predict every point of the image. Where a patch
        depends on its own token alone, only the masked patches are predicted here.

    Example:
        >>> import torch
        >>> from mimkit import masking
        >>> mask = masking.uniform(masking.key([0], seed=0), (4, 4), num_masked=8, unit=2)
        >>> head = SimMIMHead("linear", grid=(1, 1), dim=48, token=(16, 16), patch=(4, 4), values=3)
        >>> head(torch.randn(1, 1, 48), mask).shape
        torch.Size([1, 8, 48])
    """

    @checked
    def __init__(
        self,
        name: HeadName = "linear",
        *,
        grid: Grid,
        dim: Size,
        token: Grid,
        patch: Grid,
        values: Size,
        window: Size = 7,
        finest: Size = 4,
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        sizes = [as_sizes(*pair) for pair in (("grid", grid), ("token", token), ("patch", patch))]
        if len({len(axes) for axes in sizes}) != 1:
            raise ValueError(
                f"grid, token and patch must have the same axes; got {grid}, {token}, {patch}"
            )
        self.predict: nn.Module
        cell, points = token, values * math.prod(token)
        if name == "linear":
            self.predict = nn.Linear(dim, points)
        elif name == "mlp":
            self.predict = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, points))
        else:
            self.predict, cell = _inverse_swin(name, grid, dim, token, values, window, finest)
        self.mixes_tokens = isinstance(self.predict, InverseSwin)
        self.cell, self.patch = cell, patch
        self.cell_grid = tuple(
            tokens * coarse // fine for tokens, coarse, fine in zip(grid, token, cell, strict=True)
        )

    @checked
    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], mask: Mask
    ) -> Float[Tensor, "batch masked patch_values"]:
        """Predict the masked patches, each in the order "c p1 p2".

        Args:
            tokens: All tokens of the encoder, without prefix tokens.
            mask: Which patches to predict.

        Returns:
            One patch per masked token, in ascending order of position.
        """
        if self.cell == self.patch and not self.mixes_tokens:
            predicted: Tensor = self.predict(gather_masked(tokens, mask))
            return predicted
        cells = self.predict(tokens)
        return gather_masked(points_of_patches(cells, self.cell_grid, self.cell, self.patch), mask)


def _inverse_swin(
    name: str, grid: Grid, dim: int, token: Grid, values: int, window: int, finest: int
) -> tuple[InverseSwin, Grid]:
    """Build an inverse Swin with as many splits as tokens allow; also return points per cell."""
    widths, depth, heads = _INVERSE[name]
    if len(grid) != 2:
        raise ValueError(f"head {name!r} needs a grid of two axes; got grid {grid}")
    cell, splits = token, 0
    while splits < len(depth) - 1 and _splits_evenly(cell, finest):
        cell, splits = (cell[0] // 2, cell[1] // 2), splits + 1
    if splits == 0:
        raise ValueError(
            f"head {name!r} has nothing to split: a token covers {token[0]}x{token[1]} "
            'predicted points; choose the head "linear" or "mlp", or a finer target'
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
    """Regroup predicted points from cells to patches, each patch in the order "c p1 p2".

    Args:
        cells: Row-major cells, each with its points in `torch.nn.PixelShuffle`'s order "c p1 p2".
        grid: Cells per axis.
        cell: Points per axis of a cell.
        patch: Points per axis of a patch. A cell must consist of whole patches, or a patch of whole
            cells.
    """
    if cell == patch:
        return cells
    maps = unpatchify(cells, grid, cell, order="c p1 p2")
    return patchify(maps, patch, order="c p1 p2")
