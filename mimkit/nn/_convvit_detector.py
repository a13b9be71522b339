"""ConvMAE's encoder as a detection backbone: window and global attention, four feature maps.

Axes: batch; channels; height, width; windows; tokens (of the grid, or of a window); dim; heads.
"""

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Depth, DropRate, Positive, Size, checked
from mimkit._grids import Grid, divide, per_axis
from mimkit.nn._convvit import ConvViT
from mimkit.nn._relative import RelativePositionBias


class ConvViTDetector(ConvViT):
    """ConvMAE's encoder with windowed attention, as the backbone of a detector.

    Args:
        image_size: Pixels per axis: an integer means a square image, a tuple height and width.
        window: Tokens per axis of an attention window; must divide the grid.
        global_layers: Indices of the last stage's blocks with global instead of window attention.
        patch_sizes: Stride of each of the three stages, as in `ConvViT`.
        in_channels: Channels of the images.
        dim: Width of each stage.
        depth: Number of blocks of each stage.
        heads: Attention heads of the last stage.
        mlp_ratio: Ratio of MLP hidden width to width, for each stage.
        kernel_size: Kernel size of the depth-wise convolutions; odd.
        drop_path: Stochastic depth rate of the last block, in [0, 1), as in `ConvViT`.

    Source:
        ConvMAE, arXiv:2205.03892, section 3.4 "object detection"; Alpha-VL/ConvMAE `ConvViTDet`.
        All window layers share one relative position table, all global layers another. There is no
        last norm; the fourth feature map is the third one, max-pooled. The position table is
        frozen.

    Example:
        >>> import torch
        >>> backbone = ConvViTDetector(image_size=(64, 128), window=2, global_layers=(1,),
        ...                            dim=(8, 16, 32), depth=(1, 1, 2), heads=4)
        >>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, 64, 128))]
        [(1, 8, 16, 32), (1, 16, 8, 16), (1, 32, 4, 8), (1, 32, 2, 4)]
    """

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 1024,
        window: int | Sequence[int] = 16,
        global_layers: Sequence[int] = (0, 3, 6, 10),
        patch_sizes: Sequence[int | Sequence[int]] = (4, 2, 2),
        in_channels: Size = 3,
        dim: Sequence[Size] = (256, 384, 768),
        depth: Sequence[Depth] = (2, 2, 11),
        heads: Size = 12,
        mlp_ratio: Sequence[Positive] = (4.0, 4.0, 4.0),
        kernel_size: Size = 5,
        drop_path: DropRate = 0.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            patch_sizes=patch_sizes,
            in_channels=in_channels,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            drop_path=drop_path,
        )
        if any(not 0 <= layer < depth[-1] for layer in global_layers):
            raise ValueError(
                f"global_layers must be in [0, {depth[-1]}), the blocks of the last stage; "
                f"got {tuple(global_layers)}"
            )
        self.norm = nn.Identity()
        self.window = per_axis("window", window, 2)
        self.windows = divide("grid", self.grid, self.window, "window")
        self.global_layers = frozenset(global_layers)
        self.window_bias = RelativePositionBias(grid=self.window, heads=heads)
        self.global_bias = RelativePositionBias(grid=self.grid, heads=heads)

    @checked
    def forward(  # type: ignore[override]
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim rows columns"], ...]:
        """Return the feature maps E1 to E4, from fine to coarse.

        Raises:
            ValueError: If the images have another size or number of channels.
        """
        self._check(images, None)
        cells, cell = rearrange(images, "b c h w -> b 1 (h w) c"), self.image_size
        levels = []
        for stage in self.stages:
            cells, cell = stage(cells, cell, None)
            levels.append(_as_map(cells.flatten(1, 2), cell))
        tokens = self.embed_proj(self.embed(cells, cell).flatten(1, 2)) + self.pos_embed[0]
        biases = {False: self.window_bias(), True: self.global_bias()}
        for layer, block in enumerate(self.blocks):
            is_global = layer in self.global_layers
            tokens = self._attend(block, tokens, biases[is_global], is_global)
        coarsest = _as_map(tokens, self.grid)
        return (*levels, coarsest, F.max_pool2d(coarsest, 2))

    def _attend(
        self, block: nn.Module, tokens: Tensor, bias: Tensor, is_global: bool
    ) -> Float[Tensor, "batch tokens dim"]:
        """Apply a block with global or window attention."""
        if is_global:
            whole: Tensor = block(tokens, attn_bias=bias)
            return whole
        (rows, columns), (height, width) = self.windows, self.window
        sizes = {"y": rows, "x": columns, "h": height, "w": width}
        in_grid, in_window = "b (y h x w) d", "(b y x) (h w) d"
        windows = rearrange(tokens, f"{in_grid} -> {in_window}", **sizes)
        mixed: Tensor = block(windows, attn_bias=bias)
        return rearrange(mixed, f"{in_window} -> {in_grid}", **sizes)


def _as_map(
    tokens: Float[Tensor, "batch tokens dim"], grid: Grid
) -> Float[Tensor, "batch dim height width"]:
    return rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])
