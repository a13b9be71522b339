"""Image files to pixels: formats, modes, damage, limits; and crops beside Pillow's."""

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

from recipes import pack
from recipes.engine import pictures
from recipes.engine.data import decode as decode_module
from recipes.engine.data.arrays import open_array
from recipes.engine.data.decode import DECODE, Decoder, formats
from recipes.engine.data.images import CenterCrops, resize
from recipes.engine.data.photos import read_photo
from recipes.engine.data.segmented import read_labels
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError

SUFFIXES = [suffix for some in formats().values() for suffix in some]


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def noise(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def photo_jpeg() -> bytes:
    return encoded(read_photo("chelsea.png"), "JPEG", quality=92)


@pytest.mark.parametrize("format_name", list(formats()))
def test_every_format_gives_pixels_that_can_be_written_to(format_name):
    pixels = DECODE(encoded(noise(20, 30), format_name))
    assert pixels.shape == (20, 30, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable


def test_formats_that_this_pillow_cannot_read_are_not_listed(monkeypatch):
    formats.cache_clear()
    monkeypatch.setattr(decode_module.features, "check", lambda name: name != "avif")
    try:
        assert "AVIF" not in formats()
        assert "WEBP" in formats()
    finally:
        formats.cache_clear()


@pytest.mark.parametrize(
    ("mode", "format_name"),
    [(mode, "JPEG") for mode in ("L", "RGB", "CMYK")]
    + [(mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    + [(mode, "TIFF") for mode in ("L", "I;16", "I;16B", "RGB", "CMYK")],
)
def test_every_color_mode_becomes_rgb(mode, format_name):
    smooth = Image.linear_gradient("L").resize((40, 30))
    expected = np.asarray(smooth.convert("RGB"), dtype=int)
    if mode.startswith("I;16"):
        values = np.asarray(smooth).astype(np.uint16) * 257
        stored = Image.fromarray(values)
        if mode == "I;16B":
            stored = Image.frombytes("I;16B", smooth.size, values.astype(">u2").tobytes())
    elif mode in ("1", "P", "LA"):
        stored = smooth.convert(mode)
    else:
        stored = smooth.convert("RGB").convert(mode)
    pixels = DECODE(encoded(stored, format_name))
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.mean() < (130 if mode == "1" else 2)


def test_16_bits_keep_their_range_and_a_given_range_is_stretched():
    values = np.linspace(0, 4095, 20 * 30).reshape(20, 30).astype(np.uint16)
    file = encoded(Image.fromarray(values), "PNG")
    assert DECODE(file).max() == round(4095 / 65535 * 255)
    pixels = Decoder(value_range=(0, 4095))(file)
    assert pixels.max() == 255
    np.testing.assert_allclose(pixels[..., 0], values / 4095 * 255, atol=0.51)


def test_32_bits_need_a_range():
    file = encoded(
        Image.fromarray(np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30)), "TIFF"
    )
    with pytest.raises(UnreadableError, match="--value-range"):
        DECODE(file)
    assert Decoder(value_range=(-1, 1))(file)[[0, -1], [0, -1], 0].tolist() == [0, 255]
    broken = np.full((4, 4), np.nan, dtype=np.float32)
    with pytest.raises(UnreadableError, match="not finite"):
        Decoder(value_range=(0, 1))(encoded(Image.fromarray(broken), "TIFF"))


@pytest.mark.parametrize(("background", "gray"), [("black", 0), ("gray", 128), ("white", 255)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode, background, gray):
    if mode == "P":
        image, options = Image.new("P", (4, 4), 0), {"transparency": 0}
        image.putpalette([200, 100, 50])
    else:
        clear = (200, 100, 50, 0) if mode == "RGBA" else (200, 0)
        image, options = Image.new(mode, (4, 4), clear), {}
    pixels = Decoder(background=background)(encoded(image, "PNG", **options))
    assert (pixels == gray).all()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_the_orientation_tag_is_ignored_or_applied(format_name, tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    file = encoded(noise(20, 30), format_name, exif=exif)
    stored = Image.open(io.BytesIO(file))
    assert np.array_equal(DECODE(file), np.asarray(stored))
    turned = Decoder(orientation="apply")(file)
    assert np.array_equal(turned, np.asarray(ImageOps.exif_transpose(stored)))


def test_simplejpeg_and_pillow_decode_the_same_pixels(monkeypatch):
    pytest.importorskip("simplejpeg")
    fast = DECODE(photo_jpeg()).astype(int)
    monkeypatch.setattr(decode_module, "simplejpeg", None)
    assert np.abs(fast - DECODE(photo_jpeg())).max() <= 2


def with_size(file: bytes, format_name: str, side: int) -> bytes:
    """Write another size into the header of an image."""
    if format_name == "JPEG":
        start = file.index(b"\xff\xc0") + 5
        return file[:start] + struct.pack(">HH", side, side) + file[start + 4 :]
    if format_name == "BMP":
        return file[:18] + struct.pack("<ii", side, side) + file[26:]
    return file[:6] + struct.pack("<HH", side, side) + file[10:]  # GIF


@pytest.mark.parametrize("format_name", ["JPEG", "BMP", "GIF"])
@pytest.mark.parametrize("has_simplejpeg", [True, False])
def test_the_pixel_limit_is_checked_in_the_header(format_name, has_simplejpeg, monkeypatch):
    if not has_simplejpeg:
        monkeypatch.setattr(decode_module, "simplejpeg", None)
    file = with_size(encoded(noise(20, 30), format_name), format_name, 16_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with pytest.raises(UnreadableError, match="16000 x 16000|exceeds limit"):
            DECODE(file)


def test_a_jpeg_that_a_strict_decoder_calls_corrupt_is_unreadable():
    simplejpeg = pytest.importorskip("simplejpeg")
    file = photo_jpeg()
    corrupt = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        middle = len(file) // 2 + int(rng.integers(-2000, 2000))
        damaged = file[:middle] + rng.bytes(40) + file[middle + 40 :]
        try:
            simplejpeg.decode_jpeg(damaged, strict=True)
        except ValueError:
            corrupt += 1
            with pytest.raises(UnreadableError):
                DECODE(damaged)
    assert corrupt >= 20  # the others happen to be codes of other pixels


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"no image at all", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
        (encoded(noise(9, 9), "PNG")[:60], "."),
        (photo_jpeg()[:-3000], "."),
        (b"\xff\xd8 and then no JPEG", "."),
    ],
)
def test_a_reason_is_one_line_without_addresses(data, reason):
    with pytest.raises(UnreadableError, match=reason) as error:
        DECODE(data)
    assert "0x" not in str(error.value)
    assert "\n" not in str(error.value)


@given(
    format_name=st.sampled_from(list(formats())),
    cut=st.integers(0, 400),
    damage=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=6),
)
def test_a_damaged_file_is_read_or_unreadable_but_never_fatal(format_name, cut, damage):
    data = bytearray(encoded(noise(9, 11), format_name)[: max(cut, 1)])
    for place, value in damage:
        data[place % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = DECODE(bytes(data))
        except UnreadableError:
            return
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


# Crops


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_those_of_pillow(interpolation):
    decibels = []
    for name in ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png"):
        photo = read_photo(name)
        for seed in range(6):
            rng = np.random.default_rng(seed)
            width, height = (int(rng.uniform(0.4, 1) * side) for side in photo.size)
            left, top = int(rng.integers(20)), int(rng.integers(20))
            box = (left, top, min(left + width, photo.width), min(top + height, photo.height))
            resampling = Image.Resampling[interpolation.upper()]
            exact = np.asarray(photo.crop(box).resize((224, 224), resampling)).astype(int)
            ours = resize(np.array(photo), box, (224, 224), interpolation).permute(1, 2, 0)
            error = ((ours.numpy() - exact) ** 2).mean()
            decibels.append(10 * np.log10(255**2 / max(error, 1e-9)))
    assert np.mean(decibels) >= 60
    assert min(decibels) >= 50


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_a_center_crop_has_its_size_and_is_centered(height, width, rows, columns):
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, :, 0] = np.arange(width)
    pixels[:, :, 1] = np.arange(height)[:, None]
    crop = CenterCrops()(pixels, (rows, columns))
    assert crop.shape == (3, rows, columns)
    assert crop.dtype == torch.uint8
    centers = crop.float().mean(dim=(1, 2)).tolist()
    assert centers == pytest.approx([(width - 1) / 2, (height - 1) / 2, 0], abs=1.5)


def png(height: int, width: int) -> bytes:
    """Return a PNG whose header promises more pixels than it has."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("size", [(12_000, 12_000), (2**31 - 1, 2**31 - 1), (0, 5)], ids=str)
@pytest.mark.parametrize("door", ["decoder", "array", "labels", "packing", "picture of a run"])
def test_a_huge_header_is_refused_at_every_door_and_nothing_is_printed(
    door, size, tmp_path, recwarn
):
    decode_module._silence_pillow.cache_clear()  # pytest has its own filters in each test
    file = tmp_path / "a.png"
    file.write_bytes(png(*size))
    doors = {
        "decoder": lambda: DECODE(file.read_bytes()),
        "array": lambda: open_array(io.BytesIO(file.read_bytes()), "a.png"),
        "labels": lambda: read_labels(file),
        "picture of a run": lambda: pictures._read_picture(file),
    }
    if door == "packing":
        assert pack._content_of(str(file), 32, 90) == (file.read_bytes(), False)
    else:
        with pytest.raises((UnreadableError, UserError)) as caught:
            doors[door]()
        assert str(caught.value).isprintable()
    assert [str(warning.message) for warning in recwarn] == []


def test_what_pillow_finds_odd_in_a_file_is_not_printed(recwarn):
    decode_module._silence_pillow.cache_clear()
    exif = Image.Exif()
    exif[0x010E] = "a" * 100
    data = encoded(noise(20, 30), "TIFF", exif=exif)
    place = data.index(struct.pack("<HH", 0x010E, 2)) + 4
    data = data[:place] + struct.pack("<I", 10**6) + data[place + 4 :]
    assert DECODE(data).shape == (20, 30, 3)
    assert [str(warning.message) for warning in recwarn] == []
    with Image.open(io.BytesIO(data)) as image, warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Tag data larger"):  # Pillow alone does
            image.getexif()


def test_a_picture_of_a_run_in_a_format_that_runs_a_program_is_not_opened(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: ran.append(True))
    file = tmp_path / "reconstructions.png"
    noise(20, 30).save(file, "EPS")
    with pytest.raises(UserError, match="not a whole picture"):
        pictures._read_picture(file)
    assert ran == []
    with Image.open(file) as image, contextlib.suppress(AssertionError, AttributeError):
        image.load()
    assert ran == [True]  # Pillow alone does
