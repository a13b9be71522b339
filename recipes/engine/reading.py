"""Safe readers of small text files, and digests of files of any size.

The size of what is read is limited, and nothing in it is executed.
"""

import hashlib
import json
import os
import stat
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

_MOST_YAML = 100_000  # bytes: PyYAML reads about as many in a second
_MOST_JSON = 16_000_000
_SEAL = "sha256"


class UnreadableError(Exception):
    """A file cannot be read. The message says why, without the name of the file."""


def open_regular(file: Path | str, *, follow: bool = True) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        file: The file.
        follow: Whether it may be a link.

    Raises:
        UnreadableError: If it cannot be opened, or is something else: a pipe or a device may never
            end.
    """
    # Not blocking, should it have become a pipe since it was looked at.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        if not follow and os.path.islink(file):
            raise UnreadableError("it is a link")
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a device may do something
            raise UnreadableError("it is not a regular file")
        opened = os.fdopen(os.open(file, flags), "rb")
    except FileNotFoundError as error:
        raise UnreadableError("there is no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in its name
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    return opened


def read_bytes(file: Path | str, *, most: int) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        UnreadableError: If it is not a regular file, cannot be opened, or is larger.
    """
    with open_regular(file) as content:
        size = os.fstat(content.fileno()).st_size
        if size > most:
            raise UnreadableError(f"it has more than {most:,} bytes")
        try:
            data = content.read(size + 1)
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
    if len(data) > size:  # files of /proc say that they are empty
        raise UnreadableError(f"it has more than the {size:,} bytes that it says it has")
    return data


def sha256_of(file: Path, *, follow: bool = True) -> str:
    """Return the SHA-256 of a regular file's content, in hexadecimal digits.

    Raises:
        UnreadableError: As in `open_regular`, or if it cannot be read.
    """
    with open_regular(file, follow=follow) as content:
        try:
            return hashlib.file_digest(content, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error


class _PlainYAML(yaml.SafeLoader):
    """YAML loader of plain values that rejects duplicate keys and aliases.

    A few lines of aliases of aliases can stand for more values than fit into memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise UnreadableError("it has an alias (*name), which is not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        _check_unique([key for key in keys if isinstance(key, Hashable)])
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values, of at most 100,000 bytes.

    Raises:
        UnreadableError: As in `read_bytes`; or if its content is not YAML, has a key twice or an
            alias.
    """
    content = read_bytes(file, most=_MOST_YAML)
    try:
        return yaml.load(content.decode(), _PlainYAML)  # noqa: S506 -- a SafeLoader
    except RecursionError as error:
        raise UnreadableError("it is not YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UnreadableError(f"it is not YAML: {_short(error)}") from error


def read_json(file: Path, *, most: int = _MOST_JSON) -> Any:
    """Read a JSON file of at most `most` bytes.

    Raises:
        UnreadableError: As in `read_bytes`; or if its content is not JSON, or has a key twice.
    """
    return parse_json(read_bytes(file, most=most))


def parse_json(content: bytes) -> Any:
    """Parse JSON.

    Raises:
        UnreadableError: If it is not JSON, or has a key twice.
    """
    try:
        return json.loads(content, object_pairs_hook=_unique_pairs)
    except RecursionError as error:
        raise UnreadableError("it is not JSON: nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {_short(error)}") from error


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """Add the digest of the values, so that `read_sealed` notices any change."""
    return {**values, _SEAL: _digest(values)}


def read_sealed(file: Path) -> dict[str, Any]:
    """Read a JSON file of values that `seal` has sealed.

    Raises:
        UnreadableError: As in `read_json`; or if its values are not those that were sealed.
    """
    values = read_json(file)
    if not isinstance(values, dict) or _SEAL not in values:
        raise UnreadableError("it has no digest")
    if values.pop(_SEAL) != _digest(values):
        raise UnreadableError("its content does not have its digest")
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _unique_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _check_unique([key for key, _ in pairs])
    return dict(pairs)


def _check_unique(keys: Sequence[Hashable]) -> None:
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise UnreadableError(f"it has the key {key!r:.60} twice")
        seen.add(key)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
