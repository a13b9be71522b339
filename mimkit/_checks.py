"""Checks of arguments that several rooms share, and small helpers for shapes and dtypes.

Axes: batch; channels; *spatial (one to three axes); patch (the values of one patch).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

import mimkit_kernels as kernels
from mimkit._arguments import describe
from mimkit._grids import Grid, count_tokens, divide, per_axis
from mimkit._settings import can_read_values, settings
from mimkit.masking import Mask, RaggedMask

Order = Literal["p1 p2 c", "c p1 p2"]
_CLASSES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_classes(name: str, target: Integer[Tensor, "..."], num_classes: int) -> None:
    """Check that classes are integers in [0, num_classes).

    Values are checked on a CPU, where that is cheap, and with `mimkit.use(check=True)`.

    Raises:
        TypeError: If the values are not integers.
        ValueError: If a value is out of range.
    """
    if target.dtype not in _CLASSES:
        is_stored = target.dtype in (torch.uint16, torch.uint32, torch.uint64)
        only = ", in which PyTorch computes nothing" if is_stored else ""
        raise TypeError(f"{name} must be integers; got {target.dtype}{only}")
    if (can_read_values(target) or settings.check) and target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"{name} must be in [0, {num_classes}); got {low} to {high}")


def check_even(mask: object) -> None:
    """Check that `mask` is a `Mask`: one grid and one count for all samples.

    Raises:
        TypeError: If it is a `RaggedMask`, or not a mask at all.
    """
    if isinstance(mask, RaggedMask):
        raise TypeError(f"this needs a Mask, of one grid and one count for all samples; got {mask}")
    if not isinstance(mask, Mask):
        raise TypeError(
            f"mask must be a Mask, from a sampler or Mask.from_bool; got {describe(mask)}"
        )


def check_mask(
    mask: Mask, grid: Sequence[int], samples: Shaped[Tensor, "batch ..."], name: str = "images"
) -> None:
    """Check that a mask has the grid, the batch size and the device of `samples`.

    Raises:
        TypeError: If the mask is a `RaggedMask`.
        ValueError: If the grids differ; also what `check_batch` raises.
    """
    check_even(mask)
    if mask.grid != tuple(grid):
        raise ValueError(f"the mask has grid {mask.grid}, but {name} have grid {tuple(grid)}")
    _check_batch_size(mask, samples, name)


def check_batch(mask: Mask, samples: Shaped[Tensor, "batch ..."], name: str) -> None:
    """Check that a mask has the batch size and the device of `samples`.

    Raises:
        TypeError: If the mask is a `RaggedMask`.
        ValueError: If the batch sizes or the devices differ, or (with `mimkit.use(check=True)`) the
            ids are wrong.
    """
    check_even(mask)
    _check_batch_size(mask, samples, name)


def _check_batch_size(mask: Mask, samples: Tensor, name: str) -> None:
    # `len` would fix the batch size of an exported program.
    if isinstance(samples, Tensor) and not samples.ndim:
        raise ValueError(f"{name} must have a batch axis; got a single number")
    if isinstance(samples, Tensor) and mask.batch_size != samples.shape[0]:
        raise ValueError(f"the mask has {mask.batch_size} samples, but {name} has {len(samples)}")
    check_device(mask, samples, name)


def check_device(mask: Mask | RaggedMask, samples: Shaped[Tensor, "..."], name: str) -> None:
    """Check that a mask is on the device of `samples`.

    Raises:
        TypeError: If the samples are not a tensor.
        ValueError: If the devices differ, or (with `mimkit.use(check=True)`) the ids are wrong.
    """
    if not isinstance(samples, Tensor):
        raise TypeError(f"{name} must be a tensor; got {describe(samples)}")
    if mask.device != samples.device:
        raise ValueError(
            f"the mask is on {mask.device}, but {name} on {samples.device}: "
            "draw it there, or move it with mask.to(device)"
        )
    if settings.check:
        mask.validate()


def check_rows(
    name: str,
    rows: Shaped[Tensor, "rows ..."],
    mask: RaggedMask,
    expected: int,
    dim: int | None = None,
) -> None:
    """Check the number of packed rows, their device, and their width if `dim` is given.

    Raises:
        ValueError: If one of them is wrong, or (with `mimkit.use(check=True)`) the ids are wrong.
    """
    if rows.ndim < 2 or len(rows) != expected or dim not in (None, rows.shape[1]):
        width = "..." if dim is None else dim
        raise ValueError(
            f"{name} must be [{expected}, {width}] for mask {mask}; got {tuple(rows.shape)}"
        )
    check_device(mask, rows, name)


def check_stacked(
    images: Shaped[Tensor, "batch channels *spatial"] | Sequence[Tensor],
) -> Shaped[Tensor, "batch channels *spatial"]:
    """Check that images are one tensor, and return it.

    Raises:
        TypeError: If it is a list of tensors, or anything else.
    """
    if isinstance(images, list | tuple):
        raise TypeError("a list of images needs a RaggedMask; stack images of one size for a Mask")
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor; got {describe(images)}")
    return images


def check_axes(
    images: Shaped[Tensor, "..."], patch_size: int | Sequence[int], name: str = "images"
) -> None:
    """Check that images have one to three spatial axes: one for each size of a patch.

    Raises:
        ValueError: If they have another number of axes.
    """
    if not 3 <= images.ndim <= 5:
        raise ValueError(
            f"{name} must be [batch, channels] and one to three spatial axes; "
            f"got shape {tuple(images.shape)}"
        )
    if isinstance(patch_size, Sequence) and len(patch_size) != images.ndim - 2:
        hint = ": a single image needs a batch axis, images.unsqueeze(0)"
        raise ValueError(
            f"{name} must be [batch, channels, ...] for patch_size={patch_size!r}; got "
            f"{tuple(images.shape)}{hint if len(patch_size) == images.ndim - 1 else ''}"
        )


def check_pixels(images: Shaped[Tensor, "..."]) -> None:
    """Check that pixels have a dtype whose range is known.

    Raises:
        TypeError: If they are neither floats nor uint8.
    """
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floats or uint8; got {images.dtype}")


def as_floats(images: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert uint8 images to float32 in [0, 1]; return floats unchanged.

    Raises:
        TypeError: If they have another dtype.
    """
    check_pixels(images)
    return images / 255 if images.dtype == torch.uint8 else images


