"""A Vision Transformer that encodes visible patches only.

Axes: batch; channels; *spatial; visible; tokens (the visible ones with a mask, all of the grid
without); prefix (the class token, if any); dim. With a `RaggedMask`: rows (tokens of all samples,
concatenated).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Count, Depth, DropRate, NotNegative, Ratio, Size, checked
from mimkit._checks import check_num_images, check_stacked
from mimkit._grids import Grid, divide, per_axis, sides_of
from mimkit.masking import Mask, RaggedMask
from mimkit.nn._embed import Images, PatchEmbed
from mimkit.nn._hybrid import HybridEmbed
from mimkit.nn._layers import (
    NORM_EPS,
    Activation,
    QKVBias,
    TransformerBlock,
    drop_path_rates,
    mean_of_tokens,
    xavier_linear,
)
from mimkit.nn._packing import (
    interleave,
    inverse_order,
    order_by_length,
    pack,
    positions_at,
    reorder,
)
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._timm_protocol import Matcher, TimmProtocol
from mimkit.nn._windows import Windows
from mimkit.patches import interpolate_positions, restore, sincos_positions


class ViT(TimmProtocol):
    """Vision Transformer that encodes only the visible patches when a mask is given.

    Parameter names and shapes are timm's; `interop` converts the authors' checkpoints.

    Args:
        image_size: Pixels per axis: an integer means a square image, a tuple one to three axes.
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        in_channels: Channels of the images.
        dim: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        drop_path: Stochastic depth rate of the last block, in [0, 1). Rates rise linearly from 0.
        class_token: Whether to prepend a learned class token.
        pool: What `pool` returns: the "mean" of the patch tokens, or the class "token".
        pool_norm: Whether the last LayerNorm comes after pooling (`fc_norm`, as in MAE's and timm's
            fine-tuning with mean pooling) instead of before (`norm`).
        absolute_positions: Whether position embeddings are added to the tokens.
        learn_positions: Whether the position table, initialised as sine-cosine, is trained.
        first_axis: Axis that fills the first half of a sine-cosine embedding: "column" (MAE) or
            "row" (CAE).
        relative_positions: Relative position bias: one "shared" by all blocks, one per "block", or
            `None`.
        layer_scale: Initial value of layer scale; `None` for no layer scale.
        qkv_bias: `True` for biases of queries, keys and values, `False` for none, "qv" for queries
            and values only.
        norm_eps: Epsilon of every LayerNorm.
        act: Activation of the MLPs: "gelu", or "gelu_tanh" for its approximation by tanh.
        num_registers: Learned register tokens, after the class token and without positions.
        num_classes: Width of `head`, a linear classifier for pooled tokens; 0 for none.
        stem: A CNN whose feature map is patchified instead of the image (`nn.ConvStem`, or any
            module with `out_channels` and `stride`). `patch_size` then counts feature-map
            positions.
        window: Tokens per axis of an attention window; `None` for global attention in all blocks.
            Grids that it does not divide are padded. Needs `class_token=False`, and no mask.
        global_blocks: Indices of the blocks with global attention in spite of `window`.

    Attributes:
        grid: Tokens per axis.
        num_prefix_tokens: Number of prefix tokens: the class token, if any, and the registers.

    Raises:
        ValueError: If the patch size does not divide the image size, `heads` does not divide `dim`,
            or options exclude each other (`pool="token"` without a class token, registers with
            relative positions, `window` with prefix tokens, `global_blocks` without `window`).

    Source:
        Dosovitskiy et al., arXiv:2010.11929; MAE, arXiv:2111.06377, appendix A.1;
        facebookresearch/mae `models_mae.py`, `models_vit.py`. The authors embed all patches, then
        drop the masked ones; here masked patches are never read. Relative positions, layer scale
        and "qv" as in BEiT, arXiv:2106.08254, and microsoft/SimMIM `vision_transformer.py`;
        registers as in Darcet et al., arXiv:2309.16588, and facebookresearch/dinov2; windows as in
        ViTDet, arXiv:2203.16527 (`window=14, global_blocks=(2, 5, 8, 11)`), whose decomposed
        relative positions are left out.

    Example:
        >>> from mimkit import masking
        >>> encoder = ViT(image_size=(32, 48), patch_size=8, dim=64, depth=2, heads=4)
        >>> images = torch.rand(2, 3, 32, 48)
        >>> mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.75)
        >>> encoder(images, mask).shape, encoder(images).shape
        (torch.Size([2, 7, 64]), torch.Size([2, 25, 64]))
        >>> encoder.pool(encoder(images)).shape
        torch.Size([2, 64])

        Images of any sizes in one batch, each with its own number of visible patches:

        >>> images = [torch.rand(3, 32, 48), torch.rand(3, 40, 24)]
        >>> key = masking.key([0, 1], seed=0)
        >>> mask = masking.ragged(masking.uniform, key, [(4, 6), (5, 3)], [0.75, 0.6])
        >>> tokens = encoder(images, mask)
        >>> tokens.shape, [len(rows) for rows in mask.split_visible(tokens, num_prefix=1)]
        (torch.Size([14, 64]), [7, 7])
    """

    _undecayed = r"^(cls_token|pos_embed|reg_token)$|^rel_pos_bias\.\d+\.table$"
    _first_layer = r"^cls_token|reg_token|pos_embed|patch_embed"

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_channels: Size = 3,
        dim: Size = 768,
        depth: Depth = 12,
        heads: Size = 12,
        mlp_ratio: Ratio = 4.0,
        drop_path: DropRate = 0.0,
        class_token: bool = True,
        pool: Literal["mean", "token"] = "mean",
        pool_norm: bool = False,
        absolute_positions: bool = True,
        learn_positions: bool = False,
        first_axis: Literal["column", "row"] = "column",
        relative_positions: Literal["shared", "block"] | None = None,
        layer_scale: float | None = None,
        qkv_bias: QKVBias = True,
        norm_eps: NotNegative = NORM_EPS,
        act: Activation = "gelu",
        num_registers: Count = 0,
        num_classes: Count = 0,
        stem: nn.Module | None = None,
        window: int | Sequence[int] | None = None,
        global_blocks: Sequence[Count] = (),
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        if pool == "token" and not class_token:
            raise ValueError('pool="token" needs class_token=True')
        if num_registers and relative_positions:
            raise ValueError(
                f"registers have no relative positions: num_registers={num_registers} needs "
                f"relative_positions=None; got {relative_positions!r}"
            )
        if window is None and global_blocks:
            raise ValueError(f"global_blocks={tuple(global_blocks)} needs a window; got None")
        if window is not None and (class_token or num_registers or relative_positions == "shared"):
            raise ValueError(
                f"window={window} needs class_token=False, num_registers=0 and "
                f'relative_positions="block" or None, as prefix tokens are in no window; got '
                f"{class_token}, {num_registers} and {relative_positions!r}"
            )
        if any(block >= depth for block in global_blocks):
            raise ValueError(
                f"global_blocks must be below depth={depth}; got {tuple(global_blocks)}"
            )
        self.image_size = sides_of("image_size", image_size)
        patch = per_axis("patch_size", patch_size, len(self.image_size))
        self.patch_embed = (
            PatchEmbed(patch_size=patch, in_channels=in_channels, dim=dim)
            if stem is None
            else HybridEmbed(stem=stem, patch_size=patch, dim=dim)
        )
        patch = self.patch_embed.patch_size
        self.grid = divide("image size", self.image_size, patch, "patch size")
        self.dim = dim
        self._learn_positions, self._first_axis = bool(learn_positions), first_axis
        self._num_class_tokens = int(class_token)
        self.num_prefix_tokens = self._num_class_tokens + num_registers
        self._pool = pool
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if class_token else None
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
        self.reg_token = None
        if num_registers:
            self.reg_token = nn.Parameter(
                nn.init.normal_(torch.empty(1, num_registers, dim), std=0.02)
            )
        self.pos_embed = (
            nn.Parameter(
                sincos_positions(
                    dim, self.grid, first_axis=first_axis, num_prefix=self._num_class_tokens
                )[None],
                requires_grad=self._learn_positions,
            )
            if absolute_positions
            else None
        )
        num_tables = {None: 0, "shared": 1, "block": depth}[relative_positions]
        self.window = None if window is None else per_axis("window", window, len(self.grid))
        self.global_blocks = frozenset(global_blocks)
        self.rel_pos_bias = nn.ModuleList(
            RelativePositionBias(
                grid=self.grid
                if self.window is None or index in self.global_blocks
                else self.window,
                heads=heads,
                class_token=class_token,
            )
            for index in range(num_tables)
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim=dim,
                heads=heads,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                layer_scale=layer_scale,
                qkv_bias=qkv_bias,
                norm_eps=norm_eps,
                act=act,
            )
            for rate in drop_path_rates(drop_path, depth)
        )
        self.norm = nn.Identity() if pool_norm else nn.LayerNorm(dim, eps=norm_eps)
        self.fc_norm = nn.LayerNorm(dim, eps=norm_eps) if pool_norm else nn.Identity()
        self.head = xavier_linear(dim, num_classes) if num_classes else nn.Identity()

    @checked
    def forward(
        self,
        images: Images,
        mask: Mask | RaggedMask | None = None,
        *,
        mask_token: Float[Tensor, "*masked dim"] | None = None,
    ) -> Float[Tensor, "batch prefix_and_tokens dim"] | Float[Tensor, "rows dim"]:
        """Encode the visible patches, or all patches without a mask.

        With a `RaggedMask`, a sample on another grid than the encoder's uses the sine-cosine table
        of that grid, or the learned table interpolated to it.

        Args:
            images: Images of the size that the encoder was built for. With a `RaggedMask`, any
                sizes; a list where they differ.
            mask: Which patches are visible.
            mask_token: Replaces the embedding of each masked patch, as in SimMIM; all patches are
                then encoded, of every image as many, also with a `RaggedMask`, whose images must
                have the encoder's size. Also one token per masked patch: [batch, masked, dim], or
                [rows of masked patches, dim].

        Returns:
            The prefix tokens, then one token per encoded patch in ascending order of position,
            after the last norm. With a `RaggedMask` and no `mask_token`, the tokens of all samples
            are concatenated; `mask.split_visible` splits them.

        Raises:
            TypeError: If the images are a list, and the mask is not a `RaggedMask` or there is a
                `mask_token`.
            ValueError: If the images have another size or number of channels, if the mask does not
                fit, if `mask_token` is given without a mask, or if a mask alone is used with
                windows, a `RaggedMask` alone also with relative positions.
        """
        if isinstance(mask, RaggedMask) and mask_token is None:
            if len(self.rel_pos_bias) or self.window:
                raise ValueError(
                    "relative_positions and window need a Mask, or a mask_token; got a RaggedMask"
                )
            return self._encode_packed(images, mask)
        if mask_token is not None and not isinstance(images, Tensor):
            raise TypeError("a mask_token needs images of one size, stacked; got a list")
        images = check_stacked(images)
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"this encoder takes images of size {self.image_size}; got {tuple(images.shape)}. "
                "Build one for the new size and load its position table with "
                "patches.interpolate_positions, or take features, which fit any size"
            )
        tokens = self.patch_embed(images, mask)
        if mask_token is not None:
            tokens, mask = insert_mask_tokens(tokens, mask, mask_token), None
        assert not isinstance(mask, RaggedMask)
        if mask is not None and self.window is not None:
            raise ValueError(
                f"window={self.window} needs all tokens: pass no mask, or a mask_token"
            )
        tokens = self._with_prefix_and_positions(tokens, mask, self.grid)
        for block, options in self._attention(mask, self.grid):
            tokens = self._run(block, tokens, **options)
        encoded: Tensor = self.norm(tokens)
        return encoded

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of the maps of `features`, one number for each block."""
        return (self.dim,) * len(self.blocks)

    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        grid = self._grid_for(images, self.patch_embed.patch_size)
        tokens = self._with_prefix_and_positions(self.patch_embed(images), None, grid)
        for block, options in self._attention(None, grid):
            tokens = self._run(block, tokens, **options)
            yield tokens[:, self.num_prefix_tokens :], grid

    def _attention(self, mask: Mask | None, grid: Grid) -> list[tuple[nn.Module, dict[str, Any]]]:
        """Return every block with what its attention needs on a grid: windows and bias."""
        windows = None if self.window is None else Windows(grid, self.window)
        is_global = [
            windows is None or index in self.global_blocks for index in range(len(self.blocks))
        ]
        biases: list[Tensor | None] = [
            bias(mask, grid=grid if reaches_all else None)
            for bias, reaches_all in zip(self.rel_pos_bias, is_global, strict=False)
        ]
        if len(biases) != len(self.blocks):  # no bias, or one shared by all blocks
            biases = (biases or [None]) * len(self.blocks)
        return [
            (block, {"attn_bias": bias, "windows": None if reaches_all else windows})
            for block, bias, reaches_all in zip(self.blocks, biases, is_global, strict=True)
        ]

    def _encode_packed(self, images: Images, mask: RaggedMask) -> Tensor:
        check_num_images(images, mask)
        order = order_by_length(mask)
        mask, images = mask[order], [images[sample] for sample in order]
        tokens = self.patch_embed(images, mask)
        prefix = self._prefix()
        if self.pos_embed is not None:
            tokens = tokens + positions_at(
                mask.visible_ids, mask.num_visible, mask.grids, self._positions_on
            )
        if prefix is not None:
            tokens = interleave([prefix[0]] * mask.batch_size, mask.split_visible(tokens))
        lengths = [self.num_prefix_tokens + count for count in mask.num_visible]
        packing, tokens = pack(lengths, tokens.device), tokens.unsqueeze(0)
        for block in self.blocks:
            tokens = self._run(block, tokens, packing=packing)
        return reorder(self.norm(tokens)[0], lengths, inverse_order(order))

    def _positions_on(self, grid: Grid) -> Float[Tensor, "tokens dim"]:
        assert self.pos_embed is not None
        table = self.pos_embed[0, self._num_class_tokens :]
        if grid == self.grid:
            return table
        if self._learn_positions:
            return interpolate_positions(table, self.grid, grid)
        return sincos_positions(self.dim, grid, first_axis=self._first_axis).to(table)

    def _with_prefix_and_positions(self, tokens: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        prefix = self._prefix()
        if self.pos_embed is not None:
            positions = self.pos_embed[0, self._num_class_tokens :]
            if grid != self.grid:
                positions = interpolate_positions(positions, self.grid, grid)
            if mask is not None:
                positions = F.embedding(mask.visible_ids, positions)
            tokens = tokens + positions
        if prefix is None:
            return tokens
        return torch.cat([prefix.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _prefix(self) -> Float[Tensor, "1 prefix dim"] | None:
        """Return the class token, with its position, and the registers."""
        class_token: Tensor | None = self.cls_token
        if class_token is not None and self.pos_embed is not None:
            class_token = class_token + self.pos_embed[:, : self._num_class_tokens]
        tokens = [token for token in (class_token, self.reg_token) if token is not None]
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else next(iter(tokens), None)

    def group_matcher(self, coarse: bool = False) -> Matcher:
        """Return what assigns parameters to layers, from first to last, for layer decay.

        Args:
            coarse: Whether a stage of several blocks is one layer; a ViT's block is one anyway.

        Returns:
            Patterns of parameter names by group, as timm's `group_parameters` takes them.

        Example:
            >>> encoder = ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> sorted(encoder.group_matcher())
            ['blocks', 'stem']
        """
        matcher = super().group_matcher(coarse)
        if len(self.rel_pos_bias) == 1 and isinstance(matcher, dict):  # shared by all blocks
            return {**matcher, "stem": f"{self._first_layer}|rel_pos_bias"}
        return matcher

    @checked
    def pool(
        self,
        tokens: Float[Tensor, "batch prefix_and_tokens dim"] | Float[Tensor, "rows dim"],
        mask: RaggedMask | None = None,
    ) -> Float[Tensor, "_ dim"]:
        """Pool encoded tokens to one vector per sample, by the constructor's `pool`.

        Args:
            tokens: Encoded tokens, with their prefix tokens.
            mask: The mask, if it was a `RaggedMask`.

        Returns:
            One vector per sample.

        Raises:
            ValueError: If the tokens are packed and there is no mask, or the mask does not fit.
        """
        if (tokens.ndim == 2) != (mask is not None):
            raise ValueError(
                "packed tokens of a RaggedMask [rows, dim] are pooled with their mask, others "
                f"[batch, tokens, dim] without one; got tokens {list(tokens.shape)} and "
                + ("no mask" if mask is None else "a RaggedMask")
            )
        if mask is not None:
            samples = mask.split_visible(tokens, num_prefix=self.num_prefix_tokens)
            return torch.cat([self.pool(sample.unsqueeze(0)) for sample in samples])
        if self._pool == "token":
            pooled = tokens[:, 0]
        else:
            pooled = mean_of_tokens(tokens[:, self.num_prefix_tokens :])
        summary: Tensor = self.fc_norm(pooled)
        return summary


def insert_mask_tokens(
    tokens: Float[Tensor, "batch visible dim"] | Float[Tensor, "rows dim"],
    mask: Mask | RaggedMask | None,
    mask_token: Float[Tensor, "*masked dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """Restore grid order, with a mask token (or one per position) at masked positions.

    Raises:
        ValueError: If there is no mask.
    """
    if mask is None:
        raise ValueError("mask_token replaces masked patches: pass a mask with it")
    is_single = mask_token.numel() == mask_token.shape[-1]
    whole = restore(tokens, mask, mask_token.view(-1) if is_single else mask_token)
    return whole.unflatten(0, (mask.batch_size, -1)) if isinstance(mask, RaggedMask) else whole
