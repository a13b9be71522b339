"""A whole pre-training step of CAE ViT-B/16: forward and backward; no optimizer.

Axes: batch; tokens; visible; masked; dim.
"""

import copy
import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Bench, Variant, has_fast_bfloat16
from mimkit import masking
from mimkit.interop import to_official
from mimkit.masking import Mask
from recipes.cae import CAE, CAEConfig

BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attend as the authors would today."""
    query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class AuthorsAttention(nn.Module):
    """BEiT's attention: one projection, biases of queries and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        projected = F.linear(x, self.qkv.weight, bias).chunk(3, dim=2)
        out: Tensor = self.proj(attend(*projected, self.heads))
        return out


class AuthorsCrossAttention(nn.Module):
    """The regressor's attention: three projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Answer queries."""
        query = F.linear(query, self.q.weight, self.q_bias)
        value = F.linear(value, self.v.weight, self.v_bias)
        out: Tensor = self.proj(attend(query, self.k(key), value, self.heads))
        return out


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class AuthorsMlp(nn.Module):
    """Two layers around a GELU."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, int(ratio * dim)), nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class AuthorsBlock(nn.Module):
    """Block with layer scale."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.mlp = AuthorsAttention(dim, heads), AuthorsMlp(dim, ratio)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then transform each."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class AuthorsRegressorBlock(nn.Module):
    """Block of the regressor."""

    def __init__(self, dim: int, heads: int, ratio: float) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (norm(dim) for _ in range(3))
        self.norm2_cross = norm(dim)
        self.cross_attn, self.mlp_cross = AuthorsCrossAttention(dim, heads), AuthorsMlp(dim, ratio)
        self.gamma_1_cross, self.gamma_2_cross = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, q: Tensor, kv: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        """Bring the queries one step on."""
        mixed = self.cross_attn(self.norm1_q(q + pos_q), self.norm1_k(kv + pos_k), self.norm1_v(kv))
        q = self.norm2_cross(q + self.gamma_1_cross * mixed)
        return q + self.gamma_2_cross * self.mlp_cross(q)