def check_no_nan(name: str, values: Shaped[Tensor, "..."], *, always: bool = False) -> None:
    """Check that values contain no NaN: on a CPU, with `mimkit.use(check=True)`, or always.

    Raises:
        ValueError: If they do, or are on the meta device, which holds no values.
    """
    if always and values.is_meta:
        raise ValueError(f"{name} must hold values; got a tensor on the meta device")
    is_wanted = always or settings.check or can_read_values(values)
    if is_wanted and bool(values.isnan().any()):
        raise ValueError(f"{name} must not contain NaN; got {int(values.isnan().sum())} of them")


def check_values(
    values: Float[Tensor, "batch masked patch"],
    images: Shaped[Tensor, "batch channels *spatial"],
    points: int | Sequence[int],
    name: str = "values",
) -> None:
    """Check that there is one value per channel and point of a patch.

    Raises:
        ValueError: If there is another number of values.
    """
    check_axes(images, points)
    expected = images.shape[1] * count_tokens(per_axis("patch_size", points, images.ndim - 2))
    if values.shape[2] != expected:
        raise ValueError(
            f"{name} must be [batch, masked, {expected}] for images {tuple(images.shape)}; got "
            f"{tuple(values.shape)}"
        )


def check_num_images(
    images: Shaped[Tensor, "batch ..."] | Sequence[Tensor], mask: RaggedMask
) -> None:
    """Check that there is one image per sample of a mask.

    Raises:
        ValueError: If the numbers of images and samples differ.
    """
    if len(images) != mask.batch_size:
        raise ValueError(
            f"the mask has {mask.batch_size} samples, but there are {len(images)} images"
        )


