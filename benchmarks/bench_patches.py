"""`patchify` and `gather_patches` against the authors' way.

Axes: batch; channels; height, width; tokens; patch.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.harness import Bench, Variant, nbytes, with_compiled
from mimkit import masking
from mimkit._checks import Order
from mimkit.masking import Mask
from mimkit.patches import gather_patches, patchify

PATCH, SIZE, CHANNELS = 16, 224, 3
GRID = (SIZE // PATCH, SIZE // PATCH)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def authors_patchify(images: Tensor, order: Order = "p1 p2 c") -> Tensor:
    """Patchify by reshape and einsum; the authors' order is "p1 p2 c"."""
    batch, channels, height, width = images.shape
    h, w = height // PATCH, width // PATCH
    axes = images.reshape(batch, channels, h, PATCH, w, PATCH)
    pattern = "nchpwq->nhwpqc" if order == "p1 p2 c" else "nchpwq->nhwcpq"
    return torch.einsum(pattern, axes).reshape(batch, h * w, -1)


def authors_gather(images: Tensor, ids: Tensor) -> Tensor:
    """Patchify all, then gather the visible patches."""
    patches = authors_patchify(images)
    return patches.gather(1, ids.unsqueeze(-1).expand(-1, -1, patches.shape[2]))


def authors_gather_bytes(images: Tensor, ids: Tensor) -> Tensor:
    """Patchify uint8 images, gather the visible patches, then normalise them."""
    patches = authors_gather(images, ids).float() / 255
    mean, std = (torch.tensor(v, device=images.device).repeat(PATCH**2) for v in (MEAN, STD))
    return (patches - mean) / std


def gather_bytes(images: Tensor, mask: Mask) -> Tensor:
    """Gather the visible patches of uint8 images, normalised."""
    return gather_patches(images, mask, PATCH, mean=MEAN, std=STD)


def _batch(device: torch.device) -> int:
    return 64 if device.type == "cuda" else 8


def _mask(batch: int, device: torch.device) -> Mask:
    return masking.uniform(masking.key(torch.arange(batch, device=device), seed=0), GRID, 0.75)


@pytest.mark.parametrize("order", ["p1 p2 c", "c p1 p2"])
def bench_patchify(bench: Bench, order: Order) -> None:
    images = torch.randn(_batch(bench.device), CHANNELS, SIZE, SIZE, device=bench.device)
    variants = [
        Variant("authors: einsum", authors_patchify, (images, order), is_baseline=True),
        Variant("mimkit", lambda images: patchify(images, PATCH, order=order), (images,)),
    ]
    bench.compare(
        f"{tuple(images.shape)} p={PATCH}, {order}",
        with_compiled(variants),
        dtype=images.dtype,
        tolerance=0,
        moved={"forward": 2 * nbytes(images)},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def bench_gather_patches(bench: Bench, dtype: torch.dtype) -> None:
    batch = _batch(bench.device)
    shape = (batch, CHANNELS, SIZE, SIZE)
    is_bytes = dtype == torch.uint8
    if is_bytes:
        images = torch.randint(256, shape, dtype=dtype, device=bench.device)
    else:
        images = torch.randn(shape, dtype=dtype, device=bench.device)
    mask = _mask(batch, bench.device)
    authors = authors_gather_bytes if is_bytes else authors_gather
    ours = gather_bytes if is_bytes else lambda images, mask: gather_patches(images, mask, PATCH)
    inputs = (images, mask.visible_ids)
    variants = [
        Variant("authors: patchify all, gather", authors, inputs, is_baseline=True),
        Variant("mimkit", ours, (images, mask)),
    ]
    visible_pixels = images.numel() * mask.num_visible // mask.num_tokens
    bench.compare(
        f"{shape} p={PATCH}, {mask.num_visible} of {mask.num_tokens} visible",
        with_compiled(variants),
        dtype=dtype,
        tolerance=1e-6,
        moved={"forward": visible_pixels * (images.element_size() + 4)},
    )
