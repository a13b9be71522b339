"""The Swin Transformer: shifted-window attention, and patch merging between stages.

Axes: batch; channels; height, width (pixels); tokens (of a stage's grid); windows; inside (tokens
of a window); dim.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Count, Depth, DropRate, NotNegative, Ratio, Size, checked
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
            than the window, the windows have that side and are not shifted. A grid that windows do
            not divide is padded with zeros after the norm, as in the authors' segmentation.
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
        `features` of another size are those of the authors' segmentation (Swin-Transformer-
        Semantic-Segmentation `swin_transformer.py`): windows as built, shifted in every second
        block, and a row or column of zeros where patch merging meets an odd side.

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
        mlp_ratio: Ratio = 4.0,
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
        mask: Mask | RaggedMask | None = None,
        *,
        mask_token: Float[Tensor, "*masked embed_dim"] | None = None,
    ) -> Float[Tensor, "batch tokens out_dim"]:
        """Encode images, with masked patches replaced by the mask token.

        Args:
            images: Images of the size that the encoder was built for.
            mask: Mask on `grid`, of any counts; pixels of masked patches are not read.
            mask_token: Replaces the embedding of each masked patch.

        Returns:
            One token per position of `out_grid`, after the last norm.

        Raises:
            TypeError: If the mask is neither a `Mask` nor a `RaggedMask`.
            ValueError: If the images have another size or number of channels, if the mask does not
                fit, or if only one of `mask` and `mask_token` is given.
        """
        tokens = self._embed(images, mask, mask_token)
        for stage in self.layers:
            _, tokens = stage(tokens, run=self._run)
        encoded: Tensor = self.norm(tokens)
        return encoded

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps of `features`, one number for each stage."""
        return tuple(self.dim // 2**stage for stage in reversed(range(len(self.layers))))

    def _default_layers(self) -> Sequence[int]:
        return range(len(self.layers))

    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        grid = self._grid_for(images, self.patch_embed.patch_size)
        tokens = self.patch_embed(images)
        for stage in self.layers:
            mixed, tokens = stage(tokens, grid, run=self._run)
            yield mixed, grid
            grid = tuple(-(-side // 2) for side in grid)

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Return what assigns parameters to layers; merging belongs to the next stage, as in timm.

        Args:
            coarse: Whether a stage is one layer.

        Returns:
            A function from the name of a parameter to its layer, as timm's `group_parameters`
            takes it.

        Example:
            >>> sizes = {"dim": 8, "depth": (1, 1), "heads": (1, 2), "window": 4}
            >>> encoder = SwinTransformer(image_size=32, **sizes)
            >>> layer_of = encoder.group_matcher()
            >>> layer_of("patch_embed.proj.weight") < layer_of("layers.1.blocks.0.attn.qkv.weight")
            True
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
                return (1.0, float(stage if block else stage + 1))
            return (1.0, float(stage), float(block)) if block else (1.0, stage + 1.0, 0.0)

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
        """Average the encoded tokens of each sample.

        Args:
            tokens: What `forward` returns.

        Returns:
            One vector per sample.

        Example:
            >>> sizes = {"dim": 8, "depth": (1, 1), "heads": (1, 2), "window": 4}
            >>> encoder = SwinTransformer(image_size=32, **sizes)
            >>> encoder.pool(encoder(torch.rand(2, 3, 32, 32))).shape
            torch.Size([2, 16])
        """
        return tokens.mean(dim=1)

    def _embed(
        self, images: Tensor, mask: Mask | RaggedMask | None, mask_token: Tensor | None
    ) -> Tensor:
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"this encoder takes images of size {self.image_size}; got {tuple(images.shape)}"
            )
        if mask is not None and not isinstance(mask, RaggedMask):
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


def call(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Call a block."""
    out: Tensor = block(*inputs)
    return out


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
    """

    permutations: Tensor
    inverse_permutations: Tensor
    shift_mask: Tensor | None
    is_padding: Tensor | None

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
        self.window, shift = fit_window(grid, window)
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=dim,
                heads=heads,
                window=self.window,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                norm_eps=norm_eps,
                act=act,
            )
            for rate in drop_path
        )
        for name, tensor in vars(lay_out(grid, self.window, shift, depth)).items():
            self.register_buffer(name, tensor, persistent=False)
        self.downsample = resample(dim=dim) if resample else None

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        grid: Grid | None = None,
        *,
        run: Callable[..., Tensor] = call,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch next next_dim"]]:
        """Apply the blocks to row-major tokens.

        Args:
            tokens: The tokens.
            grid: Their grid; `None` for the one that the stage was built for.
            run: Calls a block with its inputs, as checkpointing does.

        Returns:
            The tokens of this stage and those of the next stage, both row-major.
        """
        grid, layout = grid or self.grid, self._layout(grid)
        padded = padded_grid(grid, self.window)
        tokens = pad_grid(tokens, grid, padded)
        for index, block in enumerate(self.blocks):
            tokens = permute(tokens, layout, index)
            is_padding = None if layout.is_padding is None else layout.is_padding[index % 2]
            shift_mask = layout.shift_mask if index % 2 else None
            tokens = run(block, tokens, shift_mask, is_padding)
        tokens = crop_grid(permute(tokens, layout, -1), padded, grid)
        return tokens, tokens if self.downsample is None else self.downsample(tokens, grid)

    def _layout(self, grid: Grid | None) -> "Layout":
        if grid in (None, self.grid):
            return Layout(
                self.permutations, self.inverse_permutations, self.shift_mask, self.is_padding
            )
        assert grid is not None
        with self.permutations.device:
            return lay_out(grid, self.window, self.window // 2, len(self.blocks))


@dataclass(frozen=True)
class Layout:
    """Order of a stage's tokens, on the grid padded to whole windows.

    Attributes:
        permutations: For each position in the order of a block (and last, in row-major order), the
            position of the same token in the order before.
        inverse_permutations: The inverse of each.
        shift_mask: Attention mask of shifted windows; `None` if there are none.
        is_padding: Which positions are padding, in unshifted and in shifted order; `None` without
            padding.
    """

    permutations: Int64[Tensor, "orders tokens"]
    inverse_permutations: Int64[Tensor, "orders tokens"]
    shift_mask: Float[Tensor, "windows 1 inside inside"] | None
    is_padding: Bool[Tensor, "2 tokens 1"] | None


def lay_out(grid: Grid, window: int, shift: int, depth: int) -> Layout:
    """Lay out the tokens of `depth` blocks, every second one with shifted windows."""
    padded = padded_grid(grid, window)
    rows = torch.arange(count_tokens(padded))
    in_windows = [window_order(padded, window, by).flatten() for by in (0, shift)]
    orders = [rows, *(in_windows[index % 2] for index in range(depth)), rows]
    permutations = torch.stack(
        [old.argsort()[new] for old, new in zip(orders, orders[1:], strict=False)]
    )
    is_padding = None
    if padded != grid:
        real = torch.ones(1, count_tokens(grid), 1, dtype=torch.bool)
        outside = ~pad_grid(real, grid, padded)[0]
        is_padding = torch.stack([outside[order] for order in in_windows])
    mask = shifted_window_mask(padded, window, shift) if shift else None
    return Layout(permutations, permutations.argsort(dim=1), mask, is_padding)


def padded_grid(grid: Grid, window: int) -> Grid:
    """Return the grid of whole windows that covers a grid."""
    return tuple(-(-side // window) * window for side in grid)


def pad_grid(
    tokens: Shaped[Tensor, "batch tokens dim"], grid: Grid, padded: Grid
) -> Shaped[Tensor, "batch padded dim"]:
    """Put zeros after the last row and column of row-major tokens."""
    if grid == padded:
        return tokens
    below, right = (new - old for old, new in zip(grid, padded, strict=True))
    return F.pad(tokens.unflatten(1, grid), (0, 0, 0, right, 0, below)).flatten(1, 2)


def crop_grid(
    tokens: Float[Tensor, "batch padded dim"], padded: Grid, grid: Grid
) -> Float[Tensor, "batch tokens dim"]:
    """Undo `pad_grid`."""
    if grid == padded:
        return tokens
    cropped: Tensor = tokens.unflatten(1, padded)[:, : grid[0], : grid[1]].flatten(1, 2)
    return cropped


def permute(tokens: Tensor, layout: Layout, index: int) -> Tensor:
    """Bring tokens into the order of a block; -1 for row-major order after the last one."""
    permuted: Tensor = _Permute.apply(  # type: ignore[no-untyped-call]
        tokens, layout.permutations[index], layout.inverse_permutations[index]
    )
    return permuted


class _Permute(torch.autograd.Function):
    """Permute tokens; backward gathers by the inverse permutation instead of scatter-adding."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return tokens.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None  # type: ignore[no-untyped-call]


class SwinBlock(nn.Module):
    """Transformer block with window attention; tokens are in window order."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        window: int,
        mlp_ratio: float,
        drop_path: float,
        norm_eps: float,
        act: Activation,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = WindowAttention(dim=dim, heads=heads, window=window)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), act=act)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        shift_mask: Float[Tensor, "windows 1 inside inside"] | None = None,
        is_padding: Bool[Tensor, "tokens 1"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Apply the block: window attention, then an MLP.

        Args:
            tokens: The tokens.
            shift_mask: Attention mask of each window, if windows are shifted.
            is_padding: Positions that attention reads as zeros.
        """
        normed = self.norm1(tokens)
        if is_padding is not None:
            normed = normed.masked_fill(is_padding, 0)
        tokens = tokens + self.drop_path(self.attn(normed, shift_mask))
        out: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return out


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a relative position bias.

    Args:
        dim: Width of a token.
        heads: Attention heads.
        window: Tokens per axis of a window.
    """

    def __init__(self, *, dim: int, heads: int, window: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.tokens_inside = window**2
        self.rel_pos_bias = RelativePositionBias(grid=(window, window), heads=heads)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        shift_mask: Float[Tensor, "windows 1 inside inside"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend inside each window; the tokens of a window are consecutive.

        Shifted windows at the edge contain tokens from opposite sides of the image. `shift_mask`
        keeps them from attending to each other.
        """
        bias = self.rel_pos_bias()
        if shift_mask is None:  # all windows have the same bias
            pattern = "b (w n) (three h d) -> three (b w) h n d"
        else:
            bias = (bias + shift_mask).flatten(0, 1).unsqueeze(0)
            pattern = "b (w n) (three h d) -> three b (w h) n d"
        query, key, value = rearrange(
            self.qkv(tokens), pattern, three=3, h=self.heads, n=self.tokens_inside
        ).unbind(0)
        windows = tokens.shape[1] // self.tokens_inside
        attended = attend(query, key, value, bias).view(
            tokens.shape[0], windows, self.heads, self.tokens_inside, query.shape[-1]
        )
        out: Tensor = self.proj(rearrange(attended, "b w h n d -> b (w n) (h d)"))
        return out


class PatchMerging(nn.Module):
    """Patch merging: 2x2 tokens to one token of twice the width.

    Source:
        Swin, arXiv:2103.14030, section 3.1. The four tokens are concatenated column by column. Odd
        sides are padded, as in the authors' segmentation.
    """

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=_NORM_EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid
    ) -> Float[Tensor, "batch merged merged_dim"]:
        """Merge row-major tokens; the result is row-major."""
        even = padded_grid(grid, 2)
        tokens = pad_grid(tokens, grid, even)
        quads = rearrange(tokens, "b (y i x j) d -> b (y x) (j i d)", y=even[0] // 2, i=2, j=2)
        merged: Tensor = self.reduction(self.norm(quads))
        return merged


class PatchSplitting(nn.Module):
    """Patch splitting: one token to 2x2 tokens of half the width, the reverse of `PatchMerging`."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_NORM_EPS)
        self.expansion = nn.Linear(dim, 2 * dim, bias=False)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], grid: Grid
    ) -> Float[Tensor, "batch split split_dim"]:
        """Split row-major tokens; the result is row-major."""
        quads: Tensor = self.expansion(self.norm(tokens))
        return rearrange(quads, "b (y x) (i j d) -> b (y i x j) d", y=grid[0], i=2, j=2)


def fit_window(grid: Grid, window: int) -> tuple[int, int]:
    """Return window side and shift for a grid; a window that reaches its shorter side is unshifted.

    Raises:
        ValueError: If the window is below 1.

    Example:
        >>> fit_window((12, 12), 6), fit_window((6, 6), 7), fit_window((4, 8), 7)
        ((6, 3), (6, 0), (4, 0))
    """
    if window < 1:
        raise ValueError(f"window must be at least 1; got {window}")
    return (min(grid), 0) if min(grid) <= window else (window, window // 2)


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
