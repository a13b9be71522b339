"""Arrays from files: signals, pictures of any channels, and volumes.

Axes: channels, *spatial (one to three). A file holds an array with a channel axis or without; how
many spatial axes it has, `--image-size` says, or the kind of file.
"""

from __future__ import annotations

import gzip
import io
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from recipes.engine.data.decode import open_picture
from recipes.engine.data.images import (
    PICTURE_SIZE,
    CenterCrops,
    Crop,
    Cropping,
    NormalizeByConstants,
    Pixels,
    model_inputs,
    picture_size,
)
from recipes.engine.data.listing import MAX_FILE_BYTES, Samples
from recipes.engine.data.sets import StoredSet, check_readable
from recipes.engine.data.statistics import Statistics
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng

TIFF = (".tif", ".tiff")
# Endings of files of arrays. TIFF files and other pictures can be read as arrays, too.
SUFFIXES = (".npy", ".npz", ".nii", ".nii.gz", ".wav")
_PACKAGES = {
    ".nii": "nibabel",
    ".gz": "nibabel",
    ".wav": "soundfile",
    **dict.fromkeys(TIFF, "tifffile"),
}
_MOST_AXES = 3

Values = NDArray[Any]
Channels = Literal["rgb", "keep"]
CropName = Literal["random", "whole"]


@dataclass(frozen=True)
class ArrayOptions:
    """How files are read that may be arrays.

    Attributes:
        channels: As in `split_folder`.
        crop: "random" boxes as they are stored, or the "whole" array, resampled; None for what fits
            the files.
        key: Name of the array in `.npz` files.
    """

    channels: Channels | None = None
    crop: CropName | None = None
    key: str | None = None


AS_FITS = ArrayOptions()


class Stored(NamedTuple):
    """An array as a file holds it.

    Attributes:
        values: The array; of a `.npy` file, mapped into memory.
        num_axes: Number of its spatial axes, if `--image-size` does not say.
        channels_last: Whether a channel axis is the last one; otherwise it is the first.
    """

    values: Values
    num_axes: int
    channels_last: bool = False


# Reading


def open_array(file: IO[bytes], name: str, key: str | None = None) -> Stored:
    """Open the array in a file.

    Args:
        file: The file.
        name: Its name, whose ending says what it is.
        key: Name of the array in a `.npz` file; not needed if it holds one array.

    Raises:
        UnreadableError: If it is damaged, or holds no array of numbers.
        UserError: If the package that reads it is not installed.
    """
    suffix = re.search(r"\.[^./]*$", name.lower())
    read = _READERS.get(suffix[0] if suffix else "", _read_picture)
    try:
        stored = _read_npz(file, key) if read is _read_npz else read(file)
    except UnreadableError:
        raise
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(suffix[0] if suffix else "")
        if package is None or error.name != package:
            raise UnreadableError(f"it needs the package {error.name}") from error
        raise UserError(
            f'{name} needs {package}: pip install {package}, or pip install "mimkit[arrays]"'
        ) from None
    except Exception as error:  # readers raise errors of many kinds for damaged files
        text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", " ".join(str(error).split()))
        raise UnreadableError(text[:200] or type(error).__name__) from error
    _check_type(stored.values.dtype)
    if stored.values.size == 0:
        raise UnreadableError("it has no values")
    return stored


def _check_type(dtype: np.dtype[Any]) -> None:
    if dtype.kind == "c":
        raise UnreadableError(
            "its values are complex: store real and imaginary parts as two channels"
        )
    if dtype.hasobject:
        raise UnreadableError("it holds Python objects, which are not read")
    if dtype.kind not in "biuf":
        raise UnreadableError(f"its values have the type {dtype}, which is no number")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array in NumPy's format: shape, whether in Fortran's order, type."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise UnreadableError(f"its format is version {version[0]}.{version[1]} of .npy")
    shape, is_fortran, dtype = read(file)
    _check_type(dtype)
    return shape, is_fortran, dtype


def _from_header(
    file: IO[bytes], get: Callable[[int, tuple[int, ...], np.dtype[Any], str], Values]
) -> Stored:
    shape, is_fortran, dtype = _header(file)
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        raise UnreadableError("it has no values")
    values = get(num_bytes, shape, dtype, "F" if is_fortran else "C")
    return Stored(values, max(1, len(shape) - 1))


def _read_npy(file: IO[bytes]) -> Stored:
    """Map an array into memory: only what is used of it is read."""

    def mapped(num_bytes: int, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> Values:
        start = file.tell()
        if file.seek(0, io.SEEK_END) < start + num_bytes:
            raise UnreadableError("it ends early")
        if isinstance(file, io.BytesIO):
            flat = np.frombuffer(file.getvalue(), dtype, math.prod(shape), start)
            return flat.reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]
        return np.memmap(file, dtype, "r", start, shape, order)  # type: ignore[call-overload,no-any-return]

    return _from_header(file, mapped)