def each_sample(
    images: Shaped[Tensor, "batch channels *spatial"] | Sequence[Shaped[Tensor, "channels ..."]],
    mask: RaggedMask,
) -> Iterator[tuple[Shaped[Tensor, "1 channels ..."], Mask]]:
    """Yield each image with its mask, as batches of one.

    Raises:
        ValueError: If the numbers of images and samples differ, or the images' numbers of channels.
    """
    check_num_images(images, mask)
    channels = {image.shape[:1] for image in images}
    if len(channels) > 1:
        raise ValueError(
            f"images must have one number of channels; got {sorted(n for (n,) in channels)}"
        )
    for image, sample_mask in zip(images, mask.unbind(), strict=True):
        yield image.unsqueeze(0), sample_mask


def channel_statistic(
    name: str, values: Sequence[float] | Tensor | None, images: Shaped[Tensor, "batch channels ..."]
) -> list[float] | Tensor | None:
    """Check that there is one value per channel, and return the values: a sequence as a list.

    Raises:
        ValueError: If the numbers of values and channels differ.
    """
    if values is None:
        return None
    # A tensor that is made of the numbers would be one on the CPU in a compiled graph.
    is_list = isinstance(values, list | tuple)
    shape = (len(values),) if is_list else torch.as_tensor(values).shape
    if shape != (images.shape[1],):
        raise ValueError(
            f"{name} must hold one value for each of {images.shape[1]} channels of the images; "
            f"got shape {tuple(shape)}"
        )
    return values if isinstance(values, Tensor) else list(values)


def byte_statistics(
    images: Shaped[Tensor, "..."] | Sequence[Shaped[Tensor, "..."]],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Sequence[float] | None]:
    """Return `mean` and `std` as options of what reads patches; for uint8 images only.

    Raises:
        TypeError: If a list holds both uint8 and other images.
    """
    dtypes = {image.dtype for image in ([images] if isinstance(images, Tensor) else images)}
    if mean is None or torch.uint8 not in dtypes:
        return {}
    if len(dtypes) > 1:
        raise TypeError(
            "with normalize_bytes, images must all be uint8, or none of them; got "
            f"{', '.join(sorted(map(str, dtypes)))}"
        )
    return {"mean": mean, "std": std}


def check_can_normalize(patches: Float[Tensor, "batch masked patch"]) -> None:
    """Check that patches have more than one value, so that their unbiased variance exists.

    Raises:
        ValueError: If patches have a single value.
    """
    if patches.shape[-1] < 2:
        raise ValueError("a patch of a single value cannot be normalised: its variance is 0 / 0")


def patch_statistics(
    patches: Float[Tensor, "batch masked patch"],
) -> tuple[Float[Tensor, "batch masked 1"], Float[Tensor, "batch masked 1"]]:
    """Return the mean and standard deviation of each patch, as in MAE's normalisation.

    Raises:
        ValueError: If patches have a single value.
    """
    check_can_normalize(patches)
    return kernels.patch_statistics(patches)


def is_channels_last(order: str) -> bool:
    """Whether `order` is "p1 p2 c".

    Raises:
        ValueError: If the order is unknown.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be one of {get_args(Order)}; got {order!r}")
    return order == "p1 p2 c"


def cell_of(
    feature_map: Shaped[Tensor, "batch channels *spatial"], mask: Mask, name: str = "feature_map"
) -> Grid:
    """Return how many positions of a feature map, per axis, belong to one token of the mask.

    Raises:
        ValueError: If the mask has another number of axes, or does not fit the feature map.
    """
    check_batch(mask, feature_map, name)
    return divide(name, feature_map.shape[2:], mask.grid, "the grid of the mask")
