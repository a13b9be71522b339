"""Safe readers of small text files. Their size is limited, and nothing in them is executed."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

_MOST_BYTES = 1_000_000


class UnreadableError(Exception):
    """A file cannot be read. The message says why, without the name of the file."""


def read_bytes(file: Path) -> bytes:
    """Read a file of at most a megabyte.

    Raises:
        UnreadableError: If it is not a regular file, cannot be opened, or is larger.
    """
    try:
        if not file.is_file():  # a pipe or a device may never end
            raise UnreadableError("it is not a file" if file.exists() else "there is no such file")
        with file.open("rb") as content:
            data = content.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise UnreadableError(f"it has more than {_MOST_BYTES:,} bytes")
        return data
    except OSError as error:
        raise UnreadableError(error.strerror or str(error)) from error


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader of plain values that rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for position, key in enumerate(keys) if key in keys[:position]]
        if twice:
            raise UnreadableError(f"it has the key {twice[0]!r} twice")
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values.

    Raises:
        UnreadableError: As in `read_bytes`; or if its content is not YAML.
    """
    content = read_bytes(file)
    try:
        return yaml.load(content.decode(), _UniqueKeys)  # noqa: S506 -- a SafeLoader
    except RecursionError as error:
        raise UnreadableError("it is not YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UnreadableError(f"it is not YAML: {_short(error)}") from error


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        UnreadableError: As in `read_bytes`; or if its content is not JSON.
    """
    content = read_bytes(file)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise UnreadableError("it is not JSON: nested too deeply") from error
    except ValueError as error:
        raise UnreadableError(f"it is not JSON: {_short(error)}") from error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
