"""JPEG files decoded, cropped and resized on the GPU, by torchvision's nvJPEG (`--decode gpu`).

A worker reads a file and its header, and draws the same crop as for the CPU; the batch that it
sends holds the bytes of the files. What nvJPEG does not take, the worker decodes and crops.
"""

from __future__ import annotations

import io
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.engine.data.augment import Augmentation
from recipes.engine.data.decode import MAX_PIXELS, MIRRORED, TRANSPOSED, UPSIDE_DOWN
from recipes.engine.data.folder import Crops
from recipes.engine.data.images import BoxCrops, Cut
from recipes.engine.data.sets import Batch, DataSet, TrainSet
from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng

# JPEG frames with Huffman codes: baseline, extended, progressive. The others, from 0xC3 to 0xCF,
# are lossless, hierarchical or arithmetic; in the same range are three segments that are no frames.
_FRAMES = (0xC0, 0xC1, 0xC2)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
# Sampling factors of luma, with single ones for both colors: 4:4:4, 4:2:2, 4:4:0, 4:2:0, 4:1:1.
_SAMPLING = (b"\x11\x11\x11", b"\x21\x11\x11", b"\x12\x11\x11", b"\x22\x11\x11", b"\x41\x11\x11")
# PyTorch's antialiased resize on CUDA holds its weights in 48 KiB of shared memory, which are used
# up where both sides become about 47 times smaller.
_MOST_SHRUNK = 32
# Pixels decoded in one call: 0.8 GB, for a batch of pictures of many megapixels.
_MOST_DECODED = 2**28


class Plan(NamedTuple):
    """How an image is made from its file.

    Attributes:
        num_bytes: Length of the file.
        sides: Height and width as they are stored.
        orientation: EXIF orientation by which they are turned; 1 leaves them as they are.
        cut: What is cut out of the turned image.
    """

    num_bytes: int
    sides: tuple[int, int]
    orientation: int
    cut: Cut


