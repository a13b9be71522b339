"""A small data set in COCO's layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16


def annotation(number: int, image: int, category: int, **more: Any) -> dict[str, Any]:
    """Return an object of 4 x 5 pixels, as run lengths."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[3:8, 2:6] = True
    ends = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False))
    counts = np.diff([0, *ends, HEIGHT * WIDTH]).tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": [2.0, 3.0, 4.0, 5.0],
        "area": 20.0,
        "iscrowd": 0,
        "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
        **more,
    }


def write_coco(folder: Path, spoil: Callable[[dict[str, Any]], Any] | None = None) -> Path:
    """Write two images a part, the second one without objects; ids have gaps.

    Args:
        folder: Where to.
        spoil: Changes the entries of the part to train on.
    """
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for part in ("train2017", "val2017"):
        (folder / part).mkdir(exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 256, (2, HEIGHT, WIDTH, 3), dtype=np.uint8)
        for name, image in zip("ab", pixels, strict=True):
            Image.fromarray(image).save(folder / part / f"{name}.png")
        entries: dict[str, Any] = {
            "images": [
                {"id": number, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH}
                for number, name in ((7, "a"), (900, "b"))
            ],
            "annotations": [
                annotation(10, 7, 3),
                annotation(13, 7, 88),
                annotation(11, 7, 3, iscrowd=1),
            ],
            "categories": [{"id": 88, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        if spoil is not None and part == "train2017":
            spoil(entries)
        (folder / "annotations" / f"instances_{part}.json").write_text(json.dumps(entries))
    return folder
