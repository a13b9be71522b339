"""The papers' figures of a trained encoder: t-SNE, attention, mask ratios, partial fine-tuning.

Axes: batch images; channels, height and width of an image; tokens of an image, their width.
"""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from mimkit import masking, viz
from mimkit._text import escaped
from mimkit.masking import Mask
from recipes.engine.data.images import Normalize, to_unit
from recipes.engine.data.scenes import CLASSES, MAX_SIZE, MIN_SIZE, Part, load_scenes
from recipes.engine.errors import UserError
from recipes.engine.masks import first
from recipes.engine.pictures import TiledPicture, save_picture
from recipes.engine.pretrain import scalars
from recipes.engine.probes import Features, compute_features, knn, raw_pixels, standardize
from recipes.engine.run.config import Recipe, RunConfig
from recipes.engine.seeds import sample_rng

_SCENES = 150  # of each part
_PATCHES = 80  # of each class
_BATCH = 64
_SIDE = 128  # pixels of an image in the picture of attention, at least


# t-SNE of patches


def draw_tsne(
    features: Mapping[str, Features],
    normalize: Normalize,
    size: tuple[int, int],
    grid: tuple[int, int],
    in_channels: int,
    folder: Path,
    *,
    seed: int,
) -> tuple[Path, dict[str, float]]:
    """Draw the patches of held-out scenes by t-SNE of their features, in the color of their class.

    Args:
        features: Encoders by name, each drawn in a panel.
        normalize: Turns images in [0, 1] into model inputs.
        size: Height and width of a model input.
        grid: Tokens per axis.
        in_channels: Channels of a model input.
        folder: Where `tsne.png` is written.
        seed: Seed of scenes, chosen patches and t-SNE.

    Returns:
        The file, and the accuracy of k-NN in percent: of each encoder, and of the pixels.

    Raises:
        UserError: If scenes have not this size or these channels, or scikit-learn is missing.

    Source:
        CAE, arXiv:2202.03026, its figure of t-SNE: patches of ADE20K's images there. van der Maaten
        and Hinton, JMLR 2008.
    """
    try:
        from sklearn.manifold import TSNE
    except ModuleNotFoundError as error:
        raise UserError(f't-SNE needs scikit-learn ({error}): pip install "mimkit[recipes]"') from (
            error
        )
    (train, train_classes), (test, test_classes) = (
        _scene_tiles(part, size, grid, in_channels, seed) for part in ("train", "test")
    )
    rows, test_rows = _balanced(train_classes, seed), _balanced(test_classes, seed)
    labels, test_labels = train_classes.flatten()[rows], test_classes.flatten()[test_rows]
    patch_size = size[0] // grid[0], size[1] // grid[1]
    accuracy, panels = {}, {}
    for name, encode in {**features, "pixels": raw_pixels(patch_size)}.items():
        found, found_test = (
            compute_features(encode, normalize(tiles)[0], _BATCH)[1][:, -math.prod(grid) :]
            .flatten(0, 1)[chosen]
            .cpu()
            for tiles, chosen in ((train, rows), (test, test_rows))
        )
        found, found_test = standardize(found, found_test)
        accuracy[name] = knn(found, labels, found_test, test_labels)
        if name in features:
            tsne = TSNE(metric="cosine", init="random", random_state=seed)
            title = f"{name}: k-NN {accuracy[name]:.1f} %"
            panels[title] = torch.from_numpy(tsne.fit_transform(found_test.numpy()))
    file = folder / "tsne.png"
    save_picture(_scatter(panels, test_labels), file)
    return file, accuracy


def _scene_tiles(
    part: Part, size: tuple[int, int], grid: tuple[int, int], in_channels: int, seed: int
) -> tuple[Float[Tensor, "tiles channels height width"], Int64[Tensor, "tiles rows columns"]]:
    """Return scenes as tiles of the size of a model input, and the class of each patch.

    Scenes have twice the size of an input, where they can be so large: then a tile shows as much
    of a photograph as a crop of `photos` does. A patch has the class of most of its pixels.
    """
    if in_channels not in (1, 3):
        raise UserError(f"scenes have 1 or 3 channels; the encoder takes {in_channels}")
    tiles = 2 if max(size) * 2 <= MAX_SIZE else 1
    whole = size[0] * tiles, size[1] * tiles
    if min(whole) < MIN_SIZE or max(whole) > MAX_SIZE:
        raise UserError(
            f"scenes have {MIN_SIZE} to {MAX_SIZE} pixels a side; the encoder takes "
            f"{size[0]} x {size[1]}"
        )
    scenes = load_scenes(_SCENES, image_size=whole, seed=seed, part=part)
    every = [scenes[number] for number in range(_SCENES)]
    cut = {"a": tiles, "b": tiles}
    images = rearrange(
        torch.stack([scene.image for scene in every]), "s c (a h) (b w) -> (s a b) c h w", **cut
    )
    labels = rearrange(
        torch.stack([scene.labels for scene in every]), "s (a h) (b w) -> (s a b) h w", **cut
    )
    shown = to_unit(images)
    if in_channels == 1:
        shown = shown.mean(dim=1, keepdim=True)
    return shown, majority(labels, grid, len(CLASSES) + 1)


