"""Pack a folder of images into shards: uncompressed tar files in WebDataset's naming.

    python recipes/pack.py /path/to/imagenet /path/to/shards --short-side 512
    python recipes/mae.py --preset vit_base --data /path/to/shards

Shards are read at random through an index, and their samples have the ids that the folder's images
have: the same run on either gives the same losses if nothing is resized. Images whose shorter side
is larger than `--short-side` are resized and stored as JPEG files; all others are copied byte by
byte. Started again after a stop, it continues after the last complete shard.
"""

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    __import__("recipes.script" if __package__ else "script")  # import path, threads

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from recipes.engine import fields
from recipes.engine.data.arrays import SUFFIXES as ARRAYS
from recipes.engine.data.decode import DECODE, formats, open_picture
from recipes.engine.data.images import resize
from recipes.engine.data.listing import MAX_FILE_BYTES, Files, FolderId, list_files, relabel
from recipes.engine.data.shards import (
    INDEX,
    UNFINISHED,
    find_shards,
    make_index,
    shards_of,
    write_index,
)
from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError, read_bytes, read_json
from recipes.engine.run.cli import run_command
from recipes.engine.writing import write_atomically

_FINISHED = "pack.json"
SUFFIXES = [suffix for some in formats().values() for suffix in some]
_ORIENTATION = 0x0112
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_AT_ONCE = 32  # images a process gets at a time


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of packing.

    Attributes:
        folder: Folder of images, as `--data` of the recipes takes it.
        out: Folder of the shards; new, or of the same packing.
        short_side: Resize images to this shorter side, in pixels, if theirs is larger; by default
            files are copied as they are.
        quality: JPEG quality of resized images.
        shard_size: Least size of a shard but the last, such as 1GB or 200MB.
        workers: Processes that read and resize images; by default one for each core.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]
    short_side: fields.Pixels | None = None
    quality: Annotated[int, fields.Within(1, 100)] = 90
    shard_size: str = "1GB"
    workers: fields.Workers | None = None


@dataclass(frozen=True)
class Sample:
    """A packed image.

    Attributes:
        key: Its key: its path, without an ending.
        ending: Ending of its file.
        label: Its class; None without labels.
        data: Content of its file; empty if it cannot be read.
    """

    key: str
    ending: str
    label: int | None
    data: bytes


