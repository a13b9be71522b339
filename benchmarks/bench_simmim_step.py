"""A pre-training step of SimMIM, ViT-B/16 and Swin-T: forward and backward, without the optimizer.

The authors' models are reimplemented with the authors' parameter names. Other variants are the
authors' model with one of mimkit's parts, which shows how much each part saves.

Axes: batch; windows; heads; tokens; head_dim; dim; height, width.
"""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_mae_step import note_profile
from benchmarks.harness import STEP_BATCHES, Bench, Variant, has_fast_bfloat16
from mimkit import masking
from mimkit.interop import from_official
from mimkit.masking import Mask
from mimkit.nn import RelativePositionBias
from mimkit.nn._layers import attend
from recipes.simmim import SimMIM, SimMIMConfig

BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attend as the authors do: scale, multiply, add."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attend with PyTorch's fused operator."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))


class Mlp(nn.Sequential):
    """The authors' MLP."""

    def __init__(self, dim: int) -> None:
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        super().__init__(OrderedDict(layers))


class ViTAttention(nn.Module):
    """BEiT's attention: no key bias, a relative position bias."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Apply self-attention."""
        batch, length, dim = tokens.shape
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(tokens, self.qkv.weight, qkv_bias)
        qkv = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = self.attention(*qkv.unbind(0), bias.unsqueeze(0))
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, length, dim))
        return projected


class ViTBlock(nn.Module):
    """BEiT's block."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = ViTAttention(dim, heads, attention), Mlp(dim)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 0.1))
        self.gamma_2 = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Apply the block: self-attention, then an MLP."""
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens), bias)
        out: Tensor = tokens + self.gamma_2 * self.mlp(self.norm2(tokens))
        return out


