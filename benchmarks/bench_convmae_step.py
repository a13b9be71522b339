"""A pre-training step of ConvMAE-B: sampling, forward and backward, without the optimizer.

Axes: batch; channels; height, width; tokens; visible; dim.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_mae_step import (
    Attention,
    AuthorsBlock,
    fused_attention,
    note_profile,
    plain_attention,
)
from benchmarks.bench_pixel_loss import authors_loss
from benchmarks.bench_tokens import authors_gather
from benchmarks.harness import STEP_BATCHES, Bench, Variant, alternate, has_fast_bfloat16, timer
from mimkit import masking
from mimkit.interop import from_official
from mimkit.patches import pack_cells
from recipes.convmae import ConvMAE, ConvMAEConfig

RATIO = 0.75
BUDGET = 20  # times `--seconds`, shared by all variants
MIN_REPEATS = 3  # a step takes seconds on a small CPU
MIB = 2**20


class AuthorsEmbed(nn.Module):
    """The authors' `PatchEmbed`: convolution, norm over channels, GELU."""

    def __init__(self, in_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, stride, stride=stride)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample a feature map."""
        return F.gelu(self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class AuthorsConvMlp(nn.Module):
    """The authors' `CMlp`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 4 * dim, 1), nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each position."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class AuthorsConvBlock(nn.Module):
    """The authors' `CBlock`: computes every position and multiplies by the mask."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv1, self.conv2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.mlp = AuthorsConvMlp(dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Apply the block: masked depth-wise convolution, then an MLP."""
        y = self.conv1(self.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        x = x + self.conv2(self.attn(visible * y))
        out: Tensor = x + self.mlp(self.norm2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return out


class AuthorsConvMAE(nn.Module):
    """The authors' model, for any image size."""

    def __init__(self, config: ConvMAEConfig, attention: Attention) -> None:
        super().__init__()
        assert isinstance(config.image_size, int)
        self.side = config.image_size // 16
        one, two, dim = config.dim
        width = config.decoder_dim
        self.patch_embed1 = AuthorsEmbed(config.in_channels, one, 4)
        self.patch_embed2 = AuthorsEmbed(one, two, 2)
        self.patch_embed3 = AuthorsEmbed(two, dim, 2)
        self.patch_embed4 = nn.Linear(dim, dim)
        self.stage1_output_decode = nn.Conv2d(one, dim, 4, stride=4)
        self.stage2_output_decode = nn.Conv2d(two, dim, 2, stride=2)
        self.blocks1 = nn.ModuleList(AuthorsConvBlock(one) for _ in range(config.depth[0]))
        self.blocks2 = nn.ModuleList(AuthorsConvBlock(two) for _ in range(config.depth[1]))
        self.blocks3 = nn.Sequential(
            *(AuthorsBlock(dim, config.heads, attention) for _ in range(config.depth[2]))
        )
        self.decoder_blocks = nn.Sequential(
            *(
                AuthorsBlock(width, config.decoder_heads, attention)
                for _ in range(config.decoder_depth)
            )
        )
        self.norm, self.decoder_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, width)
        self.decoder_pred = nn.Linear(width, config.in_channels * 16**2)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = self._fixed_table(dim)
        self.decoder_pos_embed = self._fixed_table(width)

    def _fixed_table(self, dim: int) -> nn.Parameter:
        return nn.Parameter(0.02 * torch.randn(1, self.side**2, dim), requires_grad=False)

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        """Return the loss; adding `is_masked` to the noise fixes which patches are masked."""
        shuffle = (torch.rand_like(is_masked) + is_masked).argsort(dim=1)
        restore_ids = shuffle.argsort(dim=1)
        keep = int(self.side**2 * (1 - RATIO))
        kept = shuffle[:, :keep]
        coarse = 1 - is_masked.view(-1, 1, self.side, self.side)
        x = self.patch_embed1(images)
        for block in self.blocks1:
            x = block(x, F.interpolate(coarse, scale_factor=4.0))
        fused1 = self.stage1_output_decode(x).flatten(2).transpose(1, 2)
        x = self.patch_embed2(x)
        for block in self.blocks2:
            x = block(x, F.interpolate(coarse, scale_factor=2.0))
        fused2 = self.stage2_output_decode(x).flatten(2).transpose(1, 2)
        tokens = self.patch_embed4(self.patch_embed3(x).flatten(2).transpose(1, 2)) + self.pos_embed
        tokens = self.blocks3(authors_gather(tokens, kept))
        tokens = tokens + authors_gather(fused1, kept) + authors_gather(fused2, kept)
        latent = self.decoder_embed(self.norm(tokens))
        mask_tokens = self.mask_token.expand(len(latent), restore_ids.shape[1] - keep, -1)
        order = restore_ids.unsqueeze(2).expand(-1, -1, latent.shape[2])
        whole = torch.cat([latent, mask_tokens.to(latent.dtype)], dim=1).gather(1, order)
        decoded = self.decoder_norm(self.decoder_blocks(whole + self.decoder_pos_embed))
        return authors_loss(self.decoder_pred(decoded), images, is_masked)


def _step(model: nn.Module, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    def step(images: Tensor, is_masked: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(images, is_masked)
        return loss

    return step


class Packed(nn.Module):
    """mimkit's model, with sampling in the step, as in the authors' code."""

    def __init__(self, model: ConvMAE, ratio: float) -> None:
        super().__init__()
        self.model, self.ratio = model, ratio

    def forward(self, images: Tensor, key: masking.Key) -> Tensor:
        """Return the loss."""
        mask = masking.uniform(key, self.model.encoder.grid, self.ratio)
        loss: Tensor = self.model(images, mask).loss
        return loss


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _squeezed(output: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Compare gradients without their axes of size 1."""
    return output, *(gradient.squeeze() for gradient in gradients)


def _peak_bytes(variant: Variant, device: torch.device) -> int:
    """Return the peak memory of a step in bytes, without weights and inputs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.backward(variant.forward())
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        variant.backward(variant.forward())
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def _case(bench: Bench, dtype: torch.dtype, batch: int) -> tuple[str, ConvMAEConfig, int]:
    """Return name, model and batch size; a small case where a bfloat16 step would take minutes."""
    if dtype == torch.bfloat16 and not has_fast_bfloat16(bench.device):
        bench.note(["bfloat16 has no fast matrix products on this CPU: a small model is timed"])
        config = ConvMAEConfig(image_size=224, depth=(1, 1, 1), decoder_depth=1)
        return "widths of ConvMAE-B, depth 1, 1, 1 + 1, B=1", config, 1
    return f"ConvMAE-B, B={batch}", ConvMAEConfig(image_size=224), batch


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", STEP_BATCHES)
def bench_convmae_step(bench: Bench, dtype: torch.dtype, compiled: bool, batch: int) -> None:
    case, config, batch = _case(bench, dtype, batch)
    model = ConvMAE(config).to(bench.device)
    authors = AuthorsConvMAE(config, plain_attention).to(bench.device)
    official = authors.state_dict()
    model.load_state_dict(from_official("convmae", official))
    weights = dict(model.named_parameters())
    leaves = tuple(weights[name] for name in from_official("convmae", _trained(authors)))

    images = torch.randn(batch, 3, 224, 224, device=bench.device)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    is_masked = masking.uniform(key, model.encoder.grid, RATIO).is_masked.flatten(1).float()
    dense = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for attention in (plain_attention, fused_attention):
            name = f"authors, {attention.__name__.replace('_', ' ')}"
            if memory_format == torch.channels_last:
                name = f"{name}, channels_last"
            baseline = AuthorsConvMAE(config, attention).to(bench.device)
            baseline.load_state_dict(official)
            pixels = images.to(memory_format=memory_format)
            dense.append((name, baseline.to(memory_format=memory_format), pixels))
    variants = [
        Variant(
            name,
            _step(baseline, dtype),
            (pixels, is_masked),
            tuple(_trained(baseline).values()),
            view=_squeezed,
            is_baseline=True,
        )
        for name, baseline, pixels in dense
    ]
    ours = _step(Packed(model, RATIO), dtype)
    variants.append(Variant("mimkit, packed", ours, (images, key), leaves, view=_squeezed))
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
    if not compiled:
        for variant in variants:
            note_profile(bench, case, dtype, variant)
    timed = bench.chosen(variants)
    peaks = {variant.name: _peak_bytes(variant, bench.device) for variant in timed}
    least = min((peaks[variant.name] for variant in timed if variant.is_baseline), default=None)
    for name, peak in peaks.items():
        share = "" if least is None else f", {peak / least:.2f} of the authors' best"
        bench.note(
            [f"peak memory of a step, {case}, {dtype}, {name}: {peak / MIB:,.0f} MiB{share}"],
            kind="peak memory", case=case, dtype=str(dtype), variant=name, peak_bytes=peak,
        )  # fmt: skip


SETTINGS = {"B=8, 224 px": (224, 8), "B=2, 448 px": (448, 2)}


@pytest.mark.parametrize("setting", SETTINGS)
def bench_convmae_growth(bench: Bench, setting: str) -> None:
    """Measure time and memory of a step at several ratios and image sizes."""
    size, batch = SETTINGS[setting]
    batch = batch * 8 if bench.device.type == "cuda" else batch
    model = ConvMAE(ConvMAEConfig(image_size=size)).to(bench.device)
    leaves = tuple(_trained(model).values())
    images = torch.randn(batch, 3, size, size, device=bench.device)
    key = masking.key(torch.arange(batch, device=bench.device), seed=0)
    stages = tuple(model.encoder.stages.parameters())
    bench.note(["", f"ConvMAE-B, {setting}, float32; stages 1 and 2: their forward and backward"])
    steps, stage_steps = {}, {}
    for ratio in (0.5, 0.75, 0.9):
        step = _step(Packed(model, ratio), torch.float32)
        steps[ratio] = Variant(f"ratio {ratio}", step, (images, key), leaves)
        mask = masking.uniform(key, model.encoder.grid, ratio)
        stage_steps[ratio] = Variant(f"ratio {ratio}", _run_stages(model, mask), (images,), stages)
    for variant in (*steps.values(), *stage_steps.values()):
        variant.backward(variant.forward())
    clocks = {("step", r): timer(v, "both", bench.device) for r, v in steps.items()}
    clocks |= {("stages", r): timer(v, "both", bench.device) for r, v in stage_steps.items()}
    times = alternate(clocks, BUDGET * bench.seconds, MIN_REPEATS)
    for ratio in steps:
        step_ms, stages_ms = (1e3 * min(times[part, ratio]) for part in ("step", "stages"))
        visible = masking.uniform(key, model.encoder.grid, ratio).num_visible
        peak = _peak_bytes(steps[ratio], bench.device)
        bench.note(
            [f"  ratio {ratio}: step {step_ms:8.0f} ms, stages 1 and 2 {stages_ms:7.0f} ms = "
             f"{1e3 * stages_ms / (visible * batch):6.0f} us a visible cell, "
             f"peak {peak / MIB:7,.0f} MiB"],
            kind="growth", case=setting, ratio=ratio, step_ms=step_ms, stages_ms=stages_ms,
            visible=visible, peak_bytes=peak,
        )  # fmt: skip


def _run_stages(model: ConvMAE, mask: masking.Mask) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        cells, cell = pack_cells(images, mask), model.encoder.patch_size
        for stage in model.encoder.stages:
            cells, cell = stage(cells, cell, mask)
        return cells.square().mean()

    return run
