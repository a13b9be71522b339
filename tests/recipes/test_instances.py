"""Images with objects: COCO's files, large-scale jitter, and what a detector must not be given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes import detect
from recipes.engine.data.coco import draw_mask, is_coco, load_coco
from recipes.engine.data.images import NORMALIZE
from recipes.engine.data.instances import (
    InstanceImages,
    Instances,
    boxes_around,
    check_instances,
    no_instances,
)
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError
from tests.recipes.coco_folder import write_coco

SIZE = (12, 16)


def load(folder: Path) -> Any:
    return load_coco(folder)[0]


def test_ids_with_gaps_become_classes_from_one_on(tmp_path: Path) -> None:
    train, val, names = load_coco(write_coco(tmp_path))
    assert names == ("cat", "dog")
    image, objects = train.load(0)
    assert image.shape == (3, *SIZE)
    assert objects.classes.tolist() == [1, 2, 1]
    assert objects.is_crowd.tolist() == [False, False, True]
    assert objects.boxes[0].tolist() == [2, 3, 6, 8]
    assert torch.equal(boxes_around(objects.masks)[0], objects.boxes[0])
    assert len(train.load(1)[1]) == 0  # an image without objects
    assert len(val) == 2
    assert is_coco(tmp_path)


def change(part: str, number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[part][number].update(values)


def rle(size: list[int], counts: Any) -> Callable[[dict[str, Any]], None]:
    return change("annotations", 0, segmentation={"size": size, "counts": counts})


# What is wrong in the file, and words of the message.
MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a category that is not there": (
        change("annotations", 0, category_id=91),
        "annotation 10 has category_id 91, none of the 2 categories",
    ),
    "category 0": (change("annotations", 0, category_id=0), "annotation 10 has category_id 0"),
    "an annotation without its image": (
        change("annotations", 1, image_id=5),
        "annotation 13 has image_id 5, none of the 2 images",
    ),
    "a box of negative width": (change("annotations", 0, bbox=[1, 1, -2, 3]), "bbox"),
    "a box that is not finite": (change("annotations", 0, bbox=[1, 1, 1e999, 3]), "bbox"),
    "a box of a huge number": (change("annotations", 0, bbox=[1, 1, 10**400, 3]), "bbox"),
    "a box beyond float32": (change("annotations", 0, bbox=[1e308, 1, 1, 3]), "bbox"),
    "a word for iscrowd": (change("annotations", 0, iscrowd="0"), "iscrowd '0': expected 0 or 1"),
    "a height of many words": (change("images", 0, height="a" * 10_000), "height 'aaa"),
    "a box of three numbers": (change("annotations", 0, bbox=[1, 1, 2]), "bbox"),
    "two annotations of one id": (change("annotations", 1, id=10), "two annotations have the id"),
    "two images of one id": (change("images", 1, id=7), "two images have the id 7"),
    "no segmentation": (lambda e: e["annotations"][0].pop("segmentation"), "no segmentation"),
    "no categories": (lambda e: e.pop("categories"), "no list of categories"),
    "a path out of the folder": (change("images", 0, file_name="../x.png"), "file name"),
    "an image of no height": (change("images", 0, height=0), "height 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_annotations_is_one_line_before_training(
    tmp_path: Path, mistake: str
) -> None:
    spoil, says = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        load(write_coco(tmp_path, spoil))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


OBJECTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a mask of another size": (rle([16, 12], [0, 192]), "a mask of size [16, 12]"),
    "too few pixels": (rle([*SIZE], [0, 100]), "do not decode"),
    "too many pixels": (rle([*SIZE], [0, 200]), "do not decode"),
    "a negative run": (rle([*SIZE], [-8, 200]), "do not decode"),
    "damaged characters": (rle([*SIZE], "\x00\x7f"), "do not decode"),
    "a string cut short": (rle([*SIZE], "P"), "do not decode"),
    "no numbers": (rle([*SIZE], ["a"]), "do not decode"),
    "neither polygons nor runs": (change("annotations", 0, segmentation=3), "neither"),
    "a polygon of odd length": (change("annotations", 0, segmentation=[[1, 2, 3]]), "polygon"),
    "a polygon of a huge number": (change("annotations", 0, segmentation=[[10**400] * 6]), "polyg"),
    "a polygon of no numbers": (change("annotations", 0, segmentation=[["a"] * 6]), "polygon"),
}


@pytest.mark.parametrize("mistake", OBJECTS)
def test_an_object_that_cannot_be_drawn_is_one_line(tmp_path: Path, mistake: str) -> None:
    spoil, says = OBJECTS[mistake]
    with pytest.raises(UserError) as caught:
        load(write_coco(tmp_path, spoil)).load(0)
    assert says in str(caught.value)
    assert "annotation 10" in str(caught.value)


def test_an_image_of_another_size_than_its_entry_is_one_line(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    Image.new("RGB", (5, 5)).save(folder / "train2017" / "a.png")
    with pytest.raises(UserError, match="has 5 x 5 pixels, but 12 x 16"):
        load(folder).load(0)


def test_an_image_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    folder = write_coco(tmp_path)
    (folder / "train2017" / "a.png").write_bytes(b"not an image")
    with pytest.raises(UnreadableError):
        load(folder).load(0)
    batch = InstanceImages(load(folder), 2, 32, NORMALIZE).__getitems__([(0, 0), (0, 1)])
    assert batch.unreadable_ids == [0]
    assert len(batch.images) == len(batch.targets) == 1


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ((), "instances_train*.json; found none"),
        (("instances_train2014.json",), "found instances_train2014.json, instances_train2017.json"),
    ],
)
def test_a_folder_needs_one_file_a_part(tmp_path: Path, files: tuple[str, ...], says: str) -> None:
    folder = write_coco(tmp_path)
    for name in files:
        (folder / "annotations" / name).write_text("{}")
    if not files:
        (folder / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(UserError) as caught:
        load(folder)
    assert says in str(caught.value)


def objects(*labels: int, size: tuple[int, int] = SIZE) -> Instances:
    masks = torch.zeros(len(labels), *size, dtype=torch.bool)
    masks[:, 2:5, 3:7] = True
    return Instances(
        boxes=boxes_around(masks),
        classes=torch.tensor(labels),
        masks=masks,
        is_crowd=torch.zeros(len(labels), dtype=torch.bool),
    )


@pytest.mark.parametrize("label", [0, -1, 4, 255])
def test_a_class_that_is_not_one_of_the_classes_is_refused(label: int) -> None:
    with pytest.raises(UserError, match=f"of class {label}: classes are 1 to 3"):
        check_instances(objects(1, label), SIZE, 3, name="image")


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match="12 x 16 pixels, its masks have 16 x 12"):
        check_instances(objects(1, size=(16, 12)), SIZE, 3, name="image")


class OneImage:
    """A single image with objects."""

    def __init__(self, image: torch.Tensor, instances: Instances) -> None:
        self.image, self.instances = image, instances

    def __len__(self) -> int:
        return 1

    def load(self, number: int) -> tuple[torch.Tensor, Instances]:
        return self.image, self.instances

    def describe(self, number: int) -> str:
        return "image"


def test_a_data_set_checks_every_image_that_it_loads() -> None:
    images = InstanceImages(OneImage(torch.zeros(3, *SIZE).byte(), objects(0)), 3, 32, NORMALIZE)
    with pytest.raises(UserError, match="image has an object of class 0"):
        images.__getitems__([(0, 0)])


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    low=st.floats(0.1, 1),
    high=st.floats(1, 2),
    seed=st.integers(0, 99),
)
def test_jitter_keeps_image_masks_and_boxes_together(
    height: int, width: int, low: float, high: float, seed: int
) -> None:
    """The object is white, all else is black: so the image itself shows where the object is."""
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[:, : height // 2 + 1, width // 3 :] = True
    image = mask.expand(3, -1, -1).to(torch.uint8) * 255
    one = Instances(boxes_around(mask), torch.tensor([2]), mask, torch.tensor([False]))
    images = InstanceImages(OneImage(image, one), 3, 32, NORMALIZE, (low, high), seed)
    batch = images.__getitems__([(5, 0)])
    found, target = batch.images[0], batch.targets[0]
    assert found.shape == (3, 32, 32)
    assert torch.equal(found, images.__getitems__([(5, 0)]).images[0])
    assert target.masks.shape[1:] == (32, 32)
    if len(target):
        assert torch.equal(target.boxes, boxes_around(target.masks))
        # Antialiasing blurs edges: a pixel that is clearly white is in the mask, unless it is of
        # the padding, whose color is in between.
        white = found[0] > 250
        assert (white & ~target.masks[0]).sum() == 0
        black = found[0] < 5
        assert (black & target.masks[0]).sum() == 0


def test_crowds_are_not_trained_on_and_are_given_to_scoring(tmp_path: Path) -> None:
    train, _, _ = load_coco(write_coco(tmp_path))
    to_train = InstanceImages(train, 2, 32, NORMALIZE, (1.0, 1.0)).__getitems__([(0, 0)])
    assert to_train.targets[0].classes.tolist() == [1, 2]
    to_test = InstanceImages(train, 2, 32, NORMALIZE).__getitems__([(0, 0)])
    assert to_test.targets[0].is_crowd.tolist() == [False, False, True]
    assert to_test.targets[0].size == SIZE


def test_an_object_without_pixels_is_not_trained_on(tmp_path: Path) -> None:
    empty = {"size": [*SIZE], "counts": [SIZE[0] * SIZE[1]]}
    folder = write_coco(tmp_path, change("annotations", 0, bbox=[1, 1, 0, 4], segmentation=empty))
    batch = InstanceImages(load(folder), 2, 32, NORMALIZE, (1.0, 1.0)).__getitems__([(0, 0)])
    assert batch.targets[0].classes.tolist() == [2]


def test_an_image_without_objects_is_trained_on() -> None:
    source = OneImage(torch.zeros(3, *SIZE).byte(), no_instances(SIZE))
    batch = InstanceImages(source, 3, 32, NORMALIZE, (0.1, 2.0)).__getitems__([(0, 0)])
    assert batch.targets[0].boxes.shape == (0, 4)
    assert batch.targets[0].masks.shape == (0, 32, 32)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_run_lengths_are_columns(counts: list[int]) -> None:
    width = 3
    counts.append(-sum(counts) % width)
    size = (sum(counts) // width, width)
    flat: list[bool] = []
    for number, run in enumerate(counts):
        flat += [number % 2 == 1] * run
    expected = np.array(flat, dtype=bool).reshape(width, -1).T
    drawn = draw_mask({"size": [*size], "counts": counts}, size, name="object")
    assert np.array_equal(drawn, expected)


def test_detection_without_its_packages_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    assert detect.main(["--encoder", "none"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert 'pip install "mimkit[detect]"' in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", [["--image-size", "32", "64"], ["--compile"], ["--shard"]])
def test_what_a_detector_cannot_do_is_one_line(flag: list[str]) -> None:
    options = detect.parse(["--encoder", "none", *flag])
    with pytest.raises(UserError, match=flag[0]):
        detect.resolve_detection(options)


@pytest.mark.parametrize("preset", detect.PRESETS)
def test_every_preset_of_detection_resolves(preset: str) -> None:
    config, _ = detect.resolve_detection(detect.parse(["--encoder", "none", "--preset", preset]))
    assert config.preset == preset
    assert config.detector == detect.PRESETS[preset].detector
