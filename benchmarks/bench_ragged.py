"""MAE with a `RaggedMask`: packed sequences against padding and against a loop over samples.

All variants use the same weights, patch embedding, head and loss. "padded" pads visible tokens to
the longest sample and uses a key padding mask, with fused or plain attention. Its decoder restores
grid order, so nothing is padded there if all grids are equal, and its last block computes all
tokens. "one by one" runs a batch of one for each sample.

Axes: batch; tokens; dim.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from benchmarks.harness import Bench, Variant
from mimkit import losses, masking
from mimkit.masking import RaggedMask
from mimkit.nn import TransformerBlock
from mimkit.patches import sincos_positions
from recipes.mae import MAE, MAEConfig

PATCH, BATCH, BUDGET = 16, 8, 20
MIN_REPEATS = 5  # a step takes seconds on a small CPU

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused_attention(query: Tensor, key: Tensor, value: Tensor, is_padding: Tensor | None) -> Tensor:
    """Attend with PyTorch's fused operator and a key padding mask."""
    is_token = None if is_padding is None else ~is_padding[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=is_token)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, is_padding: Tensor | None) -> Tensor:
    """Attend with plain matrix products; logits of padding are -inf."""
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if is_padding is not None:
        logits = logits.masked_fill(is_padding[:, None, None], -torch.inf)
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


def run_block(
    block: TransformerBlock, tokens: Tensor, is_padding: Tensor | None, attention: Attention
) -> Tensor:
    """Apply a block to padded samples."""
    parts = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    query, key, value = (
        rearrange(part, "b n (h d) -> b h n d", h=block.attn.heads) for part in parts
    )
    mixed = rearrange(attention(query, key, value, is_padding), "b h n d -> b n (h d)")
    tokens = tokens + block.attn.proj(mixed)
    transformed: Tensor = tokens + block.mlp(block.norm2(tokens))
    return transformed


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Pad and stack samples; also return which tokens are padding (`None` if there is none)."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    tokens = pad_sequence(list(rows), batch_first=True)
    if len(set(map(len, rows))) == 1:
        return tokens, None
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]


class Padded:
    """MAE on padded samples, with the weights of a mimkit model."""

    def __init__(self, model: MAE, mask: RaggedMask, attention: Attention) -> None:
        self.model, self.mask, self.attention = model, mask, attention
        self.masks, widths = mask.unbind(), (model.encoder.dim, model.decoder.embed.out_features)
        # Position tables are made here, so that they are not timed.
        tables = [
            [sincos_positions(w, grid).to(mask.device) for grid in mask.grids] for w in widths
        ]
        samples = zip(tables[0], self.masks, strict=True)
        self.visible_positions = torch.cat([table[one.visible_ids[0]] for table, one in samples])
        self.positions = tables[1]

    def encode(self, images: Sequence[Tensor]) -> Tensor:
        """Return the latents, padded."""
        encoder = self.model.encoder
        tokens = encoder.patch_embed(images, self.mask) + self.visible_positions
        prefix = encoder.cls_token[0]
        rows = [torch.cat([prefix, row]) for row in self.mask.split_visible(tokens)]
        tokens, is_padding = pad(rows)
        for block in encoder.blocks:
            tokens = run_block(block, tokens, is_padding, self.attention)
        latent: Tensor = encoder.norm(tokens)
        return latent

    def latents(self, images: Sequence[Tensor]) -> Tensor:
        """Return the latents without padding."""
        rows = zip(self.encode(images), self.mask.num_visible, strict=True)
        return torch.cat([row[: 1 + count] for row, count in rows])

    def loss(self, images: Sequence[Tensor]) -> Tensor:
        """Restore grid order, decode all tokens, and compute the loss of the masked ones."""
        decoder, rows = self.model.decoder, []
        latent = decoder.embed(self.encode(images))
        for row, one, positions in zip(latent, self.masks, self.positions, strict=True):
            whole = decoder.mask_token[0].expand(one.num_tokens, -1)
            whole = whole.index_copy(0, one.visible_ids[0], row[1 : 1 + one.num_visible])
            rows.append(torch.cat([row[:1], whole + positions]))
        tokens, is_padding = pad(rows)
        for block in decoder.blocks:
            tokens = run_block(block, tokens, is_padding, self.attention)
        samples = zip(tokens, self.masks, strict=True)
        masked = torch.cat([row[1 + one.masked_ids[0]] for row, one in samples])
        prediction = self.model.head(decoder.norm(masked))
        return losses.masked_pixel_loss(prediction, images, self.mask, PATCH)


def draw(grids: Sequence[tuple[int, int]], device: torch.device) -> RaggedMask:
    """Draw masks with ratios from a uniform distribution on [0.5, 0.9]."""
    ratios = [round(ratio, 4) for ratio in torch.empty(BATCH).uniform_(0.5, 0.9).tolist()]
    key = masking.key(torch.arange(BATCH, device=device), seed=0)
    return masking.ragged(masking.uniform, key, grids, ratios)


GRIDS = {
    "one size": [(14, 14)] * BATCH,
    # Aspect ratios of photographs with about 196 patches, and two smaller images.
    "native sizes": [(14, 14), (12, 16), (16, 12), (10, 18), (18, 11), (14, 14), (8, 8), (7, 10)],
}


@pytest.mark.parametrize("sizes", GRIDS)
@pytest.mark.parametrize("part", ["encoder", "MAE"])
def bench_ragged(bench: Bench, part: str, sizes: str) -> None:
    """Time MAE at ViT-B's width (with fewer blocks on a CPU), and its encoder alone."""
    depth = {"depth": 3, "decoder_depth": 2} if bench.device.type == "cpu" else {}
    model = MAE(MAEConfig(image_size=224, **depth)).to(bench.device)
    mask = draw(GRIDS[sizes], bench.device)
    images = [
        torch.randn(3, *(PATCH * n for n in grid), device=bench.device) for grid in mask.grids
    ]
    fused, plain = (Padded(model, mask, form) for form in (fused_attention, plain_attention))

    def one_by_one(images: Sequence[Tensor]) -> Tensor:
        samples = [(images[i : i + 1], mask[i]) for i in range(BATCH)]
        if part == "encoder":
            return torch.cat([model.encoder(*sample) for sample in samples])
        return torch.stack([model(*sample).loss for sample in samples]).mean()

    def packed(images: Sequence[Tensor]) -> Tensor:
        return model.encoder(images, mask) if part == "encoder" else model(images, mask).loss

    trained = model.encoder if part == "encoder" else model
    leaves = tuple(weight for weight in trained.parameters() if weight.requires_grad)
    baselines = {
        "padded, fused attention": fused.latents if part == "encoder" else fused.loss,
        "padded, plain attention": plain.latents if part == "encoder" else plain.loss,
        "one by one": one_by_one,
    }
    variants = [
        Variant(name, function, (images,), leaves, is_baseline=True)
        for name, function in baselines.items()
    ]
    bench.with_seconds(BUDGET * bench.seconds).compare(
        f"{part}, {sizes}: {mask.num_visible} visible of {mask.num_tokens}",
        [*variants, Variant("mimkit", packed, (images,), leaves)],
        dtype=torch.float32,
        tolerance=1e-5,
        passes=("both",),
        min_repeats=MIN_REPEATS,
    )
