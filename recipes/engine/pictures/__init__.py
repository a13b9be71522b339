"""Pictures of a run: curves, reconstructions, attention; and those of several runs side by side.

    python -m recipes.engine.pictures RUN RUN [RUN ...] [--out FOLDER]

puts the pictures that all the runs have beside each other, each under its folder's name and what
its configuration has different from the others'.
"""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from mimkit import masking, viz
from mimkit._text import escaped
from mimkit.patches import grid_of, patchify, unpatchify
from recipes.engine.data.decode import open_picture
from recipes.engine.data.listing import MAX_FILE_BYTES
from recipes.engine.data.sets import DataSet, ProbeData
from recipes.engine.errors import UserError, say
from recipes.engine.masks import first
from recipes.engine.pictures.flat import enlarged, flatten_image, middle, plane
from recipes.engine.probes import Features, compute_features, fit_attentive, standardize
from recipes.engine.reading import UnreadableError, read_bytes, read_yaml
from recipes.engine.run.cli import Runs, run_command
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.writing import write_atomically, write_beside

_ATTENTION_ROWS = 8  # images in the picture of attention
_ENLARGED = 4
_SOFTWARE = "mimkit"


def save_picture(
    picture: Image.Image, file: Path, write: Callable[[Path, bytes], None] = write_atomically
) -> None:
    """Write a picture atomically, as PNG with the name of this program."""
    content, about = io.BytesIO(), PngInfo()
    about.add_text("Software", _SOFTWARE)
    picture.save(content, format="PNG", pnginfo=about)
    write(file, content.getvalue())


def draw_curves(folder: RunFolder) -> None:
    """Draw the loss over the steps, beside what trivial predictors score."""
    rows = folder.read_metrics()
    names = rows[-1].get("baselines", {})
    # A row has no predictors if the main process had no image that could be read.
    metrics = [row for row in rows if row.get("baselines", {}).keys() == names.keys()]
    series = {"loss": [row["loss"] for row in metrics]}
    series |= {name: [row["baselines"][name] for row in metrics] for name in names}
    picture = viz.curves([row["step"] for row in metrics], series, title="loss")
    save_picture(picture, folder.path / "curves.png")