def _read_npz(file: IO[bytes], key: str | None) -> Stored:
    with zipfile.ZipFile(file) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if key is None and len(names) != 1:
            raise UnreadableError(
                f"it holds {len(names)} arrays ({', '.join(names[:5])}): name one with --array-key"
            )
        if key is not None and key not in names:
            raise UnreadableError(f"it holds no array {key!r}, but {', '.join(names[:5])}")
        name = archive.namelist()[0 if key is None else names.index(key)]
        with archive.open(name) as content:

            def read(n: int, shape: tuple[int, ...], dtype: np.dtype[Any], order: str) -> Values:
                _check_bytes(n)
                data = content.read(n + 1)  # to its end, where zipfile compares the checksum
                if len(data) != n:
                    raise UnreadableError("an array in it does not have the size it should have")
                return np.frombuffer(data, dtype).reshape(shape, order=order)  # type: ignore[call-overload,no-any-return]

            return _from_header(content, read)


def _read_nifti(file: IO[bytes]) -> Stored:
    import nibabel

    _silence("nibabel.global")
    data = _content(file)
    if data.startswith(b"\x1f\x8b"):
        data = _unzipped(data)
    is_second = 540 in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big"))
    kind = nibabel.Nifti2Image if is_second else nibabel.Nifti1Image
    image = kind.from_bytes(data)
    _check_type(image.get_data_dtype())  # type: ignore[no-untyped-call]
    values = np.asarray(image.dataobj)
    while values.ndim > 1 and values.shape[-1] == 1:
        values = values[..., 0]
    return Stored(values, min(values.ndim, _MOST_AXES), channels_last=True)


def _unzipped(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as content:
        try:
            found = content.read(MAX_FILE_BYTES + 1)
        except (EOFError, zlib.error) as error:
            raise UnreadableError("it ends early, or is damaged") from error
    _check_bytes(len(found))
    return found


def _read_wav(file: IO[bytes]) -> Stored:
    import soundfile

    data = _content(file)
    length = int.from_bytes(data[4:8], "little")
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UnreadableError("it is not a WAVE file")
    if length != 2**32 - 1 and length + 8 > len(data):
        raise UnreadableError("it ends early")
    samples, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return Stored(samples, 1, channels_last=True)


def _read_tiff(file: IO[bytes]) -> Stored:
    import tifffile

    _silence("tifffile")
    data = _content(file)
    with tifffile.TiffFile(io.BytesIO(data)) as content:
        # Files of tifffile, which say that their pages are alike: of a 13-band stack, reading all
        # that the first page says of itself again for each page took three quarters of the time.
        content.pages.useframes = bool(content.is_shaped)
        series = content.series[0]
        _check_bytes(math.prod(series.shape) * series.dtype.itemsize)
        for page in series.pages:
            places = () if page is None else zip(page.dataoffsets, page.databytecounts, strict=True)
            if any(start + size > len(data) for start, size in places):
                raise UnreadableError("it ends early")
        values, axes = series.asarray(), series.axes
    for letter in "SC":  # samples of a pixel, channels
        if letter in axes:
            values = np.moveaxis(values, axes.index(letter), 0)
            break
    return Stored(values, 3 if "Z" in axes else 2)


def _read_picture(file: IO[bytes]) -> Stored:
    """Read a picture with the channels and bits that it has; the colors of a palette are RGB."""
    with open_picture(_content(file)) as image:
        if image.mode in ("P", "PA"):
            values = np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))
        else:
            values = np.array(image)
    return Stored(values, 2, channels_last=True)


def _silence(name: str) -> None:
    """Let a package not print what it finds odd in a file: damage is reported by us."""
    logger = logging.getLogger(name)
    if logger.level != logging.CRITICAL:
        logger.setLevel(logging.CRITICAL)


def _content(file: IO[bytes]) -> bytes:
    data = file.read(MAX_FILE_BYTES + 1)
    _check_bytes(len(data))
    if not data:
        raise UnreadableError("it is empty")
    return data


def _check_bytes(number: int) -> None:
    if number > MAX_FILE_BYTES:
        raise UnreadableError(f"it has more than {MAX_FILE_BYTES:,} bytes")


_READERS: dict[str, Callable[..., Stored]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".nii": _read_nifti,
    ".gz": _read_nifti,
    ".wav": _read_wav,
    **dict.fromkeys(TIFF, _read_tiff),
}


