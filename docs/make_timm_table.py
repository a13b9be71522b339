"""Make the table of docs/interop.md: which families of timm's ViTs work under a mask.

python docs/make_timm_table.py

Of each family, the smallest member is built with random weights, two blocks and a small image. A
model is exact if it equals `forward_features` where the mask hides nothing, if hidden pixels change
nothing, and if each sample of a batch gives what it gives alone.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from mimkit import masking
from mimkit.interop import wrap_timm
from mimkit.masking import Mask

PAGE = Path(__file__).parent / "interop.md"
START, END = "<!-- table: timm -->\n", "<!-- end -->"
MODULES = (
    "beit", "cait", "deit", "eva", "hiera", "naflexvit", "pit", "swin_transformer",
    "swin_transformer_v2", "tiny_vit", "vision_transformer", "vision_transformer_hybrid",
    "vision_transformer_relpos", "vision_transformer_sam", "vitamin", "volo", "xcit",
)  # fmt: skip
SIZES = [
    "test", "atto", "femto", "pico", "nano", "xxtiny", "xtiny", "xxs", "xs", "wee", "tiny", "micro",
    "mini", "little", "small", "s", "mediumd", "medium", "betwixt", "b", "base", "large", "l",
    "huge", "giant", "g", "gigantic", "enormous", "so150m", "so150m2", "so400m", "7b",
]  # fmt: skip
_SIZE = re.compile(rf"_(?:{'|'.join(sorted(SIZES, key=len, reverse=True))}|\d+)(?=_|$)")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def families() -> dict[tuple[str, str], str]:
    """Return the smallest member of each family: module and name without sizes -> model."""
    smallest: dict[tuple[str, str], str] = {}
    for module in MODULES:
        for name in timm.list_models(module=module):
            stem = re.sub(r"_(patch|window|r_s|s)?\d+.*?(?=_|$)", "", name)
            stem = _SIZE.sub("", _SIZE.sub("", stem))
            best = smallest.setdefault((module, stem), name)
            smallest[module, stem] = min(best, name, key=_rank)
    return smallest


def _rank(name: str) -> tuple[int, str]:
    sizes = [SIZES.index(part) for part in name.split("_") if part in SIZES]
    return (min(sizes, default=len(SIZES)), name)


def build(name: str) -> Any:
    """Build a model with random weights, of two blocks and for 4 x 4 patches where it can be."""
    torch.manual_seed(0)
    patch = int((re.search(r"patch(\d+)", name) or ["", "16"])[1])
    for options in ({"depth": 2, "img_size": 4 * patch}, {"img_size": 4 * patch}, {}):
        try:
            model: nn.Module = timm.create_model(name, **options).eval()
        except (TypeError, ValueError, RuntimeError, AssertionError):
            continue
        break
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return model


@torch.no_grad()
def judge(name: str) -> str:
    """Say whether a model works under a mask."""
    try:
        with torch.device("meta"):  # no memory for what is refused
            wrap_timm(timm.create_model(name))
    except (TypeError, ValueError) as error:
        reason = str(error).partition("wrap_timm ")[2]
        return "refused: " + re.sub(r"; got .*?( without.*)?$", r"\1", reason)
    model = build(name)
    encoder: Any = wrap_timm(model)
    grid = tuple(model.patch_embed.grid_size)
    sides = [n * side for n, side in zip(grid, model.patch_embed.patch_size, strict=True)]
    images = torch.randn(2, model.patch_embed.proj.in_channels, *sides)
    nothing = Mask.from_bool(torch.zeros(2, *grid, dtype=torch.bool))
    mask = masking.uniform(masking.key([0, 1], seed=0), grid, 0.6)
    whole = model.forward_features(images)
    hidden = mask.refine(model.patch_embed.patch_size).is_masked.unsqueeze(1)
    found = encoder(images.masked_fill(hidden, float("nan")), mask)
    alone = encoder(images[1:], mask[1:])
    pairs = ((encoder(images), whole), (encoder(images, nothing), whole), (found[1:], alone))
    same = all(torch.allclose(one, other, **CLOSE) for one, other in pairs)
    return "exact" if same and bool(found.isfinite().all()) else "WRONG"


def rows() -> Iterator[str]:
    """Yield the rows of the table: verdict, then the families with their smallest members."""
    verdicts: dict[tuple[str, str], list[str]] = {}
    for (module, _), name in sorted(families().items()):
        verdict = judge(name)
        print(f"{module:28}{name:48}{verdict}", flush=True)
        verdicts.setdefault((module, verdict), []).append(name)
    yield "| file of timm | under a mask | smallest members |"
    yield "|---|---|---|"
    for (module, verdict), names in verdicts.items():
        listed = ", ".join(f"`{name}`" for name in names)
        yield f"| {module} | {verdict} | {len(names)}: {listed} |"


def main() -> None:
    """Write the table into the page."""
    before, start, rest = PAGE.read_text().partition(START)
    _, end, after = rest.partition(END)
    PAGE.write_text(f"{before}{start}" + "\n".join(rows()) + f"\n{end}{after}")


if __name__ == "__main__":
    main()
