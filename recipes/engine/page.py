"""One HTML page of a finished run, or of several beside each other.

    python -m recipes.engine.page RUN [RUN ...] [--out FILE]

The page holds everything in itself: curves as vectors, pictures as data. It has no scripts and asks
no other host for anything.
"""

import base64
import html
import io
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mimkit._text import escaped
from recipes.engine.errors import UserError, say
from recipes.engine.pictures import config_of, different_keys
from recipes.engine.reading import UnreadableError, open_regular, read_bytes
from recipes.engine.run.cli import Runs, run_command
from recipes.engine.run.state import read_metrics, read_summary
from recipes.engine.writing import write_beside

_MOST_PICTURE = 100_000_000  # bytes
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } .wide { overflow-x: auto }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ddd }
.row { display: flex; gap: 1rem; flex-wrap: wrap } figure { margin: 0 }
img, svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True, eq=False)
class _Run:
    """What the page shows of a run."""

    name: str
    path: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page.

    Args:
        runs: Folders of finished runs, of any recipes.
        out: The file to write; one that is there must be such a page.

    Raises:
        UserError: A folder without a finished run, a damaged file, or an output file that is
            something else or cannot be written.
    """
    shown = [_read(run) for run in runs]
    start = "<!doctype html><!-- mimkit report -->\n"
    if os.path.lexists(out) and not _is_page(out, start):
        raise UserError(f"--out {out} is there and is not a page of this command")
    title = " and ".join(run.name for run in shown)
    parts = [
        f"<html lang=en><meta charset=utf-8><title>{_escape(title)}</title>",
        "<meta name=viewport content='width=device-width'>",
        f"<style>{_STYLE}</style><h1>{_escape(title)}</h1>",
        "<h2>Results</h2>",
        _table([run.name for run in shown], _results(shown)),
        "<h2>Loss</h2>",
        _curves(shown),
        "<h2>Pictures</h2>",
        *_pictures(shown),
        "<h2>Configuration</h2>",
        *_configurations(shown),
        "</html>",
    ]
    try:
        write_beside(out, start + "\n".join(parts))
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror}") from error


def _read(run: Path) -> _Run:
    config = config_of(run)
    try:
        summary, (rows, _) = read_summary(run), read_metrics(run)
    except UnreadableError as error:
        raise UserError(f"{run} holds a damaged file: {error}") from error
    return _Run(run.resolve().name, run, config, summary or {}, rows)


def _is_page(file: Path, start: str) -> bool:
    try:
        with open_regular(file, follow=False) as opened:
            return opened.read(len(start)) == start.encode()
    except UnreadableError:
        return False


def _results(runs: Sequence[_Run]) -> dict[str, list[str]]:
    """Return the rows of the table of results: a name, and a text for each run."""
    flat = [dict(_flat(run.summary)) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    return {name: [_number(one.get(name, "")) for one in flat] for name in names}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}, ")
        elif not isinstance(value, list):
            pairs.append((f"{prefix}{name}".replace("_", " "), value))
    return pairs


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escape(text: str, *, quote: bool = False) -> str:
    """Return a name or text from outside as HTML, without characters that steer a terminal."""
    return html.escape(escaped(text), quote=quote)


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(column)}" for column in ("", *columns))
    body = "".join(
        f"<tr><td>{_escape(name)}" + "".join(f"<td>{_escape(text)}" for text in texts)
        for name, texts in rows.items()
    )
    return f"<div class=wide><table><tr>{head}{body}</table></div>"


def _curves(runs: Sequence[_Run]) -> str:
    """Draw the losses of all runs in one picture; with one run, trivial predictors too."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        steps = [row["step"] for row in run.rows]
        axes.plot(steps, [row["loss"] for row in run.rows], label=_shortened(run.name))
        scores = [row.get("baselines", {}) for row in run.rows] if len(runs) == 1 else []
        for name in dict.fromkeys(name for row in scores for name in row):
            # A row has no predictors if the main process had no image that could be read.
            values = [row.get(name, math.nan) for row in scores]
            axes.plot(steps, values, "--", linewidth=1, label=_shortened(name))
    axes.set(xlabel="step", ylabel="loss")
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # $ is a character of a name
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font does not have
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _shortened(name: str) -> str:
    text = escaped(name)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _pictures(runs: Sequence[_Run]) -> list[str]:
    """Show each picture of any run, those of one name beside each other."""
    names = sorted({file.name for run in runs for file in run.path.glob("*.png")} - {"curves.png"})
    return [
        f"<h3>{_escape(Path(name).stem)}</h3><div class=row>"
        + "".join(_figure(run, name) for run in runs if (run.path / name).is_file())
        + "</div>"
        for name in names
    ]


def _figure(run: _Run, name: str) -> str:
    try:
        content = base64.b64encode(read_bytes(run.path / name, most=_MOST_PICTURE)).decode()
    except UnreadableError as error:
        raise UserError(f"{run.path / name} cannot be read: {error}") from error
    text = _escape(f"{Path(name).stem} of {run.name}", quote=True)
    picture = f'<img alt="{text}" src="data:image/png;base64,{content}">'
    return f"<figure>{picture}<figcaption>{_escape(run.name)}</figcaption></figure>"


def _configurations(runs: Sequence[_Run]) -> list[str]:
    """Show what differs between the configurations, then all of each."""
    names = [run.name for run in runs]
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    everything = {key: [str(run.config.get(key, "")) for run in runs] for key in keys}
    different = different_keys([run.config for run in runs])
    parts = [_table(names, {key: everything[key] for key in different})] if different else []
    whole = _table(names, everything)
    return [*parts, f"<details><summary>All of it</summary>{whole}</details>"]


@dataclass(frozen=True)
class Page:
    """Write one HTML page of a run, or of several beside each other.

    Attributes:
        runs: Folders of finished runs.
        out: The file to write.
    """

    runs: Runs
    out: Path = Path("report.html")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""

    def command(options: Page) -> None:
        if not options.runs:
            raise UserError("give the folder of a finished run, or of several")
        write_page(options.runs, options.out)
        say(options.out)

    return run_command(
        command,
        Page,
        name="engine/page",
        description="Write one HTML page of a run, or of several beside each other.",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