def with_channels(stored: Stored, num_axes: int) -> Values:
    """Return an array as [channels, *spatial].

    Raises:
        UnreadableError: If it has another number of axes.
    """
    values = stored.values
    if values.ndim == num_axes:
        return values[None]
    if values.ndim != num_axes + 1:
        raise UnreadableError(
            f"it has the shape {values.shape}: {num_axes} axes, and one of channels, are needed"
        )
    return np.moveaxis(values, -1, 0) if stored.channels_last else values


def to_tensor(values: Values) -> Shaped[Tensor, channels * spatial]:
    """Copy values: bytes as uint8, others as float32.

    Raises:
        UnreadableError: If a value is not finite.
    """
    if values.dtype == np.uint8 or values.dtype == np.bool_:
        return torch.from_numpy(np.array(values, np.uint8, order="C"))
    with np.errstate(over="ignore"):
        numbers = np.array(values, np.float32, order="C")
    if not np.isfinite(numbers).all():
        raise UnreadableError("it has values that are not finite (NaN or infinite)")
    return torch.from_numpy(numbers)


# Crops


class ArrayCrop(Protocol):
    """Cuts a tensor of a size out of an array."""

    def __call__(
        self, values: Values, size: tuple[int, ...], rng: np.random.Generator
    ) -> Shaped[Tensor, channels * size]:
        """Crop an array [channels, *spatial]."""