@torch.no_grad()
def draw_reconstructions(
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, model: nn.Module
) -> None:
    """Draw held-out pictures: as they are, masked, and reconstructed tile by tile."""
    encoder: Any = model.encoder
    show, own_sizes = shown_by(config), config.native

    def columns(number: int, picture: "TiledPicture") -> dict[str, Tensor]:
        ids = torch.arange(len(picture.tiles)) + (number << 32)
        sides = picture.tiles.shape[2:]
        grid = encoder.grid if own_sizes is None else grid_of(picture.tiles, own_sizes.patch)
        mask = first(config.masking.draw(masking.key(ids, seed=config.seed), grid))
        # Not always the encoder's.
        patch_size = [size // n for size, n in zip(sides, mask.grid, strict=True)]
        with config.autocast():
            filled = recipe.reconstruct(
                model, picture.inputs.to(config.device), mask.to(config.device)
            )
        masked = viz.show_masked(picture.tiles, mask, patch_size)
        if len(mask.grid) == 1:  # a curve has a gap there
            blank = torch.zeros_like(masked)
            masked[viz.show_masked(blank, mask, patch_size, color=1.0).bool()] = math.nan
        share = f"masked, {mask.num_masked / mask.num_tokens:.0%}"
        return {share: masked, "reconstruction": picture.from_inputs(filled)}

    note = f"{_tile_note(encoder)} and filled in by itself.\n{_note(recipe, model)}"
    if own_sizes is not None:
        show = partial(_show_whole, show)
        note = f"Whole pictures of at most {own_sizes.most} patches each.\n{_note(recipe, model)}"
    file = folder.path / "reconstructions.png"
    size = encoder.image_size if own_sizes is None else None
    draw_columns(file, data, size, columns, note=note, show=show)


@torch.no_grad()
def draw_more_pictures(
    recipe: Recipe, config: RunConfig, data: DataSet, folder: RunFolder, model: nn.Module
) -> None:
    """Draw what the recipe shows of held-out pictures beside reconstructions."""
    encoder: Any = model.encoder
    note = f"{_tile_note(encoder)}.\n{_note(recipe, model)}"
    for name, draw in recipe.pictures.items():

        def columns(_: int, picture: "TiledPicture", draw: Any = draw) -> dict[str, Tensor]:
            with config.autocast():
                found = draw(model, picture.inputs.to(config.device))
            return {caption: picture.from_inputs(tiles) for caption, tiles in found.items()}

        file = folder.path / f"{name}.png"
        draw_columns(file, data, encoder.image_size, columns, note=note, show=shown_by(config))


def _show_whole(show: Callable[[Tensor], Tensor], picture: Tensor) -> Tensor:
    """Show a picture that is one tile, which may be small."""
    return enlarged(show(picture))


def shown_by(config: RunConfig) -> Callable[[Tensor], Tensor]:
    """Return what turns values in [0, 1] into pictures, in the bands of `--bands`."""
    return partial(flatten_image, bands=config.training.bands)


def draw_columns(
    file: Path,
    data: DataSet,
    size: tuple[int, ...] | None,
    columns: Callable[[int, "TiledPicture"], Mapping[str, Tensor]],
    *,
    note: str = "",
    show: Callable[[Tensor], Tensor] = flatten_image,
) -> None:
    """Draw held-out pictures with columns of what is made of them; nothing if there are none.

    Args:
        file: Where to.
        data: Has the pictures.
        size: Size of a tile per axis; None for one tile a picture.
        columns: Makes tiles in [0, 1] by caption, of a picture and its number.
        note: Text below.
        show: Turns values in [0, 1] of any channels and axes into a picture.
    """
    rows, captions = [], ["input (not trained on)"]
    for number, picture in enumerate(tiled_pictures(data, size)):
        found = columns(number, picture)
        captions = [captions[0], *found]
        rows.append([show(picture.join(tiles)) for tiles in (picture.tiles, *found.values())])
    if rows:
        save_picture(viz.panel(rows, captions, note=note), file)


def _note(recipe: Recipe, model: nn.Module) -> str:
    return recipe.note if isinstance(recipe.note, str) else recipe.note(model)


@dataclass(frozen=True, eq=False)
class TiledPicture:
    """A picture cut into tiles of the encoder's size.

    Attributes:
        tiles: Tiles in [0, 1], row by row.
        inputs: Tiles as model inputs.
        mean: What was subtracted from them.
        std: What they were divided by then.
        counts: Tiles per axis.
    """

    tiles: Tensor
    inputs: Tensor
    mean: Tensor
    std: Tensor
    counts: tuple[int, ...]

    def from_inputs(self, inputs: Tensor) -> Tensor:
        """Turn model inputs of the tiles into tiles."""
        return inputs.float().cpu() * self.std + self.mean

    def join(self, tiles: Tensor) -> Tensor:
        """Put the tiles together."""
        patches = tiles.flatten(1)[None]
        return unpatchify(patches, self.counts, tuple(tiles.shape[2:]), order="c p1 p2")[0]


def tiled_pictures(data: DataSet, size: tuple[int, ...] | None) -> Iterator[TiledPicture]:
    """Cut each held-out picture into tiles of a size; into one tile, if it is None."""
    for picture in data.pictures:
        sides = tuple(picture.shape[1:]) if size is None else size
        counts = tuple(n // side for n, side in zip(picture.shape[1:], sides, strict=True))
        patches = patchify(picture[None], sides, order="c p1 p2")[0]
        tiles = patches.view(-1, len(picture), *sides)
        yield TiledPicture(tiles, *data.normalize(tiles), counts)


def _tile_note(encoder: Any) -> str:
    unit = "px" if len(encoder.image_size) == 2 else "points"
    return f"Tiles of {' x '.join(map(str, encoder.image_size))} {unit}, each normalised"


def draw_attention(
    features: dict[str, Features],
    probe: ProbeData,
    grid: tuple[int, ...],
    folder: RunFolder,
    *,
    seed: int,
    bands: Sequence[int] | None = None,
) -> None:
    """Draw where the attentive probe looks in test images, with a line around half of it.

    Source:
        CAE, arXiv:2202.03026, its figure of attention maps; there the encoders are trained.
    """
    # One image a class, so that each row shows something else.
    labels = probe.test_labels
    rows = [int((labels == label).nonzero()[0]) for label in labels.unique()[:_ATTENTION_ROWS]]
    images = probe.test_images[rows]
    axes = tuple(range(1, images.ndim))
    low, high = (f(images, dim=axes, keepdim=True) for f in (torch.amin, torch.amax))
    stretched = (images - low) / (high - low).clamp(min=1e-6)
    shown = torch.stack([plane(image, bands) for image in stretched])
    shown = shown.repeat_interleave(_ENLARGED, 2).repeat_interleave(_ENLARGED, 3)
    columns = {"input (contrast stretched)": shown}
    for name, encode in features.items():
        train, some = (
            compute_features(encode, part, 256)[1] for part in (probe.train_images, images)
        )
        train, some = standardize(train, some)
        classifier = fit_attentive(train, probe.train_labels.to(train.device), seed=seed)
        attention = classifier.attention(some).mean(dim=1).cpu()
        maps = attention[:, -math.prod(grid) :].unflatten(1, grid)
        columns[name] = viz.show_attention(shown, middle(maps))
    panel = [list(row) for row in zip(*columns.values(), strict=True)]
    note = "The line encloses the patches that hold half of the attention (mean over heads)."
    save_picture(viz.panel(panel, list(columns), note=note), folder.path / "attention.png")


# Several runs


def place_side_by_side(runs: Sequence[Path], out: Path) -> list[Path]:
    """Put the pictures that all of several runs have beside each other.

    Args:
        runs: Folders of finished runs, of any recipes.
        out: Folder for the new pictures; made if need be.

    Returns:
        The files written: `<name>-side-by-side.png` for each picture.

    Raises:
        UserError: A folder without a finished run, no common picture, one that cannot be read, or
            an output folder that cannot be written to.
    """
    if len(runs) < 2:
        raise UserError("give the folders of two or more runs")
    captions = _captions([config_of(run) for run in runs], runs)
    found = ({file.stem for file in run.glob("*.png") if file.is_file()} for run in runs)
    names = sorted(set.intersection(*found))
    if not names:
        raise UserError(f"no picture is in all of {', '.join(map(str, runs))}")
    sheets = {
        out / f"{name}-side-by-side.png": _beside(
            [_read_picture(run / f"{name}.png") for run in runs], captions
        )
        for name in names
    }
    for file in sheets:
        _check_ours(file)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, sheet in sheets.items():
            save_picture(sheet, file, write_beside)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to: {error.strerror}") from error
    return list(sheets)


def _check_ours(file: Path) -> None:
    """Check that a file does not exist, or is a picture that `save_picture` wrote."""
    if not os.path.lexists(file):
        return
    if file.is_file() and not file.is_symlink():
        with (
            contextlib.suppress(UnreadableError),
            open_picture(read_bytes(file, most=MAX_FILE_BYTES), "PNG") as picture,
        ):
            if picture.info.get("Software") == _SOFTWARE:
                return
    raise UserError(
        f"{file} exists and was not written by this program: move it, or give another --out"
    )


def config_of(run: Path) -> dict[str, Any]:
    """Read the configuration of a finished run, flat."""
    if not (run / "summary.json").is_file():
        raise UserError(f"{run} is not the folder of a finished run: it has no summary.json")
    try:
        config = read_yaml(run / "config.yaml")
    except UnreadableError as error:
        raise UserError(f"{run / 'config.yaml'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{run / 'config.yaml'} is not of a run of mimkit")
    return dict(_flat(config))


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def different_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that have not the same value in all configurations."""
    names = sorted({name for config in configs for name in config})
    return [n for n in names if any(c.get(n) != configs[0].get(n) for c in configs)]


def _captions(configs: Sequence[Mapping[str, Any]], runs: Sequence[Path]) -> list[str]:
    """Name each run, and what its configuration has different."""
    different = different_keys(configs)
    folders = [run.resolve().name for run in runs]
    if len(set(folders)) < len(folders):  # the same name in several places
        folders = [str(run) for run in runs]
    return [
        "\n".join(
            map(escaped, [folder, *(f"{n}: {config[n]}" for n in different[:8] if n in config)])
        )
        for folder, config in zip(folders, configs, strict=True)
    ]


def _read_picture(file: Path) -> Image.Image:
    try:
        # Of other formats, some run other programs.
        with open_picture(read_bytes(file, most=MAX_FILE_BYTES), "PNG") as picture:
            return picture.convert("RGB")
    except UnreadableError as error:
        raise UserError(f"{file} cannot be read: it is not a whole picture ({error})") from error


def _beside(pictures: Sequence[Image.Image], captions: Sequence[str]) -> Image.Image:
    """Put pictures in a row, each under its caption."""
    gap, line = 12, 14
    top = gap + line * max(caption.count("\n") + 1 for caption in captions) + gap
    width = sum(picture.width + gap for picture in pictures) + gap
    sheet = Image.new("RGB", (width, top + max(p.height for p in pictures) + gap), "white")
    pen, left = ImageDraw.Draw(sheet), gap
    for picture, caption in zip(pictures, captions, strict=True):
        for number, text in enumerate(caption.split("\n")):
            most = max(picture.width // 7, 12)  # characters of the built-in font
            shown = text if len(text) <= most else f"{text[: most - 3]}..."
            pen.text((left, gap + number * line), shown, fill="black")
        sheet.paste(picture, (left, top))
        left += picture.width + gap
    return sheet


@dataclass(frozen=True)
class SideBySide:
    """Put the pictures of several runs side by side.

    Attributes:
        runs: Folders of finished runs.
        out: Folder for the new pictures.
    """

    runs: Runs
    out: Path = Path()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""

    def command(options: SideBySide) -> None:
        for file in place_side_by_side(options.runs, options.out):
            say(file)

    return run_command(
        command,
        SideBySide,
        name="engine/pictures",
        description="Put the pictures of several runs side by side.",
        arguments=arguments,
    )
