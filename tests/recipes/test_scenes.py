"""Composed scenes: reproducible, and their labels, masks, boxes and classes agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.engine.data.photos import FILES, read_photo, split
from recipes.engine.data.scenes import CLASSES, VISIBLE_SHARE, Part, Scene, _part_of, load_scenes
from recipes.engine.errors import UserError

parts = st.sampled_from(["train", "fit", "validation", "test"])
sizes = st.sampled_from([(32, 32), (48, 40)])


def scene_of(size: tuple[int, int], part: Part, seed: int, index: int) -> Scene:
    return load_scenes(1_000, image_size=size, seed=seed, part=part)[index]


@settings(max_examples=10)
@given(sizes, parts, st.integers(0, 2**63 - 1), st.integers(0, 999))
def test_labels_masks_boxes_and_classes_agree(
    size: tuple[int, int], part: Part, seed: int, index: int
) -> None:
    scene = scene_of(size, part, seed, index)
    assert scene.image.shape == (3, *size)
    assert scene.image.dtype == torch.uint8
    assert 1 <= len(scene.classes) == len(scene.masks) == len(scene.boxes) <= 4
    assert scene.classes.min() >= 1
    assert scene.classes.max() <= len(CLASSES) == 10
    assert scene.masks.sum(dim=0).max() == 1, "a pixel belongs to one cut-out"
    painted = (scene.masks * scene.classes[:, None, None]).sum(dim=0)
    assert torch.equal(painted, scene.labels.long())
    for mask, box in zip(scene.masks, scene.boxes.int().tolist(), strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        for edge in (mask[top], mask[bottom - 1], mask[:, left], mask[:, right - 1]):
            assert edge.any(), "the box is tight, and its right and bottom are the last pixel + 1"


@settings(max_examples=3)
@given(parts, st.integers(0, 1_000), st.integers(0, 999))
def test_a_scene_is_a_function_of_seed_part_and_number(part: Part, seed: int, index: int) -> None:
    one, again = (scene_of((32, 32), part, seed, index) for _ in range(2))
    other = scene_of((32, 32), part, seed + 1, index)
    for name in ("image", "labels", "masks", "boxes", "classes"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert not torch.equal(one.image, other.image)
    number = scene_of((32, 32), part, seed, (index + 1) % 1_000)
    assert not torch.equal(one.image, number.image)


def test_every_class_occurs_and_every_cut_out_stays_visible() -> None:
    scenes = [scene_of((32, 32), "train", 0, index) for index in range(100)]
    classes = torch.cat([scene.classes for scene in scenes])
    assert set(classes.tolist()) == set(range(1, 11))
    assert set(map(len, (scene.classes for scene in scenes))) == {1, 2, 3, 4}
    areas = torch.cat([scene.masks.flatten(1).sum(dim=1) for scene in scenes])
    assert areas.min() > VISIBLE_SHARE * 30  # a disc of the least radius has about 60 pixels


def test_color_and_brightness_do_not_tell_the_class() -> None:
    """Every cut-out has about the same mean in each channel, but for clipping and hidden pixels."""
    means: dict[int, list[torch.Tensor]] = {label: [] for label in range(1, 11)}
    for index in range(100):
        scene = scene_of((32, 32), "train", 0, index)
        for label, mask in zip(scene.classes.tolist(), scene.masks, strict=True):
            means[label].append(scene.image[:, mask].float().mean(dim=1))
    by_class = torch.stack([torch.stack(rows).mean(dim=0) for rows in means.values()])
    assert (by_class - 127.5).abs().max() < 20


@pytest.mark.parametrize("file", FILES)
def test_the_parts_of_a_photograph_do_not_overlap(file: str) -> None:
    photo = read_photo(file)
    parts = {part: _part_of(photo, part) for part in ("train", "fit", "validation", "test")}
    left, right = split(photo)
    assert np.array_equal(parts["train"], left)
    assert np.array_equal(parts["test"], right)
    assert left.width + right.width == photo.width
    both = np.concatenate([np.asarray(parts["fit"]), np.asarray(parts["validation"])])
    assert np.array_equal(both, left)


@pytest.mark.parametrize("size", [(31, 64), (64, 257)])
def test_a_size_that_does_not_fit_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="choose 32 to 256 a side"):
        load_scenes(1, image_size=size, seed=0)


def test_a_number_beyond_the_scenes_is_refused() -> None:
    with pytest.raises(IndexError, match="scene 3 of 3"):
        load_scenes(3, image_size=(32, 32), seed=0)[3]
