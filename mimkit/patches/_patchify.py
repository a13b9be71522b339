"""Images <-> patch vectors.

Axes: batch; channels; *spatial (one to three axes); tokens (row-major over the grid);
patch (the values of one patch, in the chosen order).
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

import mimkit_kernels as kernels
from mimkit._arguments import Scales, checked
from mimkit._checks import (
    Order,
    channel_statistic,
    check_axes,
    check_mask,
    check_pixels,
    check_stacked,
    each_sample,
    is_channels_last,
)
from mimkit._grids import Grid, as_sizes, count_tokens, divide, per_axis
from mimkit.masking import Mask, RaggedMask


@checked
def grid_of(
    images: Shaped[Tensor, "batch channels *spatial"], patch_size: int | Sequence[int]
) -> Grid:
    """Return the number of patches of `images` per axis.

    Args:
        images: Images, or any signal of one to three spatial axes. An image without its batch axis
            is taken for signals of one axis, unless `patch_size` has two sizes.
        patch_size: Pixels per patch; one integer, or one per spatial axis.

    Returns:
        Patches per axis.

    Raises:
        ValueError: If the patch does not divide the size, or there are not one to three spatial
            axes.

    Source:
        mimkit's own.

    Example:
        >>> grid_of(torch.zeros(1, 3, 224, 192), 16)
        (14, 12)
    """
    check_axes(images, patch_size)
    return divide("image size", images.shape[2:], patch_size, "patch size")


@checked
def patchify(
    images: Shaped[Tensor, "batch channels *spatial"],
    patch_size: int | Sequence[int],
    *,
    order: Order = "p1 p2 c",
) -> Shaped[Tensor, "batch tokens patch"]:
    """Cut images into patch vectors.

    Args:
        images: Any number of channels, one to three spatial axes, any dtype.
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        order: Order of the values inside a patch. In "p1 p2 c", MAE's order, channels vary
            fastest. "c p1 p2" is the order of convolution weights, and faster to load. "p1 p2"
            stands for all spatial axes, also where there are one or three.

    Returns:
        One vector per patch, in row-major order of the grid.

    Raises:
        ValueError: If the patch does not divide the size, or the order is unknown.

    Source:
        MAE, facebookresearch/mae `patchify`, which takes square 3-channel images only.

    Example:
        >>> patchify(torch.arange(8).view(1, 2, 1, 4), (1, 2))
        tensor([[[0, 4, 1, 5],
                 [2, 6, 3, 7]]])
    """
    grid = grid_of(images, patch_size)
    pattern, sizes = _pattern(per_axis("patch_size", patch_size, len(grid)), order)
    return rearrange(images, pattern, **sizes)


@checked
def unpatchify(
    patches: Shaped[Tensor, "batch tokens patch"],
    grid: Sequence[int],
    patch_size: int | Sequence[int],
    *,
    order: Order = "p1 p2 c",
) -> Shaped[Tensor, "batch channels *spatial"]:
    """Undo `patchify`.

    Args:
        patches: One vector per token of `grid`.
        grid: Tokens per axis.
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        order: The order that was passed to `patchify`.

    Returns:
        Images, in the dtype of `patches`.

    Raises:
        ValueError: If the patches do not fit the grid or the patch size.

    Source:
        MAE, facebookresearch/mae `unpatchify`, which makes square 3-channel images only.

    Example:
        >>> images = torch.randn(2, 3, 8, 12)
        >>> torch.equal(unpatchify(patchify(images, 4), (2, 3), 4), images)
        True
    """
    grid = as_sizes("grid", grid)
    patch = per_axis("patch_size", patch_size, len(grid))
    if patches.ndim != 3 or patches.shape[1] != count_tokens(grid):
        raise ValueError(
            f"patches must be [batch, {count_tokens(grid)}, values] for grid {grid}; "
            f"got {tuple(patches.shape)}"
        )
    if patches.shape[2] % count_tokens(patch):
        raise ValueError(f"{patches.shape[2]} values do not fill patches of {patch} pixels")
    pattern, sizes = _pattern(patch, order)
    sizes |= {f"h{axis}": size for axis, size in enumerate(grid, 1)}
    image_side, patch_side = pattern.split(" -> ")
    return rearrange(patches, f"{patch_side} -> {image_side}", **sizes)


@checked
def gather_patches(
    images: Float[Tensor, "batch channels *spatial"]
    | UInt8[Tensor, "batch channels *spatial"]
    | Sequence[Shaped[Tensor, "channels ..."]],
    mask: Mask | RaggedMask,
    patch_size: int | Sequence[int],
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Scales | Tensor | None = None,
    order: Order = "p1 p2 c",
) -> Float[Tensor, "batch visible patch"] | Float[Tensor, "rows patch"]:
    """Cut out the visible patches only; no other pixel of contiguous images is read.

    For the masked patches pass `~mask` (`mask.complement()` under `torch.compile`).

    Args:
        images: Floats, or uint8 in [0, 255], which is converted to float32 in [0, 1] first. With a
            `RaggedMask`, also a list of images [channels, *spatial] of any sizes.
        mask: Which patches to take; its grid is that of the images. With a `RaggedMask`, the result
            is packed: the patches of all samples, concatenated.
        patch_size: Pixels per patch; one integer, or one per spatial axis.
        mean: One value per channel to subtract; from uint8 images, after the conversion.
        std: One value per channel to divide by afterwards. Both are applied in float32 (in float64
            if the images are).
        order: Order of the values inside a patch (see `patchify`).

    Returns:
        The visible patches: floats, in ascending order of position.

    Raises:
        TypeError: If the images are neither floats nor uint8.
        ValueError: If the mask does not fit the images, or the number of channel statistics is
            wrong.

    Source:
        mimkit's own, with the values of MAE's `patchify`. The authors embed or cut out all patches,
        then drop the masked ones.

    Example:
        >>> from mimkit.masking import Mask, RaggedMask
        >>> images = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2) * 85
        >>> mask = Mask.from_visible_ids(torch.tensor([[1, 2]]), (2, 2))
        >>> gather_patches(images, mask, 1)[0, :, 0]
        tensor([0.3333, 0.6667])
    """
    if isinstance(mask, RaggedMask):
        options: dict[str, Any] = {"mean": mean, "std": std, "order": order}
        samples = each_sample(images, mask)
        return torch.cat([gather_patches(*pair, patch_size, **options)[0] for pair in samples])
    images = check_stacked(images)
    check_pixels(images)
    grid = grid_of(images, patch_size)
    check_mask(mask, grid, images)
    patch = per_axis("patch_size", patch_size, len(grid))
    return kernels.gather_patches(
        images,
        mask.visible_ids,
        patch,
        mean=channel_statistic("mean", mean, images),
        std=channel_statistic("std", std, images),
        channels_last=is_channels_last(order),
    )


def _pattern(patch: Grid, order: Order) -> tuple[str, dict[str, int]]:
    """Return the einops pattern from images to patches, and the sizes that it needs."""
    axes = range(1, len(patch) + 1)
    image_side = "b c " + " ".join(f"(h{axis} p{axis})" for axis in axes)
    tokens = " ".join(f"h{axis}" for axis in axes)
    pixels = " ".join(f"p{axis}" for axis in axes)
    inner = f"{pixels} c" if is_channels_last(order) else f"c {pixels}"
    sizes = {f"p{axis}": size for axis, size in zip(axes, patch, strict=True)}
    return f"{image_side} -> b ({tokens}) ({inner})", sizes