def majority(
    labels: UInt8[Tensor, "batch height width"], grid: tuple[int, int], num_classes: int
) -> Int64[Tensor, "batch rows columns"]:
    """Return the most frequent label of each patch; of equally frequent ones, the lowest.

    Example:
        >>> majority(torch.tensor([[[0, 2, 1, 1], [2, 2, 1, 0]]], dtype=torch.uint8), (1, 2), 3)
        tensor([[[2, 1]]])
    """
    shares = [
        rearrange((labels == label).float(), "n (a p) (b q) -> n a b (p q)", a=grid[0], b=grid[1])
        for label in range(num_classes)
    ]
    return torch.stack([share.mean(-1) for share in shares]).argmax(dim=0)


def _balanced(classes: Int64[Tensor, "tiles rows columns"], seed: int) -> Int64[Tensor, " chosen"]:
    """Choose patches at random, the same number of each class."""
    flat = classes.flatten()
    counts = flat.bincount(minlength=len(CLASSES) + 1)
    number = min(_PATCHES, int(counts.min()))
    rng = sample_rng(seed, 0, 0)
    each = [
        torch.from_numpy(rng.permutation((flat == label).nonzero()[:, 0].numpy())[:number])
        for label in range(len(counts))
    ]
    return torch.cat(each)