class RelativeTable(nn.Module):
    """BEiT's relative position bias with a class token."""

    def __init__(self, grid: tuple[int, int], heads: int) -> None:
        super().__init__()
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        table = 0.02 * torch.randn(offsets + 3, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = RelativePositionBias(grid=grid, heads=heads, class_token=True).index
        self.register_buffer("index", index, persistent=False)

    def forward(self) -> Tensor:
        """Return the bias."""
        index: Tensor = self.index  # type: ignore[assignment]
        bias = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
        return bias.permute(2, 0, 1).contiguous()


class ViTEncoder(nn.Module):
    """SimMIM's ViT."""

    def __init__(self, config: SimMIMConfig, attention: Attention) -> None:
        super().__init__()
        dim, side = config.dim, config.image_size // config.patch_size
        conv = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.rel_pos_bias = RelativeTable((side, side), config.heads)
        self.blocks = nn.ModuleList(
            ViTBlock(dim, config.heads, attention) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Return the feature map."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2)
        hidden = is_masked.flatten(1).unsqueeze(2).type_as(tokens)
        tokens = tokens * (1 - hidden) + self.mask_token.expand_as(tokens) * hidden
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        bias = self.rel_pos_bias()
        for block in self.blocks:
            tokens = block(tokens, bias)
        tokens = self.norm(tokens)[:, 1:]
        side = is_masked.shape[1]
        return tokens.permute(0, 2, 1).reshape(len(tokens), -1, side, side)


class SwinAttention(nn.Module):
    """Swin's window attention."""

    def __init__(self, dim: int, heads: int, window: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        table = 0.02 * torch.randn((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        index = RelativePositionBias(grid=(window, window), heads=heads).index
        self.register_buffer("index", index, persistent=False)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """Attend inside each window."""
        count, inside, dim = windows.shape
        qkv = self.qkv(windows).reshape(count, inside, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        index: Tensor = self.index  # type: ignore[assignment]
        bias = self.relative_position_bias_table[index.view(-1)].view(inside, inside, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            bias = (bias + mask.unsqueeze(1)).repeat(count // len(mask), 1, 1, 1)
        mixed = self.attention(*qkv.unbind(0), bias)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(count, inside, dim))
        return projected


class SwinBlock(nn.Module):
    """Swin's block: roll, partition into windows, attend, reverse both."""

    def __init__(
        self, side: int, dim: int, heads: int, window: int, shift: int, attention: Attention
    ) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = SwinAttention(dim, heads, window, attention), Mlp(dim)
        region = torch.zeros(1, side, side, 1)
        for number, (rows, columns) in enumerate(
            (r, c)
            for r in (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for c in (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        ):
            region[:, rows, columns] = number
        regions = self.partition(region).squeeze(-1)
        differs = (regions.unsqueeze(1) - regions.unsqueeze(2)) != 0
        self.register_buffer("mask", differs * -100.0 if shift else None, persistent=False)

    def partition(self, maps: Tensor) -> Tensor:
        """Partition maps [batch, height, width, dim] into windows."""
        batch, height, width, dim = maps.shape
        w = self.window
        cells = maps.view(batch, height // w, w, width // w, w, dim)
        return cells.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, w * w, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the block: window attention, then an MLP."""
        batch, length, dim = tokens.shape
        side, w, shift = self.side, self.window, self.shift
        maps = self.norm1(tokens).view(batch, side, side, dim)
        if shift:
            maps = maps.roll((-shift, -shift), (1, 2))
        windows = self.attn(self.partition(maps), self.mask)
        cells = windows.view(batch, side // w, side // w, w, w, dim).permute(0, 1, 3, 2, 4, 5)
        maps = cells.contiguous().view(batch, side, side, dim)
        if shift:
            maps = maps.roll((shift, shift), (1, 2))
        tokens = tokens + maps.view(batch, length, dim)
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class SwinMerging(nn.Module):
    """Swin's patch merging."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.side = side
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Merge 2x2 tokens to one."""
        maps = tokens.view(len(tokens), self.side, self.side, -1)
        quads = [maps[:, i::2, j::2] for j in range(2) for i in range(2)]
        merged: Tensor = self.reduction(self.norm(torch.cat(quads, -1).flatten(1, 2)))
        return merged


class SwinStage(nn.Module):
    """Blocks, then patch merging."""

    def __init__(self, side: int, dim: int, depth: int, heads: int, window: int, **rest: bool):
        super().__init__()
        attention: Attention = rest.pop("attention")  # type: ignore[assignment]
        whole = side <= window
        window, shift = (side, 0) if whole else (window, window // 2)
        self.blocks = nn.Sequential(
            *(
                SwinBlock(side, dim, heads, window, shift if i % 2 else 0, attention)
                for i in range(depth)
            )
        )
        self.downsample = SwinMerging(side, dim) if rest["merge"] else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply blocks and patch merging."""
        merged: Tensor = self.downsample(self.blocks(tokens))
        return merged


class SwinEncoder(nn.Module):
    """SimMIM's Swin."""

    def __init__(self, config: SimMIMConfig, attention: Attention) -> None:
        super().__init__()
        dim, side = config.dim, config.image_size // config.patch_size
        conv = nn.Conv2d(3, dim, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))
        self.patch_embed.norm = nn.LayerNorm(dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        last = len(config.depth) - 1
        self.layers = nn.Sequential(
            *(
                SwinStage(
                    side // 2**i,
                    dim * 2**i,
                    depth,
                    config.heads[i],
                    config.window,
                    attention=attention,
                    merge=i < last,
                )
                for i, depth in enumerate(config.depth)
            )
        )
        self.norm = nn.LayerNorm(dim * 2**last)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Return the feature map."""
        embed = self.patch_embed
        tokens = embed.norm(embed.proj(images).flatten(2).transpose(1, 2))
        hidden = is_masked.flatten(1).unsqueeze(2).type_as(tokens)
        tokens = tokens * (1 - hidden) + self.mask_token.expand_as(tokens) * hidden
        tokens = self.norm(self.layers(tokens)).transpose(1, 2)
        side = int(tokens.shape[2] ** 0.5)
        return tokens.reshape(len(tokens), -1, side, side)


class AuthorsSimMIM(nn.Module):
    """The authors' model: embeds all patches, predicts the whole image, then masks the loss.

    With `masked_only`, predicts masked patches only.
    """

    def __init__(
        self, config: SimMIMConfig, attention: Attention, *, masked_only: bool = False
    ) -> None:
        super().__init__()
        self.masked_only = masked_only
        swin = config.encoder == "swin"
        self.encoder = (SwinEncoder if swin else ViTEncoder)(config, attention)
        self.patch_size = config.patch_size
        merged = 2 ** (len(config.depth) - 1) if swin else 1
        stride, dim = config.patch_size * merged, config.dim * merged
        conv = nn.Conv2d(dim, stride**2 * 3, kernel_size=1)
        self.decoder = nn.Sequential(conv, nn.PixelShuffle(stride))

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Return the loss."""
        if self.masked_only:
            return self._masked_loss(images, is_masked)
        reconstruction = self.decoder(self.encoder(images, is_masked))
        hidden = is_masked.repeat_interleave(self.patch_size, 1)
        hidden = hidden.repeat_interleave(self.patch_size, 2).unsqueeze(1).contiguous()
        errors = F.l1_loss(images, reconstruction, reduction="none")
        loss: Tensor = (errors * hidden).sum() / (hidden.sum() + 1e-5) / 3
        return loss

    def _masked_loss(self, images: Tensor, is_masked: Tensor) -> Tensor:
        rows = is_masked.flatten(1).bool()
        tokens = self.encoder(images, is_masked).flatten(2).transpose(1, 2)[rows]
        conv = self.decoder[0]
        predicted = F.linear(tokens, conv.weight.flatten(1), conv.bias)
        pixels = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)[rows]
        return F.l1_loss(predicted, pixels)


def _case(
    bench: Bench, encoder: str, dtype: torch.dtype, batch: int
) -> tuple[str, SimMIMConfig, int, int]:
    """Return name, model, batch size and unit; small where a bfloat16 step would take minutes."""
    small = dtype == torch.bfloat16 and not has_fast_bfloat16(bench.device)
    if small:
        bench.note(["bfloat16 has no fast matrix products on this CPU: a small model is timed"])
    batch = 1 if small else batch
    if encoder == "vit":
        config = SimMIMConfig(image_size=224, depth=2 if small else 12)
        return f"ViT-B/16, 224 px, depth {config.depth}, B={batch}", config, batch, 2
    config = SimMIMConfig(
        image_size=192,
        encoder="swin",
        dim=96,
        depth=(2, 2) if small else (2, 2, 6, 2),
        heads=(3, 6) if small else (3, 6, 12, 24),
    )
    return f"Swin-T, 192 px, depth {config.depth}, B={batch}", config, batch, 8


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("encoder", ["vit", "swin"])
@pytest.mark.parametrize("batch", STEP_BATCHES)
def bench_simmim_step(
    bench: Bench, encoder: str, dtype: torch.dtype, compiled: bool, batch: int
) -> None:
    case, config, batch, unit = _case(bench, encoder, dtype, batch)
    model = SimMIM(config).to(bench.device)
    side = config.image_size // config.patch_size
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    mask = masking.uniform(key, (side, side), 0.6, unit=unit, rounding="simmim")
    images = torch.randn(batch, 3, config.image_size, config.image_size, device=bench.device)
    images += 8  # far from the first predictions, where L1 has no kink
    is_masked = mask.is_masked.float()

    def flat(output: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Flatten the decoder's weight, which is a 1x1 convolution in the authors' model."""
        return output, *(g.flatten(1) if g.shape[2:] == (1, 1) else g for g in gradients)

    def authors(
        name: str, attention: Attention, *, masked_only: bool = False, is_baseline: bool = True
    ) -> tuple[AuthorsSimMIM, Variant]:
        theirs = AuthorsSimMIM(config, attention, masked_only=masked_only).to(bench.device)
        if weights:
            theirs.load_state_dict(weights)

        def step(images: Tensor, is_masked: Tensor) -> Tensor:
            with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
                loss: Tensor = theirs(images, is_masked)
            return loss

        leaves = tuple(theirs.parameters())
        inputs = (images, is_masked)
        return theirs, Variant(name, step, inputs, leaves, view=flat, is_baseline=is_baseline)

    weights: dict[str, Tensor] = {}
    theirs, plain = authors("authors, plain attention", plain_attention)
    weights |= theirs.state_dict()
    _, fused = authors("authors, scaled_dot_product_attention", fused_attention)
    parts = {"mimkit's attention": {"attention": attend}}
    if encoder == "vit":  # a token of Swin covers many patches
        parts["head of masked tokens"] = {"attention": plain_attention, "masked_only": True}
    mixed = {
        part: authors(f"authors, {part}", **changes, is_baseline=False)[1]
        for part, changes in parts.items()
    }
    method = f"simmim_{encoder}"
    model.load_state_dict(from_official(method, weights))
    named = dict(model.named_parameters())
    leaves = tuple(named[name] for name in from_official(method, dict(theirs.named_parameters())))

    def step(images: Tensor, mask: Mask) -> Tensor:
        with torch.autocast(bench.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(images, mask).loss
        return loss

    ours = Variant("mimkit", step, (images, mask), leaves)
    # Boolean indexing has a data-dependent shape, so it does not compile into one graph.
    variants = [plain, fused, ours] if compiled else [plain, fused, *mixed.values(), ours]
    if compiled:
        variants = [variant.compiled() for variant in variants]
    bench.with_seconds(BUDGET * bench.seconds).compare(
        case,
        variants,
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        passes=("both",),
        graphs=True,
        min_repeats=MIN_REPEATS,
    )
    for variant in [] if compiled else [plain, fused, ours]:
        note_profile(bench, case, dtype, variant)
    if not compiled and bench.only is None:
        _note_gains(bench, case, dtype, {**mixed, "all of mimkit": ours})


def _note_gains(bench: Bench, case: str, dtype: torch.dtype, parts: dict[str, Variant]) -> None:
    """Print the time that each part saves, relative to the authors' model with plain attention."""
    name = str(dtype).removeprefix("torch.")
    rows = [row for row in bench.report.rows if (row.bench, row.case) == (bench.name, case)]
    fastest = {row.variant: row.min_ms for row in rows if row.dtype == name}
    theirs = fastest["authors, plain attention"]
    gains = {part: 1 - fastest[variant.name] / theirs for part, variant in parts.items()}
    summary = ", ".join(f"{part} {gain:+.1%}" for part, gain in gains.items())
    bench.note(
        [f"time saved of the authors' step with plain attention, {case}, {name}: {summary}"],
        kind="gains",
        case=case,
        dtype=name,
        saved=gains,
    )
