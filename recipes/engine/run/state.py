"""The state files of a run: what each must hold, and how a damaged one is repaired.

    metrics.jsonl        rows, by ascending step        damaged rows are left out
    summary.json         sealed with its own digest     written again at the end of the run
    skipped_steps.json   steps                          those that can be read are kept
    unreadable.<n>.json  sample ids                     those that can be read are kept
    environment.json     a dictionary                   written again

A file that is repaired stays beside the new one, as `<name>.damaged-<number>`.
"""

import bisect
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from recipes.engine.reading import (
    UnreadableError,
    open_regular,
    parse_json,
    read_json,
    read_sealed,
    sha256_of,
)
from recipes.engine.writing import put_aside, write_atomically, write_json

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
SKIPPED = "skipped_steps.json"
ENVIRONMENT = "environment.json"
UNREADABLE = re.compile(r"unreadable\.\d+\.json", re.ASCII)
DIGESTS = "digests"  # of the files of weights, in the summary
_MOST_ROW = 1_000_000  # bytes
_MOST_METRICS = 2_000_000_000
_MOST_STEPS = 10**18
_MOST_LOSS = 1e39  # of float32


def read_metrics(
    folder: Path, *, most_steps: int = _MOST_STEPS
) -> tuple[list[dict[str, Any]], int]:
    """Read the rows of `metrics.jsonl`.

    Args:
        folder: The folder of the run.
        most_steps: Steps of the run. Rows of later ones are damaged.

    Returns:
        The rows, and the number of damaged ones. A last line without an end is not counted: it is
        what a killed run leaves.

    Raises:
        UnreadableError: If the file cannot be read, or is larger than any run makes it.
    """
    file = folder / METRICS
    if not os.path.lexists(file):
        return [], 0
    rows: list[dict[str, Any]] = []
    damaged = 0
    with open_regular(file, follow=False) as content:
        if os.fstat(content.fileno()).st_size > _MOST_METRICS:
            raise UnreadableError(f"it has more than {_MOST_METRICS:,} bytes")
        while line := content.readline(_MOST_ROW):
            row = _row(line, most_steps)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n") or len(line) == _MOST_ROW:
                damaged += 1
    kept = _ascending([row["step"] for row in rows])
    return [rows[index] for index in kept], damaged + len(rows) - len(kept)


def _ascending(steps: Sequence[int]) -> list[int]:
    """Return the indices of the longest ascending series, so that one wrong step costs one row."""
    lowest: list[int] = []  # last step of the lowest series of each length
    ends: list[int] = []  # their indices
    before: list[int] = []  # the index before each one in its series
    for index, step in enumerate(steps):
        length = bisect.bisect_left(lowest, step)
        before.append(ends[length - 1] if length else -1)
        if length == len(lowest):
            lowest.append(step)
            ends.append(index)
        elif step < lowest[length]:
            lowest[length], ends[length] = step, index
    kept: list[int] = []
    index = ends[-1] if ends else -1
    while index >= 0:
        kept.append(index)
        index = before[index]
    return kept[::-1]


def _row(line: bytes, most_steps: int) -> dict[str, Any] | None:
    """Parse a row; None if it is damaged."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_json(line)
    except UnreadableError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    if not 1 <= row["step"] <= most_steps:
        return None
    baselines = row.get("baselines", {})
    if not isinstance(baselines, dict):
        return None
    numbers = [row.get("loss"), row.get("images_per_s"), row.get("seconds", 0)]
    is_whole = all(type(number) in (int, float) for number in (*numbers, *baselines.values()))
    is_whole = is_whole and all(-_MOST_LOSS < number < _MOST_LOSS for number in numbers)
    # Trivial predictors may score NaN or infinity, but no integer is that large.
    return row if is_whole and not any(_is_huge(n) for n in baselines.values()) else None


def _is_huge(number: float) -> bool:
    return type(number) is int and abs(number) > _MOST_LOSS


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read `summary.json`, and compare the weights that it names with their digests.

    Returns:
        The summary; None if there is none.

    Raises:
        UnreadableError: If it or the weights are damaged. Weights that were moved elsewhere are no
            damage.
    """
    file = folder / SUMMARY
    if not os.path.lexists(file):
        return None
    summary = read_sealed(file)
    for name, digest in _digests(summary).items():
        if os.path.lexists(folder / name) and sha256_of(folder / name) != digest:
            raise UnreadableError(f"{name} does not have the digest in it")
    return summary


