"""`gather_visible` and `restore` against the authors' way.

Axes: batch; tokens; visible; dim.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Pass, Variant, nbytes, with_compiled
from mimkit import masking
from mimkit.masking import Mask
from mimkit.patches import gather_visible, restore

GRID, RATIO = (14, 14), 0.75
PASSES: tuple[Pass, ...] = ("forward", "backward")
DTYPES = [torch.float32, torch.bfloat16]


def authors_gather(tokens: Tensor, ids: Tensor) -> Tensor:
    """Gather tokens with `torch.gather`; unlike the authors' code, without copying the ids."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def authors_restore(
    latent: Tensor, mask_token: Tensor, restore_ids: Tensor, positions: Tensor
) -> Tensor:
    """Append mask tokens, unshuffle, prepend the class token, add position embeddings."""
    missing = restore_ids.shape[1] + 1 - latent.shape[1]
    mask_tokens = mask_token.expand(latent.shape[0], missing, -1)
    tokens = authors_gather(torch.cat([latent[:, 1:], mask_tokens], dim=1), restore_ids)
    return torch.cat([latent[:, :1], tokens], dim=1) + positions


def _mask(device: torch.device) -> Mask:
    batch = 256 if device.type == "cuda" else 8
    return masking.uniform(masking.key(torch.arange(batch, device=device), seed=0), GRID, RATIO)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_gather_visible(bench: Bench, dtype: torch.dtype) -> None:
    mask, dim = _mask(bench.device), 768
    shape = (mask.batch_size, mask.num_tokens, dim)
    tokens = torch.randn(shape, dtype=dtype, device=bench.device, requires_grad=True)
    inputs = (tokens, mask.visible_ids)
    variants = [
        Variant("authors: gather", authors_gather, inputs, (tokens,), is_baseline=True),
        Variant("mimkit", gather_visible, (tokens, mask), (tokens,)),
    ]
    taken = nbytes(tokens) * mask.num_visible // mask.num_tokens
    bench.compare(
        f"{shape}, {mask.num_visible} visible",
        with_compiled(variants),
        dtype=dtype,
        tolerance=0,
        passes=PASSES,
        moved={"forward": 2 * taken, "backward": taken + nbytes(tokens)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def bench_restore(bench: Bench, dtype: torch.dtype) -> None:
    mask, dim = _mask(bench.device), 512
    shape = (mask.batch_size, 1 + mask.num_visible, dim)
    latent = torch.randn(shape, dtype=dtype, device=bench.device, requires_grad=True)
    mask_token = torch.randn(dim, dtype=dtype, device=bench.device, requires_grad=True)
    positions = torch.randn(1 + mask.num_tokens, dim, dtype=dtype, device=bench.device)
    leaves = (latent, mask_token)

    def ours(latent: Tensor, mask_token: Tensor, mask: Mask, positions: Tensor) -> Tensor:
        return restore(latent, mask, mask_token, positions=positions, num_prefix=1)

    theirs = (latent, mask_token, mask.restore_ids, positions)
    variants = [
        Variant(
            "authors: cat, gather, cat, add", authors_restore, theirs, leaves, is_baseline=True
        ),
        Variant("mimkit", ours, (latent, mask_token, mask, positions), leaves),
    ]
    restored = mask.batch_size * nbytes(positions)
    bench.compare(
        f"{shape} to {1 + mask.num_tokens} tokens",
        with_compiled(variants),
        dtype=dtype,
        tolerance=1e-5 if dtype == torch.float32 else 2e-2,
        passes=PASSES,
        moved={
            "forward": nbytes(latent, positions) + restored,
            "backward": restored + nbytes(latent),
        },
    )
