"""Make the pictures and tables of `which-mask.md`: `python docs/make_pictures.py`.

All keys are fixed, so a second run changes nothing. A test compares the tables.
`python docs/make_pictures.py RUN` makes the README's picture from a finished run instead.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from skimage import data
from torch import Tensor

from mimkit import masking, viz
from mimkit.masking import Key, Mask, stats

HERE = Path(__file__).parent
PAGE = HERE / "which-mask.md"
GRID = (14, 14)
CELL = 8  # pixels of a picture per token
SHOWN = 5  # masks in a picture
DRAWN = 4096  # masks in a marginal map

Pixels = Float[Tensor, "3 height width"]
Draw = Callable[[Key, Sequence[int]], Mask]

PAPER, INK = (0.93, 0.93, 0.90), (0.20, 0.23, 0.30)
PARTS = [(0.90, 0.45, 0.25), (0.25, 0.55, 0.80), (0.40, 0.70, 0.40), (0.75, 0.45, 0.75)]


def centered(key: Key, grid: Sequence[int], ratio: float) -> Mask:
    """Sample with weights that decrease from the center, as in a saliency map."""
    rows, columns = (torch.linspace(-1, 1, size) for size in grid)
    bump = torch.exp(-3 * (rows.square()[:, None] + columns.square()[None]))
    weights = bump.flatten().expand(key.batch_size, -1)
    return masking.weighted(key, grid, ratio, weights=weights)


def published(sampler: Callable[..., Tensor], **options: object) -> Draw:
    """Adapt a sampler of `compat` whose counts are equal within a batch."""
    return lambda key, grid: Mask.from_bool(sampler(key, grid, **options))


# Name of the picture -> sampler with the settings of its paper.
SAMPLERS: dict[str, Draw] = {
    "uniform": partial(masking.uniform, ratio=0.75),
    "uniform-units": partial(masking.uniform, ratio=0.6, unit=2),
    "blockwise": partial(masking.blockwise, ratio=0.5),
    "blockwise-75": partial(masking.blockwise, ratio=0.75),
    "inverse-block": partial(masking.inverse_block, ratio=0.8),
    "visible-block": partial(masking.visible_block, ratio=0.65),
    "prefix": partial(masking.prefix, ratio=0.5),
    "gridwise": masking.gridwise,
    "square": partial(masking.square, side=7, position="random"),
    "weighted": partial(centered, ratio=0.5),
    "multiblock": lambda key, grid: masking.multiblock(key, grid).context,
    "complementary": lambda key, grid: masking.complementary(key, grid, 4)[0],
    "compat-mmpretrain": published(masking.compat.mmpretrain, ratio=0.4),
    "compat-ijepa": published(masking.compat.ijepa),
}


def paint(values: Tensor, colors: Sequence[Sequence[float]]) -> Pixels:
    """Color a grid of small integers, one square of pixels per token."""
    picture = torch.tensor(colors)[values.long()].permute(2, 0, 1)
    return picture.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)


def paint_rates(rates: Float[Tensor, "rows columns"]) -> Pixels:
    """Color a marginal map, from the color of visible tokens (0) to black (1)."""
    values = rates[None, :, :, None]
    picture = (1 - values) * torch.tensor(PAPER) + values * torch.tensor((0.0, 0.0, 0.0))
    return picture[0].permute(2, 0, 1).repeat_interleave(CELL, 1).repeat_interleave(CELL, 2)


def draw_sampler(name: str) -> None:
    """Save a picture of some masks of a sampler and its marginal map."""
    draw = SAMPLERS[name]
    mask = draw(masking.key(range(SHOWN), seed=0), GRID)
    if name == "multiblock":
        tiles = multiblock_tiles()
    elif name == "complementary":
        tiles = complementary_tiles()
    else:
        tiles = [paint(is_masked, (PAPER, INK)) for is_masked in mask.is_masked]
    rates = marginals(name)
    captions = ["masks"] + [""] * (SHOWN - 1) + [f"{rates.min():.2f}-{rates.max():.2f}"]
    viz.panel([[*tiles, paint_rates(rates)]], captions).quantize(32).save(
        HERE / "pictures" / f"{name}.png", optimize=True
    )


def multiblock_tiles() -> list[Pixels]:
    """Draw the context light, targets in colors, and all other tokens dark."""
    blocks = masking.multiblock(masking.key(range(SHOWN), seed=0), GRID)
    label = blocks.context.is_masked.long()
    for number, target in enumerate(blocks.targets, 2):
        label = torch.where(target.is_masked, number, label)
    return [paint(one, (PAPER, INK, *PARTS)) for one in label]


def complementary_tiles() -> list[Pixels]:
    """Draw one color per part, for the tokens that are visible in it."""
    parts = masking.complementary(masking.key(range(SHOWN), seed=0), GRID, 4)
    label = sum(n * (~part.is_masked).long() for n, part in enumerate(parts))
    return [paint(one, PARTS) for one in torch.as_tensor(label)]


def draw_tube() -> None:
    """Save a picture of a tube mask on four frames, with a uniform mask below."""
    key, grid = masking.key([0], seed=0), (4, *GRID)
    rows = [
        [paint(frame, (PAPER, INK)) for frame in mask.is_masked[0]]
        for mask in (masking.tube(key, grid, 0.9), masking.uniform(key, grid, 0.9))
    ]
    captions = [f"frame {n}" for n in range(4)]
    panel = viz.panel(rows, captions, note="top: tube, bottom: uniform")
    panel.quantize(32).save(HERE / "pictures" / "tube.png", optimize=True)


def marginals(name: str, drawn: int = DRAWN) -> Float[Tensor, "rows columns"]:
    """Return the rate at which each token is masked; `stats` draws masks in batches of 256."""
    return stats.marginals(SAMPLERS[name], GRID, num_samples=drawn)


def share_table() -> str:
    """Make the table of masking rates of each sampler on a grid of 14 x 14."""
    lines = [
        "| picture | mean | lowest | highest | corner | center |",
        "|---|---|---|---|---|---|",
    ]
    for name in SAMPLERS:
        rates = marginals(name, 1024)
        numbers = (rates.mean(), rates.min(), rates.max(), rates[0, 0], rates[7, 7])
        lines.append(f"| {name} | " + " | ".join(f"{float(n):.2f}" for n in numbers) + " |")
    return "\n".join(lines)


# SimMIM's random masks: unit in pixels -> the reference's distances by ratio, top-1 accuracies of
# the paper by ratio, and the number of masks to average.
SIMMIM_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
UNITS = {
    4: (1.3, 1.4, 1.5, 1.6, 1.8, 2.1, 2.5, 3.3, 5.1),
    8: (2.1, 2.3, 2.5, 2.8, 3.1, 3.7, 4.5, 6.1, 9.9),
    16: (3.7, 4.2, 4.8, 5.2, 5.9, 7.3, 8.7, 13.1, 21.4),
    32: (7.5, 9.3, 9.7, 10.9, 12.8, 14.9, 19.7, 25.3, 46.0),
    64: (16.8, 19.4, 22.0, 24.9, 29.4, 37.7, 47.0, 70.1, None),
}
UNIT_SCORES = {
    4: {0.4: 81.9, 0.6: 82.0, 0.8: 82.1},
    8: {0.4: 82.1, 0.6: 82.2, 0.8: 82.4},
    16: {0.4: 82.4, 0.6: 82.6, 0.8: 82.5},
    32: dict(
        zip(SIMMIM_RATIOS, (82.7, 82.8, 82.8, 82.7, 83.0, 82.8, 82.7, 82.4, 82.4), strict=True)
    ),
    64: {0.1: 82.6, 0.2: 82.6},
}
AVERAGED = {4: 3, 8: 12, 16: 60, 32: 300, 64: 1000}


def unit_table() -> str:
    """Make the table of AvgDist of SimMIM's random masks: mimkit (reference) **top-1**."""
    head = "| unit, px | " + " | ".join(f"{ratio:.1f}" for ratio in SIMMIM_RATIOS) + " |"
    lines = [head, "|---" * (len(SIMMIM_RATIOS) + 1) + "|"]
    for unit, references in UNITS.items():
        cells = []
        for ratio, reference in zip(SIMMIM_RATIOS, references, strict=True):
            count = masking.num_masked((192 // unit) ** 2, ratio, rounding="simmim")
            score = UNIT_SCORES[unit].get(ratio)
            if count == (192 // unit) ** 2:
                cells.append("nothing visible")
                continue
            key = masking.key(range(AVERAGED[unit]), seed=0)
            mask = masking.uniform(key, (192 // unit,) * 2, num_masked=count)
            cells.append(_cell(stats.average_distance(mask, unit), reference, score))
        lines.append(f"| {unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(ours: Tensor, reference: float | None, score: float | None) -> str:
    texts = [f"{float(ours):.1f}", "" if reference is None else f"({reference})"]
    return " ".join([text for text in texts if text] + ([f"**{score}**"] if score else []))


def other_rows() -> list[tuple[str, Mask, int, float, float | None]]:
    """Return the rows of the second table: name, masks, pixels per token, reference, top-1."""
    one, many = masking.key([0], seed=0), masking.key(range(100), seed=0)
    squares = [(0.11, 4, 11.2, 82.6), (0.25, 6, 16.5, 82.5), (0.44, 8, 21.8, 82.5),
               (0.69, 10, 27.2, None)]  # fmt: skip
    blocks = [(0.4, 17.9, 82.7), (0.6, 24.0, 82.6), (0.8, 33.7, 82.4)]
    wide = [(0.4, 21.4, 82.7), (0.6, 34.0, 82.6), (0.8, 51.0, 82.4)]
    randoms = [(0.5, 5.9, 84.9), (0.75, 10.1, 84.9), (0.9, 20.3, 83.0)]
    mae_blocks = [(75, 19.2, None), (98, 24.2, 83.9), (147, 37.0, 82.8)]
    return [
        *((f"SimMIM, center square, {ratio}", masking.square(one, (12, 12), side), 16, ref, score)
          for ratio, side, ref, score in squares),
        *((f"SimMIM, block-wise, 16-pixel patches, {ratio}",
           masking.blockwise(many, (12, 12), ratio, rounding="simmim"), 16, ref, score)
          for ratio, ref, score in blocks),
        *((f"SimMIM, block-wise, 32-pixel patches, {ratio}",
           masking.blockwise(many, (6, 6), ratio, rounding="simmim", min_block=4), 32, ref, score)
          for ratio, ref, score in wide),
        *((f"MAE, random, {ratio}", masking.uniform(many, GRID, ratio), 16, ref, score)
          for ratio, ref, score in randoms),
        ("MAE, grid, 0.75", masking.gridwise(one, GRID), 16, 5.95, 84.0),
        *((f"MAE, block-wise, {count} of 196", masking.blockwise(many, GRID, num_masked=count),
           16, ref, score) for count, ref, score in mae_blocks),
    ]  # fmt: skip


def other_table() -> str:
    """Make the table of AvgDist of the other masks of both papers, with reference and top-1."""
    lines = ["| mask | mimkit | reference | top-1 |", "|---|---|---|---|"]
    for name, mask, patch, reference, score in other_rows():
        ours = float(stats.average_distance(mask, patch))
        lines.append(f"| {name} | {ours:.1f} | {reference} | {score or ''} |")
    return "\n".join(lines)


TABLES = {"shares": share_table, "units": unit_table, "others": other_table}


def update_tables(text: str, names: Sequence[str] = tuple(TABLES)) -> str:
    """Replace each table between its markers by a newly computed one."""
    for name in names:
        before, start, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{start}{TABLES[name]()}\n{end}{after}"
    return text


# The samplers of the README's picture, by the names that users type.
FRONT = {
    "uniform": SAMPLERS["uniform"],
    "blockwise": SAMPLERS["blockwise"],
    "inverse_block": SAMPLERS["inverse-block"],
    "gridwise": SAMPLERS["gridwise"],
    "multiblock": SAMPLERS["multiblock"],
    "square": SAMPLERS["square"],
}


def draw_front(run: Path) -> None:
    """Save one row of a run's reconstructions, and below it the masks of six samplers."""
    photo = torch.from_numpy(data.coffee()[:392, 104:496].copy()).permute(2, 0, 1) / 255
    key = masking.key([3], seed=0)
    masks = [viz.show_masked(photo[None], draw(key, GRID), 28)[0] for draw in FRONT.values()]
    masks = [tile[:, ::4, ::4] for tile in masks]
    below = viz.panel([masks], list(FRONT))
    with Image.open(run / "reconstructions.png") as drawn:
        captions, row = drawn.crop((0, 0, drawn.width, 20)), drawn.crop((0, 344, drawn.width, 560))
    front = Image.new("RGB", (below.width, 240 + below.height), "white")
    for picture, top in ((captions, 0), (row, 20), (below, 240)):
        front.paste(picture, (0, top))
    front.quantize(128).save(HERE / "pictures" / "front.png", optimize=True)


def main() -> None:
    """Write all pictures and tables, or the README's picture of the run that is given."""
    if len(sys.argv) > 1:
        return draw_front(Path(sys.argv[1]))
    (HERE / "pictures").mkdir(exist_ok=True)
    for name in SAMPLERS:
        draw_sampler(name)
    draw_tube()
    PAGE.write_text(update_tables(PAGE.read_text()))


if __name__ == "__main__":
    main()
