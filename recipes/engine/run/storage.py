"""Files of a checkpoint: what `torch.distributed.checkpoint` writes and reads, without pickle.

    .metadata            JSON: type, shape and place of every tensor, place of every other value
    __<process>_0.distcp the bytes of the tensors and JSON values that a process writes

PyTorch plans which process writes and reads which part. Its own files are pickles, and reading them
can run code. Nothing in these can; all that they claim is checked against the files.
"""

import contextlib
import hashlib
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from recipes.engine.reading import UnreadableError, open_regular, parse_json, read_json
from recipes.engine.writing import new_file, write_atomically

METADATA = ".metadata"
PART = re.compile(r"__\d+_0\.distcp", re.ASCII)
_MOST_METADATA = 64_000_000  # bytes: a million parts of tensors
_MOST_VALUE = 16_000_000


@dataclass(frozen=True)
class FileDigest:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> "FileDigest":
        """Compute the digest of a content."""
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Piece:
    """Place of a tensor's part, or of another value, in the files.

    Attributes:
        file: Name of the file.
        start: First byte.
        size: Number of bytes.
    """

    file: str
    start: int
    size: int


class Writer(FileSystemWriter):
    """Writes a checkpoint.

    Args:
        folder: An existing folder without a checkpoint.

    Attributes:
        files: Digests of all files by name; in the main process, once everything is written.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self.folder = folder
        self.files: dict[str, FileDigest] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's part, and compute its digest on the way."""
        written: Future[list[WriteResult]] = Future()
        name = f"{plan.storage_data.prefix}0.distcp"
        pieces, digest, end = [], hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(new_file(self.folder / name)) if plan.items else None
            for item in plan.items:
                assert file is not None
                content = _bytes_of(planner.resolve_data(item))
                file.write(content)
                digest.update(content)
                pieces.append((item.index, Piece(name, end, len(content))))
                end += len(content)
        total = FileDigest(end, digest.hexdigest())
        written.set_result([WriteResult(i, p.size, (p, total)) for i, p in pieces])
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, in the main process."""
        places = {}
        for result in (result for part in results for result in part):
            piece, total = result.storage_data
            places[result.index] = piece
            self.files[piece.file] = total
        content = json.dumps(_describe(metadata, places)).encode()
        write_atomically(self.folder / METADATA, content)
        self.files[METADATA] = FileDigest.of(content)


class SaveJSON(DefaultSavePlanner):
    """Plans what each process writes; values other than tensors are written as JSON."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """Turn a value into JSON."""
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(json.dumps(object).encode())
        return object


class Reader(FileSystemReader):
    """Reads a checkpoint.

    Args:
        folder: The folder of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata.

        Raises:
            UnreadableError: If it is damaged.
        """
        found = read_json(self.folder / METADATA, most=_MOST_METADATA)
        try:
            return _metadata_from(found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UnreadableError(f"{METADATA} does not describe a checkpoint") from error

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a process needs.

        Raises:
            UnreadableError: If a file has not what the metadata says.
            ValueError: If a tensor is of another type.
        """
        with contextlib.ExitStack() as stack:
            opened: dict[str, IO[bytes]] = {}
            for item in plan.items:
                piece: Piece = self.storage_data[item.storage_index]
                if piece.file not in opened:
                    file = open_regular(self.folder / piece.file, follow=False)
                    opened[piece.file] = stack.enter_context(file)
                if item.type == LoadItemType.BYTE_IO:
                    content = _read(opened[piece.file], piece).numpy().tobytes()
                    planner.load_bytes(item, io.BytesIO(content))
                else:
                    self._read_tensor(opened[piece.file], piece, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_tensor(
        self, file: IO[bytes], piece: Piece, item: ReadItem, planner: LoadPlanner
    ) -> None:
        dtype, shape = self._kinds[item.storage_index]
        target = planner.resolve_tensor(item).detach()
        if target.dtype != dtype:
            name = item.storage_index.fqn
            raise ValueError(f"{name} is of {dtype}, where {target.dtype} is expected")
        tensor = _read(file, piece).view(dtype).view(shape)
        for axis, (start, length) in enumerate(
            zip(item.storage_offsets, item.lengths, strict=True)
        ):
            tensor = tensor.narrow(axis, start, length)
        target.copy_(tensor)
        planner.commit_tensor(item, target)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take the places of all parts from the metadata."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._kinds = {
            MetadataIndex(name, chunk.offsets): (tensor.properties.dtype, chunk.sizes)
            for name, tensor in metadata.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
            for chunk in tensor.chunks
        }


