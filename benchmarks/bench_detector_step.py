"""A training step of ConvMAE-B's detection backbone: forward and backward, without the optimizer.

Axes: batch; channels; height, width; tokens; windows; heads.
"""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_convmae_step import (
    MIB,
    AuthorsConvBlock,
    AuthorsEmbed,
    _peak_bytes,
)
from benchmarks.harness import Bench, Variant
from mimkit.interop import from_official
from mimkit.nn import ConvViTDetector

WINDOW, GLOBAL_LAYERS = 16, (0, 3, 6, 10)
BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU


class AuthorsBias(nn.Module):
    """The authors' `RelativePositionBias`, with its index of tokens x tokens."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(
            0.02 * torch.randn((2 * side - 1) ** 2, heads)
        )
        axes = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        y, x = (axis.flatten()[:, None] - axis.flatten() + side - 1 for axis in axes)
        self.register_buffer("index", y * (2 * side - 1) + x, persistent=False)

    def forward(self) -> Tensor:
        """Gather the bias."""
        index: Tensor = self.index  # type: ignore[assignment]
        rows = self.relative_position_bias_table[index.view(-1)].view(*index.shape, -1)
        return rows.permute(2, 0, 1).contiguous()


class AuthorsBiasedBlock(nn.Module):
    """The authors' `Block`, with a relative position bias."""

    def __init__(self, dim: int, heads: int, is_fused: bool) -> None:
        super().__init__()
        self.heads, self.is_fused = heads, is_fused
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        layers = {"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.ModuleDict(layers)

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Apply the block: self-attention, then an MLP."""
        qkv = self.attn["qkv"](self.norm1(tokens))
        query, key, value = rearrange(qkv, "b n (t h d) -> t b h n d", t=3, h=self.heads)
        if self.is_fused:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        else:
            logits = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5 + bias
            mixed = logits.softmax(dim=-1) @ value
        tokens = tokens + self.attn["proj"](rearrange(mixed, "b h n d -> b n (h d)"))
        out: Tensor = tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))
        return out


class AuthorsDetector(nn.Module):
    """The authors' `ConvViTDet`, for any image size, with one bias for all blocks of a kind."""

    def __init__(self, image_size: int, is_fused: bool) -> None:
        super().__init__()
        dims, depths, heads, side = (256, 384, 768), (2, 2, 11), 12, image_size // 16
        self.patch_embed1 = AuthorsEmbed(3, dims[0], 4)
        self.patch_embed2 = AuthorsEmbed(dims[0], dims[1], 2)
        self.patch_embed3 = AuthorsEmbed(dims[1], dims[2], 2)
        self.patch_embed4 = nn.Linear(dims[2], dims[2])
        self.blocks1 = nn.ModuleList(AuthorsConvBlock(dims[0]) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(AuthorsConvBlock(dims[1]) for _ in range(depths[1]))
        self.blocks3 = nn.ModuleList(
            AuthorsBiasedBlock(dims[2], heads, is_fused) for _ in range(depths[2])
        )
        table = 0.02 * torch.randn(1, side**2, dims[2])
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.windowed_rel_pos_bias = AuthorsBias(WINDOW, heads)
        self.global_rel_pos_bias = AuthorsBias(side, heads)

    def forward(self, images: Tensor) -> Tensor:
        """Return the sum of the means of three squared maps, to have something to differentiate.

        The fourth is the third, max-pooled: rounding changes which token is the largest.
        """
        x, maps = images, []
        for embed, blocks in ((self.patch_embed1, self.blocks1), (self.patch_embed2, self.blocks2)):
            x = embed(x)
            for block in blocks:
                x = block(x, 1.0)
            maps.append(x)
        x = self.patch_embed3(x)
        side = x.shape[2]
        x = self.patch_embed4(x.flatten(2).permute(0, 2, 1)) + self.pos_embed
        biases = self.windowed_rel_pos_bias(), self.global_rel_pos_bias()
        sizes = {"y": side // WINDOW, "h": WINDOW, "w": WINDOW}
        for index, block in enumerate(self.blocks3):
            if index in GLOBAL_LAYERS:
                x = block(x, biases[1])
            else:
                x = rearrange(x, "b (y h x w) d -> (b y x) (h w) d", **sizes)
                x = rearrange(
                    block(x, biases[0]), "(b y x) (h w) d -> b (y h x w) d", x=sizes["y"], **sizes
                )
        last = rearrange(x, "b (h w) d -> b d h w", h=side)
        return _score([*maps, last])


def _score(maps: list[Tensor]) -> Tensor:
    return torch.stack([one.square().mean() for one in maps]).sum()


def _squeezed(output: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return output, *(gradient.squeeze() for gradient in gradients)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("image_size", [512, 1024])
def bench_detector_step(bench: Bench, image_size: int) -> None:
    """Time a step of the backbone on one image.

    On a CPU, 512 pixels only: the larger case has 16 times as many logits in its global blocks.
    """
    if image_size > 512 and bench.device.type == "cpu":
        bench.note([f"{image_size} pixels: skipped on a CPU"])
        return
    models = {
        f"authors, {name} attention": AuthorsDetector(image_size, is_fused).to(bench.device)
        for name, is_fused in (("plain", False), ("fused", True))
    }
    official = next(iter(models.values())).state_dict()
    model = ConvViTDetector(image_size=image_size).to(bench.device)
    model.load_state_dict(from_official("convmae_det", official))
    images = torch.randn(1, 3, image_size, image_size, device=bench.device)
    variants = []
    for name, baseline in models.items():
        baseline.load_state_dict(official)
        leaves = tuple(_trained(baseline).values())
        variants.append(
            Variant(name, baseline, (images,), leaves, view=_squeezed, is_baseline=True)
        )
    weights = dict(model.named_parameters())
    names = from_official("convmae_det", _trained(next(iter(models.values()))))
    leaves = tuple(weights[name] for name in names)
    ours = Variant(
        "mimkit", lambda pixels: _score(model.features(pixels)), (images,), leaves, view=_squeezed
    )
    variants.append(ours)
    case = f"ConvMAE-B detector, B=1, {image_size} pixels"
    bench.with_seconds(BUDGET * bench.seconds).compare(
        case,
        variants,
        dtype=torch.float32,
        tolerance=1e-4,
        passes=("both",),
        min_repeats=MIN_REPEATS,
    )
    for variant in variants:
        peak = _peak_bytes(variant, bench.device)
        bench.note(
            [f"peak memory of a step, {case}, {variant.name}: {peak / MIB:,.0f} MiB"],
            kind="peak memory", case=case, variant=variant.name, peak_bytes=peak,
        )  # fmt: skip
    buffers = {
        "authors": sum(buffer.nbytes for buffer in next(iter(models.values())).buffers()),
        "mimkit": sum(buffer.nbytes for buffer in model.buffers()),
    }
    for name, size in buffers.items():
        bench.note([f"buffers kept between steps, {case}, {name}: {size / MIB:,.2f} MiB"])
