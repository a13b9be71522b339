"""A pre-training step of MAE ViT-B/16: sampling, forward and backward, without the optimizer.

Axes: batch; tokens; visible; dim.
"""

import re
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_pixel_loss import authors_loss
from benchmarks.bench_tokens import authors_gather, authors_restore
from benchmarks.harness import STEP_BATCHES, Bench, Variant, has_fast_bfloat16, time_on_gpu
from mimkit import masking
from mimkit.interop import from_official
from recipes.engine.flops import counting_flops
from recipes.mae import MAE, MAEConfig

GRID, LENGTH, PATCH, RATIO = (14, 14), 196, 16, 0.75
BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU
IS_MATRIX_PRODUCT = re.compile(
    r"::_?(mm|addmm|bmm|baddbmm|linear)$|scaled_dot_product|flash|mkldnn|conv"
)
# Operators that compute nothing; those of mimkit's kernels among them.
IS_MOVE = re.compile(
    r"::_?(copy_|clone|cat|stack|roll|flip|fill_|zero_|(index|gather|scatter|masked_select)\w*"
    r"|restore_tokens)$"
)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend as timm 0.3.2 does."""
    logits = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with PyTorch's fused operator."""
    return F.scaled_dot_product_attention(query, key, value)


class AuthorsAttention(nn.Module):
    """timm 0.3.2's attention."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply self-attention."""
        batch, length, dim = tokens.shape
        qkv = self.qkv(tokens).reshape(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = self.attention(query, key, value).transpose(1, 2).reshape(batch, length, dim)
        projected: Tensor = self.proj(mixed)
        return projected


class AuthorsBlock(nn.Module):
    """timm 0.3.2's block."""

    def __init__(self, dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = AuthorsAttention(dim, heads, attention)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the block: self-attention, then an MLP."""
        tokens = tokens + self.attn(self.norm1(tokens))
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class AuthorsMAE(nn.Module):
    """The authors' model: embeds all patches, decodes in grid order, predicts all patches."""

    def __init__(self, config: MAEConfig, attention: Attention) -> None:
        super().__init__()
        dim, width = config.dim, config.decoder_dim
        conv = nn.Conv2d(config.in_channels, dim, PATCH, stride=PATCH)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = _fixed_table(dim)
        self.decoder_pos_embed = _fixed_table(width)
        self.blocks = nn.Sequential(
            *(AuthorsBlock(dim, config.heads, attention) for _ in range(config.depth))
        )
        self.decoder_blocks = nn.Sequential(
            *(
                AuthorsBlock(width, config.decoder_heads, attention)
                for _ in range(config.decoder_depth)
            )
        )
        self.norm, self.decoder_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, width)
        self.decoder_pred = nn.Linear(width, config.in_channels * PATCH**2)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Return the loss; adding `is_masked` to the noise fixes which patches are masked."""
        tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        keep = int(LENGTH * (1 - RATIO))
        shuffle = (torch.rand_like(is_masked) + is_masked).argsort(dim=1)
        restore_ids = shuffle.argsort(dim=1)
        hidden = torch.ones_like(is_masked)
        hidden[:, :keep] = 0
        hidden = hidden.gather(1, restore_ids)
        tokens = authors_gather(tokens, shuffle[:, :keep])
        prefix = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        latent = self.norm(self.blocks(torch.cat([prefix, tokens], dim=1)))
        tokens = authors_restore(
            self.decoder_embed(latent), self.mask_token, restore_ids, self.decoder_pos_embed
        )
        prediction = self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))
        return authors_loss(prediction[:, 1:], images, hidden)


def _fixed_table(dim: int) -> nn.Parameter:
    return nn.Parameter(0.02 * torch.randn(1, 1 + LENGTH, dim), requires_grad=False)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _authors(
    name: str, model: AuthorsMAE, inputs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Variant:
    def step(images: Tensor, is_masked: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(images, is_masked)
        return loss

    return Variant(name, step, inputs, tuple(_trained(model).values()), is_baseline=True)


def _ours(
    model: MAE, leaves: tuple[Tensor, ...], inputs: tuple[Tensor, masking.Key], dtype: torch.dtype
) -> Variant:
    def step(images: Tensor, key: masking.Key) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(images, masking.uniform(key, GRID, RATIO)).loss
        return loss

    return Variant("mimkit", step, inputs, leaves)


def _profile(variant: Variant, device: torch.device) -> dict[str, float]:
    """Return the self time of each operator in one step, in milliseconds."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        variant.backward(variant.forward())
        if on_gpu:
            torch.cuda.synchronize()
    # The time of a GPU kernel is already in its operator, so rows of kernels are left out.
    events = [e for e in profiler.key_averages() if "CPU" in str(e.device_type)]
    micros = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    return {name: us / 1e3 for name, us in sorted(micros.items(), key=lambda item: -item[1]) if us}


def count_flops(variant: Variant) -> int:
    """Count the FLOPs of a step's matrix products and convolutions."""
    with counting_flops() as counter:
        variant.backward(variant.forward())
    return int(counter.get_total_flops())


def note_profile(bench: Bench, case: str, dtype: torch.dtype, variant: Variant) -> None:
    """Print the operators with the largest self time in a step, if the variant is timed."""
    if bench.only is not None and not re.search(bench.only, variant.name):
        return
    times = _profile(variant, bench.device)
    total = sum(times.values())
    gigaflop = count_flops(variant) / 1e9
    matrix = sum(ms for name, ms in times.items() if IS_MATRIX_PRODUCT.search(name))
    moves = sum(ms for name, ms in times.items() if IS_MOVE.search(name))
    top = dict(list(times.items())[:10])
    gaps = None
    if bench.device.type == "cuda":
        step = 1e3 * min(time_on_gpu(lambda: variant.backward(variant.forward())) for _ in range(3))
        gaps = max(1 - total / step, 0.0)
    lines = [
        "",
        f"{case}, {dtype}, {variant.name}: {matrix / total:.1%} of {total:.0f} ms of operators are "
        f"matrix products, of {gigaflop:,.0f} GFLOP, and {moves / total:.1%} move data; the ten "
        "largest by self time:",
        *(f"  {ms:9.1f} ms  {ms / total:6.1%}  {name}" for name, ms in top.items()),
    ]
    if gaps is not None:
        lines.append(f"  in {gaps:.1%} of the step's {step:.1f} ms the device waits for launches")
    bench.note(
        lines,
        kind="profile",
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        variant=variant.name,
        total_ms=total,
        gigaflop=gigaflop,
        share_of_matrix_products=matrix / total,
        share_of_data_movement=moves / total,
        share_of_launch_gaps=gaps,
        top_ms=top,
    )


def _case(bench: Bench, dtype: torch.dtype, batch: int) -> tuple[str, MAEConfig, int]:
    """Return name, model and batch size; a small case where a bfloat16 step would take minutes."""
    if dtype == torch.bfloat16 and not has_fast_bfloat16(bench.device):
        bench.note(["bfloat16 has no fast matrix products on this CPU: a small model is timed"])
        config = MAEConfig(image_size=224, depth=2, decoder_depth=1)
        return "width of ViT-B/16, depth 2 + 1, B=1", config, 1
    return f"ViT-B/16, B={batch}", MAEConfig(image_size=224), batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", STEP_BATCHES)
def bench_mae_step(bench: Bench, dtype: torch.dtype, batch: int) -> None:
    case, config, batch = _case(bench, dtype, batch)
    authors = AuthorsMAE(config, fused_attention).to(bench.device)
    plain = AuthorsMAE(config, plain_attention).to(bench.device)
    model = MAE(config).to(bench.device)
    plain.load_state_dict(authors.state_dict())
    model.load_state_dict(from_official("mae", authors.state_dict()))
    weights = dict(model.named_parameters())
    leaves = tuple(weights[name] for name in from_official("mae", _trained(authors)))

    images = torch.randn(batch, config.in_channels, 224, 224, device=bench.device)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    is_masked = masking.uniform(key, GRID, RATIO).is_masked.flatten(1).float()
    channels_last = images.to(memory_format=torch.channels_last)
    fused = _authors("authors, fused attention", authors, (images, is_masked), dtype)
    ours = _ours(model, leaves, (images, key), dtype)
    variants = [
        fused,
        _authors("authors, plain attention", plain, (images, is_masked), dtype),
        _authors("authors, fused, channels_last", authors, (channels_last, is_masked), dtype),
        ours,
        fused.compiled(),
        ours.compiled(),
    ]
    bench.with_seconds(BUDGET * bench.seconds).compare(
        case,
        variants,
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 5e-2,
        passes=("both",),
        graphs=True,
        min_repeats=MIN_REPEATS,
    )
    for variant in (fused, ours):
        note_profile(bench, case, dtype, variant)
