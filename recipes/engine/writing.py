"""Files that are whole on the disk once they have their name, also after a power cut."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, and rename it once it is on the disk."""
    partial = file.with_name(file.name + PARTIAL)
    partial.unlink(missing_ok=True)  # of a killed run; of a link, the link itself
    with new_file(partial) as opened:
        opened.write(content.encode() if isinstance(content, str) else content)
    os.replace(partial, file)
    sync_folder(file.parent)


def write_beside(file: Path, content: str | bytes) -> None:
    """Write a file as `write_atomically` does, in a folder that may hold files of other people.

    The temporary name is one that nothing has; a run that fails leaves nothing under it.
    """
    numbers = itertools.count(1)
    names = (file.with_name(f"{file.name}.{number}{PARTIAL}") for number in numbers)
    partial = next(name for name in names if not os.path.lexists(name))
    is_ours = False
    try:
        with new_file(partial) as opened:
            is_ours = True
            opened.write(content.encode() if isinstance(content, str) else content)
        os.replace(partial, file)
    except BaseException:
        if is_ours:
            partial.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def write_json(file: Path, values: Any) -> None:
    """Write values as JSON, atomically."""
    write_atomically(file, json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def new_file(file: Path) -> Iterator[IO[bytes]]:
    """Create a file, which must not exist; it is on the disk after the context."""
    with file.open("xb") as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())


def put_aside(path: Path) -> str:
    """Rename a damaged file or folder, and return its new name."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    path.rename(kept)
    return kept.name


def sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse this
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
