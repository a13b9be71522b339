"""The Swin Transformer: shifted-window attention, and patch merging between stages.

Axes: batch; channels; height, width (pixels); tokens (of a stage's grid); windows; inside (tokens
of a window); dim.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from mimkit._arguments import Count, Depth, DropRate, NotNegative, Positive, Size, checked
from mimkit._checks import check_even
from mimkit._grids import Grid, as_integer, count_tokens, divide, per_axis, sides_of
from mimkit.masking import Mask, RaggedMask
from mimkit.nn._embed import Images, PatchEmbed
from mimkit.nn._layers import Activation, DropPath, Mlp, attend, check_heads, drop_path_rates
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._timm_protocol import Matcher, TimmProtocol
from mimkit.nn._vit import insert_mask_tokens

_NORM_EPS = 1e-5
_NOT_NEIGHBORS = -100.0  # added to logits between tokens that only the roll made neighbors


class SwinTransformer(TimmProtocol):
    """Swin Transformer that can replace masked patches by a mask token.

    Args:
        image_size: Pixels per axis; an integer means a square image.
        patch_size: Pixels per patch; one integer, or one per axis.
        in_channels: Channels of the images.
        dim: Width of a token in the first stage; every further stage doubles it.
        depth: Blocks of each stage.
        heads: Attention heads of each stage.
        window: Tokens per axis of a window. If the shorter side of a stage's grid is not larger
            than the window, the windows have that side and are not shifted.
        mlp_ratio: Ratio of MLP hidden width to width.
        drop_path: Stochastic depth rate of the last block, in [0, 1). Rates rise linearly from 0.
        norm_eps: Epsilon of the blocks' LayerNorms and the last one.
        act: Activation of the MLPs: "gelu", or "gelu_tanh" for its approximation by tanh.
        num_classes: Width of `head`, a linear classifier for pooled tokens; 0 for none.

    Attributes:
        grid: Patches per axis: the grid of masks.
        out_grid: Tokens per axis after the last stage.
        stride: Pixels per axis of an output token.
        dim: Width of an output token.
        num_prefix_tokens: Number of prefix tokens: 0.

    Raises:
        ValueError: If `depth` and `heads` differ in length, patches and merging do not divide the
            image size, windows do not fill a stage's grid, or a stage's heads do not divide its
            width.

    Source:
        Swin, arXiv:2103.14030; microsoft/SimMIM `swin_transformer.py`, with its initialization.
        The authors roll the feature map and partition it into windows in every shifted block, and
        undo both. Here tokens stay in window order and are reordered once between two blocks.

    Example:
        >>> encoder = SwinTransformer(image_size=(32, 64), dim=16, depth=(2, 2), heads=(2, 4),
        ...                           window=4)
        >>> images = torch.rand(2, 3, 32, 64)
        >>> encoder(images).shape, encoder.out_grid
        (torch.Size([2, 32, 32]), (4, 8))
        >>> [tuple(feature.shape) for feature in encoder.features(images)]
        [(2, 16, 8, 16), (2, 32, 4, 8)]
    """

    _undecayed = r"rel_pos_bias\.table$"
    _first_layer = r"^patch_embed"

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 4,
        in_channels: Size = 3,
        dim: Size = 96,
        depth: Sequence[Depth] = (2, 2, 6, 2),
        heads: Sequence[Size] = (3, 6, 12, 24),
        window: Size = 7,
        mlp_ratio: Positive = 4.0,
        drop_path: DropRate = 0.0,
        norm_eps: NotNegative = _NORM_EPS,
        act: Activation = "gelu",
        num_classes: Count = 0,
    ) -> None:
        super().__init__()
        stages = [value if isinstance(value, Sequence) else () for value in (depth, heads)]
        if len(stages[0]) != len(stages[1]) or not stages[0]:
            raise ValueError(
                f"depth and heads must have one number per stage; got {depth} and {heads}"
            )
        window = as_integer("window", window)
        self.image_size = sides_of("image_size", image_size)
        if len(self.image_size) != 2:
            raise ValueError(f"Swin needs images of two axes; got image_size={image_size}")
        patch = per_axis("patch_size", patch_size, 2)
        self.grid = divide("image size", self.image_size, patch, "patch size")
        merged = 2 ** (len(depth) - 1)
        self.out_grid = divide("patch grid", self.grid, merged, "total patch merging")
        self.stride = tuple(side * merged for side in patch)
        self.dim = dim * merged
        self.num_prefix_tokens = 0
        self.patch_embed = _NormedPatchEmbed(patch_size=patch, in_channels=in_channels, dim=dim)
        rates = drop_path_rates(drop_path, sum(depth))
        self.layers = nn.ModuleList(
            SwinStage(
                grid=tuple(side // 2**stage for side in self.grid),
                dim=dim * 2**stage,
                depth=blocks,
                heads=heads[stage],
                window=window,
                mlp_ratio=mlp_ratio,
                drop_path=rates[sum(depth[:stage]) : sum(depth[: stage + 1])],
                resample=PatchMerging if stage < len(depth) - 1 else None,
                norm_eps=norm_eps,
                act=act,
            )
            for stage, blocks in enumerate(depth)
        )
        self.axis_sizes = {"dim": self.dim, "embed_dim": dim}
        self.norm = nn.LayerNorm(self.dim, eps=norm_eps)
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.apply(initialize_swin)

    @checked
    def forward(
        self,
        images: Shaped[Tensor, "batch channels height width"],
        mask: Mask | None = None,
        *,
        mask_token: Float[Tensor, "*masked embed_dim"] | None = None,
    ) -> Float[Tensor, "batch tokens out_dim"]:
        """Encode images, with masked patches replaced by the mask token.

        Args:
            images: Images of the size that the encoder was built for.
            mask: Mask on `grid`; pixels of masked patches are not read.
            mask_token: Replaces the embedding of each masked patch.

        Returns:
            One token per position of `out_grid`, after the last norm.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
            ValueError: If the images have another size or number of channels, if the mask does not
                fit, or if only one of `mask` and `mask_token` is given.
        """
        tokens = self._embed(images, mask, mask_token)
        for stage in self.layers:
            _, tokens = self._run(stage, tokens)
        encoded: Tensor = self.norm(tokens)
        return encoded

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps of `features`, one number for each stage."""
        return tuple(self.dim // 2**stage for stage in reversed(range(len(self.layers))))

    def _default_layers(self) -> Sequence[int]:
        return range(len(self.layers))

    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        tokens = self._embed(images, None, None)
        for index, stage in enumerate(self.layers):
            mixed, tokens = self._run(stage, tokens)
            yield mixed, self._grid_of(index)

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Return what assigns parameters to layers; merging belongs to the next stage, as in timm.

        Args:
            coarse: Whether a stage is one layer.
        """
        stages: Any = self.layers
        last = (1.0, len(stages) - 1.0, *(() if coarse else (len(stages[-1].blocks) - 1.0,)))

        def layer_of(name: str) -> tuple[float, ...]:
            inside = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
            if inside is None:
                outside = {"patch_embed": (0.0,), "norm": last}
                return outside.get(name.split(".")[0], (math.inf,))
            stage, block = int(inside[1]), inside[2]
            if coarse:
                return (1, stage if block else stage + 1)
            return (1, stage, int(block)) if block else (1, stage + 1, 0)

        return layer_of

    def _stages(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def _fits(self, stage: int) -> bool:
        return stage == len(self.layers) - 1

    def _grid_of(self, stage: int) -> Grid:
        return tuple(side // 2**stage for side in self.grid)

    def _set_pool(self, name: str) -> None:
        if name != "avg":
            raise ValueError(f'global_pool must be "avg"; got {name!r}')

    @checked
    def pool(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
        """Average the encoded tokens of each sample."""
        return tokens.mean(dim=1)

    def _embed(self, images: Tensor, mask: Mask | None, mask_token: Tensor | None) -> Tensor:
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"this encoder takes images of size {self.image_size}; got {tuple(images.shape)}"
            )
        if mask is not None:
            check_even(mask)
        if mask is not None and mask_token is None:
            raise ValueError("Swin cannot leave tokens out: pass a mask_token with the mask")
        tokens: Tensor = self.patch_embed(images, mask)
        return tokens if mask_token is None else insert_mask_tokens(tokens, mask, mask_token)


class _NormedPatchEmbed(PatchEmbed):
    """Patch embedding followed by a LayerNorm."""

    def __init__(self, *, patch_size: Sequence[int], in_channels: int, dim: int) -> None:
        # The order of summation changes rounding. In the golden vectors one residual of the L1 loss
        # is zero up to rounding; with this order its gradient has the same sign as the authors'.
        super().__init__(patch_size=patch_size, in_channels=in_channels, dim=dim, order="p1 p2 c")
        bound = (in_channels * count_tokens(patch_size)) ** -0.5
        nn.init.uniform_(self.proj.weight, -bound, bound)  # a convolution's default
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS)

    def forward(  # noqa: D102
        self, images: Images, mask: Mask | RaggedMask | None = None
    ) -> Tensor:
        tokens: Tensor = self.norm(super().forward(images, mask))
        return tokens


class SwinStage(nn.Module):
    """Blocks on one grid, every second one with shifted windows, then a change of resolution.

    Args:
        grid: Tokens per axis.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads.
        window: Tokens per axis of a window.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        drop_path: Stochastic depth rate of each block.
        resample: Layer to the next stage's grid: `PatchMerging`, `PatchSplitting` or none.
        norm_eps: Epsilon of the blocks' LayerNorms.
        act: Activation of the MLPs.

    Raises:
        ValueError: If the grid is not divisible into windows.
    """

    permutations: Tensor
    inverse_permutations: Tensor

    def __init__(
        self,
        *,
        grid: Grid,
        dim: int,
        depth: int,
        heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: Sequence[float],
        resample: "type[PatchMerging] | type[PatchSplitting] | None",
        norm_eps: float = _NORM_EPS,
        act: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.grid = grid
        window, shift = fit_window(grid, window)
        self.blocks = nn.ModuleList(
            SwinBlock(
                grid=grid,
                dim=dim,
                heads=heads,
                window=window,
                shift=shift if index % 2 else 0,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                norm_eps=norm_eps,
                act=act,
            )
            for index, rate in enumerate(drop_path)
        )
        rows = torch.arange(count_tokens(grid))
        orders = [
            rows,
            *(window_order(grid, window, shift if i % 2 else 0).flatten() for i in range(depth)),
            rows,
        ]
        # For each position in the new order, the position of the same token in the old order.
        permutations = torch.stack(
            [old.argsort()[new] for old, new in zip(orders, orders[1:], strict=False)]
        )
        self.register_buffer("permutations", permutations, persistent=False)
        self.register_buffer("inverse_permutations", permutations.argsort(dim=1), persistent=False)
        self.downsample = resample(grid=grid, dim=dim) if resample else None

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch next next_dim"]]:
        """Apply the blocks to row-major tokens.

        Returns:
            The tokens of this stage and those of the next stage, both row-major.
        """
        for index, block in enumerate(self.blocks):
            tokens = block(self._permute(tokens, index))
        tokens = self._permute(tokens, -1)
        return tokens, tokens if self.downsample is None else self.downsample(tokens)

    def _permute(self, tokens: Tensor, index: int) -> Tensor:
        permuted: Tensor = _Permute.apply(  # type: ignore[no-untyped-call]
            tokens, self.permutations[index], self.inverse_permutations[index]
        )
        return permuted


class _Permute(torch.autograd.Function):
    """Permute tokens; backward gathers by the inverse permutation instead of scatter-adding."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return tokens.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None  # type: ignore[no-untyped-call]


class SwinBlock(nn.Module):
    """Transformer block with window attention; tokens are in window order."""

    def __init__(
        self,
        *,
        grid: Grid,
        dim: int,
        heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        drop_path: float,
        norm_eps: float,
        act: Activation,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = WindowAttention(grid=grid, dim=dim, heads=heads, window=window, shift=shift)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), act=act)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Apply the block: window attention, then an MLP."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        out: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return out


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a relative position bias.

    Args:
        grid: Tokens per axis.
        dim: Width of a token.
        heads: Attention heads.
        window: Tokens per axis of a window.
        shift: Shift of the windows in tokens. Windows at the edge then contain tokens from opposite
            sides of the image, which do not attend to each other.
    """

    shift_mask: Tensor | None

    def __init__(self, *, grid: Grid, dim: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.tokens_inside = window**2
        self.rel_pos_bias = RelativePositionBias(grid=(window, window), heads=heads)
        mask = shifted_window_mask(grid, window, shift) if shift else None
        self.register_buffer("shift_mask", mask, persistent=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend inside each window; the tokens of a window are consecutive."""
        bias = self.rel_pos_bias()
        if self.shift_mask is None:  # all windows have the same bias
            pattern = "b (w n) (three h d) -> three (b w) h n d"
        else:
            bias = (bias + self.shift_mask).flatten(0, 1).unsqueeze(0)
            pattern = "b (w n) (three h d) -> three b (w h) n d"
        query, key, value = rearrange(
            self.qkv(tokens), pattern, three=3, h=self.heads, n=self.tokens_inside
        ).unbind(0)
        windows = tokens.shape[1] // self.tokens_inside
        attended = attend(query, key, value, bias).view(
            len(tokens), windows, self.heads, self.tokens_inside, query.shape[-1]
        )
        out: Tensor = self.proj(rearrange(attended, "b w h n d -> b (w n) (h d)"))
        return out


