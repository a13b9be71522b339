"""Patches of images in plain PyTorch: shared by the references of the kernels that read patches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimkit_kernels._dtypes import KERNEL_DTYPES
from mimkit_kernels._launch import constant, prepare

Numbers = Sequence[float] | None
Statistic = Numbers | Tensor  # kernels accept numbers only, references also tensors


def take_pixels(
    images: Tensor, ids: Tensor, patch: Sequence[int], mean: Statistic, std: Statistic
) -> Tensor:
    """Gather patches and normalize them: [batch, taken, channels, *patch].

    Args:
        images: [batch, channels, *spatial]; floats, or uint8, which become float32 in [0, 1].
        ids: [batch, taken], int64; row-major positions of patches.
        patch: Pixels per patch, one integer per spatial axis.
        mean: One value per channel to subtract.
        std: One value per channel to divide by.
    """
    # A run of pixels that are contiguous in memory is moved as a whole.
    runs = images.reshape(-1, patch[-1])
    taken = runs.index_select(0, runs_of_patches(ids, images.shape, patch))
    taken = taken.view(*ids.shape, images.shape[1], *patch)
    if taken.dtype == torch.uint8:
        taken = taken.float() / 255
    if mean is not None:
        taken = taken - per_channel(mean, taken)
    return taken if std is None else taken / per_channel(std, taken)


def runs_of_patches(ids: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Return the indices of all pixel runs in the patches `ids`, counting over the whole batch.

    A run is a row of `patch[-1]` pixels along the last axis.
    """
    batch, channels, *spatial = shape
    grid = [pixels // size for pixels, size in zip(spatial, patch, strict=True)]
    runs_per_image = channels * product(spatial) // patch[-1]
    split = [size for axis in zip(grid, (*patch[:-1], 1), strict=True) for size in axis]
    runs = torch.arange(runs_per_image, device=ids.device).view(channels, *split)
    # Reorder from (channel, token and pixel of each axis) to (tokens, channel, pixels).
    axes = range(1, 2 * len(grid), 2)
    runs_of_patch = runs.permute(*axes, 0, *(axis + 1 for axis in axes))
    runs_of_patch = runs_of_patch.reshape(product(grid), -1)
    first_run = torch.arange(batch, device=ids.device).view(-1, 1, 1) * runs_per_image
    return (runs_of_patch[ids] + first_run).flatten()


def per_channel(statistic: Sequence[float] | Tensor, taken: Tensor) -> Tensor:
    """Return a statistic as a tensor that broadcasts over [batch, taken, channels, *patch]."""
    dtype = torch.promote_types(taken.dtype, torch.float32)
    values = torch.as_tensor(statistic, dtype=dtype, device=taken.device)
    return values.view(-1, *[1] * (taken.ndim - 3))


def product(sizes: Sequence[int]) -> int:
    """Return the product of sizes, which may be symbolic."""
    result = 1
    for size in sizes:
        result *= size
    return result


def image_obstacle(images: Tensor, mean: Statistic, std: Statistic) -> str | None:
    """Return why kernels cannot read patches from `images`; `None` if they can."""
    if images.dtype not in (*KERNEL_DTYPES, torch.uint8):
        return f"images of {images.dtype}"
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        return "channel statistics in tensors"
    span = sum((n - 1) * s for n, s in zip(images.shape[1:], images.stride()[1:], strict=True))
    if span >= 1 << 31:
        return f"images that span {span} values each"
    return None


def channel_tensor(statistic: Numbers, device: torch.device) -> Tensor | None:
    """Return a statistic as a float32 tensor on the device."""
    return None if statistic is None else _copied_once(tuple(statistic), device)


@constant
def _copied_once(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def prepare_statistics(device: torch.device, *statistics: Statistic) -> None:
    """Make the tensors of statistics while a call is traced."""
    for statistic in statistics:
        if not isinstance(statistic, Tensor):
            prepare(device, lambda numbers=statistic: channel_tensor(numbers, device))  # type: ignore[misc]
