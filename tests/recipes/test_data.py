"""Data sets of the recipes: items, folders, formats and broken files."""

import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from recipes.engine.data.images import NORMALIZE, normalize_by_image, random_box
from recipes.engine.data.load import load_data
from recipes.engine.data.photos import CROP_SCALES, FILES, MIN_GRAY_STD, gray_std, read_photo, split
from recipes.engine.data.sets import (
    DataSet,
    DrawnImages,
    check_readable,
    collate,
    read_first,
)
from recipes.engine.errors import UserError

SIZE = (32, 32)
DRAWN = ["photos", "digits"]


@pytest.fixture(scope="module")
def drawn() -> dict[str, DataSet]:
    return {name: load_data(name, image_size=SIZE, seed=0) for name in DRAWN}


@pytest.fixture
def photo_set(drawn: dict[str, DataSet]) -> DataSet:
    return drawn["photos"]


def noise(height: int, width: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_tree(root: Path, counts: dict[str, int]) -> Path:
    """Write small images, all different, into subfolders: `counts` maps each to its number."""
    for subfolder, number in counts.items():
        (root / subfolder).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            noise(12, 20, seed=index).save(root / subfolder / f"{index:03}.png")
    return root


# Photos and digits


@pytest.mark.parametrize("name", DRAWN)
def test_an_item_is_a_function_of_seed_epoch_and_id(name, drawn):
    train = drawn[name].train
    indices = [(0, 0), (0, 1), (3, 12_799), (1, 0)]
    batch = train.__getitems__(indices)
    other_run = pickle.loads(pickle.dumps(load_data(name, image_size=SIZE, seed=0).train))
    for row, index in reversed(list(enumerate(indices))):
        alone, alone_id = other_run[index]
        assert torch.equal(batch.images[row], alone)
        assert int(batch.sample_ids[row]) == alone_id == index[1]
    images = list(batch.images)
    other_seed = load_data(name, image_size=SIZE, seed=1).train
    images.append(other_seed[0, 0][0])
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_items_do_not_depend_on_the_number_of_workers(photo_set):
    batches = [[(2, i) for i in range(start, start + 8)] for start in range(0, 32, 8)]
    here, there = (
        list(
            DataLoader(
                photo_set.train, batch_sampler=batches, num_workers=workers, collate_fn=collate
            )
        )
        for workers in (0, 2)
    )
    for batch, other in zip(here, there, strict=True):
        assert torch.equal(batch.images, other.images)
        assert torch.equal(batch.sample_ids, other.sample_ids)


@pytest.mark.parametrize("name", DRAWN)
def test_items_are_bytes_that_become_model_inputs(name, drawn):
    data = drawn[name]
    assert len(data.train) == 12_800
    image, sample_id = data.train[0, 7]
    assert image.shape == (data.in_channels, *SIZE)
    assert image.dtype == torch.uint8
    assert isinstance(sample_id, int)
    inputs = data.train.to_inputs(image[None])
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs, data.normalize(image[None] / 255)[0])
    assert torch.equal(data.train.to_inputs(inputs), inputs)


@pytest.mark.parametrize("name", DRAWN)
def test_inputs_have_about_zero_mean_and_unit_variance(name, drawn):
    train = drawn[name].train
    images = train.to_inputs(train.__getitems__([(0, i) for i in range(500)]).images)
    assert abs(images.mean()) < 0.1
    assert 0.7 < images.std() < 1.1


@pytest.mark.parametrize("name", DRAWN)
def test_normalize_can_be_inverted(name, drawn):
    data = drawn[name]
    images = torch.rand(4, data.in_channels, 8, 12)
    images[0] = 0.5
    inputs, mean, std = data.normalize(images)
    torch.testing.assert_close(inputs * std + mean, images)
    torch.testing.assert_close(inputs[2:], data.normalize(images[2:])[0], rtol=0, atol=0)