class LoadJSON(DefaultLoadPlanner):
    """Plans what each process reads; values other than tensors are JSON."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a value where it belongs, if it is of the kind that is there."""
        *path, last = self.mappings[read_item.dest_index.fqn]
        holder: Any = self.original_state_dict
        for step in path:
            holder = holder[step]
        holder[last] = _like(holder[last], parse_json(value.read()), read_item.dest_index.fqn)


def _like(present: Any, value: Any, name: str) -> Any:
    """Return a value from JSON as the type of the present one: a list may be a tuple.

    Raises:
        ValueError: If it is of another kind.
    """
    if isinstance(present, tuple) and isinstance(value, list):
        value = tuple(value)
    numbers = (int, float)
    is_number = type(present) in numbers and type(value) in numbers
    if type(value) is not type(present) and not is_number:
        raise ValueError(f"{name} is a {type(value).__name__}, not a {type(present).__name__}")
    return value


def _bytes_of(data: Tensor | io.BytesIO) -> memoryview:
    if isinstance(data, io.BytesIO):
        return data.getbuffer()
    plain = data.detach().cpu().contiguous().flatten().view(torch.uint8)
    content: memoryview = plain.numpy().data
    return content


def _read(file: IO[bytes], piece: Piece) -> Tensor:
    """Read the bytes of a piece, which the file must have."""
    size = file.seek(0, io.SEEK_END)
    if piece.start + piece.size > size:
        raise UnreadableError(f"{piece.file} ends before what {METADATA} says is in it")
    content = torch.empty(piece.size, dtype=torch.uint8)
    file.seek(piece.start)
    if file.readinto(content.numpy()) != piece.size:  # type: ignore[attr-defined]
        raise UnreadableError(f"{piece.file} cannot be read to its end")
    return content


def _describe(metadata: Metadata, places: dict[MetadataIndex, Piece]) -> dict[str, Any]:
    """Describe the tensors and values of a checkpoint as JSON."""
    tensors, values = {}, {}
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            piece = places[MetadataIndex(name)]
            values[name] = [piece.file, piece.start, piece.size]
            continue
        chunks = []
        for chunk in entry.chunks:
            piece = places[MetadataIndex(name, chunk.offsets)]
            chunks.append([list(chunk.offsets), list(chunk.sizes), piece.file, piece.start])
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        tensors[name] = [dtype, list(entry.size), chunks]
    return {"tensors": tensors, "values": values}


def _metadata_from(found: Any) -> Metadata:
    """Turn a description back into metadata, and check it.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: If it is not such a description.
    """
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, Piece] = {}
    for name, (dtype_name, shape, chunks) in found["tensors"].items():
        dtype = vars(torch)[dtype_name]
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{dtype_name} is no type of numbers")
        parts = []
        for offsets, sizes, file, start in chunks:
            part = ChunkStorageMetadata(_counts(offsets), _counts(sizes))
            ends = [first + length for first, length in zip(offsets, sizes, strict=True)]
            if any(end > most for end, most in zip(ends, shape, strict=True)):
                raise ValueError(f"a part of {name} is outside of it")
            size = math.prod(sizes) * dtype.itemsize
            places[MetadataIndex(name, part.offsets)] = _piece(file, start, size)
            parts.append(part)
        if sum(math.prod(part.sizes) for part in parts) != math.prod(shape):
            # PyTorch would leave the rest of the tensor as it was.
            raise ValueError(f"the parts of {name} are not all of it")
        properties = TensorProperties(dtype=dtype)
        entries[name] = TensorStorageMetadata(properties, _counts(shape), parts)
    for name, (file, start, size) in found["values"].items():
        if size > _MOST_VALUE:
            raise ValueError(f"{name} has {size} bytes")
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = _piece(file, start, size)
    return Metadata(entries, storage_data=places)


def _piece(file: str, start: int, size: int) -> Piece:
    if not PART.fullmatch(file):
        raise ValueError(f"{file} is not a file of a checkpoint")
    first, length = _counts([start, size])
    return Piece(file, first, length)


def _counts(numbers: list[int]) -> torch.Size:
    if any(type(number) is not int or not 0 <= number < 2**62 for number in numbers):
        raise ValueError(f"{numbers} are not counts")
    return torch.Size(numbers)