@dataclass(frozen=True, eq=False)
class Encoded:
    """The images of a batch before they are decoded.

    Attributes:
        plans: How each is made; None for one that is finished.
        files: Files of those with a plan, one after the other: a worker sends one tensor.
        finished: The others.
    """

    plans: list[Plan | None]
    files: UInt8[Tensor, " bytes"]
    finished: UInt8[Tensor, "images channels height width"]

    def __len__(self) -> int:
        return len(self.plans)

    def pin_memory(self) -> Encoded:
        """Copy to pinned memory. `DataLoader` calls this method."""
        files, finished = self.files.pin_memory(), self.finished.pin_memory()
        return replace(self, files=files, finished=finished)


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedCrops(Crops):
    """RGB crops that are decoded on the device; single items are decoded on the CPU."""

    crop: BoxCrops

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """Return a batch of `Encoded` images."""
        plans: list[Plan | None] = []
        files: list[bytes] = []
        finished: list[Tensor] = []
        sample_ids: list[int] = []
        unreadable_ids: list[int] = []
        for epoch, sample_id in indices:
            try:
                file = self.samples.read(sample_id)
                plan = self._plan(file, epoch, sample_id)
                if plan is None:
                    finished.append(self._crop_file(file, epoch, sample_id))
                else:
                    files.append(file)
            except UnreadableError:
                unreadable_ids.append(sample_id)
                continue
            plans.append(plan)
            sample_ids.append(sample_id)
        row = torch.from_numpy(np.frombuffer(bytearray().join(files), np.uint8))
        encoded = Encoded(plans, row, self._stacked(finished))
        return Batch(encoded, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids)

    def _plan(self, file: bytes, epoch: int, sample_id: int) -> Plan | None:
        """Draw how an image is made from a file; return None if it is for the CPU.

        So are files in which something is odd: the decoders of the CPU say what.
        """
        sides = frame_of(file)
        if sides is None:
            return None
        try:
            orientation = self.decode.turn(file)
        except Exception:  # as in `Decoder`
            return None
        height, width = sides[::-1] if orientation in TRANSPOSED else sides
        cut = self.crop.cut(width, height, sample_rng(self.seed, epoch, sample_id))
        left, top, right, bottom = cut.box
        shrunk = max((bottom - top) / self.image_size[0], (right - left) / self.image_size[1])
        return None if shrunk > _MOST_SHRUNK else Plan(len(file), sides, orientation, cut)

    def to_device(self, batch: Batch, device: str) -> Batch:
        """Decode and crop the images of a batch on a device."""
        encoded: Encoded = batch.images
        with _beside_training(torch.device(device)):
            others = iter(encoded.finished.to(device, non_blocking=True))
            decoded = self._decoded(encoded, device)
            found = [next(others if plan is None else decoded) for plan in encoded.plans]
            images = self._stacked([image for image in found if image is not None], device)
        if images.is_cuda:
            images.record_stream(torch.cuda.current_stream())
        is_read = torch.tensor([image is not None for image in found], dtype=torch.bool)
        damaged = batch.sample_ids[~is_read].tolist()
        return batch._replace(
            images=images,
            sample_ids=batch.sample_ids[is_read],
            unreadable_ids=[*batch.unreadable_ids, *damaged],
        )

    def _decoded(self, encoded: Encoded, device: str) -> Iterator[Tensor | None]:
        """Yield the crops of the files, None for one that cannot be decoded."""
        plans = [plan for plan in encoded.plans if plan is not None]
        files = encoded.files.split([plan.num_bytes for plan in plans]) if plans else ()
        for part in _parts(plans):
            for file, plan, pixels in zip(
                files[part], plans[part], decode_all(files[part], device), strict=True
            ):
                if pixels is not None and pixels.shape == (3, *plan.sides):
                    yield self._finish(pixels, plan)
                else:
                    yield self._on_cpu(file, plan, device)

    def _finish(self, pixels: UInt8[Tensor, "3 h w"], plan: Plan) -> Tensor:
        """Crop and resize decoded pixels, on their device."""
        left, top, right, bottom = plan.cut.box
        box = turned(pixels, plan.orientation)[None, :, top:bottom, left:right]
        height, width = self.image_size
        # Bytes are resized on CPUs only.
        crop = F.interpolate(
            box.float(), (height, width), mode=self.crop.interpolation, antialias=True
        )[0]
        crop = crop.round_().clamp_(0, 255).to(torch.uint8)
        return crop.flip(-1) if plan.cut.is_flipped else crop

    def _on_cpu(self, file: UInt8[Tensor, " bytes"], plan: Plan, device: str) -> Tensor | None:
        """Let the CPU decide what is damaged: nvJPEG leaves out more kinds than the header says."""
        height, width = self.image_size
        try:
            pixels = self.decode(file.numpy().tobytes())
        except UnreadableError:
            return None
        _say_refused()
        return self.crop.apply(plan.cut, pixels, (height, width)).to(device)

    def _stacked(self, crops: list[Tensor], device: str = "cpu") -> Tensor:
        none = torch.empty(0, self.num_channels, *self.image_size, dtype=self.dtype, device=device)
        return torch.stack(crops) if crops else none


