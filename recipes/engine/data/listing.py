"""List the files of a data set: folders, links, classes, and what is held out.

Paths are bytes, relative to the folder, with slashes. Names that begin with a dot are ignored.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from recipes.engine.errors import UserError
from recipes.engine.reading import open_regular, read_bytes

HELD_OUT_SHARE = 0.1
# Held-out pictures of a folder whose reconstructions are shown.
NUM_PICTURES = 4
_OF_RUNS = (b".lock", b"config.yaml")  # files of a run's folder, from its first second
# A larger file is not read into memory.
MAX_FILE_BYTES = 2**31


@dataclass(frozen=True, eq=False)
class Samples(ABC):
    """Samples as they are stored.

    Attributes:
        root: The folder that holds them.
        rows: Rows of these samples in the list of all samples of the folder.
        labels: Class of each sample, counted from 0; all 0 without labels.
    """

    root: Path
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    @abstractmethod
    def fingerprint(self) -> bytes:
        """Hash of the names and sizes of all samples of the folder."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a readable name of a sample."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the content of a sample's file.

        Raises:
            UnreadableError: If it cannot be read.
        """

    def open(self, index: int) -> IO[bytes]:
        """Open a sample's file.

        Raises:
            UnreadableError: If it cannot be read.
        """
        return io.BytesIO(self.read(index))

    def subset(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> Self:
        """Select samples by their indices or by a boolean array."""
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])

    def relabel(self, labels: NDArray[np.int64]) -> Self:
        """Replace the labels."""
        return replace(self, labels=labels)


SamplesType = TypeVar("SamplesType", bound=Samples)


@dataclass(frozen=True, eq=False)
class Names:
    """Many byte strings in two arrays: workers share arrays, but copy lists of objects.

    Attributes:
        text: The strings, one after the other.
        ends: End of each string in `text`.
    """

    text: NDArray[np.uint8]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes()

    def count(self, suffixes: Iterable[str], rows: NDArray[np.int64]) -> int:
        """Count the strings of some rows that end in one of some suffixes, in any case."""
        text, ends = self.text, self.ends[rows]
        found = np.zeros(len(ends), np.bool_)
        starts = ends - np.diff(self.ends, prepend=0)[rows]
        for suffix in suffixes:
            fits = ends - starts >= len(suffix)
            for back, letter in enumerate(reversed(suffix.encode()), 1):
                letters = text[np.maximum(ends - back, 0)]
                fits &= (letters == letter) | (letters == ord(chr(letter).upper()))
            found |= fits
        return int(found.sum())


@dataclass(frozen=True, eq=False)
class Files(Samples):
    """Files of a folder.

    Attributes:
        names: Paths of all listed files.
        sizes: Size of each in bytes; -1 if it has none, such as a broken link.
    """

    names: Names
    sizes: NDArray[np.int64]

    @property
    def fingerprint(self) -> bytes:
        """Hash of the names and sizes of all files of the folder."""
        content = hashlib.sha256(self.names.text.tobytes())
        content.update(self.names.ends.tobytes() + self.sizes.tobytes())
        return content.digest()

    def name(self, index: int) -> str:
        """Return the path of a file."""
        return str(self.root / os.fsdecode(self.names[self.rows[index]]))

    def read(self, index: int) -> bytes:
        """Return the content of a file.

        Raises:
            UnreadableError: If it cannot be read, or is not a regular file.
        """
        return read_bytes(self.name(index), most=MAX_FILE_BYTES)

    def open(self, index: int) -> IO[bytes]:
        """Open a file.

        Raises:
            UnreadableError: If it cannot be opened, or is not a regular file.
        """
        return open_regular(Path(self.name(index)))


# Listing

FolderId = tuple[int, int]  # device and inode
Parts = tuple[bytes, ...]  # of a path


@dataclass
class PassedOver:
    """What a listing leaves out.

    Attributes:
        suffixes: Number of files with each other suffix.
        pipes: Paths of pipes, sockets and devices with the right suffix.
        links: Paths that lead to folders or files that are listed anyway.
        empty: Folders at the top without files.
        runs: Folders of runs of mimkit.
    """

    suffixes: Counter[str] = field(default_factory=Counter)
    pipes: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def notes(self, root: Path, *, has_classes: bool) -> list[str]:
        """Return a line for each kind of omission."""
        notes = []
        if self.suffixes:
            kinds = ", ".join(f"{kind} {n:,}" for kind, n in self.suffixes.most_common(8))
            notes.append(f"{self.suffixes.total():,} files in {root} were not read: {kinds}")
        for paths, reason in (
            (self.pipes, "pipes or devices, which are not read"),
            (self.links, "links to what is listed already, which are not followed"),
            (self.runs, "runs of mimkit, whose pictures are not read"),
            (self.empty if has_classes else [], "folders without images, which are no classes"),
        ):
            if paths:
                some = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
                notes.append(f"{root} holds {len(paths):,} {reason}: {some}")
        return notes


@dataclass(frozen=True, eq=False)
class _Run:
    """Files of one folder, with no subfolder's files between them."""

    key: Parts  # of the first file: runs are sorted by it
    text: bytes
    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]


