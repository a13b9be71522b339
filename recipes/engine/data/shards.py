"""Shards: tar files in WebDataset's naming, read at random through an index.

A sample is an image `key.jpg`, with an optional class in `key.cls` or as "label" in `key.json`. If
every key has a folder, as `cat/0001`, the first folder is the class. Samples have the order of the
shards' names and of their members. `recipes/pack.py` writes shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recipes.engine.data.listing import MAX_FILE_BYTES, Names, Samples
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError, open_regular

INDEX = "index.npz"
UNFINISHED = "packing.json"  # beside shards that are being packed
_BLOCK = 512  # bytes; members of a tar file begin at multiples of it
_OPEN_SHARDS = 64
_NO_CLASS = ""
# Kind of numbers and number of axes of what is in an index.
_KINDS = {
    "shard_names": ("U", 1), "shard_sizes": ("i", 1), "text": ("u", 1), "ends": ("i", 1),
    "shards": ("i", 1), "offsets": ("i", 1), "sizes": ("i", 1), "class_names": ("U", 1),
    "labels": ("i", 1), "skipped": ("i", 0),
}  # fmt: skip


class _Handles:
    """Open shards, by path; each process opens its own."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Handles], tuple[()]]:
        return _Handles, ()

    def read(self, path: str, offset: int, size: int) -> bytes:
        if path not in self._open:
            if len(self._open) == _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return os.pread(self._open[path], size, offset)


@dataclass(frozen=True, eq=False)
class Shards(Samples):
    """Images in shards.

    Attributes:
        names: Name of each image in its shard.
        shard_names: Names of the shards.
        shards: Number of the shard of each image.
        offsets: First byte of each image in its shard.
        sizes: Bytes of each image.
    """

    names: Names
    shard_names: tuple[str, ...]
    shards: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    handles: _Handles = field(default_factory=_Handles)

    @property
    def fingerprint(self) -> bytes:
        """Hash of the names and sizes of all images."""
        content = hashlib.sha256("/".join(self.shard_names).encode(errors="surrogateescape"))
        for array in (self.names.text, self.names.ends, self.shards, self.offsets, self.sizes):
            content.update(array.tobytes())
        return content.digest()

    def name(self, index: int) -> str:
        """Return the path of a shard and the name of an image in it."""
        row = self.rows[index]
        return f"{self._path(row)}/{os.fsdecode(self.names[row])}"

    def read(self, index: int) -> bytes:
        """Return the content of an image.

        Raises:
            UnreadableError: If the shard cannot be read, or ends before the image.
        """
        row = self.rows[index]
        size = int(self.sizes[row])
        try:
            data = self.handles.read(self._path(row), int(self.offsets[row]), size)
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
        if len(data) < size:
            raise UnreadableError("its shard ends before it")
        return data

    def _path(self, row: int) -> str:
        return str(self.root / self.shard_names[self.shards[row]])


def find_shards(root: Path) -> list[str]:
    """Return the sorted names of the tar files in a folder."""
    try:
        names = os.listdir(root)
    except OSError as error:
        raise UserError(f"cannot list the folder {root}: {error.strerror}") from error
    return sorted(name for name in names if name.endswith(".tar") and not name.startswith("."))


def list_shards(
    root: Path, shard_names: list[str], suffixes: Iterable[str], *, labelled: bool
) -> tuple[Shards, tuple[str, ...], list[str]]:
    """List the images in shards, and their classes.

    The index is read from the folder, or made and written there if there is none.

    Args:
        root: The folder.
        shard_names: Names of its tar files.
        suffixes: Endings of the names of images, in lower case.
        labelled: Whether classes are wanted.

    Returns:
        The images, the names of their classes, and notes.

    Raises:
        UserError: If a shard is damaged, or is not as the index says.
    """
    if (root / UNFINISHED).exists():
        raise UserError(f"packing {root} is not finished: start mimkit pack again")
    notes: list[str] = []
    file = root / INDEX
    if os.path.lexists(file):
        index = _read_index(file)
        _check_index(index, root, shard_names)
    else:
        index = make_index(root, shard_names, suffixes)
        try:
            write_index(file, index)
            notes.append(f"{root} had no {INDEX}: one was written")
        except OSError as error:
            notes.append(f"{root} has no {INDEX}, and none can be written: {error.strerror}")
    skipped = int(index["skipped"])
    if skipped:
        notes.append(f"{skipped:,} members of the shards in {root} are no images and were not read")
    if not len(index["ends"]):
        raise UserError(f"the shards in {root} hold no images")
    shards = shards_of(root, index)
    if not (labelled and len(index["class_names"])):
        return shards, (), notes
    return shards.relabel(index["labels"]), tuple(index["class_names"].tolist()), notes