class AuthorsEncoder(nn.Module):
    """Embeds all patches, then takes the seen ones by a boolean mask."""

    def __init__(self, config: CAEConfig, grid: tuple[int, ...]) -> None:
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        length = 1 + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, length, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            AuthorsBlock(dim, config.heads, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = norm(dim)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Encode what is not masked."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        batch, _, dim = x.shape
        x = x[~is_masked].reshape(batch, -1, dim)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        table = self.pos_embed.expand(batch, -1, -1)
        seen = table[:, 1:][~is_masked].reshape(batch, -1, dim)
        x = x + torch.cat([table[:, :1], seen], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class AuthorsCAE(nn.Module):
    """The authors' model: a second encoder for the target, boolean gathers, all logits."""

    def __init__(self, config: CAEConfig, grid: tuple[int, ...]) -> None:
        super().__init__()
        width, heads, ratio = config.decoder_dim, config.decoder_heads, config.mlp_ratio
        self.weight = config.alignment_weight
        self.encoder = AuthorsEncoder(config, grid)
        self.alignment_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        length = 1 + grid[0] * grid[1]
        self.rd_pos_embed = nn.Parameter(torch.zeros(1, length, width), requires_grad=False)
        self.regresser = nn.Module()
        self.regresser.regressor_blocks = nn.ModuleList(
            AuthorsRegressorBlock(width, heads, ratio) for _ in range(config.regressor_depth)
        )
        self.regresser.norm = norm(width)
        self.decoder = nn.Module()
        self.decoder.decoder_blocks = nn.ModuleList(
            AuthorsBlock(width, heads, ratio) for _ in range(config.decoder_depth)
        )
        self.decoder.norm = norm(width)
        self.decoder.head = nn.Linear(width, config.vocabulary_size)

    def forward(self, images: Tensor, is_masked: Tensor, token_ids: Tensor) -> Tensor:
        """Return the loss."""
        visible = self.encoder(images, is_masked)[:, 1:]
        with torch.no_grad():
            target = self.alignment_encoder(images, ~is_masked)[:, 1:]
        batch, _, dim = visible.shape
        table = self.rd_pos_embed[:, 1:].expand(batch, -1, -1)
        pos_masked = table[is_masked].reshape(batch, -1, dim)
        pos_visible = table[~is_masked].reshape(batch, -1, dim)
        q = self.mask_token.expand(batch, pos_masked.shape[1], -1)
        pos_k = torch.cat([pos_visible, pos_masked], dim=1)
        for block in self.regresser.regressor_blocks:
            q = block(q, torch.cat([visible, q], dim=1), pos_masked, pos_k)
        q = self.regresser.norm(q)
        x = q + pos_masked
        for block in self.decoder.decoder_blocks:
            x = block(x)
        logits = self.decoder.head(self.decoder.norm(x)).flatten(0, 1)
        main = F.cross_entropy(logits.float(), token_ids[is_masked])
        return main + self.weight * F.mse_loss(q.float(), target.float())


class OnePassCAE(CAE):
    """One encoder pass over [visible] and [masked] batched together, where both are as many."""

    def forward(self, images: Tensor, mask: Mask, token_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss."""
        both = self.encoder(images.repeat(2, 1, 1, 1), Mask.cat([mask, mask.complement()]))
        visible, target = both[:, 1:].chunk(2)
        positions = self._positions(mask.masked_ids)
        queries = self.mask_token.expand(len(images), mask.num_masked, -1)
        predicted = self.regressor(queries, visible, positions, self._positions(mask.visible_ids))
        main = self.head(self.decoder(predicted, positions), token_ids.gather(1, mask.masked_ids))
        return main + self.config.alignment_weight * F.mse_loss(predicted, target.detach())


def case(device: torch.device, dtype: torch.dtype) -> tuple[str, CAEConfig, int]:
    """Return name, model and batch: a small one where bfloat16 would take minutes a step."""
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        small = CAEConfig(image_size=224, depth=2, regressor_depth=1, decoder_depth=1)
        return "width of CAE-B, depth 2 + 1 + 1, B=1", small, 1
    batch = 64 if device.type == "cuda" else 8
    return f"CAE-B, B={batch}", CAEConfig(image_size=224), batch


def make_variants(config: CAEConfig, batch: int, device: torch.device) -> dict[str, Variant]:
    """Make all models with the same weights, and the inputs of one step."""
    torch.manual_seed(0)
    model = CAE(config).to(device)
    one_pass = OnePassCAE(config).to(device)
    one_pass.load_state_dict(model.state_dict())
    authors = AuthorsCAE(config, model.encoder.grid).to(device)
    authors.load_state_dict(to_official("cae", model.state_dict(), duplicates=True))
    images = torch.randn(batch, config.in_channels, 224, 224, device=device)
    key = masking.key(torch.arange(batch, device=device), seed=0)
    mask = masking.blockwise(key, model.encoder.grid, 0.5)
    ids = torch.randint(config.vocabulary_size, (batch, mask.num_tokens), device=device)
    # Softmax does not see the bias of the keys' norm: its gradient is rounding alone.
    names = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and not name.endswith("norm_k.bias")
    ]
    theirs = dict(authors.named_parameters())
    official = to_official("cae", dict.fromkeys(names, torch.empty(0)))
    order = [theirs[name] for name in official]

    def ours(images: Tensor, mask: Mask, ids: Tensor) -> Tensor:
        loss: Tensor = model(images, mask, ids).loss
        return loss

    def leaves(module: nn.Module) -> tuple[Tensor, ...]:
        weights = dict(module.named_parameters())
        return tuple(weights[name] for name in names)

    is_masked = mask.is_masked.flatten(1)
    return {
        "authors": Variant(
            "authors, fused attention",
            authors,
            (images, is_masked, ids),
            tuple(order),
            is_baseline=True,
        ),
        "mimkit": Variant("mimkit", ours, (images, mask, ids), leaves(model)),
        "one pass": Variant(
            "mimkit, one encoder pass", one_pass, (images, mask, ids), leaves(one_pass)
        ),
    }


def under_autocast(variant: Variant, dtype: torch.dtype, device: torch.device) -> Variant:
    """Run a variant in another type."""

    def function(*inputs: object) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = variant.function(*inputs)
        return loss

    return Variant(
        variant.name, function, variant.inputs, variant.leaves, is_baseline=variant.is_baseline
    )


def peak_memory(kind: str, device: torch.device) -> float:
    """Return the MB that a process of its own at most holds: one model and one float32 step."""
    code = f"from benchmarks import bench_cae_step as b; b.print_peak({kind!r}, {device.type!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(run.stdout)


def print_peak(kind: str, device_type: str) -> None:
    """Make a model and one step, and print the MB of this process."""
    device = torch.device(device_type)
    _, config, batch = case(device, torch.float32)
    grid = (14, 14)
    images = torch.randn(batch, config.in_channels, 224, 224, device=device)
    key = masking.key(torch.arange(batch, device=device), seed=0)
    mask = masking.blockwise(key, grid, 0.5)
    ids = torch.randint(config.vocabulary_size, (batch, mask.num_tokens), device=device)
    if kind == "authors":
        AuthorsCAE(config, grid).to(device)(images, mask.is_masked.flatten(1), ids).backward()
    else:
        CAE(config).to(device)(images, mask, ids).loss.backward()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_cae_step(bench: Bench, dtype: torch.dtype) -> None:
    name, config, batch = case(bench.device, dtype)
    variants = make_variants(config, batch, bench.device)
    bench.with_seconds(BUDGET * bench.seconds).compare(
        name,
        [under_autocast(variant, dtype, bench.device) for variant in variants.values()],
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        passes=("both",),
        min_repeats=MIN_REPEATS,
    )
    if dtype == torch.float32:
        del variants
        theirs, ours = (peak_memory(kind, bench.device) for kind in ("authors", "mimkit"))
        bench.note(
            [
                f"peak memory of a process, model and one step: authors {theirs:,.0f} MB, "
                f"mimkit {ours:,.0f} MB"
            ],
            kind="memory",
            case=name,
            authors_mb=theirs,
            mimkit_mb=ours,
        )