def bytes_in(size: str) -> int:
    """Return the number of bytes in a size such as 1GB.

    Example:
        >>> bytes_in("1GB"), bytes_in("1.5 mb"), bytes_in("800")
        (1000000000, 1500000, 800)
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) *([KMGT]B)?", size.strip().upper())
    number = round(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    if number < 1:
        raise UserError(f"--shard-size {size} is no size: give a number of bytes such as 1GB")
    return number


def keys_of(files: Files) -> list[tuple[str, str]]:
    """Return key and ending of each file. A key has no dot, and no two are the same.

    Raises:
        UserError: If two files would have one key.
    """
    names = [os.fsdecode(files.names[row]) for row in files.rows]
    parts = [os.path.splitext(name) for name in names]
    keys = [stem.replace(".", "_") for stem, _ in parts]
    count = Counter(keys)
    keys = [
        key if count[key] == 1 else name.replace(".", "_")  # a.jpg beside a.png
        for key, name in zip(keys, names, strict=True)
    ]
    if twice := [key for key, number in Counter(keys).items() if number > 1]:
        raise UserError(f"two images in {files.root} have the key {twice[0]}: rename one of them")
    return [(key, ending) for key, (_, ending) in zip(keys, parts, strict=True)]


def contents_of(
    paths: Sequence[str], short_side: int | None, quality: int
) -> list[tuple[bytes, bool]]:
    """Return the content of files, and whether each was resized: then it is a JPEG file."""
    torch.set_num_threads(1)
    return [_content_of(path, short_side, quality) for path in paths]


def _content_of(path: str, short_side: int | None, quality: int) -> tuple[bytes, bool]:
    try:
        data = read_bytes(path, most=MAX_FILE_BYTES)
    except UnreadableError:
        return b"", False  # stays unreadable, and the others keep their ids
    if short_side is None:
        return data, False
    try:
        pixels = DECODE(data)
        with open_picture(data) as header:
            has_many_bits, exif = header.mode[0] in "IF", header.getexif()
            is_stack = header.format == "TIFF" and getattr(header, "n_frames", 1) > 1
    except UnreadableError:
        return data, False
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    if scale >= 1 or has_many_bits or is_stack:
        return data, False
    size = max(1, round(height * scale)), max(1, round(width * scale))
    resized = resize(pixels, (0, 0, width, height), size, "bicubic")
    kept = Image.Exif()
    if _ORIENTATION in exif:
        kept[_ORIENTATION] = exif[_ORIENTATION]
    buffer = io.BytesIO()
    image = Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
    image.save(buffer, "JPEG", quality=quality, exif=kept)
    return buffer.getvalue(), True


def samples_of(
    files: Files, start: int, options: PackOptions, *, labelled: bool
) -> Iterator[Sample]:
    """Yield the samples of a folder from the one with the id `start` on, in order."""
    keys = keys_of(files)
    convert = partial(contents_of, short_side=options.short_side, quality=options.quality)
    chunks = (
        [files.name(index) for index in range(first, min(first + _AT_ONCE, len(files)))]
        for first in range(start, len(files), _AT_ONCE)
    )
    for index, (data, is_resized) in enumerate(_in_order(convert, chunks, options.workers), start):
        key, ending = keys[index]
        label = int(files.labels[index]) if labelled else None
        yield Sample(key, ".jpg" if is_resized else ending, label, data)


Contents = list[tuple[bytes, bool]]


def _in_order(
    convert: Callable[[list[str]], Contents], chunks: Iterator[list[str]], workers: int | None
) -> Iterator[tuple[bytes, bool]]:
    """Apply a function in several processes, a few chunks ahead of what is taken."""
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers == 0:
        for chunk in chunks:
            yield from convert(chunk)
        return
    with ProcessPoolExecutor(workers) as pool:
        pending = deque(pool.submit(convert, chunk) for chunk in islice(chunks, 2 * workers))
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(convert, chunk) for chunk in islice(chunks, 1))
            yield from done


def write_shard(file: Path, samples: Iterator[Sample], size: int) -> list[tuple[str, bytes]]:
    """Write samples until a shard has its size; return the name and hash of each image."""
    written = []
    with file.open("wb") as content:
        with tarfile.open(
            fileobj=content, mode="w:", format=tarfile.GNU_FORMAT, errors="surrogateescape"
        ) as tar:
            for sample in samples:
                name = sample.key + sample.ending
                _add(tar, name, sample.data)
                if sample.label is not None:
                    _add(tar, f"{sample.key}.cls", str(sample.label).encode())
                written.append((name, hashlib.sha256(sample.data).digest()))
                if content.tell() >= size:
                    break
        content.flush()
        os.fsync(content.fileno())
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same images give the same shard
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def verify_shard(file: Path, written: list[tuple[str, bytes]]) -> None:
    """Read a shard as a training run does, and compare it with what was written.

    Raises:
        UserError: If it differs.
    """
    shard = shards_of(file.parent, make_index(file.parent, [file.name], SUFFIXES))
    names = [os.fsdecode(shard.names[row]) for row in range(len(shard))]
    hashes = [hashlib.sha256(shard.read(row)).digest() for row in range(len(shard))]
    if list(zip(names, hashes, strict=True)) != written:
        raise UserError(f"{file} differs from what was written to it: check the disk")


def pack(files: Files, out: Path, options: PackOptions, *, labelled: bool) -> None:
    """Pack files into the shards of a folder, or continue with it.

    Raises:
        UserError: If the folder holds something else, or cannot be written.
    """
    settings = {
        "short_side": options.short_side,
        "quality": options.quality,
        "shard_size": bytes_in(options.shard_size),
        "images": len(files),
        "digest": files.fingerprint.hex(),
    }
    counts = _packed_before(out, settings)
    start = sum(counts)
    samples = samples_of(files, start, options, labelled=labelled)
    with tqdm(total=len(files), initial=start, unit="image", desc=out.name, disable=None) as bar:

        def counted() -> Iterator[Sample]:
            for sample in samples:
                yield sample
                bar.update()

        stream = counted()
        while sum(counts) < len(files):
            shard = out / f"shard-{len(counts):06d}.tar"
            partial_shard = shard.with_suffix(".partial")
            written = write_shard(partial_shard, stream, bytes_in(options.shard_size))
            verify_shard(partial_shard, written)
            os.replace(partial_shard, shard)
            counts.append(len(written))
            write_atomically(out / UNFINISHED, json.dumps({**settings, "counts": counts}))
    write_index(out / INDEX, make_index(out, find_shards(out), SUFFIXES))
    if (out / UNFINISHED).exists():
        os.replace(out / UNFINISHED, out / _FINISHED)


def _packed_before(out: Path, settings: dict[str, Any]) -> list[int]:
    """Return the number of samples in each complete shard of an earlier, equal packing."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (UNFINISHED, _FINISHED):
        if not (out / name).exists():
            continue
        try:
            state = read_json(out / name)
            counts = state.pop("counts")
        except (UnreadableError, AttributeError, KeyError) as error:
            raise UserError(f"{out / name} is damaged: choose another folder") from error
        if state != settings:
            different = sorted(key for key in settings if state.get(key) != settings[key])
            raise UserError(
                f"{out} holds a packing with another {', '.join(different)}: choose another folder"
            )
        return list(counts)
    if other := sorted(os.listdir(out)):
        raise UserError(f"{out} holds {other[0]}: choose a new folder")
    write_atomically(out / UNFINISHED, json.dumps({**settings, "counts": []}))
    return []