def random_box(values: Values, size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Cut out a box at a random place; nothing is resized or flipped."""
    return _box(values, size, [int(rng.integers(n + 1)) for n in _margins(values, size)])


def center_box(values: Values, size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Cut out the central box."""
    return _box(values, size, [margin // 2 for margin in _margins(values, size)])


def whole(values: Values, size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Resample the whole array to a size: linearly, antialiased, axis by axis."""
    crop = to_tensor(values)
    if crop.shape[1:] == size:
        return crop
    numbers = crop.float()
    for axis, length in enumerate(size, 1):
        # As the last axis of four: with one column, PyTorch 2.13 mixes up the values.
        rows = numbers.movedim(axis, -1)
        flat = rows.reshape(1, -1, 1, rows.shape[-1]).contiguous()
        flat = F.interpolate(flat, (1, length), mode="bilinear", antialias=True)
        numbers = flat.reshape(*rows.shape[:-1], length).movedim(-1, axis)
    return numbers.round().to(torch.uint8) if crop.dtype == torch.uint8 else numbers


@dataclass(frozen=True)
class AsPicture:
    """Crops and resizes a picture as the papers do.

    Attributes:
        crop: A crop of pictures.
    """

    crop: Cropping

    def __call__(self, values: Values, size: tuple[int, ...], rng: np.random.Generator) -> Tensor:
        """Crop an array of two spatial axes."""
        pixels = to_tensor(values).permute(1, 2, 0).numpy()
        return self.crop(pixels, (size[0], size[1]), rng)


@dataclass(frozen=True)
class OfArray:
    """Crops a picture as an array.

    Attributes:
        crop: A crop of arrays.
    """

    crop: ArrayCrop

    def __call__(self, pixels: Pixels, size: tuple[int, int], rng: np.random.Generator) -> Crop:
        """Crop the pixels of a picture."""
        return self.crop(pixels.transpose(2, 0, 1), size, rng)


def _margins(values: Values, size: tuple[int, ...]) -> list[int]:
    """Return for each axis how many points are left.

    Raises:
        UnreadableError: If an axis is shorter than the box.
    """
    margins = [n - side for n, side in zip(values.shape[1:], size, strict=True)]
    if min(margins) < 0:
        raise UnreadableError(
            f"it has {shown_shape(values.shape[1:])} points, less than the {shown_shape(size)} of "
            "a crop: give a smaller --image-size, or --crop whole"
        )
    return margins


def _box(values: Values, size: tuple[int, ...], start: list[int]) -> Tensor:
    box = tuple(slice(at, at + side) for at, side in zip(start, size, strict=True))
    return to_tensor(values[:, *box])


def shown_shape(shape: tuple[int, ...]) -> str:
    """Return sizes as "32 x 64"."""
    return " x ".join(map(str, shape))


CROPS: dict[CropName, ArrayCrop] = {"random": random_box, "whole": whole}


def evaluation_crop(crop: ArrayCrop) -> ArrayCrop:
    """Return what test samples are cropped by: the whole, the central box, the central crop."""
    if isinstance(crop, AsPicture):
        return AsPicture(CenterCrops())
    return whole if crop is whole else center_box


# The data set


@dataclass(frozen=True, eq=False, kw_only=True)
class Arrays(StoredSet):
    """Crops of stored arrays, as bytes (uint8) or float32.

    Attributes:
        crop: How they are cropped.
        key: Name of the array in `.npz` files.
        statistics: What inputs are normalised by; None until they are measured.
    """

    crop: ArrayCrop
    key: str | None = None
    statistics: Statistics | None = None

    def _crop(self, epoch: int, sample_id: int) -> Tensor:
        values = read_array(self.samples, sample_id, len(self.image_size), self.key)
        if len(values) != self.num_channels:
            raise UnreadableError(f"it has {len(values)} channels, others have {self.num_channels}")
        if values.dtype not in (np.uint8, np.bool_) and self.dtype == torch.uint8:
            raise UnreadableError(f"its values have the type {values.dtype}, others have uint8")
        if values.dtype in (np.uint8, np.bool_) and self.dtype != torch.uint8:
            raise UnreadableError(f"its values have the type {values.dtype}, others have more bits")
        return self.crop(values, self.image_size, sample_rng(self.seed, epoch, sample_id))

    def to_inputs(
        self, images: Shaped[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch channels *spatial"]:
        """Normalise each channel by the mean and deviation of the data set."""
        assert self.statistics is not None
        if images.dtype == torch.uint8:
            return model_inputs(images, self.statistics.of_fractions())
        return self.statistics.normalize(images.float())

    @property
    def byte_statistics(self) -> NormalizeByConstants | None:
        """Mean and deviation of the data set, if it holds bytes."""
        if self.dtype != torch.uint8 or self.statistics is None:
            return None
        return self.statistics.of_fractions()

    def picture_size(self, sample_id: int) -> tuple[int, ...]:
        """Return the size of a picture to be shown: as many whole crops as fit, one of a volume."""
        size = self.image_size
        if isinstance(self.crop, AsPicture):
            return picture_size((size[0], size[1]))
        try:
            shape = read_array(self.samples, sample_id, len(size), self.key).shape[1:]
        except UnreadableError:
            return size
        if self.crop is whole or len(size) == _MOST_AXES:
            return size
        return tuple(
            side * max(1, min(n, PICTURE_SIZE) // side) for n, side in zip(shape, size, strict=True)
        )

    def describe(self, sample_id: int) -> str:
        """Return the path of an array, and why it cannot be read, if it cannot."""
        try:
            self._crop(0, sample_id)
        except UnreadableError as error:
            return f"{self.samples.name(sample_id)} ({error})"
        return self.samples.name(sample_id)


def read_array(samples: Samples, index: int, num_axes: int, key: str | None) -> Values:
    """Return the array of a sample as [channels, *spatial].

    Raises:
        UnreadableError: If it cannot be read, or has another number of axes.
    """
    with samples.open(index) as file:
        return with_channels(open_array(file, samples.name(index), key), num_axes)


def open_arrays(
    samples: Samples,
    image_size: int | tuple[int, ...],
    crop: ArrayCrop,
    *,
    key: str | None,
    seed: int,
) -> Arrays:
    """Make a data set of arrays; the first one that can be read says what the others must be like.

    Args:
        samples: The files.
        image_size: Points per axis of a crop; one integer if it is the same on every axis.
        crop: How arrays are cropped.
        key: Name of the array in `.npz` files.
        seed: Seed of the run.

    Raises:
        UserError: If too many cannot be read.
    """
    failed: dict[int, str] = {}
    for index in range(len(samples)):
        try:
            with samples.open(index) as file:
                stored = open_array(file, samples.name(index), key)
            num_axes = len(image_size) if isinstance(image_size, tuple) else stored.num_axes
            if num_axes > _MOST_AXES:
                raise UnreadableError(f"it has {num_axes} axes beside the channels, more than 3")
            values = with_channels(stored, num_axes)
        except UnreadableError as error:
            failed[index] = str(error)
            check_readable(_Failed(samples, (), seed, reasons=failed), failed)
            continue
        size = image_size if isinstance(image_size, tuple) else (image_size,) * num_axes
        dtype = torch.uint8 if values.dtype in (np.uint8, np.bool_) else torch.float32
        return Arrays(samples, size, seed, len(values), dtype, crop=crop, key=key)
    raise AssertionError("check_readable has raised")


@dataclass(frozen=True, eq=False, kw_only=True)
class _Failed(StoredSet):
    """Samples that cannot be opened, to be named."""

    reasons: dict[int, str]

    def describe(self, sample_id: int) -> str:
        """Return the path of a sample, and why it cannot be opened."""
        return f"{self.samples.name(sample_id)} ({self.reasons[sample_id]})"


def for_evaluation(train: Arrays, samples: Samples) -> Arrays:
    """Return held-out samples, cropped without chance."""
    return replace(train, samples=samples, crop=evaluation_crop(train.crop))