class PatchMerging(nn.Module):
    """Patch merging: 2x2 tokens to one token of twice the width.

    Source:
        Swin, arXiv:2103.14030, section 3.1. The four tokens are concatenated column by column.
    """

    def __init__(self, *, grid: Grid, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(4 * dim, eps=_NORM_EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch merged merged_dim"]:
        """Merge row-major tokens; the result is row-major."""
        quads = rearrange(tokens, "b (y i x j) d -> b (y x) (j i d)", y=self.grid[0] // 2, i=2, j=2)
        merged: Tensor = self.reduction(self.norm(quads))
        return merged


class PatchSplitting(nn.Module):
    """Patch splitting: one token to 2x2 tokens of half the width, the reverse of `PatchMerging`."""

    def __init__(self, *, grid: Grid, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch split split_dim"]:
        """Split row-major tokens; the result is row-major."""
        quads: Tensor = self.expansion(self.norm(tokens))
        return rearrange(quads, "b (y x) (i j d) -> b (y i x j) d", y=self.grid[0], i=2, j=2)


def fit_window(grid: Grid, window: int) -> tuple[int, int]:
    """Return window side and shift for a grid; a window that reaches its shorter side is unshifted.

    Raises:
        ValueError: If the grid is not divisible into windows.

    Example:
        >>> fit_window((12, 12), 6), fit_window((6, 6), 7), fit_window((4, 8), 7)
        ((6, 3), (6, 0), (4, 0))
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    side, shift = (min(grid), 0) if min(grid) <= window else (window, window // 2)
    if any(tokens % side for tokens in grid):
        fitting = [n for n in range(1, min(grid) + 1) if not any(tokens % n for tokens in grid)]
        raise ValueError(
            f"windows of {side}x{side} do not fill the {'x'.join(map(str, grid))} tokens of a "
            f"stage; windows of {fitting} would fit"
        )
    return side, shift


def window_order(grid: Grid, window: int, shift: int) -> Int64[Tensor, "windows inside"]:
    """Return the row-major positions of each window's tokens."""
    positions = torch.arange(count_tokens(grid)).view(grid).roll((-shift, -shift), (0, 1))
    return _partition(positions, window)


def shifted_window_mask(
    grid: Grid, window: int, shift: int
) -> Float[Tensor, "windows 1 inside inside"]:
    """Shifted-window attention mask: -100 between tokens that only the roll made neighbors."""
    # Label the regions of the rolled map: only tokens of the same region are neighbors.
    regions = [torch.zeros(size, dtype=torch.int64) for size in grid]
    for region in regions:
        region[-window:], region[-shift:] = 1, 2
    labels = _partition(regions[0][:, None] * 3 + regions[1], window)
    differs = labels[:, None, :, None] != labels[:, None, None, :]
    return differs * _NOT_NEIGHBORS


def _partition(
    values: Int64[Tensor, "height width"], window: int
) -> Int64[Tensor, "windows inside"]:
    return rearrange(values, "(y i) (x j) -> (y x) (i j)", i=window, j=window)


def initialize_swin(module: nn.Module) -> None:
    """Initialise one module as Swin does: weights truncated normal with std 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, RelativePositionBias):
        nn.init.trunc_normal_(module.table, std=0.02)