Index = dict[str, NDArray[Any]]


def shards_of(root: Path, index: Index) -> Shards:
    """Return the images of an index, without labels."""
    count = len(index["ends"])
    return Shards(
        root,
        np.arange(count),
        np.zeros(count, np.int64),
        names=Names(index["text"], index["ends"]),
        shard_names=tuple(index["shard_names"].tolist()),
        shards=index["shards"],
        offsets=index["offsets"],
        sizes=index["sizes"],
    )


def make_index(root: Path, shard_names: Iterable[str], suffixes: Iterable[str]) -> Index:
    """Index the members of shards.

    Raises:
        UserError: If a shard is cut or damaged, or holds two images with one key.
    """
    endings = tuple(suffixes)
    names: list[bytes] = []
    classes: list[str] = []
    places: list[tuple[int, int, int]] = []
    skipped = 0
    shard_names = list(shard_names)
    for number, shard in enumerate(shard_names):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, str] = {}
        for member in _members(root / shard):
            key, ending = _split_key(member.name)
            if f".{ending}".lower().endswith(endings):
                if key in images:
                    raise UserError(
                        f"{root / shard} holds two images with the key {key}: "
                        f"{images[key].name} and {member.name}"
                    )
                images[key] = member
            elif ending in ("cls", "json"):
                labels[key] = _label(root / shard, member)
            else:
                skipped += 1
        for key, member in images.items():
            names.append(os.fsencode(member.name))
            classes.append(labels.get(key, _NO_CLASS))
            places.append((number, member.offset_data, member.size))
    if names and all(b"/" in name for name in names):
        classes = [os.fsdecode(name.partition(b"/")[0]) for name in names]
    class_names = sorted(set(classes), key=_class_order)
    has_classes = _NO_CLASS not in class_names
    numbers = {name: number for number, name in enumerate(class_names)}
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return {
        "shard_names": np.array(shard_names),
        "shard_sizes": np.array([(root / shard).stat().st_size for shard in shard_names]),
        "text": np.frombuffer(b"".join(names), np.uint8),
        "ends": np.array([len(name) for name in names], dtype=np.int64).cumsum(),
        "shards": table[:, 0].astype(np.int32),
        "offsets": table[:, 1].copy(),
        "sizes": table[:, 2].copy(),
        "class_names": np.array(class_names if has_classes else [], dtype=np.str_),
        "labels": np.array([numbers[name] for name in classes], dtype=np.int64),
        "skipped": np.array(skipped),
    }


def write_index(file: Path, index: Index) -> None:
    """Write an index under a temporary name and rename it, so that it is never incomplete."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("wb") as content:
        np.savez(content, **index)  # type: ignore[arg-type]
        content.flush()
        os.fsync(content.fileno())
    os.replace(partial, file)


def _members(shard: Path) -> Iterable[tarfile.TarInfo]:
    """Yield the files in a shard.

    Raises:
        UserError: If it is cut or damaged.
    """
    damaged = f"the shard {shard} is cut or damaged"
    try:
        end = 0
        with open_regular(shard) as content:
            length = os.fstat(content.fileno()).st_size
            with tarfile.open(fileobj=content, mode="r:", errors="surrogateescape") as tar:
                for member in tar:
                    end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                    if end > length or not 0 <= member.size <= MAX_FILE_BYTES:
                        raise UserError(f"{damaged}: it ends in {member.name}")
                    if member.isreg() and not member.issparse():
                        yield member
            content.seek(end)
            if content.read(_BLOCK) != bytes(_BLOCK):
                raise UserError(f"{damaged}: its end is missing")
    except (tarfile.TarError, ValueError, RecursionError) as error:  # odd headers
        raise UserError(f"{damaged}: {' '.join(str(error).split())[:200]}") from error
    except UnreadableError as error:
        raise UserError(f"the shard {shard} cannot be read: {error}") from error
    except OSError as error:
        raise UserError(f"the shard {shard} cannot be read: {error.strerror}") from error


def _split_key(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot after its folder, as WebDataset does."""
    folder, slash, base = name.rpartition("/")
    key, _, ending = base.partition(".")
    return folder + slash + key, ending