def _scatter(panels: Mapping[str, Tensor], labels: Int64[Tensor, " points"]) -> Image.Image:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels) + 1.4, 4.6), layout="constrained")
    for axes, (title, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for label, name in enumerate(("surface", *CLASSES)):
            color = (0.75, 0.75, 0.75) if label == 0 else colormaps["tab10"](label - 1)
            place = points[labels == label]
            axes.scatter(place[:, 0], place[:, 1], s=7, color=color, label=name, linewidths=0)
        axes.set(title=title, xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=2)
    return _painted(figure)


def _painted(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)


# Attention of the encoder


def draw_encoder_attention(
    encoders: Mapping[str, nn.Module],
    config: RunConfig,
    pictures: Sequence[TiledPicture],
    folder: Path,
) -> Path:
    """Draw where the last block looks in held-out images, with a line around half of it.

    Args:
        encoders: Encoders by name; of the first one, each head is drawn, too.
        config: Configuration of their run.
        pictures: Held-out pictures; of each, the tile with the largest contrast is drawn.
        folder: Where `encoder-attention.png` is written.

    Source:
        CAE, arXiv:2202.03026, its figure of attention maps; single heads as in DINO,
        arXiv:2104.14294, figure 1.
    """
    chosen = [int(picture.tiles.flatten(1).std(dim=1).argmax()) for picture in pictures]
    tiles, inputs = (
        torch.stack([getattr(p, name)[tile] for p, tile in zip(pictures, chosen, strict=True)])
        for name in ("tiles", "inputs")
    )
    enlarged = max(_SIDE // min(tiles.shape[2:]), 1)
    shown = tiles.repeat_interleave(enlarged, 2).repeat_interleave(enlarged, 3)
    columns, heads = {"input": shown}, dict[str, Tensor]()
    for name, encoder in encoders.items():
        with config.autocast():
            attention = last_attention(encoder, inputs.to(config.device)).float().cpu()
        columns[f"{name}, all heads"] = viz.show_attention(shown, attention.mean(dim=1))
        if not heads:
            heads = {
                f"{name}, head {number}": viz.show_attention(shown, head)
                for number, head in enumerate(attention.unbind(1), start=1)
            }
    columns |= heads
    has_token = getattr(next(iter(encoders.values())), "num_prefix_tokens", 0) > 0
    query = "the class token" if has_token else "all patches (mean)"
    note = f"Attention of {query} in the last block. The line encloses half of it."
    panel = [list(row) for row in zip(*columns.values(), strict=True)]
    file = folder / "encoder-attention.png"
    save_picture(viz.panel(panel, list(columns), note=note), file)
    return file


@torch.no_grad()
def last_attention(
    encoder: Any, images: Float[Tensor, "batch channels height width"]
) -> Float[Tensor, "batch heads rows columns"]:
    """Return the attention of an encoder's last block to each patch.

    Args:
        encoder: A `nn.ViT` or `nn.ConvViT` without attention windows.
        images: Model inputs.

    Returns:
        Weights of the class token as query; without one, the mean over all patches as queries.
        Those of a head sum to 1, less what the class token itself gets.
    """
    kept: list[Tensor] = []

    def keep(attention: Any, arguments: tuple[Any, ...]) -> None:
        tokens, _, bias, *_ = arguments
        kept.append(attention.attention_weights(tokens, bias))

    with encoder.blocks[-1].attn.register_forward_pre_hook(keep):
        encoder(images)
    (weights,) = kept
    num_prefix = encoder.num_prefix_tokens
    of_queries = weights[:, :, 0] if num_prefix else weights.mean(dim=2)
    of_patches: Tensor = of_queries[:, :, num_prefix:].unflatten(2, encoder.grid)
    return of_patches


# Mask ratios


@torch.no_grad()
def draw_mask_ratios(
    recipe: Recipe,
    config: RunConfig,
    model: nn.Module,
    picture: TiledPicture,
    ratios: Sequence[float],
    folder: Path,
) -> Path:
    """Draw one held-out picture at several mask ratios: masked, and reconstructed tile by tile.

    Args:
        recipe: The recipe.
        config: Its configuration.
        model: The trained model.
        picture: The picture.
        ratios: Fractions of patches to mask.
        folder: Where `mask-ratios.png` is written.

    Source:
        MAE, arXiv:2111.06377, figure 4.
    """
    encoder: Any = model.encoder
    ids = torch.arange(len(picture.tiles))
    whole = picture.join(picture.tiles)
    captions, rows = ["input"], [[whole], [torch.ones_like(whole)]]
    for ratio in ratios:
        mask = _mask_at(ratio, config, masking.key(ids, seed=config.seed), encoder.grid)
        patch_size = [s // n for s, n in zip(encoder.image_size, mask.grid, strict=True)]
        inputs, mask_there = picture.inputs.to(config.device), mask.to(config.device)
        with config.autocast():
            filled = recipe.reconstruct(model, inputs, mask_there)
            loss = scalars(model(inputs, mask_there))["loss"]
        captions.append(f"masked {mask.num_masked / mask.num_tokens:.0%}, loss {loss:.3f}")
        masked = viz.show_masked(picture.tiles, mask, patch_size)
        for row, tiles in zip(rows, (masked, picture.from_inputs(filled)), strict=True):
            row.append(picture.join(tiles))
    about = recipe.note if isinstance(recipe.note, str) else recipe.note(model)
    note = (
        "Below: reconstructions, tile by tile. Masks as in training; patch by patch where its "
        f"sampler has no such ratio.\n{about}"
    )
    file = folder / "mask-ratios.png"
    save_picture(viz.panel(rows, captions, note=note), file)
    return file


def _mask_at(ratio: float, config: RunConfig, key: masking.Key, grid: tuple[int, ...]) -> Mask:
    try:
        return first(dataclasses.replace(config.masking, mask_ratio=ratio).draw(key, grid))
    except ValueError:  # such as grid-wise or complementary masks, which have one ratio
        return masking.uniform(key, grid, ratio)


# Partial fine-tuning


def draw_partial_fine_tuning(curves: Mapping[str, Mapping[str, float]], folder: Path) -> Path:
    """Draw accuracy over the number of blocks that are fine-tuned.

    Args:
        curves: Accuracy in percent by number of blocks, by name.
        folder: Where `partial-fine-tuning.png` is written.

    Source:
        MAE, arXiv:2111.06377, figure 9.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(
            [int(number) for number in values], list(values.values()), "o-", label=escaped(name)
        )
    axes.set(xlabel="blocks fine-tuned", ylabel="accuracy (%)")
    axes.set_xticks(sorted({int(number) for values in curves.values() for number in values}))
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)  # $ is a character of a name
    file = folder / "partial-fine-tuning.png"
    save_picture(_painted(figure), file)
    return file


def partial_curves(summary: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the curves of one run of partial fine-tuning, by name."""
    names = {"fine-tuned": "accuracy", "from scratch": "from_scratch"}
    return {name: summary[key] for name, key in names.items() if key in summary}
