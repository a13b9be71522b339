"""From the bytes of an image file to pixels."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError

try:
    import simplejpeg
except ModuleNotFoundError:  # Pillow decodes the same pixels, but accepts damaged JPEG files.
    simplejpeg = None

Orientation = Literal["ignore", "apply"]
Background = Literal["black", "gray", "white"]

# Formats of Pillow by their suffixes. The others are not tried: some run other programs.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k"),
    "AVIF": (".avif",),
}
_OPTIONAL = {"WEBP": "webp", "JPEG2000": "jpg_2000", "AVIF": "avif"}

# More are refused before they are decoded. The number is Pillow's.
MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112
# EXIF orientations that swap the axes of the stored pixels, and then reverse rows or columns.
TRANSPOSED, UPSIDE_DOWN, MIRRORED = (5, 6, 7, 8), (3, 4, 7, 8), (2, 3, 6, 7)
_BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}


@cache
def formats() -> dict[str, tuple[str, ...]]:
    """Return the formats that this Pillow reads, with their suffixes in lower case."""
    return {
        name: suffixes
        for name, suffixes in _FORMATS.items()
        if name not in _OPTIONAL or features.check(_OPTIONAL[name])
    }


@contextlib.contextmanager
def open_picture(data: bytes, *kinds: str) -> Iterator[Image.Image]:
    """Open a picture with Pillow.

    Args:
        data: Content of a file.
        kinds: Formats to try; by default `formats`.

    Raises:
        UnreadableError: If it is damaged, too large, or of another format, also found out later in
            the context.
    """
    _silence_pillow()
    try:
        with Image.open(io.BytesIO(data), formats=kinds or tuple(formats())) as image:
            _check_size(image.width, image.height)
            yield image
    except (UnreadableError, UserError):
        raise
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        raise UnreadableError(_reason(error)) from error


@cache
def _silence_pillow() -> None:
    """Let Pillow not print what it finds odd in a file: what cannot be read, we report."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True)
class Decoder:
    """Decode an image file as RGB.

    Of a file with several pictures, the first is decoded.

    Attributes:
        orientation: "ignore" decodes pixels as they are stored, as the papers' loaders do; "apply"
            turns them as the EXIF orientation tag says.
        background: Color under transparent pixels.
        value_range: Values that become black and white in pictures of more than 8 bits per channel;
            by default the whole range of 16 bits.
    """

    orientation: Orientation = "ignore"
    background: Background = "black"
    value_range: tuple[float, float] | None = None

    def __call__(self, data: bytes) -> UInt8[np.ndarray, "height width 3"]:
        """Decode the content of a file.

        Raises:
            UnreadableError: If it is damaged, too large, or not an image.
        """
        if not data:
            raise UnreadableError("it is empty")
        try:
            pixels = self._decode_jpeg(data) if data.startswith(b"\xff\xd8") else None
            return self._decode_with_pillow(data) if pixels is None else pixels
        except UnreadableError:
            raise
        except Exception as error:  # decoders raise errors of many kinds for damaged files
            raise UnreadableError(_reason(error)) from error

    def turn(self, data: bytes) -> int:
        """Return the EXIF orientation by which a JPEG file is turned, from 1 to 8."""
        return _orientation_of(data) if self.orientation == "apply" else 1

    def _decode_jpeg(self, data: bytes) -> UInt8[np.ndarray, "height width 3"] | None:
        """Decode a JPEG file with simplejpeg; return None if it is for Pillow."""
        if simplejpeg is None:
            return None
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colors not in ("YCbCr", "RGB", "Gray"):  # CMYK
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return turned(pixels, self.turn(data))

    def _decode_with_pillow(self, data: bytes) -> UInt8[np.ndarray, "height width 3"]:
        with open_picture(data) as file:
            image: Image.Image = file
            if self.orientation == "apply":
                image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                return self._from_many_bits(image)
            if image.has_transparency_data:
                above = image.convert("RGBA")
                image = Image.new("RGBA", above.size, (*_BACKGROUNDS[self.background], 255))
                image.alpha_composite(above)
            return np.array(image.convert("RGB"))

    def _from_many_bits(self, image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
        """Scale gray values of more than 8 bits; Pillow would clip them."""
        values = np.asarray(image, dtype=np.float64)
        if self.value_range is None and not image.mode.startswith("I;16"):
            raise UnreadableError("its values have 32 bits: give their range with --value-range")
        low, high = self.value_range or (0.0, 65_535.0)
        if not np.isfinite(values).all():
            raise UnreadableError("it has values that are not finite")
        scaled = ((values - low) / (high - low)).clip(0, 1)
        gray = np.round(scaled * 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)


DECODE = Decoder()


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if width * height == 0:
        raise UnreadableError("it has no pixels")


def _orientation_of(data: bytes) -> int:
    with open_picture(data, "JPEG") as file:
        value = file.getexif().get(_ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def turned(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "h w 3"]:
    """Turn pixels as an EXIF orientation, from 1 to 8, says."""
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if orientation in UPSIDE_DOWN else 1
    columns = -1 if orientation in MIRRORED else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _reason(error: Exception) -> str:
    """Describe an error of a decoder in one line, without addresses of objects."""
    if "cannot identify" in str(error):
        return "it is not an image in a known format"
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", " ".join(str(error).split()))
    return text[:200] or type(error).__name__