def _list(
    root: Path, *, labelled: bool, seen: set[FolderId]
) -> tuple[Files, tuple[str, ...], list[str]]:
    """List the images of a folder.

    Raises:
        UserError: If there are none, or `--data` would read arrays instead of them.
    """
    others = Counter[str]()
    found, problem = None, None
    try:
        found = list_files(root, SUFFIXES, labelled=labelled, seen=seen, others=others)
    except UserError as error:
        problem = error
    endings = sorted({os.path.splitext("x" + suffix)[1] for suffix in ARRAYS} & set(others))
    if sum(others[ending] for ending in endings) > (0 if found is None else len(found[0])):
        raise UserError(
            f"{root} holds arrays ({', '.join(endings)}), which are not packed: give the folder "
            "itself as --data"
        )
    if found is None:
        assert problem is not None
        raise problem
    return found


def run(options: PackOptions) -> None:
    """Pack a folder, with its `train/` and `val/` if it has them.

    Raises:
        UserError: If there are no images, or the output folder holds something else.
    """
    if not options.folder.is_dir():
        raise UserError(f"{options.folder} is not a folder")
    has_train = (options.folder / "train").is_dir()
    parts = [part for part in ("train", "val") if (options.folder / part).is_dir()]
    class_names: tuple[str, ...] = ()
    seen: set[FolderId] = set()
    for part in parts if has_train else [""]:
        labelled = has_train and (part == "train" or bool(class_names))
        files, names, notes = _list(options.folder / part, labelled=labelled, seen=seen)
        say(*(f"note: {note}" for note in notes), file=sys.stderr)
        class_names = names if part == "train" else class_names
        files = relabel(files, names, class_names) if part == "val" else files
        try:
            pack(files, options.out / part, options, labelled=bool(class_names))
        except (OSError, BrokenProcessPool) as error:
            reason = getattr(error, "strerror", None) or "a process that reads images was killed"
            raise UserError(f"{options.out / part} cannot be written: {reason}") from error
        size = sum(
            (options.out / part / name).stat().st_size for name in find_shards(options.out / part)
        )
        say(f"{options.out / part}: {len(files):,} images, {size / 1e6:,.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    return run_command(run, PackOptions, name="pack", description=__doc__, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