def _label(shard: Path, member: tarfile.TarInfo) -> str:
    """Read the class of a sample; "" if there is none."""
    with open_regular(shard) as content:
        content.seek(member.offset_data)
        text = content.read(min(member.size, 1_000_000)).decode(errors="replace").strip()
    if member.name.endswith(".cls"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return _NO_CLASS
    label = found.get("label", _NO_CLASS) if isinstance(found, dict) else _NO_CLASS
    return str(label)


def _class_order(name: str) -> tuple[int, int, str]:
    """Sort numbers by value, before other names."""
    is_number = name.isascii() and name.isdigit() and len(name) < 19
    return (0, int(name), "") if is_number else (1, 0, name)


def _read_index(file: Path) -> Index:
    damaged = f"the index {file} is damaged: remove it, and it is made again"
    try:
        with open_regular(file) as content, np.load(content, allow_pickle=False) as arrays:
            stored = sum(entry.file_size for entry in arrays.zip.infolist())
            if stored > os.fstat(content.fileno()).st_size:  # it is not compressed
                raise UserError(damaged)
            index = {name: arrays[name] for name in _KINDS}
        _check_columns(index)
    except UserError:
        raise
    except Exception as error:  # damaged zip files make zipfile and NumPy raise errors of any kind
        raise UserError(damaged) from error
    return index


def _check_columns(index: Index) -> None:
    """Check the types, shapes and ranges of what is in an index.

    Raises:
        ValueError: If one does not fit.
    """
    for name, (kind, axes) in _KINDS.items():
        if index[name].dtype.kind != kind or index[name].ndim != axes:
            raise ValueError(name)
    count, num_shards = len(index["ends"]), len(index["shard_names"])
    num_classes = max(len(index["class_names"]), 1)
    starts = np.concatenate([[0], index["ends"]])
    columns = [index[name] for name in ("shards", "offsets", "sizes", "labels")]
    shards, offsets, sizes, labels = columns
    if any(len(column) != count for column in columns) or len(index["shard_sizes"]) != num_shards:
        raise ValueError("length")
    if len(set(index["class_names"].tolist())) != len(index["class_names"]):
        raise ValueError("class_names")
    if (starts[:-1] > starts[1:]).any() or starts[-1] != len(index["text"]):
        raise ValueError("ends")
    if min(shards.min(initial=0), offsets.min(initial=0), sizes.min(initial=0)) < 0:
        raise ValueError("negative")
    if count and (shards.max() >= num_shards or (labels < 0).any() or labels.max() >= num_classes):
        raise ValueError("number")
    if (offsets > index["shard_sizes"][shards] - sizes).any():  # their sum may overflow
        raise ValueError("offsets")


def _check_index(index: Index, root: Path, shard_names: list[str]) -> None:
    """Check that the shards are those of the index.

    Raises:
        UserError: If a shard is missing, new, or has another size.
    """
    known = dict(zip(index["shard_names"].tolist(), index["shard_sizes"].tolist(), strict=True))
    for name in sorted({*known, *shard_names}):
        size = (root / name).stat().st_size if name in shard_names else None
        if size != known.get(name):
            there = "is missing" if size is None else f"has {size:,} bytes"
            wanted = f"{known[name]:,} bytes" if name in known else "no such shard"
            raise UserError(
                f"the shard {root / name} {there}, but {root / INDEX} says {wanted}: copy the "
                f"shards again, or remove {INDEX}, and it is made again"
            )
