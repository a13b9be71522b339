"""Gather the patches `ids` of images.

    patches[b, n, value(c, p)] = (images[b, c, origin(ids[b, n]) + p] - mean[c]) / std[c]

Axes: b batch; n taken patches; c channels; p pixels of a patch (one to three axes). value(c, p) is
the index of (c, p) in a patch vector, in the order "p1 p2 c" or "c p1 p2". Bytes are scaled to
fractions in [0, 1] first. The gradient of the images is the gradient of the patches over std, and
zero where no patch was taken. One program per patch of the grid writes all of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import on_device
from mimkit_kernels._patch_tiles import (
    ImageLayout,
    PatchShape,
    describe,
    load_channels,
    load_patch,
    pixel_offsets,
    tile_positions,
    value_offsets,
)
from mimkit_kernels._patches import (
    Numbers,
    Statistic,
    channel_tensor,
    image_obstacle,
    per_channel,
    prepare_statistics,
    product,
    runs_of_patches,
    take_pixels,
)
from mimkit_kernels._register import register
from mimkit_kernels._slots import slots_of

if TYPE_CHECKING:
    import triton.language as tl


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    *,
    mean: Statistic = None,
    std: Statistic = None,
    channels_last: bool = True,
) -> Tensor:
    """Gather the patches `ids` (distinct within a row) of images, by kernel or reference.

    Args:
        images: [batch, channels, *spatial]; floats, or uint8, which become float32 in [0, 1].
        ids: [batch, taken], int64; row-major positions of patches.
        patch: Pixels per patch, one integer per spatial axis.
        mean: One value per channel to subtract.
        std: One value per channel to divide by.
        channels_last: Whether the values of a patch have the order "p1 p2 c", else "c p1 p2".

    Returns:
        [batch, taken, values], in the dtype of the images; float32 for bytes or with statistics.
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
    taken = take_pixels(images, ids, patch, mean, std)
    return (taken.movedim(2, -1) if channels_last else taken).flatten(2)


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
    layout: ImageLayout,
    SHAPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one tile of one patch."""
    slot = tl.program_id(0)
    row, column, inside = tile_positions(tl.program_id(1), row_blocks, SHAPE, ROWS, COLUMNS)
    values = load_patch(images, ids, mean, std, slot, taken, row, column, inside, layout, SHAPE)
    target = value_offsets(slot, row, column, SHAPE, CHANNELS_LAST)
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
    layout: ImageLayout,
    SHAPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One program: one tile of one patch of the grid, taken or not."""
    place = tl.program_id(0)
    row, column, inside = tile_positions(tl.program_id(1), row_blocks, SHAPE, ROWS, COLUMNS)
    sample, token = place // tokens, place % tokens
    slot = tl.load(slots + place)
    source = value_offsets(sample.to(tl.int64) * taken + slot, row, column, SHAPE, CHANNELS_LAST)
    # If the patch was not taken, the mask is empty and the gradient is zero.
    rows = tl.where(slot < taken, SHAPE.ROWS, 0)
    is_taken = (row < rows)[:, None] & (column < SHAPE.COLUMNS)[None, :]
    grad = tl.load(grad_patches + source, mask=is_taken, other=0.0).to(tl.float32)
    if std is not None:
        grad = grad / load_channels(std, row, column, SHAPE)
    target = pixel_offsets(sample, token, row, column, layout, SHAPE)
    tl.store(grad_images + target, grad.to(grad_images.dtype.element_ty), mask=inside)


# Launchers

MAX_TILE = 1024
MAX_COLUMNS = 128


def _tiling(shape: PatchShape, channels_last: bool) -> tuple[int, int, Any]:
    """Return tiles per patch along the rows and in total, and the constants of a launch.

    Args:
        shape: Shape of a patch.
        channels_last: The order of values in a patch vector.
    """
    rows, columns = shape.tile(MAX_TILE, MAX_COLUMNS)
    row_blocks, column_blocks = -(-shape.ROWS // rows), -(-shape.COLUMNS // columns)
    constants = {
        "SHAPE": shape,
        "CHANNELS_LAST": channels_last,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 1,  # offsets are computed once per program: many values share them
        "enable_fp_fusion": True,
    }
    return row_blocks, row_blocks * column_blocks, constants


def _launch_gather(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Numbers,
    std: Numbers,
    channels_last: bool,
) -> Tensor:
    layout, shape = describe(images, patch, interleaved=channels_last)
    batch, taken = ids.shape
    dtype, device = _result_dtype(images, mean, std), images.device
    patches = torch.empty((batch, taken, shape.ROWS * shape.COLUMNS), dtype=dtype, device=device)
    row_blocks, blocks, constants = _tiling(shape, channels_last)
    if patches.numel():
        with on_device(images):
            _gather_kernel[batch * taken, blocks](
                patches,
                images,
                ids.contiguous(),
                channel_tensor(mean, device),
                channel_tensor(std, device),
                taken,
                row_blocks,
                layout,
                **constants,
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
    layout, patch_shape = describe(grad_images, patch)
    batch, taken = ids.shape
    tokens = product(shape[2:]) // product(patch)
    row_blocks, blocks, constants = _tiling(patch_shape, channels_last)
    if grad_images.numel():
        with on_device(grad_patches):
            _scatter_kernel[batch * tokens, blocks](
                grad_images,
                grad_patches.contiguous(),
                slots_of(ids, tokens),
                channel_tensor(std, grad_patches.device),
                taken,
                tokens,
                row_blocks,
                layout,
                **constants,
            )
    return grad_images


# Registration


def _fake_gather(
    images: Tensor,
    ids: Tensor,
    patch: Sequence[int],
    mean: Statistic,
    std: Statistic,
    channels_last: bool,
) -> Tensor:
    prepare_statistics(images.device, mean, std)
    values = images.shape[1] * product(patch)
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
        taken = taken / per_channel(std, taken)
    runs = taken.new_zeros(batch * channels * product(spatial) // patch[-1], patch[-1])
    runs[runs_of_patches(ids, shape, patch)] = taken.reshape(-1, patch[-1])
    grad_images: Tensor = runs.view(*shape).to(dtype)
    return grad_images


def _fake_scatter(grad_patches: Tensor, ids: Tensor, shape: Sequence[int], *options: Any) -> Tensor:
    prepare_statistics(grad_patches.device, options[1])
    return grad_patches.new_empty(shape, dtype=options[-1])


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