class _Walk:
    """A walk through a folder. Real folders come first, so that no link takes their place."""

    def __init__(self, root: Path, suffixes: Iterable[str], seen: set[FolderId]) -> None:
        self.root = os.fsencode(root)
        self.suffixes = tuple(suffix.encode() for suffix in suffixes)
        self.seen = seen
        self.targets: set[FolderId] = set()  # files that links lead to
        self.passed_over = PassedOver()
        self.runs: list[_Run] = []

    def walk(self) -> list[_Run]:
        """List the folder, then what its links lead to; return its files, sorted by path."""
        links = self._descend([()])
        while links:
            found: list[Parts] = []
            for parts in sorted(links):
                found += self._follow(parts)
            links = found
        return sorted(self.runs, key=lambda run: run.key)

    def _descend(self, folders: list[Parts]) -> list[Parts]:
        """List folders and the real folders below them; return the links in them."""
        links: list[Parts] = []
        while folders:
            parts = folders.pop()
            try:
                names, below = self._scan(parts, links)
            except OSError as error:
                path = os.fsdecode(self._path(parts))
                raise UserError(f"cannot list the folder {path}: {error.strerror}") from error
            folders += [(*parts, name) for name in below]
            self._add(parts, names, below)
            if len(parts) == 1 and not names and not below:
                self.passed_over.empty.append(_shown(parts))
        return links

    def _scan(self, parts: Parts, links: list[Parts]) -> tuple[list[bytes], list[bytes]]:
        """Return the sorted names of files and of folders in a folder that is new."""
        names: list[bytes] = []
        below: list[bytes] = []
        status = os.stat(self._path(parts))
        if (status.st_dev, status.st_ino) in self.seen:
            self.passed_over.links.append(_shown(parts))
            return names, below
        self.seen.add((status.st_dev, status.st_ino))
        if parts and self._is_run(parts):
            self.passed_over.runs.append(_shown(parts))
            return names, below
        with os.scandir(self._path(parts)) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                is_image = name.lower().endswith(self.suffixes)
                if is_image and entry.is_file(follow_symlinks=False):
                    names.append(name)
                elif entry.is_symlink():
                    links.append((*parts, name))
                elif entry.is_dir():
                    below.append(name)
                elif is_image:
                    self.passed_over.pipes.append(_shown((*parts, name)))
                else:
                    self.passed_over.suffixes[_suffix(name)] += 1
        return sorted(names), sorted(below)

    def _is_run(self, parts: Parts) -> bool:
        """Whether a folder is one of a run: its pictures are no images to train on."""
        return all(os.path.isfile(self._path((*parts, name))) for name in _OF_RUNS)

    def _follow(self, parts: Parts) -> list[Parts]:
        """List what a link leads to; return the links in it."""
        path = self._path(parts)
        if os.path.isdir(path):
            return self._descend([parts])
        if not parts[-1].lower().endswith(self.suffixes):
            self.passed_over.suffixes[_suffix(parts[-1])] += 1
        elif not os.path.exists(path) or (os.path.isfile(path) and not self._is_listed(path)):
            self._add(parts[:-1], [parts[-1]], [])  # a broken link is an image that is unreadable
        elif os.path.isfile(path):
            self.passed_over.links.append(_shown(parts))
        else:
            self.passed_over.pipes.append(_shown(parts))
        return []

    def _is_listed(self, path: bytes) -> bool:
        """Whether a link leads to a file that is listed, or that another link leads to."""
        real = os.path.realpath(path)
        folder, name = os.path.split(real)
        is_visible = name.lower().endswith(self.suffixes) and not name.startswith(b".")
        if is_visible and _id_of(folder) in self.seen:
            return True
        is_known = _id_of(real) in self.targets
        self.targets.add(_id_of(real))
        return is_known

    def _add(self, parts: Parts, names: list[bytes], below: list[bytes]) -> None:
        """Keep files, in runs between which the files of subfolders are sorted."""
        cuts = [0, *sorted({bisect_left(names, name) for name in below}), len(names)]
        inside = b"".join(part + b"/" for part in parts)
        for start, stop in zip(cuts, cuts[1:], strict=False):
            if run := names[start:stop]:
                text = inside + inside.join(run)
                lengths = np.fromiter(map(len, run), np.int64, len(run)) + len(inside)
                sizes = np.array(self._sizes(parts, run))
                self.runs.append(_Run((*parts, run[0]), text, lengths, sizes))

    def _sizes(self, parts: Parts, names: list[bytes]) -> list[int]:
        folder = os.open(self._path(parts), os.O_RDONLY | os.O_DIRECTORY)
        try:  # the system need not look up the path of the folder for each file
            return [_size(name, folder) for name in names]
        finally:
            os.close(folder)

    def _path(self, parts: Parts) -> bytes:
        return b"/".join((self.root, *parts))


