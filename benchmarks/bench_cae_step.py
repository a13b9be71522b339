"""A pre-training step of CAE ViT-B/16: forward and backward, without the optimizer.

Axes: batch; tokens; visible; masked; dim.
"""

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_mae_step import Attention, fused_attention, note_profile, plain_attention
from benchmarks.harness import STEP_BATCHES, Bench, Variant, has_fast_bfloat16
from mimkit import masking
from mimkit.interop import to_official
from mimkit.masking import Mask
from mimkit.nn import ContextRegressor, PatchEmbed, TokenHead
from recipes.cae import CAE, CAEConfig

BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU


def attend(attention: Attention, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Apply multi-head attention."""
    parts = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return attention(*parts).transpose(1, 2).flatten(2)


class AuthorsAttention(nn.Module):
    """BEiT's attention: one fused projection, biases of queries and values."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply self-attention."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        projected = F.linear(x, self.qkv.weight, bias).chunk(3, dim=2)
        out: Tensor = self.proj(attend(self.attention, *projected, self.heads))
        return out


class AuthorsCrossAttention(nn.Module):
    """The regressor's cross-attention: three projections."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Apply cross-attention."""
        query = F.linear(query, self.q.weight, self.q_bias)
        value = F.linear(value, self.v.weight, self.v_bias)
        out: Tensor = self.proj(attend(self.attention, query, self.k(key), value, self.heads))
        return out


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class AuthorsMlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, int(ratio * dim)), nn.Linear(int(ratio * dim), dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class AuthorsBlock(nn.Module):
    """Block with layer scale."""

    def __init__(self, dim: int, heads: int, ratio: float, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.mlp = AuthorsAttention(dim, heads, attention), AuthorsMlp(dim, ratio)
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block: self-attention, then an MLP."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class AuthorsRegressorBlock(nn.Module):
    """Block of the regressor."""

    def __init__(self, dim: int, heads: int, ratio: float, attention: Attention) -> None:
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (norm(dim) for _ in range(3))
        self.norm2_cross = norm(dim)
        self.cross_attn = AuthorsCrossAttention(dim, heads, attention)
        self.mlp_cross = AuthorsMlp(dim, ratio)
        self.gamma_1_cross, self.gamma_2_cross = (nn.Parameter(torch.ones(dim)) for _ in range(2))

    def forward(self, q: Tensor, kv: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        """Apply the block: cross-attention, then an MLP."""
        mixed = self.cross_attn(self.norm1_q(q + pos_q), self.norm1_k(kv + pos_k), self.norm1_v(kv))
        q = self.norm2_cross(q + self.gamma_1_cross * mixed)
        return q + self.gamma_2_cross * self.mlp_cross(q)


class AuthorsEncoder(nn.Module):
    """Embeds all patches, then selects the visible ones by a boolean mask."""

    def __init__(self, config: CAEConfig, grid: tuple[int, ...], attention: Attention) -> None:
        super().__init__()
        dim, patch = config.dim, config.patch_size
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(config.in_channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        length = 1 + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, length, dim), requires_grad=False)
        self.blocks = nn.ModuleList(
            AuthorsBlock(dim, config.heads, config.mlp_ratio, attention)
            for _ in range(config.depth)
        )
        self.norm = norm(dim)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Encode the visible patches."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        batch, _, dim = x.shape
        x = x[~is_masked].reshape(batch, -1, dim)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1)
        table = self.pos_embed.expand(batch, -1, -1)
        visible = table[:, 1:][~is_masked].reshape(batch, -1, dim)
        x = x + torch.cat([table[:, :1], visible], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out


class AuthorsCAE(nn.Module):
    """The authors' model: a second encoder for the target, boolean gathers, all logits."""

    def __init__(self, config: CAEConfig, grid: tuple[int, ...], attention: Attention) -> None:
        super().__init__()
        width, heads, ratio = config.decoder_dim, config.decoder_heads, config.mlp_ratio
        self.weight = config.alignment_weight
        self.encoder = AuthorsEncoder(config, grid, attention)
        self.alignment_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        length = 1 + grid[0] * grid[1]
        self.rd_pos_embed = nn.Parameter(torch.zeros(1, length, width), requires_grad=False)
        self.regresser = nn.Module()
        self.regresser.regressor_blocks = nn.ModuleList(
            AuthorsRegressorBlock(width, heads, ratio, attention)
            for _ in range(config.regressor_depth)
        )
        self.regresser.norm = norm(width)
        self.decoder = nn.Module()
        self.decoder.decoder_blocks = nn.ModuleList(
            AuthorsBlock(width, heads, ratio, attention) for _ in range(config.decoder_depth)
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


class AllPatches(PatchEmbed):
    """Embeds all patches, then selects the visible ones by a boolean mask."""

    def forward(self, images: Tensor, mask: Mask | None = None) -> Tensor:
        """Embed the visible patches."""
        assert mask is not None
        tokens = super().forward(images)
        return tokens[~mask.is_masked.flatten(1)].view(len(images), mask.num_visible, -1)


class AllLogits(TokenHead):
    """Keeps all logits for the backward pass."""

    def forward(  # type: ignore[override]
        self, x: Tensor, target: Tensor, *, return_accuracy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy."""
        logits = F.linear(x, self.weight, self.bias).flatten(0, 1)
        loss = F.cross_entropy(logits.float(), target.flatten())
        return loss, (logits.argmax(dim=1) == target.flatten()).float().mean()


def from_every_query(
    regressor: ContextRegressor, mask_token: Tensor, visible: Tensor, positions: Tensor, mask: Mask
) -> Tensor:
    """Predict latents with a query, a key and a value for every masked patch of every image."""
    queries = mask_token.expand(len(visible), mask.num_masked, -1)
    at_queries, at_visible = positions[mask.masked_ids], positions[mask.visible_ids]
    predicted: Tensor = regressor(queries, visible, at_queries, at_visible)
    return predicted


class SecondEncoder(CAE):
    """Computes the alignment target with a copy of the encoder."""

    def __init__(self, config: CAEConfig) -> None:
        super().__init__(config)
        self.copy = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def _alignment_target(self, images: Tensor, mask: Mask) -> Tensor:
        target: Tensor = self.copy(images, mask.complement())[:, 1:]
        return target


def with_all_patches(config: CAEConfig) -> CAE:
    """Make a CAE that embeds all patches."""
    model = CAE(config)
    embed = model.encoder.patch_embed
    model.encoder.patch_embed = AllPatches(
        patch_size=embed.patch_size, in_channels=config.in_channels, dim=config.dim
    )
    return model


def with_all_logits(config: CAEConfig) -> CAE:
    """Make a CAE that keeps all logits."""
    model = CAE(config)
    model.head = AllLogits(dim=config.decoder_dim, vocabulary_size=config.vocabulary_size)
    return model


def with_every_query(config: CAEConfig) -> CAE:
    """Make a CAE whose regressor starts from one query per masked patch."""
    model = CAE(config)
    regressor = model.regressor
    regressor.from_mask_token = partial(from_every_query, regressor)  # type: ignore[method-assign]
    return model


# mimkit with one of its optimizations undone; the difference in time is what it saves.
ABLATIONS = {
    "all patches embedded": with_all_patches,
    "all logits": with_all_logits,
    "every query": with_every_query,
    "second encoder": SecondEncoder,
}


class OnePassCAE(CAE):
    """One encoder pass over visible and masked patches in one batch; needs equal counts of both."""

    def forward(self, images: Tensor, mask: Mask, token_ids: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss."""
        both = self.encoder(images.repeat(2, 1, 1, 1), Mask.cat([mask, mask.complement()]))
        visible, target = both[:, 1:].chunk(2)
        positions = self.pos_embed[0, 1:]
        predicted = self.regressor.from_mask_token(self.mask_token[0, 0], visible, positions, mask)
        tokens = self.decoder(predicted, positions[mask.masked_ids])
        main = self.head(tokens, token_ids.gather(1, mask.masked_ids))
        return main + self.config.alignment_weight * F.mse_loss(predicted, target.detach())


def case(device: torch.device, dtype: torch.dtype, batch: int) -> tuple[str, CAEConfig, int]:
    """Return name, model and batch size; a small case where a bfloat16 step would take minutes."""
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device):
        small = CAEConfig(image_size=224, depth=2, regressor_depth=1, decoder_depth=1)
        return "width of CAE-B, depth 2 + 1 + 1, B=1", small, 1
    return f"CAE-B, B={batch}", CAEConfig(image_size=224), batch


def make_variants(
    config: CAEConfig, batch: int, device: torch.device, dtype: torch.dtype
) -> list[Variant]:
    """Make the variants: all models with the same weights, and the inputs of a step."""
    torch.manual_seed(0)
    model = CAE(config).to(device)
    one_pass = OnePassCAE(config).to(device)
    one_pass.load_state_dict(model.state_dict())
    official = to_official("cae", model.state_dict(), duplicates=True)
    images = torch.randn(batch, config.in_channels, 224, 224, device=device)
    key = masking.key(torch.arange(batch, device=device), seed=0)
    mask = masking.blockwise(key, model.encoder.grid, 0.5)
    ids = torch.randint(config.vocabulary_size, (batch, mask.num_tokens), device=device)
    # Softmax cancels the bias of the keys' norm, so its gradient is rounding only.
    names = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and not name.endswith("norm_k.bias")
    ]
    their_names = to_official("cae", dict.fromkeys(names, torch.empty(0)))

    def leaves(module: nn.Module, names: Iterable[str] = names) -> tuple[Tensor, ...]:
        weights = dict(module.named_parameters())
        return tuple(weights[name] for name in names)

    def authors(attention: Attention) -> Variant:
        theirs = AuthorsCAE(config, model.encoder.grid, attention).to(device)
        theirs.load_state_dict(official)
        return Variant(
            f"authors, {attention.__name__.replace('_', ' ')}",
            theirs,
            (images, mask.is_masked.flatten(1), ids),
            leaves(theirs, their_names),
            is_baseline=True,
        )

    # In bfloat16 on a CPU, PyTorch's fused attention is slower than plain products and less exact:
    # gradients of query biases are 5 % off float32, against 1 % (`bench_attention`).
    has_fused = dtype == torch.float32 or device.type != "cpu"
    forms = [plain_attention, fused_attention] if has_fused else [plain_attention]
    inputs = (images, mask, ids)
    variants = [
        *(authors(attention) for attention in forms),
        Variant("mimkit", loss_of(model), inputs, leaves(model)),
        Variant("mimkit, one encoder pass", one_pass, inputs, leaves(one_pass)),
    ]
    for name, build in ABLATIONS.items():
        changed = build(config).to(device)
        state = model.state_dict()
        changed.load_state_dict(
            {name: state[name.replace("copy.", "encoder.", 1)] for name in changed.state_dict()}
        )
        variants.append(Variant(f"mimkit, {name}", loss_of(changed), inputs, leaves(changed)))
    return variants


def loss_of(model: CAE) -> Callable[[Tensor, Mask, Tensor], Tensor]:
    """Return a function that computes the model's loss."""

    def loss(images: Tensor, mask: Mask, ids: Tensor) -> Tensor:
        total: Tensor = model(images, mask, ids).loss
        return total

    return loss


def under_autocast(variant: Variant, dtype: torch.dtype, device: torch.device) -> Variant:
    """Run a variant under autocast to `dtype`; float32 runs without autocast."""

    def function(*inputs: object) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = variant.function(*inputs)
        return loss

    return Variant(
        variant.name, function, variant.inputs, variant.leaves, is_baseline=variant.is_baseline
    )


def peak_memory(kind: str, device: torch.device) -> float:
    """Return the peak memory in MB of a new process that builds a model and runs a float32 step."""
    code = f"from benchmarks import bench_cae_step as b; b.print_peak({kind!r}, {device.type!r})"
    # Return freed tensors above 128 KiB to the system: what malloc keeps varies by 100 MB.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(run.stdout)


def print_peak(kind: str, device_type: str) -> None:
    """Build a model, run a step, and print the peak memory of this process in MB."""
    device = torch.device(device_type)
    _, config, batch = case(device, torch.float32, STEP_BATCHES[0])
    grid = (14, 14)
    images = torch.randn(batch, config.in_channels, 224, 224, device=device)
    key = masking.key(torch.arange(batch, device=device), seed=0)
    mask = masking.blockwise(key, grid, 0.5)
    ids = torch.randint(config.vocabulary_size, (batch, mask.num_tokens), device=device)
    if kind == "authors":
        AuthorsCAE(config, grid, fused_attention).to(device)(
            images, mask.is_masked.flatten(1), ids
        ).backward()
    else:
        ABLATIONS.get(kind, CAE)(config).to(device)(images, mask, ids).loss.backward()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        # getrusage would include the peak of the parent process.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6)  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", STEP_BATCHES)
def bench_cae_step(bench: Bench, dtype: torch.dtype, batch: int) -> None:
    name, config, batch = case(bench.device, dtype, batch)
    variants = [
        under_autocast(variant, dtype, bench.device)
        for variant in make_variants(config, batch, bench.device, dtype)
    ]
    # The authors' code indexes with booleans, which makes no single graph.
    timed = [v for v in variants if v.is_baseline or v.name == "mimkit"]
    variants += [variant.compiled(fullgraph=not variant.is_baseline) for variant in timed]
    bench.with_seconds(BUDGET * bench.seconds).compare(
        name,
        variants,
        dtype=dtype,
        tolerance=1e-4 if dtype == torch.float32 else 5e-2,
        passes=("both",),
        graphs=True,
        min_repeats=MIN_REPEATS,
    )
    for variant in timed:
        note_profile(bench, name, dtype, variant)
    if dtype == torch.float32 and bench.only is None and batch == STEP_BATCHES[0]:
        del variants
        note_gains(bench, name)


def note_gains(bench: Bench, name: str) -> None:
    """Print how much time and memory each optimization saves."""
    times = {row.variant: row.min_ms for row in bench.report.rows if row.case == name}
    megabytes = {
        kind: peak_memory(kind, bench.device) for kind in ("authors", "mimkit", *ABLATIONS)
    }
    ours, theirs = megabytes["mimkit"], megabytes["authors"]
    lines = [
        f"peak memory of a process, model and one step: authors {theirs:,.0f} MB, "
        f"mimkit {ours:,.0f} MB",
        *(
            f"without '{kind}', mimkit saves {times[f'mimkit, {kind}'] - times['mimkit']:,.0f} ms "
            f"and {megabytes[kind] - ours:,.0f} MB"
            for kind in ABLATIONS
        ),
    ]
    bench.note(
        lines,
        kind="memory",
        case=name,
        authors_mb=theirs,
        mimkit_mb=ours,
        **{f"{kind.replace(' ', '_')}_mb": megabytes[kind] for kind in ABLATIONS},
    )
