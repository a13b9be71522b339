"""Cut the patches `ids` out of images, and no other.

    patches[b, n, value(c, p)] = (images[b, c, origin(ids[b, n]) + p] - mean[c]) / std[c]

Axes: b batch; n taken patches; c channels; p pixels of a patch (one to three axes); value: the
place of (c, p) in a patch vector, "p1 p2 c" or "c p1 p2". Bytes become fractions in [0, 1] first.
The gradient of the images holds each patch's gradient over std, and zero where no patch was taken:
one program per patch of the grid writes it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import KERNEL_DTYPES, takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._patch_tiles import Geometry, normalized, pixel_offsets, value_offsets
from mimkit_kernels._register import on_device, register
from mimkit_kernels.move_tokens import slots_of

if TYPE_CHECKING:
    import triton.language as tl


Numbers = Sequence[float] | None
Statistic = Numbers | Tensor  # kernels take numbers, the reference tensors too


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    *,
    mean: Statistic = None,
    std: Statistic = None,
    channels_last: bool = True,
) -> Tensor:
    """Take the patches `ids` (distinct within a row) of images, by kernel or reference.

    Args:
        images: [batch, channels, *spatial]; floats, or uint8, which become float32 in [0, 1].
        ids: [batch, taken], int64; row-major positions of patches.
        patch: Pixels per patch, one integer per spatial axis.
        mean: One value per channel to subtract.
        std: One value per channel to divide by.
        channels_last: Whether values lie in the order "p1 p2 c", else "c p1 p2".

    Returns:
        [batch, taken, values], in the dtype of the images; float32 of bytes or with statistics.
    """
    arguments = (images, ids, list(patch), mean, std, channels_last)
    if takes_kernel("gather_patches", images, lambda: image_obstacle(images, mean, std)):
        patches: Tensor = gather_patches_op(*arguments)
        return patches
    return gather_patches_reference(*arguments)


def gather_patches_reference(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
) -> Tensor:
    """Compute `gather_patches` in plain PyTorch."""
    # Runs of pixels that lie side by side in memory are moved whole.
    channels = images.shape[1]
    runs = images.reshape(-1, patch[-1])
    taken = runs.index_select(0, _runs_taken(ids, images.shape, patch))
    taken = taken.view(*ids.shape, channels, *patch)
    if taken.dtype == torch.uint8:
        taken = taken.float() / 255
    if mean is not None:
        taken = taken - _per_channel(mean, taken)
    if std is not None:
        taken = taken / _per_channel(std, taken)
    return (taken.movedim(2, -1) if channels_last else taken).flatten(2)


def _runs_taken(ids: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Number the runs of all images, and return the numbers of those in the patches `ids`."""
    batch, channels, *spatial = shape
    grid = [pixels // size for pixels, size in zip(spatial, patch, strict=True)]
    runs_per_image = channels * _product(spatial) // patch[-1]
    split = [size for axis in zip(grid, (*patch[:-1], 1), strict=True) for size in axis]
    runs = torch.arange(runs_per_image, device=ids.device).view(channels, *split)
    # From channels, then tokens and pixels of each axis in turn, to tokens, channels, pixels.
    axes = range(1, 2 * len(grid), 2)
    runs_of_patch = runs.permute(*axes, 0, *(axis + 1 for axis in axes)).reshape(_product(grid), -1)
    first_run = torch.arange(batch, device=ids.device).view(-1, 1, 1) * runs_per_image
    return (runs_of_patch[ids] + first_run).flatten()


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _per_channel(statistic: Sequence[float] | Tensor, taken: Tensor) -> Tensor:
    dtype = torch.promote_types(taken.dtype, torch.float32)
    values = torch.as_tensor(statistic, dtype=dtype, device=taken.device)
    return values.view(-1, *[1] * (taken.ndim - 3))


def _result_dtype(images: Tensor, mean: Statistic, std: Statistic) -> torch.dtype:
    plain = images.is_floating_point() and mean is None and std is None
    return images.dtype if plain else torch.float32


# Kernels


@jit
def _gather_kernel(
    patches: tl.tensor,
    images: tl.tensor,
    ids: tl.tensor,
    mean: tl.tensor,
    std: tl.tensor,
    taken: tl.tensor,
    row_blocks: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    sb: tl.tensor,
    sc: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one tile of one patch."""
    slot = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = block % row_blocks * ROWS + tl.arange(0, ROWS)
    column = block // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < C * P1 * P2)[:, None] & (column < P3)[None, :]
    token = tl.load(ids + slot)
    source = pixel_offsets(
        slot // taken, token, row, column, g2, g3, sb, sc, s1, s2, s3, P1, P2, P3
    )
    pixels = tl.load(images + source, mask=inside)
    values = normalized(pixels, row, mean, std, C, P1, P2)
    target = slot * (C * P1 * P2 * P3) + value_offsets(row, column, C, P1, P2, P3, CHANNELS_LAST)
    tl.store(patches + target, values.to(patches.dtype.element_ty), mask=inside)


@jit
def _scatter_kernel(
    grad_images: tl.tensor,
    grad_patches: tl.tensor,
    slots: tl.tensor,
    std: tl.tensor,
    taken: tl.tensor,
    tokens: tl.tensor,
    row_blocks: tl.tensor,
    g2: tl.tensor,
    g3: tl.tensor,
    sb: tl.tensor,
    sc: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    C: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    P3: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one tile of one patch of the grid, taken or not."""
    place = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = block % row_blocks * ROWS + tl.arange(0, ROWS)
    column = block // row_blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < C * P1 * P2)[:, None] & (column < P3)[None, :]
    sample, token = place // tokens, place % tokens
    slot = tl.load(slots + place)
    source = (sample * taken + slot) * (C * P1 * P2 * P3)
    source += value_offsets(row, column, C, P1, P2, P3, CHANNELS_LAST)
    # No row of a patch is inside where no patch was taken.
    is_taken = (row < tl.where(slot < taken, C * P1 * P2, 0))[:, None] & (column < P3)[None, :]
    grad = tl.load(grad_patches + source, mask=is_taken, other=0.0).to(tl.float32)
    if std is not None:
        grad = grad / tl.load(std + tl.minimum(row // (P1 * P2), C - 1))[:, None]
    target = pixel_offsets(sample, token, row, column, g2, g3, sb, sc, s1, s2, s3, P1, P2, P3)
    tl.store(grad_images + target, grad.to(grad_images.dtype.element_ty), mask=inside)


# Launchers

MAX_TILE = 1024
MAX_COLUMNS = 128


def _num_warps(values: int, tensor: Tensor) -> int:
    """Give every thread 16 bytes of `tensor` at a time."""
    return min(max(values * tensor.element_size() // (32 * 16), 1), 4)


def on_gpu(statistic: Numbers, images: Tensor) -> Tensor | None:
    """Return a statistic as a float32 tensor beside the images."""
    return None if statistic is None else _copied_once(tuple(statistic), images.device)


@cache
def _copied_once(values: tuple[float, ...], device: torch.device) -> Tensor:
    # A copy from the host waits for the GPU, and cannot be captured in a graph.
    return torch.tensor(values, dtype=torch.float32, device=device)


def _launch_gather(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Numbers,
    std: Numbers,
    channels_last: bool,
) -> Tensor:
    geometry = Geometry.of(images, patch)
    batch, taken = ids.shape
    patches = torch.empty(
        (batch, taken, geometry.rows * geometry.columns),
        dtype=_result_dtype(images, mean, std),
        device=images.device,
    )
    rows, columns = geometry.tile(MAX_TILE, MAX_COLUMNS)
    row_blocks, column_blocks = -(-geometry.rows // rows), -(-geometry.columns // columns)
    if patches.numel():
        with on_device(images):
            _gather_kernel[batch * taken, row_blocks * column_blocks](
                patches,
                images,
                ids.contiguous(),
                on_gpu(mean, images),
                on_gpu(std, images),
                taken,
                row_blocks,
                **geometry.arguments,
                **geometry.constants,
                CHANNELS_LAST=channels_last,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=_num_warps(rows * columns, images),
                enable_fp_fusion=True,
            )
    return patches


def _launch_scatter(
    grad_patches: Tensor,
    ids: Tensor,
    shape: Sequence[int],
    patch: Sequence[int],
    std: Numbers,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    grad_images = torch.empty(shape, dtype=dtype, device=grad_patches.device)
    geometry = Geometry.of(grad_images, patch)
    batch, taken = ids.shape
    tokens = _product(shape[2:]) // _product(patch)
    rows, columns = geometry.tile(MAX_TILE, MAX_COLUMNS)
    row_blocks, column_blocks = -(-geometry.rows // rows), -(-geometry.columns // columns)
    if grad_images.numel():
        with on_device(grad_patches):
            _scatter_kernel[batch * tokens, row_blocks * column_blocks](
                grad_images,
                grad_patches.contiguous(),
                slots_of(ids, tokens),
                on_gpu(std, grad_images),
                taken,
                tokens,
                row_blocks,
                **geometry.arguments,
                **geometry.constants,
                CHANNELS_LAST=channels_last,
                ROWS=rows,
                COLUMNS=columns,
                num_warps=_num_warps(rows * columns, grad_images),
                enable_fp_fusion=True,
            )
    return grad_images


# Registration


def image_obstacle(images: Tensor, mean: Statistic, std: Statistic) -> str | None:
    """Say why kernels cannot read patches from `images`, if they cannot."""
    if images.dtype not in (*KERNEL_DTYPES, torch.uint8):
        return f"images of {images.dtype}"
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return "channel statistics in tensors"
    span = sum((n - 1) * s for n, s in zip(images.shape[1:], images.stride()[1:], strict=True))
    if span >= 1 << 31:
        return f"images that span {span} values each"
    return None


def _fake_gather(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
) -> Tensor:
    values = images.shape[1] * _product(patch)
    dtype = _result_dtype(images, mean, std)
    return images.new_empty((*ids.shape, values), dtype=dtype)


def _scatter_reference(
    grad_patches: Tensor,
    ids: Tensor,
    shape: Sequence[int],
    patch: Sequence[int],
    std: Statistic,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    batch, channels, *spatial = shape
    taken = (
        grad_patches.unflatten(2, (*patch, channels)).movedim(-1, 2)
        if channels_last
        else grad_patches.unflatten(2, (channels, *patch))
    )
    if std is not None:
        taken = taken / _per_channel(std, taken)
    runs = taken.new_zeros(batch * channels * _product(spatial) // patch[-1], patch[-1])
    runs[_runs_taken(ids, shape, patch)] = taken.reshape(-1, patch[-1])
    grad_images: Tensor = runs.view(*shape).to(dtype)
    return grad_images


def _fake_scatter(
    grad_patches: Tensor,
    ids: Tensor,
    shape: Sequence[int],
    patch: Sequence[int],
    std: Statistic,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    return grad_patches.new_empty(shape, dtype=dtype)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, ids, ctx.patch, _, ctx.std, ctx.channels_last = inputs
    ctx.shape, ctx.dtype = list(images.shape), images.dtype
    ctx.save_for_backward(ids)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    grad_images = scatter_patches_op(
        grad, ids, ctx.shape, ctx.patch, ctx.std, ctx.channels_last, ctx.dtype
    )
    return grad_images, None, None, None, None, None


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_patches, ids, _, ctx.patch, ctx.std, ctx.channels_last, _ = inputs
    ctx.dtype = grad_patches.dtype
    ctx.save_for_backward(ids)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    taken = gather_patches_op(grad, ids, ctx.patch, None, ctx.std, ctx.channels_last)
    return taken.to(ctx.dtype), None, None, None, None, None, None


gather_patches_op = register(
    "gather_patches(Tensor images, Tensor ids, SymInt[] patch, float[]? mean, float[]? std, "
    "bool channels_last) -> Tensor",
    launch=_launch_gather,
    reference=gather_patches_reference,
    fake=_fake_gather,
    backward=_gather_backward,
    setup_context=_setup_gather,
)
scatter_patches_op = register(
    "scatter_patches(Tensor grad_patches, Tensor ids, SymInt[] shape, SymInt[] patch, "
    "float[]? std, bool channels_last, ScalarType dtype) -> Tensor",
    launch=_launch_scatter,
    reference=_scatter_reference,
    fake=_fake_scatter,
    backward=_scatter_backward,
    setup_context=_setup_scatter,
)
