"""ConvMAE's hybrid encoder: two convolution stages, then a transformer stage.

With a mask, the convolution stages run on packed cells: the fine positions inside each visible
token of the last stage. Without a mask, they run on the whole feature map, stored as one cell.

Axes: batch; channels; height, width; cells (visible tokens of the mask; 1 for a whole map); cell
(positions of a cell, row-major); positions (of all cells); visible; tokens (the visible ones with a
mask, all of the grid without); dim.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int32, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Count, Depth, DropRate, Ratio, Size, checked
from mimkit._checks import as_floats, check_even, check_mask, check_stacked
from mimkit._grids import Grid, divide, per_axis, reach_of, sides_of
from mimkit.conv import packed_depthwise_conv2d
from mimkit.masking import Mask
from mimkit.nn._layers import (
    NORM_EPS,
    DropPath,
    Mlp,
    TransformerBlock,
    drop_path_rates,
    mean_of_tokens,
    xavier_linear,
)
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._timm_protocol import TimmProtocol
from mimkit.patches import (
    gather_visible,
    interpolate_positions,
    neighbors,
    pack_cells,
    sincos_positions,
)

STAGES = 3
CONV_NORM_EPS = 1e-5  # in convolution stages and embeddings, where the authors left the default

Value = TypeVar("Value", int, float)
Triple = tuple[Value, Value, Value]


@dataclass(frozen=True)
class Layout:
    """Memory layout of a stage's positions.

    Attributes:
        cell: Positions per axis of a cell.
        around: The neighbors of every cell; `None` for a whole feature map, which is one cell.
        hidden: Positions of a whole feature map that convolutions read as zeros.
    """

    cell: Grid
    around: Int32[Tensor, "batch cells window"] | None = None
    hidden: Bool[Tensor, "batch 1 positions 1"] | None = None


class CellProjection(nn.Module):
    """Convolution with kernel size equal to stride, applied inside each cell.

    Args:
        in_dim: Width of the input.
        dim: Width of the output.
        stride: Stride and kernel size per axis; must divide the cell.
    """

    def __init__(self, *, in_dim: int, dim: int, stride: Grid) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, in_dim, *stride))
        self.bias = nn.Parameter(torch.empty(dim))
        init_as_convolution(self.weight, self.bias)
        self.stride = stride

    def forward(
        self, cells: Float[Tensor, "batch cells cell in_dim"], cell: Grid
    ) -> Float[Tensor, "batch cells smaller dim"]:
        """Project every `stride` block of positions to one position."""
        height, width = self.stride
        # Channels stay the innermost axis: the copy moves contiguous rows.
        patches = rearrange(
            cells,
            "b v (y p x q) c -> b v (y x) (p q c)",
            y=cell[0] // height,
            p=height,
            q=width,
            x=cell[1] // width,
        )
        weight = rearrange(self.weight, "d c p q -> d (p q c)")
        return F.linear(patches, weight, self.bias)


class CellEmbed(nn.Module):
    """Downsample cells: strided projection, LayerNorm, GELU."""

    def __init__(self, *, in_dim: int, dim: int, stride: Grid) -> None:
        super().__init__()
        self.proj = CellProjection(in_dim=in_dim, dim=dim, stride=stride)
        self.norm = nn.LayerNorm(dim, eps=CONV_NORM_EPS)

    def forward(
        self, cells: Float[Tensor, "batch cells cell in_dim"], cell: Grid
    ) -> Float[Tensor, "batch cells smaller dim"]:
        """Downsample every cell."""
        return F.gelu(self.norm(self.proj(cells, cell)))


class DepthwiseConv(nn.Module):
    """Depth-wise convolution that reads positions outside the cells as zeros."""

    def __init__(self, *, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.radius = (kernel_size // 2, kernel_size // 2)
        init_as_convolution(self.weight, self.bias)

    def forward(
        self, cells: Float[Tensor, "batch cells cell dim"], layout: Layout
    ) -> Float[Tensor, "batch cells cell dim"]:
        """Convolve every position with its neighborhood."""
        if layout.around is not None:
            return packed_depthwise_conv2d(
                cells, self.weight, self.bias, layout.around, cell=layout.cell
            )
        feature_map = rearrange(
            hide(cells, layout.hidden), "b 1 (h w) c -> b c h w", h=layout.cell[0]
        )
        mixed = F.conv2d(
            feature_map, self.weight, self.bias, padding=self.radius, groups=cells.shape[-1]
        )
        return rearrange(mixed, "b c h w -> b 1 (h w) c")


class ConvBlock(nn.Module):
    """Transformer block with a depth-wise convolution in place of attention.

    Source:
        ConvMAE, arXiv:2205.03892, section 3.1; Alpha-VL/ConvMAE `CBlock`, whose 1x1 convolutions
        are linear layers here.
    """

    def __init__(
        self, *, dim: int, kernel_size: int, mlp_ratio: float, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.conv1 = nn.Linear(dim, dim)
        self.depthwise = DepthwiseConv(dim=dim, kernel_size=kernel_size)
        self.conv2 = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=CONV_NORM_EPS)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))
        for layer in (self.mlp.fc1, self.mlp.fc2):
            layer.reset_parameters()  # PyTorch's default, as for the authors' 1x1 convolutions
        self.drop_path = DropPath(drop_path)

    def forward(
        self, cells: Float[Tensor, "batch cells cell dim"], layout: Layout
    ) -> Float[Tensor, "batch cells cell dim"]:
        """Apply the block: depth-wise convolution, then an MLP."""
        mixed = self.conv2(self.depthwise(self.conv1(self.norm1(cells)), layout))
        cells = cells + self.drop_path(mixed)
        transformed = self.mlp(self.norm2(cells).flatten(1, 2)).view_as(cells)
        out: Tensor = cells + self.drop_path(transformed)
        return out


class ConvStage(nn.Module):
    """Downsampling embedding, then convolution blocks."""

    def __init__(
        self,
        *,
        in_dim: int,
        dim: int,
        stride: Grid,
        kernel_size: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
    ) -> None:
        super().__init__()
        self.stride, self.kernel_size = stride, kernel_size
        self.embed = CellEmbed(in_dim=in_dim, dim=dim, stride=stride)
        self.blocks = nn.ModuleList(
            ConvBlock(dim=dim, kernel_size=kernel_size, mlp_ratio=mlp_ratio, drop_path=rate)
            for rate in drop_path
        )

    def forward(
        self,
        cells: Float[Tensor, "batch cells cell in_dim"],
        cell: Grid,
        mask: Mask | None,
        hidden: Bool[Tensor, "batch 1 positions 1"] | None = None,
    ) -> tuple[Float[Tensor, "batch cells smaller dim"], Grid]:
        """Downsample cells and apply the blocks.

        Args:
            cells: Output of the stage before, or pixels.
            cell: Positions per axis of such a cell.
            mask: Mask on the grid of the last stage; `None` for a whole feature map.
            hidden: Masked positions of a whole feature map at the resolution of this stage.

        Returns:
            The new cells, zero at hidden positions, and their positions per axis.
        """
        cells = self.embed(cells, cell)
        cell = divide("cell", cell, self.stride, "stride")
        layout = Layout(cell, self._neighbors(mask, cell), hidden)
        for block in self.blocks:
            cells = block(cells, layout)
        return hide(cells, hidden), cell

    def _neighbors(self, mask: Mask | None, cell: Grid) -> Tensor | None:
        if mask is None:
            return None
        radius = self.kernel_size // 2
        return neighbors(mask, reach=reach_of((radius, radius), cell))


class ConvViT(TimmProtocol):
    """Hybrid encoder: two convolution stages, then transformer blocks, on visible cells only.

    Args:
        image_size: Pixels per axis: an integer means a square image, a tuple height and width.
        patch_sizes: Stride of each of the three stages: one integer, or one per axis. A token of
            the last stage covers as many pixels as their product; masks are on this grid.
        in_channels: Channels of the images.
        dim: Width of each stage.
        depth: Number of blocks of each stage.
        heads: Attention heads of the last stage; must divide its width.
        mlp_ratio: Ratio of MLP hidden width to width, for each stage.
        kernel_size: Kernel size of the depth-wise convolutions; odd.
        drop_path: Stochastic depth rate of the last block, in [0, 1). Rates rise linearly from 0
            over the blocks of all stages.
        multi_scale: Whether to add the projected outputs of the first two stages to the output.
        masked_conv: Whether convolutions read masked positions as zeros. `False` is an ablation of
            the paper: convolutions run on the whole image, so masked pixels reach the output.
        pool: What `pool` returns: the "mean" of the tokens, or the first "token", as the authors'
            fine-tuning does without `--global_pool`.
        pool_norm: Whether the last LayerNorm comes after pooling (`fc_norm`) instead of before
            (`norm`).
        learn_positions: Whether the position table, initialised as sine-cosine, is trained.
        num_classes: Width of `head`, a linear classifier for pooled tokens; 0 for none.
        relative_positions: "block" for a relative position bias in each block of the last stage,
            as in the authors' segmentation; `None` for none.
        layer_scale: Initial value of layer scale in the last stage (1 in the authors'
            segmentation); `None` for no layer scale.

    Attributes:
        grid: Tokens per axis of the last stage: the grid of masks.
        fine_grid: Tokens per axis of the first stage. A mask on this grid is an ablation of the
            paper: it hides a part of every token, so all tokens are encoded, at full cost.
        num_prefix_tokens: Number of prefix tokens: 0.

    Raises:
        ValueError: If an option of stages does not have three values, the strides do not divide the
            image size, `kernel_size` is even, or `heads` does not divide the last stage's width.

    Source:
        ConvMAE, arXiv:2205.03892, sections 3.1 to 3.3; Alpha-VL/ConvMAE `models_convmae.py`,
        `models_convvit.py`. The authors' code takes images of 224 pixels only. It computes every
        position of the first two stages, then drops the masked ones.

    Example:
        >>> from mimkit import masking
        >>> encoder = ConvViT(image_size=(32, 64), dim=(8, 16, 32), depth=(1, 1, 2), heads=4)
        >>> images = torch.rand(2, 3, 32, 64)
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.75)
        >>> encoder(images, mask).shape, encoder(images).shape
        (torch.Size([2, 2, 32]), torch.Size([2, 8, 32]))
    """

    num_prefix_tokens = 0
    _undecayed = r"^pos_embed$|^rel_pos_bias\.\d+\.table$"
    _first_layer = r"^pos_embed|^stages|^embed|^fusions"

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_sizes: Sequence[int | Sequence[int]] = (4, 2, 2),
        in_channels: Size = 3,
        dim: Sequence[Size] = (256, 384, 768),
        depth: Sequence[Depth] = (2, 2, 11),
        heads: Size = 12,
        mlp_ratio: Sequence[Ratio] = (4.0, 4.0, 4.0),
        kernel_size: Size = 5,
        drop_path: DropRate = 0.0,
        multi_scale: bool = False,
        masked_conv: bool = True,
        pool: Literal["mean", "token"] = "mean",
        pool_norm: bool = False,
        learn_positions: bool = False,
        num_classes: Count = 0,
        relative_positions: Literal["block"] | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim[-1] if dim else 0}
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that it has a center; got {kernel_size}")
        shape = {"patch_sizes": patch_sizes, "dim": dim, "depth": depth, "mlp_ratio": mlp_ratio}
        check_stages(**shape)
        self.image_size = sides_of("image_size", image_size)
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must have height and width; got {image_size!r}")
        strides = [per_axis("patch_sizes", size, 2) for size in patch_sizes]
        self.strides, self.patch_size = strides, product(strides)
        self.grid = divide("image size", self.image_size, self.patch_size, "strides of all stages")
        self.fine_grid = divide("image size", self.image_size, strides[0], "first stride")
        self.in_channels, self.dim, self.masked_conv = in_channels, dim[-1], masked_conv
        self._pool, self._stage_dims = pool, tuple(dim[:-1])

        rates = drop_path_rates(drop_path, sum(depth))
        widths = (in_channels, *dim)
        self.stages = nn.ModuleList(
            ConvStage(
                in_dim=widths[stage],
                dim=dim[stage],
                stride=strides[stage],
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio[stage],
                drop_path=rates[sum(depth[:stage]) : sum(depth[: stage + 1])],
            )
            for stage in range(STAGES - 1)
        )
        self.embed = CellEmbed(in_dim=dim[-2], dim=dim[-1], stride=strides[-1])
        nn.init.xavier_uniform_(self.embed.proj.weight.view(dim[-1], -1))
        self.embed_proj = xavier_linear(dim[-1], dim[-1])
        self.pos_embed = nn.Parameter(
            sincos_positions(dim[-1], self.grid)[None], requires_grad=bool(learn_positions)
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim=dim[-1],
                heads=heads,
                mlp_ratio=mlp_ratio[-1],
                drop_path=rate,
                layer_scale=layer_scale,
            )
            for rate in rates[sum(depth[:-1]) :]
        )
        self.rel_pos_bias = nn.ModuleList(
            RelativePositionBias(grid=self.grid, heads=heads)
            for _ in range(depth[-1] if relative_positions else 0)
        )
        self.fusions = nn.ModuleList(
            CellProjection(in_dim=dim[stage], dim=dim[-1], stride=product(strides[stage + 1 :]))
            for stage in range(STAGES - 1 if multi_scale else 0)
        )
        self.norm = nn.Identity() if pool_norm else nn.LayerNorm(dim[-1], eps=NORM_EPS)
        self.fc_norm = nn.LayerNorm(dim[-1], eps=NORM_EPS) if pool_norm else nn.Identity()
        self.head = xavier_linear(dim[-1], num_classes) if num_classes else nn.Identity()

    @checked
    def forward(
        self,
        images: Float[Tensor, "batch channels height width"]
        | UInt8[Tensor, "batch channels height width"],
        mask: Mask | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Encode the visible patches, or all patches without a mask.

        Args:
            images: Images of the size that the encoder was built for.
            mask: Mask on `grid`, or on `fine_grid` (see Attributes).

        Returns:
            One token per encoded patch, in ascending order of position, after the last norm. With
            a mask on `fine_grid`, all patches are encoded.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the images have another size or number of channels, or the mask another
                grid or batch size.
        """
        if mask is not None:
            check_even(mask)
        is_partial = mask is not None and mask.grid == self.fine_grid != self.grid
        partial, mask = (mask, None) if is_partial else (None, mask)
        self._check(images, mask, partial)
        tokens, fused = self._embed(images, mask if self.masked_conv else None, partial)
        if mask is not None and not self.masked_conv:
            tokens, *fused = (gather_visible(part, mask) for part in (tokens, *fused))
        positions = self.pos_embed[0]
        tokens = tokens + (positions if mask is None else F.embedding(mask.visible_ids, positions))
        for block, options in self._attention(mask, self.grid):
            tokens = self._run(block, tokens, **options)
        for part in fused:
            tokens = tokens + part
        encoded: Tensor = self.norm(tokens)
        return encoded

    @checked
    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Pool encoded tokens to one vector per sample, by the constructor's `pool`.

        Args:
            tokens: What `forward` returns.

        Returns:
            One vector per sample.

        Example:
            >>> encoder = ConvViT(image_size=(32, 64), dim=(8, 16, 32), depth=(1, 1, 2), heads=4)
            >>> encoder.pool(encoder(torch.rand(2, 3, 32, 64))).shape
            torch.Size([2, 32])
        """
        pooled = tokens[:, 0] if self._pool == "token" else mean_of_tokens(tokens)
        summary: Tensor = self.fc_norm(pooled)
        return summary

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps of `features`: of two stages, then of the last stage's blocks."""
        return (*self._stage_dims, *(self.dim for _ in self.blocks))

    def _default_layers(self) -> Sequence[int]:
        return (*range(STAGES - 1), -1)

    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        self._check_channels(images)
        grid = self._grid_for(images, self.patch_size)
        cells, cell = whole_map(images), tuple(images.shape[2:])
        for stage in self.stages:
            cells, cell = stage(cells, cell, None)
            yield cells.flatten(1, 2), cell
        tokens = self.embed_proj(self.embed(cells, cell).flatten(1, 2)) + self._positions(grid)
        for block, options in self._attention(None, grid):
            tokens = self._run(block, tokens, **options)
            yield tokens, grid

    def _positions(self, grid: Grid) -> Float[Tensor, "tokens dim"]:
        table = self.pos_embed[0]
        return table if grid == self.grid else interpolate_positions(table, self.grid, grid)

    def _attention(self, mask: Mask | None, grid: Grid) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Return every block with what its attention needs on a grid: windows and bias."""
        if not self.rel_pos_bias:
            return [(block, {}) for block in self.blocks]
        pairs = zip(self.blocks, self.rel_pos_bias, strict=True)
        return [(block, {"attn_bias": bias(mask, grid=grid)}) for block, bias in pairs]

    def _embed(
        self, images: Tensor, mask: Mask | None, partial: Mask | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], list[Float[Tensor, "batch tokens dim"]]]:
        """Run the convolution stages.

        Returns:
            The tokens without position embeddings, and the projected outputs of the first two
            stages (none without `multi_scale`).
        """
        if mask is None:
            cells, cell = whole_map(images), self.image_size
        else:
            cells, cell = pack_cells(images, mask), self.patch_size
        fused = []
        for index, stage in enumerate(self.stages):
            hidden = None if partial is None else self._hidden(partial, index)
            cells, cell = stage(cells, cell, mask, hidden)
            if self.fusions:
                fused.append(self.fusions[index](cells, cell).flatten(1, 2))
        return self.embed_proj(self.embed(cells, cell).flatten(1, 2)), fused

    def _hidden(self, partial: Mask, stage: int) -> Bool[Tensor, "batch 1 positions 1"]:
        """Return the positions of a stage that contain no visible position of the first stage."""
        height, width = product([(1, 1), *self.strides[1 : stage + 1]])
        pattern = "b (y p) (x q) -> b 1 (y x) 1 (p q)"
        return rearrange(partial.is_masked, pattern, p=height, q=width).all(dim=-1)

    def _check_channels(self, images: Tensor) -> None:
        if images.shape[1] != self.in_channels:
            raise ValueError(
                f"images must have {self.in_channels} channels; got shape {tuple(images.shape)}"
            )

    def _check(self, images: Tensor, mask: Mask | None, partial: Mask | None = None) -> None:
        check_stacked(images)
        if tuple(images.shape[2:]) != self.image_size or images.shape[1] != self.in_channels:
            raise ValueError(
                f"this encoder takes images of {self.in_channels} channels and size "
                f"{self.image_size}; got {tuple(images.shape)}. Build one for the new size and "
                "load its position table with patches.interpolate_positions, or take features, "
                "which fit any size"
            )
        if mask is not None:
            check_mask(mask, self.grid, images)
        if partial is not None:
            check_mask(partial, self.fine_grid, images)


def check_stages(**values: Sequence[object]) -> None:
    """Check that every setting has one value per stage.

    Raises:
        ValueError: If a setting has another number of values.
    """
    for name, value in values.items():
        if not isinstance(value, Sequence) or len(value) != STAGES:
            raise ValueError(
                f"{name} must have one value for each of the {STAGES} stages; got {value!r}"
            )


def hide(
    cells: Float[Tensor, "batch cells cell dim"],
    hidden: Bool[Tensor, "batch cells cell 1"] | None,
) -> Float[Tensor, "batch cells cell dim"]:
    """Set hidden positions to zero; `hidden=None` leaves the cells as they are."""
    return cells if hidden is None else cells.masked_fill(hidden, 0)


def whole_map(
    images: Shaped[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch 1 pixels channels"]:
    """Return whole images as one cell each."""
    return rearrange(as_floats(images), "b c h w -> b 1 (h w) c")


def product(strides: Sequence[Grid]) -> Grid:
    """Multiply strides axis by axis."""
    return tuple(map(math.prod, zip(*strides, strict=True)))


def init_as_convolution(weight: Tensor, bias: Tensor) -> None:
    """Initialise a convolution's weight and bias as PyTorch does by default."""
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)
