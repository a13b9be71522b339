"""Pictures of what a detector finds in held-out images."""

import colorsys
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import viz
from recipes.engine.data.images import to_bytes, to_unit
from recipes.engine.data.instances import fitted, resize_image, resize_masks
from recipes.engine.detection.score import DetectionData, find
from recipes.engine.pictures import save_picture
from recipes.engine.reading import UnreadableError
from recipes.engine.run.config import RunConfig

FILE = "detections.png"
_NUMBER = 6
_SIDE = 224
_BEST = 5


@torch.no_grad()
def draw_found(
    models: Mapping[str, nn.Module], config: RunConfig, data: DetectionData, path: Path
) -> None:
    """Draw the objects in the first images to score on, and what is best scored of what is found.

    Args:
        models: The detectors, by what they started from.
        config: The run's configuration.
        data: The images.
        path: Output folder.
    """
    rows = []
    for number in range(min(len(data.test), _NUMBER)):
        try:
            image, truth = data.test.source.load(number)
        except UnreadableError:
            continue
        batch = data.test.__getitems__([(0, number)])
        images = data.test.to_inputs(batch.images.to(config.device))
        columns: list[Mapping[str, Tensor]] = [
            {},
            {"boxes": truth.boxes, "labels": truth.classes, "masks": truth.masks},
        ]
        for model in models.values():
            (found,) = find(model, config, images, batch.targets)
            best = found["scores"].argsort(descending=True)[:_BEST]
            columns.append({name: one[best].cpu() for name, one in found.items()})
        rows.append([draw_objects(image, one, data.class_names) for one in columns])
    captions = ["input (not trained on)", "objects", *models]
    note = (
        f"What is found: in each image the {_BEST} objects with the highest scores, written there."
    )
    if rows:
        save_picture(viz.panel(rows, captions, note=note), path / FILE)


def draw_objects(
    image: Tensor, objects: Mapping[str, Tensor], names: tuple[str, ...]
) -> Float[Tensor, "3 side side"]:
    """Draw objects into an image, which is fitted into a square.

    Args:
        image: Bytes [3, height, width].
        objects: `boxes`, `labels`, `masks`, and `scores` if there are any.
        names: Names of the classes, from 1 on.
    """
    size = fitted((image.shape[1], image.shape[2]), _SIDE)
    small = to_unit(resize_image(image, size))
    labels = objects.get("labels", torch.zeros(0)).tolist()
    scale = _SIDE / max(image.shape[1:])
    for label, mask in zip(labels, objects.get("masks", ()), strict=True):
        inside = resize_masks(mask[None], size)[0]
        color = torch.tensor(_color(label)).view(3, 1) / 255
        small[:, inside] = 0.5 * small[:, inside] + 0.5 * color
    picture = Image.fromarray((small * 255).round().byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for number, label in enumerate(labels):
        left, top, right, bottom = (objects["boxes"][number] * scale).tolist()
        draw.rectangle(
            (left, top, max(right - 1, left), max(bottom - 1, top)), outline=_color(label)
        )
        text = names[label - 1]
        if "scores" in objects:
            text += f" {objects['scores'][number]:.2f}"
        place = (left + 2, min(top, _SIDE - 12))
        draw.text(place, text, fill="white", stroke_width=1, stroke_fill="black")
    drawn = to_unit(to_bytes(picture))
    return F.pad(drawn, (0, _SIDE - size[1], 0, _SIDE - size[0]), value=1.0)


def _color(label: int) -> tuple[int, int, int]:
    """Return the color of a class: hues that lie far apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618 % 1, 0.9, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
