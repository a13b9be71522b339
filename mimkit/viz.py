"""Pictures of reconstructions, attention and training curves.

Needs pillow; `curves` also needs matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from mimkit._arguments import Count, Share, checked
from mimkit._checks import check_no_nan, check_values
from mimkit._grids import divide
from mimkit.masking import Mask
from mimkit.patches import gather_visible, patchify, restore, unpatchify

if TYPE_CHECKING:
    from PIL.Image import Image

_GAP = 4
_CAPTION_HEIGHT = 16
_BACKGROUND = (255, 255, 255)
_INK = (40, 40, 40)


@checked
def show_masked(
    images: Float[Tensor, "batch channels *spatial"],
    mask: Mask,
    patch_size: int | Sequence[int],
    *,
    color: float = 0.5,
) -> Float[Tensor, "batch channels *spatial"]:
    """Fill the masked patches with one color.

    Args:
        images: Images, in the units of `color`.
        mask: Which patches to fill.
        patch_size: Pixels per patch.
        color: Value of every channel of a filled pixel.

    Returns:
        A copy of the images.

    Raises:
        ValueError: If the mask does not fit the images.

    Source:
        mimkit's own.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> show_masked(torch.ones(1, 1, 1, 2), mask, 1, color=0.0)
        tensor([[[[0., 1.]]]])
    """
    visible = gather_visible(patchify(images, patch_size), mask)
    patches = restore(visible, mask, visible.new_full(visible.shape[2:], color))
    return unpatchify(patches, mask.grid, patch_size)


@checked
def fill_masked(
    images: Float[Tensor, "batch channels *spatial"],
    mask: Mask,
    patches: Float[Tensor, "batch masked patch"],
    patch_size: int | Sequence[int],
) -> Float[Tensor, "batch channels *spatial"]:
    """Replace the masked patches by predicted ones.

    Args:
        images: Images in the units of the prediction.
        mask: Which patches were predicted.
        patches: The predictions, in MAE's order "p1 p2 c". Predictions of normalised pixels must
            first be inverted with `targets.NormalizedPixels.invert`.
        patch_size: Pixels per patch.

    Returns:
        A copy of the images.

    Raises:
        ValueError: If the mask does not fit the images, or the patches do not fit the mask.

    Source:
        mimkit's own.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[True, False]]]))
        >>> fill_masked(torch.ones(1, 1, 1, 2), mask, torch.full((1, 1, 1), 3.0), 1)
        tensor([[[[3., 1.]]]])
    """
    check_values(patches, images, patch_size, "patches")
    visible = gather_visible(patchify(images, patch_size), mask)
    return unpatchify(restore(visible, mask, patches), mask.grid, patch_size)


@checked
def half_mass(
    attention: Float[Tensor, "batch *grid"], *, share: Share = 0.5
) -> Bool[Tensor, "batch *grid"]:
    """Find the smallest set of positions with a given share of the attention.

    Args:
        attention: Non-negative values; they need not sum to 1.
        share: Fraction of each sample's total that the positions must have, in [0, 1].

    Returns:
        True = in the set.

    Raises:
        ValueError: If the attention contains NaN.

    Source:
        CAE, arXiv:2202.03026: the contour in the figure of attention maps (see `show_attention`).

    Example:
        >>> half_mass(torch.tensor([[[0.1, 0.4], [0.3, 0.2]]])).int()
        tensor([[[0, 1],
                 [1, 0]]], dtype=torch.int32)
    """
    check_no_nan("attention", attention, always=True)
    flat = attention.flatten(1).double()
    values, order = flat.sort(dim=1, descending=True, stable=True)
    before = values.cumsum(dim=1) - values
    inside = before < share * flat.sum(dim=1, keepdim=True)
    return torch.zeros_like(inside).scatter(1, order, inside).view(attention.shape)


@checked
def show_attention(
    images: Float[Tensor, "batch channels height width"],
    attention: Float[Tensor, "batch rows columns"],
    *,
    share: Share = 0.5,
    color: Sequence[float] = (1.0, 0.9, 0.0),
    line: Count = 2,
) -> Float[Tensor, "batch 3 height width"]:
    """Draw an attention map as brightness, with a contour around half of the attention.

    Args:
        images: Images in [0, 1] with one or three channels; their size must be divisible by the
            grid of the attention map.
        attention: One non-negative value per grid position.
        share: Fraction of the attention inside the contour, in [0, 1].
        color: Color of the contour.
        line: Width of the contour in pixels.

    Returns:
        Pictures in [0, 1].

    Raises:
        ValueError: If the image size is not divisible by the grid.

    Source:
        CAE, arXiv:2202.03026, the figure of attentive probing's attention maps, whose contour
        encloses half of the attention.

    Example:
        >>> images, attention = torch.rand(2, 3, 32, 32), torch.rand(2, 8, 8)
        >>> show_attention(images, attention).shape
        torch.Size([2, 3, 32, 32])
    """
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have one or three channels; got {tuple(images.shape)}")
    if len(color) != 3:
        raise ValueError(f"color must be three values; got {color!r}")
    down, across = divide("image size", images.shape[2:], attention.shape[1:], "the attention grid")
    strongest = attention.flatten(1).amax(dim=1).view(-1, 1, 1).clamp(min=1e-12)
    bright = (attention / strongest).repeat_interleave(down, 1).repeat_interleave(across, 2)
    shown = images.expand(-1, 3, -1, -1) * (0.3 + 0.7 * bright.unsqueeze(1))
    inside = half_mass(attention, share=share)
    inside = inside.repeat_interleave(down, 1).repeat_interleave(across, 2)
    # A pixel inside the selected positions is on the contour if one of its neighbors is outside.
    outside = F.pad((~inside).float().unsqueeze(1), [line] * 4, value=1.0)
    near = F.max_pool2d(outside, 2 * line + 1, stride=1).bool()
    on_line = near & inside.unsqueeze(1)
    return torch.where(on_line, shown.new_tensor(color).view(1, 3, 1, 1), shown)


@checked
def panel(rows: Sequence[Sequence[Tensor]], captions: Sequence[str], *, note: str = "") -> "Image":
    """Arrange images in a grid with a caption above each column.

    Args:
        rows: Images [channels, height, width] in [0, 1], with one or three channels; values outside
            are clipped.
        captions: One per column.
        note: Text below the images; long lines are wrapped.

    Returns:
        A picture of pillow.

    Raises:
        ValueError: If a row has another length than the captions, or an image another shape.

    Source:
        mimkit's own.

    Example:
        >>> panel([[torch.zeros(1, 8, 8), torch.ones(3, 8, 8)]], ["input", "output"]).size
        (28, 32)
    """
    from PIL import Image, ImageDraw

    if not rows or any(len(row) != len(captions) for row in rows):
        raise ValueError(
            f"every row needs one image for each of {len(captions)} captions; "
            f"got rows of {[len(row) for row in rows]}"
        )
    pictures = [[_to_picture(image) for image in row] for row in rows]
    widths = [max(row[column].width for row in pictures) for column in range(len(captions))]
    heights = [max(picture.height for picture in row) for row in pictures]
    width = sum(widths) + _GAP * (len(widths) + 1)
    note_lines = _wrapped(note, width - 2 * _GAP)
    canvas = Image.new(
        "RGB",
        (
            width,
            _CAPTION_HEIGHT * (1 + len(note_lines)) + sum(heights) + _GAP * (len(heights) + 1),
        ),
        _BACKGROUND,
    )
    draw = ImageDraw.Draw(canvas)
    left = _GAP
    for column, caption in enumerate(captions):
        draw.text((left, 2), caption, fill=_INK)
        top = _CAPTION_HEIGHT + _GAP
        for row, height in zip(pictures, heights, strict=True):
            canvas.paste(row[column], (left, top))
            top += height + _GAP
        left += widths[column] + _GAP
    for line, text in enumerate(note_lines):
        draw.text((_GAP, canvas.height - _CAPTION_HEIGHT * (len(note_lines) - line)), text, _INK)
    return canvas


@checked
def curves(
    steps: Sequence[int] | Sequence[float], series: Mapping[str, Sequence[float]], *, title: str
) -> "Image":
    """Plot curves over training steps: the first one thick and solid, the others dashed.

    Args:
        steps: Values of the horizontal axis.
        series: Name -> one value per step.
        title: Label of the vertical axis.

    Returns:
        A picture of pillow.

    Raises:
        ValueError: If a series does not have one value per step.

    Source:
        mimkit's own.

    Example:
        >>> series = {"loss": [1.0, 0.6, 0.5], "zero": [1.0, 1.0, 1.0]}
        >>> curves([0, 100, 200], series, title="masked loss").size
        (700, 400)
    """
    import io
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    for name, values in series.items():
        if len(values) != len(steps):
            raise ValueError(
                f"series must have one value for each of {len(steps)} steps; got {len(values)} "
                f"for {name!r}"
            )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(series.items()):
        style = {"linewidth": 2.0} if index == 0 else {"linewidth": 1.0, "linestyle": "--"}
        axes.plot(steps, values, label=_drawable(name), **style)
    axes.set_xlabel("step")
    axes.set_ylabel(_drawable(title), parse_math=False)  # $ is a character of a name
    axes.grid(alpha=0.3)
    for text in axes.legend(loc="upper right", fontsize="small").get_texts():
        text.set_parse_math(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font does not have
        FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)


def _drawable(text: str) -> str:
    """Return a text in which bytes that are not UTF-8 are written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _wrapped(text: str, width: int) -> list[str]:
    """Wrap lines between words to `width` pixels; a longer word gets a line of its own."""
    from PIL import Image, ImageDraw

    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = []
    for line in text.splitlines():
        fitting = ""
        for word in line.split():
            longer = f"{fitting} {word}".strip()
            if fitting and draw.textlength(longer) > width:
                lines.append(fitting)
                longer = word
            fitting = longer
        lines.append(fitting)
    return lines


def _to_picture(image: Float[Tensor, "channels height width"]) -> "Image":
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"rows must hold images [1 or 3 channels, height, width]; got {tuple(image.shape)}"
        )
    if image.is_meta:
        raise ValueError("rows must hold values; got an image on the meta device")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())