def _shown(parts: Parts) -> str:
    return os.fsdecode(b"/".join(parts))


def _suffix(name: bytes) -> str:
    return _shown((os.path.splitext(name)[1].lower(),)) or "no suffix"


def _id_of(path: bytes) -> FolderId:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _size(name: bytes, folder: int) -> int:
    try:
        return os.stat(name, dir_fd=folder).st_size
    except OSError:
        return -1


def list_files(
    root: Path,
    suffixes: Iterable[str],
    *,
    labelled: bool,
    seen: set[FolderId] | None = None,
    others: Counter[str] | None = None,
) -> tuple[Files, tuple[str, ...], list[str]]:
    """List the files in a folder and its subfolders, and their classes.

    Links are followed, but no folder or file is listed twice.

    Args:
        root: The folder.
        suffixes: Endings of the names of files, in lower case.
        labelled: Whether its subfolders are classes.
        seen: Folders that are listed already; those of `root` are added to it.
        others: Gets the number of files with each other ending.

    Returns:
        The files sorted by path, the names of their classes, and notes on what was left out. There
        are no names if no subfolder holds files.

    Raises:
        UserError: If there are no files, only some of them are in subfolders, or a folder cannot be
            listed.
    """
    walk = _Walk(root, suffixes, set() if seen is None else seen)
    runs = walk.walk()
    if others is not None:
        others.update(walk.passed_over.suffixes)
    folders = [run.key[0] for run in runs if len(run.key) > 1]
    has_classes = labelled and bool(folders)
    notes = walk.passed_over.notes(root, has_classes=has_classes)
    if not runs:
        found = "; ".join(notes) or "it is empty"
        raise UserError(f"{root} holds no images that end in {', '.join(suffixes)}: {found}")
    if has_classes and len(folders) < len(runs):
        stray = next(run.key[0] for run in runs if len(run.key) == 1)
        raise UserError(
            f"{os.fsdecode(os.path.join(walk.root, stray))} has no class while other "
            "images do: move it into the folder of its class, or all images into one folder"
        )
    files = _joined(root, runs)
    if not has_classes:
        return files, (), notes
    class_names = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(class_names)}
    labels = np.repeat([numbers[name] for name in folders], [len(run.sizes) for run in runs])
    return files.relabel(labels), tuple(map(os.fsdecode, class_names)), notes


def _joined(root: Path, runs: list[_Run]) -> Files:
    text = np.frombuffer(b"".join(run.text for run in runs), np.uint8)
    ends = np.concatenate([run.lengths for run in runs]).cumsum()
    sizes = np.concatenate([run.sizes for run in runs])
    count = len(ends)
    return Files(
        root, np.arange(count), np.zeros(count, np.int64), names=Names(text, ends), sizes=sizes
    )


# Splitting


def relabel(
    samples: SamplesType, names: tuple[str, ...], class_names: tuple[str, ...]
) -> SamplesType:
    """Give held-out samples the class numbers of training.

    Args:
        samples: The held-out samples.
        names: Names of their classes.
        class_names: Names of the training classes.

    Returns:
        The samples with new labels.

    Raises:
        UserError: If the training images have classes and the held-out ones have none or others.
    """
    if class_names and not names:
        raise UserError(f"{samples.root} has no class folders while the training images do")
    if unknown := sorted(set(names) - set(class_names)):
        raise UserError(f"{samples.root / unknown[0]} is a class without training images")
    if not names:
        return samples
    labels = np.array([class_names.index(name) for name in names])
    return samples.relabel(labels[samples.labels])


def hold_out(samples: SamplesType, *, labelled: bool) -> tuple[SamplesType, SamplesType]:
    """Split samples into training samples and held-out samples, which are the last ones.

    Args:
        samples: The samples.
        labelled: Whether to hold out a tenth of each class, at least one image; otherwise the last
            four images of the folder.

    Returns:
        Training samples and held-out samples.

    Raises:
        UserError: If there are too few samples to split.
    """
    counts = np.bincount(samples.labels)
    if labelled:
        num_held_out = np.maximum(1, (counts * HELD_OUT_SHARE).astype(np.int64))
    else:
        num_held_out = np.minimum(NUM_PICTURES, counts // 2)
    # Rank 1 is a class's last sample.
    by_class = samples.labels.argsort(kind="stable")
    rank = np.empty(len(samples), np.int64)
    rank[by_class] = counts.cumsum()[samples.labels[by_class]] - np.arange(len(samples))
    is_held_out = (rank <= num_held_out[samples.labels]) & (counts[samples.labels] > 1)
    if not is_held_out.any():
        raise UserError(
            f"{samples.root} has too few images to hold one out: "
            "give two or more, or a val folder beside train"
        )
    return samples.subset(~is_held_out), samples.subset(is_held_out)