def frame_of(file: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG file that nvJPEG decodes to the RGB of other decoders.

    Returns:
        None for other files: CMYK, stored RGB, more than 8 bits, arithmetic codes, unusual
        sampling, no or too many pixels, and those that do not end as a JPEG file does: they are cut
        off, which nvJPEG may not notice.
    """
    if not file.startswith(b"\xff\xd8") or not file.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    at = 2
    while at + 4 <= len(file) and file[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", file, at)
        segment = file[at + 4 : at + 2 + length]
        if marker == 0xEE and segment[:5] == b"Adobe" and segment[11:12] != b"\x01":
            return None  # stored RGB or CMYK
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return _sides(segment) if marker in _FRAMES else None
        at += 2 + length
    return None


def _sides(frame: bytes) -> tuple[int, int] | None:
    """Return height and width of the header of a frame, if its pixels are for nvJPEG."""
    if len(frame) < 6:
        return None
    bits, height, width, channels = struct.unpack_from(">BHHB", frame)
    ids, sampling = frame[6::3], frame[7::3]
    fits = channels == 1 or (sampling in _SAMPLING and ids != b"RGB")
    is_whole = len(frame) == 6 + 3 * channels
    fits = fits and is_whole and bits == 8 and 0 < height * width <= MAX_PIXELS
    return (height, width) if fits else None


def turned(pixels: UInt8[Tensor, "3 h w"], orientation: int) -> UInt8[Tensor, "3 h w"]:
    """Turn pixels as an EXIF orientation, from 1 to 8, says."""
    if orientation in TRANSPOSED:
        pixels = pixels.mT
    axes = [-2] * (orientation in UPSIDE_DOWN) + [-1] * (orientation in MIRRORED)
    return pixels.flip(axes) if axes else pixels


def _parts(plans: Sequence[Plan]) -> Iterator[slice]:
    """Split images into parts that are decoded at once."""
    start, pixels = 0, 0
    for index, plan in enumerate(plans):
        size = plan.sides[0] * plan.sides[1]
        if index > start and pixels + size > _MOST_DECODED:
            yield slice(start, index)
            start, pixels = index, 0
        pixels += size
    if start < len(plans):
        yield slice(start, len(plans))


def decode_all(files: Sequence[Tensor], device: str) -> list[Tensor | None]:
    """Decode JPEG files on a device; None for one that it cannot decode.

    Of several files with one that fails, torchvision decodes none: they are halved until it is
    alone.
    """
    try:
        return [*decode_jpegs(files, device)]
    except RuntimeError as error:
        if "CUDA" in str(error):  # of memory or the device, not of a file
            raise
        if len(files) == 1:
            return [None]
        middle = len(files) // 2
        return decode_all(files[:middle], device) + decode_all(files[middle:], device)


def decode_jpegs(files: Sequence[UInt8[Tensor, " bytes"]], device: str) -> list[Tensor]:
    """Decode JPEG files on the current GPU: the only call of torchvision.

    Raises:
        RuntimeError: If one of them cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    # It writes on a stream of its own, which waits for no other: the memory that it writes to must
    # not be in use any more.
    torch.cuda.current_stream().synchronize()
    where = torch.device(device, torch.cuda.current_device())
    found: list[Tensor] = decode_jpeg(list(files), mode=ImageReadMode.RGB, device=where)
    return found


@cache
def _stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


@contextmanager
def _beside_training(device: torch.device) -> Iterator[None]:
    """Let a GPU decode while it still trains on the batch before; nothing else on a CPU."""
    if device.type != "cuda":
        yield
        return
    stream = _stream(torch.cuda.current_device())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@cache
def _say_refused() -> None:
    """Say once a process that files are decoded on the CPU after all."""
    say(
        "note: --decode gpu: nvJPEG does not decode some of the JPEG files; these are decoded on "
        "the CPU, in the training process",
        file=sys.stderr,
    )


def decoded_on(name: str, data: DataSet) -> DataSet:
    """Let training images be decoded where `--decode` says; all others are on the CPU.

    Args:
        name: Value of `--decode`.
        data: The data set.

    Raises:
        UserError: If that is the GPU, and it cannot decode, or the images are not RGB pictures of
            files, cropped by a random box.
    """
    if name != "gpu":
        return data
    train = data.train
    if reason := _misfit(train):
        raise UserError(f"--decode gpu is for {reason}; give --decode cpu, or omit it")
    check_nvjpeg("cuda")
    return replace(data, train=EncodedCrops(**vars(train)))


def _misfit(train: TrainSet) -> str | None:
    """Return what the GPU decodes instead of these images; None if it decodes them."""
    if not isinstance(train, Crops):
        return "pre-training and classification on folders of RGB pictures, as files or in shards"
    if train.sizes_differ:
        return "pictures of one size: omit --native-size"
    if not isinstance(train.crop, BoxCrops):
        return "random resized crops: omit --crop"
    if isinstance(train.crop, Augmentation) and (train.crop.policy or train.crop.erase):
        return "random resized crops: RandAugment works on the CPU, choose --augment crop"
    return None


def check_nvjpeg(device: str) -> None:
    """Decode a small picture on a device.

    Raises:
        UserError: If torchvision fails, or its pixels are wrong. The message gives the reason.
    """
    color = torch.tensor([200, 100, 50], dtype=torch.uint8)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), tuple(color.tolist())).save(buffer, "JPEG", quality=95)
    file = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    try:
        (pixels,) = decode_jpegs([file], device)
        error = (pixels.cpu().float() - color.view(3, 1, 1)).abs().max().item()
        reason = None if error < 8 else f"its pixels are wrong by up to {error:.0f}"
    except Exception as problem:  # missing and mismatched builds fail in many ways
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    if reason:
        raise UserError(
            f"--decode gpu: torchvision decodes no JPEG file on this GPU ({reason}); give "
            "--decode cpu, or omit it"
        )
