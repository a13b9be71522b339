"""The last lines of a run: how long it trained, and what is in its folder."""

import sys
from pathlib import Path

from tqdm import tqdm

from recipes.engine.errors import say
from recipes.engine.reading import UnreadableError
from recipes.engine.run.state import METRICS, SUMMARY, read_metrics

_FILES = {
    "reconstructions": "images, what is visible of them, what the model predicts",
    "curves": "the loss of each step, beside trivial predictors",
    "attention": "where the encoder looks",
    "segmentations": "images, true classes, predicted classes",
    "detections": "images, true boxes and masks, predicted ones",
    "encoder": "weights, for `--encoder` of finetune, probe, segment and detect",
    "model": "weights of the whole model",
    "tokenizer": "weights, for `--tokenizer` of cae and simmim",
    "summary": "the numbers above, and more",
}


def print_closing(folder: Path) -> None:
    """Print the training time of a finished run, and its pictures, weights and numbers.

    The time is that of the steps that count, also over several jobs, and of all the trainings of a
    run that trains several times. Runs of earlier versions did not write it down.
    """
    seconds = sum(_seconds(file) for file in folder.rglob(METRICS))
    if seconds:
        say(f"training time  {tqdm.format_interval(round(seconds))} (min:s)")
    files = [*sorted(folder.glob("*.png")), *sorted(folder.glob("*.safetensors")), folder / SUMMARY]
    say(f"files in {folder}:")
    say(*(f"  {file.name:<24}{_FILES.get(file.stem, '')}".rstrip() for file in files))
    say(f"all of it on one page: mimkit report {folder}")


def _seconds(file: Path) -> float:
    try:
        return float(sum(row.get("seconds", 0) for row in read_metrics(file.parent)[0]))
    except UnreadableError as error:  # of an earlier run in a folder below, which nothing checks
        say(f"warning: {file} cannot be read: {error}", file=sys.stderr)
        return 0.0