def digest_beside(weights: Path) -> str | None:
    """Return the digest of a file of weights in the summary of the run beside it.

    Returns:
        None if there is no summary beside it, or the file is not one that the run has written.

    Raises:
        UnreadableError: If the summary is damaged, or of a version of mimkit without digests.
    """
    file = weights.with_name(SUMMARY)
    if not os.path.lexists(file):
        return None
    digest: str | None = _digests(read_sealed(file)).get(weights.name)
    return digest


def _digests(summary: dict[str, Any]) -> dict[str, str]:
    digests = summary.pop(DIGESTS, None)
    if not isinstance(digests, dict):
        raise UnreadableError("it has no digests of weights")
    return digests


def read_numbers(file: Path, *, below: int) -> list[int]:
    """Read a list of steps or sample ids; empty if there is no such file.

    Raises:
        UnreadableError: If it is damaged: anything but different integers from 0 to `below` - 1.
    """
    if not os.path.lexists(file):
        return []
    found = read_json(file)
    if not isinstance(found, list):
        raise UnreadableError("it is not a list")
    if _sound(found, below) != found:
        raise UnreadableError(f"not all of it are different integers from 0 to {below - 1:,}")
    return found


def _sound(found: Any, below: int) -> list[int]:
    numbers = found if isinstance(found, list) else []
    fitting = (number for number in numbers if type(number) is int and 0 <= number < below)
    return list(dict.fromkeys(fitting))


def repair(
    folder: Path, *, num_samples: int, num_steps: int, environment: Callable[[], dict[str, Any]]
) -> list[str]:
    """Check and repair the state files that training reads or adds to.

    Args:
        folder: The folder of the run.
        num_samples: Number of training images.
        num_steps: Number of steps.
        environment: Makes what `environment.json` holds.

    Returns:
        A sentence for each file that was repaired.

    Raises:
        OSError: If a file cannot be renamed or written.
    """
    return [
        *_repair_metrics(folder, num_steps),
        *_repair_numbers(folder / SKIPPED, num_steps),
        *(
            sentence
            for file in sorted(folder.iterdir())
            if UNREADABLE.fullmatch(file.name)
            for sentence in _repair_numbers(file, num_samples)
        ),
        *_repair_environment(folder / ENVIRONMENT, environment),
    ]


def _repair_metrics(folder: Path, num_steps: int) -> Iterator[str]:
    file = folder / METRICS
    try:
        rows, damaged = read_metrics(folder, most_steps=num_steps)
        if damaged == 0:
            return
        what = f"{damaged} damaged lines were left out, {len(rows)} rows are kept"
    except UnreadableError as error:
        rows, what = [], f"{error}; its rows are lost"
    kept = put_aside(file)
    write_rows(file, rows)
    yield f"{file} was repaired: {what}; the damaged file is {kept}"


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of metrics, one a line."""
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))


def _repair_numbers(file: Path, below: int) -> Iterator[str]:
    try:
        read_numbers(file, below=below)
    except UnreadableError as error:
        sound = _sound(_json_or_none(file), below)
        kept = put_aside(file)
        write_json(file, sound)
        yield (
            f"{file} was repaired: {error}; {len(sound)} numbers are kept, the damaged file is "
            f"{kept}"
        )


def _repair_environment(file: Path, make: Callable[[], dict[str, Any]]) -> Iterator[str]:
    try:
        if isinstance(read_json(file), dict):
            return
        reason = "it is not a dictionary"
    except UnreadableError as error:
        reason = str(error)
    kept = f"; the damaged file is {put_aside(file)}" if os.path.lexists(file) else ""
    write_json(file, make())
    yield f"{file} was written again: {reason}{kept}"


def _json_or_none(file: Path) -> Any:
    try:
        return read_json(file)
    except UnreadableError:
        return None