def test_normalizing_by_image_removes_brightness_and_contrast():
    images = torch.rand(2, 3, 16, 16)
    inputs, _, _ = normalize_by_image(images)
    dimmer, _, _ = normalize_by_image(images * 0.9 + 0.05)
    assert inputs.mean(dim=(2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(inputs, dimmer, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", DRAWN)
def test_probe_data_is_balanced_and_drawn_once(name, drawn):
    probe = drawn[name].probe
    again = load_data(name, image_size=SIZE, seed=0).probe
    classes = len(drawn[name].class_names)
    assert probe.train_labels.bincount().tolist() == [50] * classes
    assert len(probe.test_labels) == len(probe.test_images) == 2_500
    assert int(probe.test_labels.bincount().max() - probe.test_labels.bincount().min()) <= 1
    assert probe.train_labels.dtype == probe.test_labels.dtype == torch.int64
    assert torch.equal(probe.train_images, again.train_images)
    assert torch.equal(probe.test_images, again.test_images)
    assert drawn[name].probe is probe


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("image_size", [(32, 32), (48, 24)])
def test_pictures_are_whole_tiles_in_the_unit_range(name, image_size):
    for picture in load_data(name, image_size=image_size, seed=0).pictures:
        channels, height, width = picture.shape
        assert channels == (3 if name == "photos" else 1)
        assert height % image_size[0] == width % image_size[1] == 0
        assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.parametrize("image_size", [(8, 8), (8, 48), (40, 8)])
def test_photos_offer_crops_of_every_photo_in_any_shape(image_size):
    data = load_data("photos", image_size=image_size, seed=2**64)
    for source in (data.train.source, data.load_probe.args[1]):
        for label in range(source.num_classes):
            crop = source.draw(label, np.random.default_rng(label))
            assert crop.shape == (3, *image_size)


@pytest.mark.parametrize("name", FILES)
def test_the_parts_of_a_photo_do_not_overlap(name):
    photo = read_photo(name)
    left, right = split(photo)
    assert left.width == round(0.6 * photo.width)
    np.testing.assert_array_equal(np.concatenate([left, right], axis=1), photo)


def test_no_crop_of_a_photo_is_flat(photo_set):
    source = photo_set.train.source
    rng = np.random.default_rng(0)
    for label in range(source.num_classes):
        crops = np.stack([source.draw(label, rng).numpy() for _ in range(200)])
        assert (crops.mean(axis=1) / 255).std(axis=(1, 2)).min() > MIN_GRAY_STD - 1e-9


def test_every_photo_offers_all_five_scales_and_both_directions(photo_set):
    source = photo_set.train.source
    assert [len(levels) for levels in source.pyramids] == [len(CROP_SCALES)] * len(FILES)
    draws = [source.draw(3, np.random.default_rng(seed)) for seed in range(64)]
    level = source.pyramids[3]
    slices = {
        crop.tobytes()
        for pixels in (one.pixels for one in level)
        for window in [np.lib.stride_tricks.sliding_window_view(pixels, SIZE, axis=(1, 2))]
        for crop in np.moveaxis(window, 0, 2).reshape(-1, 3, *SIZE)
    }
    unflipped = [draw.numpy().tobytes() in slices for draw in draws]
    flipped = [draw.flip(2).numpy().tobytes() in slices for draw in draws]
    assert all(a or b for a, b in zip(unflipped, flipped, strict=True))
    assert 16 < sum(flipped) < 48


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_gray_std_is_the_standard_deviation_of_each_window(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 9, 11), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(pixels.mean(axis=0) / 255, (height, width))
    np.testing.assert_allclose(
        gray_std(pixels, (height, width)), windows.std(axis=(2, 3)), atol=1e-6
    )


def test_training_and_test_digits_are_different_images(drawn):
    probe = drawn["digits"].load_probe
    train, test = probe.args[:2]
    seen = {image.tobytes() for images in train.digits for image in images}
    held_out = [image.tobytes() for images in test.digits for image in images]
    assert len(held_out) == 360
    assert not seen.intersection(held_out)


@pytest.mark.parametrize("image_size", [(16, 16), (20, 64)])
def test_a_digit_lies_inside_its_canvas(image_size):
    source = load_data("digits", image_size=image_size, seed=0).train.source
    for label in range(10):
        canvas = source.draw(label, np.random.default_rng(label))
        assert canvas.shape == (1, *image_size)
        assert canvas.max() > 128
        assert (canvas == 0).float().mean() > 0.1


# Mistakes


@pytest.mark.parametrize(
    ("name", "image_size", "seed", "message"),
    [
        ("photo", SIZE, 0, "'photo'.*photos, digits or an existing folder"),
        ("photos", (512, 32), 0, "512 x 32.*8 to 256"),
        ("photos", (32, 4), 0, "32 x 4.*8 to 256"),
        ("photos", (0, 32), 0, r"\(0, 32\)"),
        ("photos", SIZE, -1, "seed -1"),
        ("digits", (8, 32), 0, "at least 16.*8 x 32"),
    ],
)
def test_a_mistake_is_repeated_with_what_would_fit(name, image_size, seed, message):
    with pytest.raises(UserError, match=message):
        load_data(name, image_size=image_size, seed=seed)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("photos", "skimage", "scikit-image"), ("digits", "sklearn", "scikit-learn")],
)
def test_a_missing_package_is_named_with_its_extra(name, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.data", raising=False)
    with pytest.raises(UserError, match=rf'{package}: pip install "mimkit\[recipes\]"'):
        load_data(name, image_size=SIZE, seed=0)


# Folders


def test_a_labelled_tree_gives_classes_items_and_a_probe(tmp_path):
    counts = {"train/cat": 8, "train/cat-2": 6, "val/cat": 3, "val/cat-2": 5}
    data = load_data(str(write_tree(tmp_path, counts)), image_size=(16, 24), seed=0)
    assert data.class_names == ("cat", "cat-2")
    assert len(data.train) == 14
    image, sample_id = data.train[5, 13]
    assert image.shape == (3, 16, 24)
    assert sample_id == 13
    assert torch.equal(image, data.train[5, 13][0])
    assert not torch.equal(image, data.train[6, 13][0])
    assert data.probe.train_labels.bincount().tolist() == [8, 6]
    assert data.probe.test_labels.bincount().tolist() == [3, 5]
    assert data.probe.test_images.shape == (8, 3, 16, 24)
    assert all(p.shape == (3, 192, 192) and 0 <= p.min() <= p.max() <= 1 for p in data.pictures)


def test_without_val_a_tenth_of_each_class_is_held_out(tmp_path):
    # Sorted as whole paths, "b-2/..." would come before "b/...".
    write_tree(tmp_path, {"train/b": 30, "train/b-2": 5, "train/lone": 1})
    data = load_data(str(tmp_path), image_size=(8, 8), seed=0)
    samples = data.load_probe.args[0]
    train, held_out = (
        [part.name(index).removeprefix(f"{tmp_path}/train/") for index in range(len(part))]
        for part in (samples.train, samples.held_out)
    )
    assert held_out == ["b/027.png", "b/028.png", "b/029.png", "b-2/004.png"]
    assert len({*train, *held_out}) == 36
    assert data.probe.test_labels.tolist() == [0, 0, 0, 1]
    assert data.probe.train_labels.bincount().tolist() == [27, 4, 1]


def test_without_labels_the_last_images_are_held_out(tmp_path):
    write_tree(tmp_path, {".": 2, "deep/er": 3, ".hidden": 4})
    (tmp_path / "deep" / ".thumbnail.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path), image_size=(8, 8), seed=0)
    assert data.class_names == ()
    assert data.probe is None
    assert [Path(data.train.describe(i)).name for i in range(len(data.train))] == [
        "000.png",
        "001.png",
        "000.png",
    ]
    assert len(data.pictures) == 2


def test_val_without_labels_gives_the_pictures_and_leaves_all_images_to_train(tmp_path):
    write_tree(tmp_path, {"train": 3, "val": 2})
    data = load_data(str(tmp_path), image_size=(8, 8), seed=0)
    assert len(data.train) == 3
    assert len(data.pictures) == 2
    assert data.probe is None


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (3, 2), (500, 60)])
def test_images_of_any_shape_give_items_and_pictures(shape, tmp_path):
    for index in range(2):
        noise(*shape).save(tmp_path / f"{index}.png")
    data = load_data(str(tmp_path), image_size=(32, 48), seed=0)
    assert data.train[0, 0][0].shape == (3, 32, 48)
    assert data.pictures[0].shape == (3, 192, 192)


@given(
    width=st.integers(1, 2000),
    height=st.integers(1, 2000),
    seed=st.integers(0, 2**32),
    area=st.sampled_from([(0.2, 1.0), (0.67, 1.0), (0.08, 1.0)]),
)
def test_a_random_box_lies_inside_the_image_and_has_the_right_area_and_ratio(
    width, height, seed, area
):
    left, top, right, bottom = random_box(width, height, np.random.default_rng(seed), area=area)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 100 and 0.5 < width / height < 2:
        assert 0.9 * area[0] < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.7 < (right - left) / (bottom - top) < 1.4


def test_half_of_the_items_are_flipped(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    for index in range(2):
        ramp.save(tmp_path / f"{index}.png")
    train = load_data(str(tmp_path), image_size=(16, 16), seed=0).train
    drawn = (train[epoch, 0][0].int() for epoch in range(60))
    rising = [bool((image[0, 0].diff() > 0).all()) for image in drawn]
    assert 15 < sum(rising) < 45


def test_inputs_of_a_folder_use_the_statistics_of_imagenet(tmp_path):
    for index in range(2):
        Image.new("RGB", (16, 16), (255, 0, 51)).save(tmp_path / f"{index}.png")
    train = load_data(str(tmp_path), image_size=(8, 8), seed=0).train
    inputs = train.to_inputs(train[0, 0][0][None])
    expected = (torch.tensor([1, 0, 0.2]) - torch.tensor(NORMALIZE.mean)) / torch.tensor(
        NORMALIZE.std
    )
    torch.testing.assert_close(inputs[0], expected[:, None, None].expand(3, 8, 8))


def test_an_unreadable_image_is_skipped(tmp_path):
    write_tree(tmp_path, {".": 8})
    (tmp_path / "001.png").write_bytes(b"no image at all")
    train = load_data(str(tmp_path), image_size=(8, 8), seed=0).train
    assert train[0, 1] == (None, 1)
    assert train.describe(1) == str(tmp_path / "001.png")
    batch = collate([train[0, i] for i in range(3)])
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.sample_ids.tolist() == [0, 2]
    assert batch.sample_ids.dtype == torch.int64
    assert batch.unreadable_ids == [1]
    assert len(collate([train[0, 1]]).images) == 0


def test_a_batch_is_filled_in_place_with_the_same_items(tmp_path):
    write_tree(tmp_path, {".": 8})
    (tmp_path / "001.png").write_bytes(b"no image at all")
    train = load_data(str(tmp_path), image_size=(8, 8), seed=0).train
    indices = [(3, 2), (0, 1), (1, 0)]
    batch = train.__getitems__(indices)
    items = collate([train[index] for index in indices])
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, items.images)
    assert batch.sample_ids.tolist() == items.sample_ids.tolist() == [2, 0]
    assert batch.unreadable_ids == items.unreadable_ids == [1]


def test_the_limit_on_unreadable_images_is_10_or_one_percent(tmp_path):
    class Images(DrawnImages):
        def __len__(self):
            return number

    samples = Images(None, None, 0)
    for number, limit in ((26, 10), (2_000, 20)):
        check_readable(samples, range(limit))
        with pytest.raises(UserError, match=f"{limit + 1} of {number} images cannot .*sample 0,"):
            check_readable(samples, range(limit + 1))
    number = 3
    check_readable(samples, range(2))
    with pytest.raises(UserError, match="none of the 3 images can be read"):
        check_readable(samples, range(3))


def test_the_first_images_that_can_be_read_are_found_behind_others(tmp_path):
    write_tree(tmp_path, {".": 20})
    for index in range(10):
        (tmp_path / f"{index:03}.png").write_bytes(b"")
    train = load_data(str(tmp_path), image_size=(8, 8), seed=0).train
    unreadable: set[int] = set()
    assert [i for _, i in read_first(train, range(16), 3, unreadable)] == [10, 11, 12]
    assert unreadable == set(range(10))
    (tmp_path / "010.png").write_bytes(b"")
    with pytest.raises(UserError, match="11 of 16 images cannot be read"):
        list(read_first(train, range(16), 3, set()))


def test_probes_count_unreadable_images_of_all_classes_together(tmp_path):
    write_tree(tmp_path, {"train/a": 20, "train/b": 20})
    for name in ("a", "b"):
        for index in range(6):
            (tmp_path / "train" / name / f"{index:03}.png").write_bytes(b"")
    data = load_data(str(tmp_path), image_size=(8, 8), seed=0)
    with pytest.raises(UserError, match="11 of 36 images cannot be read"):
        data.load_probe()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "holds no images.*jpg"),
        ({"train": 0}, "train holds no images"),
        ({"images": 1}, "too few images"),
        ({"train/a": 1, "train/b": 1}, "too few images"),
        ({"train/a": 2, "train": 1}, "000.png has no class"),
        ({"train/a": 2, "val": 1}, "val has no class folders"),
        ({"train/a": 2, "val/b": 1}, "b is a class without training images"),
        ({"train/a": 2, "val": 0}, "val holds no images"),
    ],
)
def test_a_folder_that_does_not_fit_is_named_in_the_message(counts, message, tmp_path):
    write_tree(tmp_path, counts)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path), image_size=SIZE, seed=0)


@pytest.mark.parametrize("subfolder", ["", "train/a", "val/a"])
def test_a_folder_without_a_readable_image_is_an_error(subfolder, tmp_path):
    if subfolder:
        write_tree(tmp_path, {"train/a": 4, "val/a": 4})
    for index in range(4):
        (tmp_path / subfolder / f"{index:03}.png").write_bytes(b"no image at all")
    with pytest.raises(UserError, match="none of the . images can be read"):
        load_data(str(tmp_path), image_size=SIZE, seed=0)


def test_links_to_folders_are_followed(tmp_path):
    write_tree(tmp_path / "elsewhere", {"cat": 3})
    (tmp_path / "set" / "train").mkdir(parents=True)
    os.symlink(tmp_path / "elsewhere" / "cat", tmp_path / "set" / "train" / "cat")
    assert load_data(str(tmp_path / "set"), image_size=SIZE, seed=0).class_names == ("cat",)


def test_a_user_error_keeps_its_line_when_wrapped_in_a_traceback():
    wrapped = (
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n  File ...\nrecipes.engine.errors.UserError: the line\n"
    )
    assert str(UserError(wrapped)) == "the line"
    assert str(pickle.loads(pickle.dumps(UserError("the line")))) == "the line"
