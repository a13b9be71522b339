"""Pre-trained encoder against none, over several seeds; and where the encoder comes from."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.engine.errors import UserError, say
from recipes.engine.main import run
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.run.config import Recipe

Scores = Mapping[str, Sequence[float]]
_ENCODER = "encoder.safetensors"


def find_encoder(given: str, recipes: Sequence[str], root: Path = Path("runs")) -> str | None:
    """Return the encoder that `--encoder` names.

    Args:
        given: A file, the folder of a run, "none", or "auto" for the newest finished run.
        recipes: Recipes whose runs "auto" takes.
        root: Folder of the runs.

    Returns:
        The path of a file, or "none"; None if "auto" finds no run.

    Raises:
        UserError: If a folder has no encoder.
    """
    if given != "auto":
        path = Path(given)
        if path.is_dir() and not (path / _ENCODER).is_file():
            raise UserError(
                f"--encoder {given} is a folder without {_ENCODER}: is its run finished?"
            )
        return str(path / _ENCODER) if path.is_dir() else given
    files = [file for file in root.glob(f"*/{_ENCODER}") if _recipe_of(file) in recipes]
    newest = max(files, key=lambda file: (file.stat().st_mtime, str(file)), default=None)
    return None if newest is None else str(newest)


def _recipe_of(encoder: Path) -> Any:
    try:
        return read_yaml(encoder.with_name("config.yaml")).get("recipe")
    except (UnreadableError, AttributeError):
        return None


def find_or_pretrain(
    given: str, recipes: Sequence[str], recipe: Recipe, description: str, *, dry_run: bool
) -> str:
    """Return the encoder that `--encoder` names, or pre-train one if "auto" finds none.

    Args:
        given: As of `find_encoder`.
        recipes: As of `find_encoder`.
        recipe: The recipe that pre-trains.
        description: Its help text.
        dry_run: Whether to say only that it would be pre-trained; then "none" is returned.

    Raises:
        UserError: If a folder has no encoder.
        SystemExit: If the pre-training stops.
    """
    found = find_encoder(given, recipes)
    names = " or ".join(recipes)
    if found is None and dry_run:
        say(f"note: there is no finished run of {names} in runs: one is trained first")
        return "none"
    if found is None:
        say(
            f"note: there is no finished run of {names} in runs: training "
            f"{recipe.name} --preset {next(iter(recipe.presets))} first",
            file=sys.stderr,
        )
        code = run(recipe, description, [])
        if code:
            raise SystemExit(code)
        found = find_encoder(given, recipes)
        assert found is not None
    if given == "auto":
        say(f"note: --encoder {found}", file=sys.stderr)
    return found


def print_comparison(title: str, scores: Scores) -> None:
    """Print means and ranges of a score: one row for each start.

    Args:
        title: What is scored.
        scores: The score with each seed, by start: "pretrained" and "scratch".

    Example:
        >>> print_comparison("mIoU", {"pretrained": [20.0, 22.0], "scratch": [15.0]})
        mIoU            mean     range            seeds
        pretrained      21.0     20.0 to 22.0         2
        scratch         15.0     15.0 to 15.0         1
    """
    say(f"{title:<14}{'mean':>6}     {'range':<17}seeds")
    for start, values in scores.items():
        mean = sum(values) / len(values)
        low, high = (f"{bound:.1f}" for bound in (min(values), max(values)))
        say(f"{start:<14}{mean:>6.1f}     {f'{low} to {high}':<17}{len(values):>5}")
