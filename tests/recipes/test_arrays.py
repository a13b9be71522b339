"""Arrays as data: files, crops, statistics, pictures; and what is refused."""

import io
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from recipes import convmae, mae, simmim
from recipes.engine.data.arrays import ArrayOptions, open_array, random_box, whole, with_channels
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import DataSet
from recipes.engine.data.statistics import measure
from recipes.engine.errors import UserError
from recipes.engine.main import check_fit
from recipes.engine.pictures.flat import flatten_image
from recipes.engine.pretrained.encoders import EncoderFile, warn_of_other_values
from recipes.engine.pretrained.shapes import ViTShape
from recipes.engine.reading import UnreadableError
from tests.recipes.command import config_for


@pytest.fixture(autouse=True)
def few_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.engine.data.folder.MEASURED_CROPS", 24)


SHAPES = {1: (40,), 2: (12, 14), 3: (8, 9, 10)}


def values(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return (np.random.default_rng(seed).normal(100, 30, shape)).astype(dtype)


def write(path: Path, array: np.ndarray) -> Path:
    """Write an array without a channel axis (a signal: [points, channels]) as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez_compressed(path, array)
    elif path.suffix == ".tif":
        pytest.importorskip("tifffile").imwrite(path, array)
    elif path.suffix == ".wav":
        pytest.importorskip("soundfile").write(path, array, 8_000, subtype="FLOAT")
    else:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def fill(root: Path, name: str, *shape: int, number: int = 6, dtype: type = np.float32) -> Path:
    for index in range(number):
        write(root / name.format(index), values(*shape, seed=index, dtype=dtype))
    return root


def load(root: Path, image_size, **options) -> DataSet:
    seed = options.pop("seed", 0)
    return load_data(str(root), image_size=image_size, seed=seed, options=ArrayOptions(**options))


def opened(path: Path, num_axes: int | None = None, key: str | None = None) -> np.ndarray:
    with path.open("rb") as file:
        stored = open_array(file, path.name, key)
    return np.array(with_channels(stored, num_axes or stored.num_axes))


# Files


@given(
    array=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int32, np.float32, np.float64]),
        hnp.array_shapes(min_dims=2, max_dims=4, max_side=4),
        elements=st.integers(0, 200),
    ),
    order=st.sampled_from("CF"),
)
def test_an_array_is_read_as_it_was_written(tmp_path_factory, array, order):
    path = tmp_path_factory.mktemp("arrays") / "a.npy"
    np.save(path, np.asarray(array, order=order))
    assert np.array_equal(opened(path), array)
    np.savez(path.with_suffix(".npz"), only=array)
    assert np.array_equal(opened(path.with_suffix(".npz")), array)
    stored = open_array(io.BytesIO(path.read_bytes()), "a.npy")  # as from a shard
    assert np.array_equal(stored.values, array)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "channels_last", "expected"),
    [
        ("a.nii", (5, 6, 7), np.int16, True, (1, 5, 6, 7)),
        ("a.nii.gz", (5, 6, 7, 2), np.float32, True, (2, 5, 6, 7)),
        ("a.nii", (5, 6, 1), np.float32, True, (1, 5, 6)),
        ("a.wav", (30, 2), np.float32, True, (2, 30)),
        ("a.tif", (13, 9, 8), np.uint16, False, (13, 9, 8)),
        ("a.tif", (9, 8), np.float32, False, (1, 9, 8)),
        ("a.tif", (9, 8), np.int32, False, (1, 9, 8)),
    ],
)
def test_each_format_gives_channels_first(tmp_path, name, shape, dtype, channels_last, expected):
    array = (values(*shape) / 300).astype(np.float32) if name.endswith("wav") else None
    array = values(*shape, dtype=dtype) if array is None else array
    found = opened(write(tmp_path / name, array))
    assert found.shape == expected
    moved = np.moveaxis(array, -1, 0) if channels_last and found.shape[0] > 1 else array
    assert np.array_equal(found, moved.reshape(expected))


def test_pages_of_a_tiff_file_are_channels_or_the_first_axis_of_a_volume(tmp_path):
    path = write(tmp_path / "a.tif", values(5, 9, 8, dtype=np.uint16))
    assert opened(path, 2).shape == (5, 9, 8)
    assert opened(path, 3).shape == (1, 5, 9, 8)


def test_a_npy_file_is_mapped_not_read(tmp_path):
    with write(tmp_path / "a.npy", values(2, 30)).open("rb") as file:
        assert isinstance(open_array(file, "a.npy").values, np.memmap)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.tif", "a.nii", "a.nii.gz", "a.wav"])
@pytest.mark.parametrize("spoil", [_truncated, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_cannot_be_read(tmp_path, name, spoil):
    shape = (40,) if name == "a.wav" else (9, 8, 7) if "nii" in name else (9, 8)
    path = write(tmp_path / name, values(*shape) / 300)
    spoil(path)
    with pytest.raises(UnreadableError, match="."):
        opened(path)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((2, 3), np.complex64), "complex: store real and imaginary parts as two channels"),
        (np.array([{}, 1], dtype=object), "Python objects"),
        (np.array([["a"]]), "no number"),
        (np.ones((0, 4)), "no values"),
    ],
)
def test_what_is_no_array_of_numbers_cannot_be_read(tmp_path, array, says):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(UnreadableError, match=says):
        opened(tmp_path / "a.npy")


def test_a_pickle_in_the_place_of_an_array_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    (tmp_path / "a.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UnreadableError):
        opened(tmp_path / "a.npy")
    assert not (tmp_path / "executed").exists()


def test_of_several_arrays_in_a_file_one_must_be_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, one=np.ones((1, 4)), two=np.zeros((1, 4)))
    with pytest.raises(UnreadableError, match=r"2 arrays \(one, two\): name one with --array-key"):
        opened(path)
    with pytest.raises(UnreadableError, match="no array 'three', but one, two"):
        opened(path, key="three")
    assert opened(path, key="two").sum() == 0


def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    (tmp_path / "a.npy").write_bytes(buffer.getvalue())
    with pytest.raises(UnreadableError, match="ends early"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize("package", ["tifffile", "nibabel", "soundfile"])
def test_a_missing_reader_is_named_with_what_installs_it(tmp_path, package, monkeypatch):
    name = {"tifffile": "a{}.tif", "nibabel": "a{}.nii", "soundfile": "a{}.wav"}[package]
    shape = {"tifffile": (13, 9, 8), "nibabel": (9, 8, 7), "soundfile": (40,)}[package]
    fill(tmp_path, name, *shape)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'pip install {package}, or .*"mimkit\[arrays\]"'):
        load(tmp_path, 8, channels="keep")


# The data set


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_an_item_is_a_function_of_seed_epoch_and_id(tmp_path, axes):
    fill(tmp_path, "{}.npy", 2, *SHAPES[axes])
    data = load(tmp_path, 4)
    assert data.in_channels == 2
    assert data.image_size == (4,) * axes
    again, other = load(tmp_path, 4).train, load(tmp_path, 4, seed=1).train
    item = data.train[3, 1][0]
    assert item.shape == (2, *[4] * axes)
    assert item.dtype == torch.float32
    assert torch.equal(item, again[3, 1][0])
    assert not torch.equal(item, data.train[4, 1][0])
    assert not torch.equal(item, other[3, 1][0])
    batch = data.train.__getitems__([(3, 1), (0, 0)])
    assert torch.equal(batch.images, torch.stack([item, data.train[0, 0][0]]))
    assert batch.sample_ids.tolist() == [1, 0]


@given(axes=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_a_random_box_is_a_part_of_the_array_as_it_is_stored(axes, seed):
    shape = SHAPES[axes]
    array = np.arange(np.prod(shape)).reshape(1, *shape)
    box = random_box(array, (3,) * axes, np.random.default_rng(seed)).long()[0]
    corner = np.unravel_index(int(box.flatten()[0]), shape)
    part = tuple(slice(at, at + 3) for at in corner)
    assert np.array_equal(box.numpy(), array[0][part])


def test_bytes_stay_bytes_and_other_values_are_float32(tmp_path):
    fill(tmp_path / "bytes", "{}.npy", 1, 12, 14, dtype=np.uint8)
    fill(tmp_path / "more", "{}.npy", 1, 12, 14, dtype=np.uint16)
    assert load(tmp_path / "bytes", (8, 8)).train[0, 0][0].dtype == torch.uint8
    assert load(tmp_path / "more", (8, 8)).train[0, 0][0].dtype == torch.float32


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_whole_array_is_resampled_to_the_image_size(dtype, axis):
    ramp = np.broadcast_to(np.linspace(0, 200, 64), (1, 8, 10, 64)).astype(dtype)
    crop = whole(np.moveaxis(ramp, -1, axis), (4, 16, 6), np.random.default_rng(0))
    assert crop.shape == (1, 4, 16, 6)
    assert crop.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    lines = crop.float().movedim(axis, -1).flatten(0, -2)
    length = lines.shape[1]
    steps = (torch.arange(length) + 0.5) * (64 / length) - 0.5
    expected = (steps * (200 / 63)).expand_as(lines)
    torch.testing.assert_close(lines[:, 1:-1], expected[:, 1:-1], atol=1.6, rtol=0)


@given(
    crops=st.lists(
        hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(-1e4, 1e4, width=32)), min_size=1
    )
)
def test_statistics_are_those_of_all_values_together(crops):
    found = measure(map(torch.from_numpy, crops))
    together = np.stack(crops, axis=1).reshape(2, -1).astype(np.float64)
    np.testing.assert_allclose(found.mean, together.mean(axis=1), rtol=1e-9, atol=1e-9)
    std = together.std(axis=1)
    is_flat = std <= 1e-6 * np.abs(together.mean(axis=1))
    np.testing.assert_allclose(found.std, np.where(is_flat, 1, std), rtol=1e-6, atol=1e-9)
    assert all(high > low for low, high in zip(found.low, found.high, strict=True))


def test_inputs_have_mean_0_and_deviation_1_in_each_channel(tmp_path):
    gain = np.array([1, 1e4])[:, None, None]
    for index in range(6):
        np.save(tmp_path / f"{index}.npy", values(2, 16, 16, seed=index) * gain)
    data = load(tmp_path, (8, 8))
    inputs = data.train.to_inputs(torch.stack([data.train[e, 0][0] for e in range(60)]))
    assert inputs.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (inputs.std(dim=(0, 2, 3)) - 1).abs().max() < 0.2
    shown = torch.stack(list(data.pictures))
    inputs, mean, std = data.normalize(shown)
    torch.testing.assert_close(inputs * std + mean, shown)


def test_known_statistics_are_used_and_not_measured_again(tmp_path):
    fill(tmp_path, "{}.npy", 1, 12, 14)
    known = load(tmp_path, (8, 8)).statistics
    moved = type(known)((5.0,), (2.0,), (0.0,), (9.0,))
    data = load_data(
        str(tmp_path), image_size=(8, 8), seed=0, find_statistics=lambda channels, size: moved
    )
    assert data.statistics == moved
    assert torch.equal(data.train.to_inputs(torch.full((1, 1, 8, 8), 7.0)), torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize(("factor", "far"), [(1.0, False), (2.0, False), (1 / 255, True)])
def test_arrays_in_another_unit_than_those_of_the_encoder_are_noted(tmp_path, capfd, factor, far):
    rng = np.random.default_rng(0)
    for index in range(20):
        np.save(tmp_path / f"{index}.npy", rng.normal(100, 40, (2, 12, 14)).astype(np.float32))
    known = load(tmp_path, (8, 8)).statistics
    for path in tmp_path.iterdir():
        np.save(path, np.load(path) * np.float32(factor))
    data = load_data(
        str(tmp_path), image_size=(8, 8), seed=0, find_statistics=lambda channels, size: known
    )
    file = EncoderFile(tmp_path, "", ViTShape(), {}, known)
    warn_of_other_values(file, data)
    assert ("are they in the same unit?" in capfd.readouterr().err) == far


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        (values(3, 12, 14), "3 channels, others have 2"),
        (values(12), r"shape \(12,\): 2 axes, and one of channels, are needed"),
        (np.full((2, 12, 14), np.nan, np.float32), "not finite"),
        (np.full((2, 12, 14), 1e300), "not finite"),
        (values(2, 7, 14), "7 x 14 points, less than the 8 x 8 of a crop"),
        (values(2, 12, 14, dtype=np.uint8), "uint8, others have more bits"),
    ],
)
def test_an_odd_array_is_left_out_and_named_with_the_reason(tmp_path, odd, says):
    fill(tmp_path, "{}.npy", 2, 12, 14, number=8)
    np.save(tmp_path / "1.npy", odd)
    train = load(tmp_path, (8, 8)).train
    assert train[0, 1] == (None, 1)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(train.describe(1))


def test_if_no_array_fits_one_line_says_why(tmp_path):
    fill(tmp_path, "{}.npy", 2, 12, 14)
    with pytest.raises(UserError, match="none of the 3 images can be read.*--crop whole"):
        load(tmp_path, (32, 32))
    assert load(tmp_path, (32, 32), crop="whole").train[0, 0][0].shape == (2, 32, 32)
    with pytest.raises(UserError, match="none of the 3 images .*1 axes, and one of channels"):
        load(tmp_path, (4,))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="it is empty"):
        load(tmp_path / "empty", (8, 8))


def test_a_pipe_with_the_name_of_an_array_is_not_opened(tmp_path, capsys):
    import os

    fill(tmp_path, "{}.npy", 2, 12, 14)
    os.mkfifo(tmp_path / "a.npy")
    assert len(load(tmp_path, (8, 8)).train) == 3
    assert "1 pipes or devices" in capsys.readouterr().err


# Pictures or arrays


def noise_png(path: Path, mode: str, size: int = 20, seed: int = 0) -> None:
    path.parent.mkdir(exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}.get(mode, ())
    kind = np.uint16 if mode == "I;16" else np.uint8
    most = np.iinfo(kind).max
    pixels = np.random.default_rng(seed).integers(0, most, (size, size, *channels)).astype(kind)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(
    ("mode", "channels", "dtype"),
    [
        ("L", 1, torch.uint8),
        ("RGB", 3, torch.uint8),
        ("RGBA", 4, torch.uint8),
        ("I;16", 1, torch.float32),
    ],
)
def test_pictures_keep_their_channels_and_bits_if_asked(tmp_path, mode, channels, dtype):
    for index in range(4):
        noise_png(tmp_path / f"{index}.png", mode)
    kept, rgb = load(tmp_path, (8, 8), channels="keep"), load(tmp_path, (8, 8))
    assert kept.in_channels == channels
    assert kept.train[0, 0][0].dtype == dtype
    assert kept.train[0, 0][0].shape == (channels, 8, 8)
    assert kept.pictures[0].shape == (channels, 192, 192)
    assert rgb.in_channels == 3
    assert rgb.statistics is None
    if mode == "RGB":  # the same crops
        assert torch.equal(kept.train[2, 1][0], rgb.train[2, 1][0])


def test_what_a_folder_has_more_of_is_read_and_the_rest_is_named(tmp_path, capsys):
    fill(tmp_path, "{}.npy", 2, 12, 14)
    noise_png(tmp_path / "preview.png", "RGB")
    assert load(tmp_path, (8, 8)).in_channels == 2
    assert "1 files in" in capsys.readouterr().err
    for index in range(8):
        noise_png(tmp_path / f"p{index}.png", "RGB")
    assert load(tmp_path, (8, 8)).in_channels == 3
    assert ".npy 6" in capsys.readouterr().err
    assert load(tmp_path, (8, 8), channels="rgb").in_channels == 3


def test_tiff_files_are_arrays_if_rgb_cannot_hold_them(tmp_path):
    fill(tmp_path / "bands", "{}.tif", 13, 12, 14, dtype=np.uint16)
    fill(tmp_path / "gray", "{}.tif", 12, 14, dtype=np.uint16)
    assert load(tmp_path / "bands", (8, 8)).in_channels == 13
    assert load(tmp_path / "gray", (8, 8)).in_channels == 3
    assert load(tmp_path / "gray", (8, 8), channels="keep").in_channels == 1


def test_pictures_are_cut_out_as_they_are_if_asked(tmp_path):
    for index in range(4):
        noise_png(tmp_path / f"{index}.png", "RGB")
    pixels = np.array(Image.open(tmp_path / "0.png")).transpose(2, 0, 1)
    crop = load(tmp_path, (8, 8), crop="random").train[0, 0][0].numpy()
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (3, 8, 8))
    assert (windows == crop).all(axis=(3, 4, 5)).any()


# Pictures of them


@pytest.mark.parametrize(
    ("shape", "bands", "expected"),
    [
        ((3, 20, 30), None, (3, 20, 30)),
        ((13, 20, 30), None, (3, 80, 120)),
        ((13, 20, 30), (5,), (1, 80, 120)),
        ((2, 200, 200), None, (1, 200, 200)),
        ((1, 16, 32, 64), None, (1, 64, 328)),
        ((2, 200), None, (1, 68, 200)),
    ],
)
def test_an_image_of_any_channels_and_axes_gives_one_picture(shape, bands, expected):
    picture = flatten_image(torch.rand(shape), bands)
    assert picture.shape == expected
    assert not picture.isnan().any()


def test_bands_are_counted_from_1_and_must_exist():
    image = torch.arange(4.0).view(4, 1, 1).expand(4, 200, 200)
    assert flatten_image(image, (3, 2, 1))[:, 0, 0].tolist() == [2, 1, 0]
    with pytest.raises(UserError, match="--bands 5: the data have 4 channels"):
        flatten_image(image, (5,))


def test_bands_that_do_not_exist_are_refused_before_training(tmp_path):
    fill(tmp_path / "data", "{}.npy", 2, 12, 14)
    config = config_for(mae.RECIPE, "--data", "stacks", "--bands", "3")
    with pytest.raises(UserError, match="--bands 3: stacks has 2 channels"):
        config.for_data(load(tmp_path / "data", (8, 8)))


@pytest.mark.parametrize("recipe", [convmae, simmim])
def test_encoders_of_two_axes_refuse_volumes_in_one_line(tmp_path, recipe):
    fill(tmp_path / "data", "{}.npy", 1, 8, 8, 8)
    data = load(tmp_path / "data", (8, 8, 8))
    config = config_for(recipe.RECIPE, "--data", "volumes")
    with pytest.raises(UserError, match="image_size|image-size|two axes|2 axes") as refused:
        check_fit(recipe.RECIPE, config.for_data(data))
    assert "\n" not in str(refused.value)


def test_a_curve_goes_through_its_points_and_has_a_gap_where_it_is_hidden():
    signal = torch.linspace(0, 1, 128).repeat(1, 1)
    signal[:, 40:60] = torch.nan
    picture = flatten_image(signal)[0, :64]
    assert picture[63, 0] < 0.5
    assert picture[0, 127] < 0.5
    assert (picture[:, 40:60] > 0.5).all()


# Whole runs


def run(recipe, *arguments: str) -> None:
    assert recipe.main(list(arguments)) == 0


SMALL = ("--epochs", "2", "--batch-size", "4", "--warmup-epochs", "0")


@pytest.mark.full
@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        (1, ["16", "--patch-size", "4"]),
        (2, ["8"]),
        (3, ["8", "8", "8", "--patch-size", "4", "4", "2"]),
    ],
)
def test_mae_trains_on_arrays_and_its_encoder_is_probed_and_fine_tuned(tmp_path, axes, sizes):
    from recipes import finetune, probe
    from recipes.engine.main import run as pretrain

    for part, number in (("train/a", 8), ("train/b", 8), ("val/a", 3), ("val/b", 3)):
        fill(tmp_path / "data" / part, "{}.npy", 2, *SHAPES[axes], number=number)
    data, out = ["--data", str(tmp_path / "data")], tmp_path / "run"
    arguments = [*data, "--image-size", *sizes, *SMALL, "--out", str(out), "--bands", "2"]
    assert pretrain(mae.RECIPE, "", arguments) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert len(config["statistics"]["mean"]) == config["model"]["in_channels"] == 2
    assert len((out / "encoder.safetensors").read_bytes()) > 0
    picture = Image.open(out / "reconstructions.png")
    assert picture.width > 100
    encoder = ["--encoder", str(out), "--resume", "never"]
    run(probe, *data, *encoder, "--out", str(tmp_path / "probe"))
    assert (tmp_path / "probe/attention.png").is_file()
    run(finetune, *data, *encoder, *SMALL, "--out", str(tmp_path / "tuned"))
    for folder in ("probe", "tuned"):
        found = yaml.safe_load((tmp_path / folder / "config.yaml").read_text())
        assert found["statistics"] == config["statistics"]


@pytest.mark.full
@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_mae_trains_on_gray_pictures_without_a_detour_over_rgb(mode, tmp_path, monkeypatch):
    from recipes.engine.main import run as pretrain

    for index in range(16):
        noise_png(tmp_path / f"data/{index:02d}.png", mode, size=24 + index, seed=index)

    def refuse(self: Image.Image, *arguments: object, **options: object) -> None:
        raise AssertionError("converted")

    out = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "data"), "--image-size", "16", *SMALL]
    arguments += ["--channels", "keep", "--out", str(out), "--log-every", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "convert", refuse)
        assert pretrain(mae.RECIPE, "", arguments) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(np.isfinite(row["loss"]) for row in rows)
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"]["in_channels"] == 1
    assert (config["statistics"]["std"][0] > 255) == (mode == "I;16")
    with Image.open(out / "reconstructions.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 50


@pytest.mark.full
def test_a_folder_of_one_class_is_not_probed_but_has_a_held_out_loss(tmp_path):
    from recipes import probe
    from recipes.engine.main import run as pretrain

    fill(tmp_path / "data/train/all", "{}.npy", 2, 12, 14, number=20)
    arguments = ["--data", str(tmp_path / "data"), "--image-size", "8", *SMALL]
    assert pretrain(mae.RECIPE, "", [*arguments, "--out", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["held_out"]["loss"] > 0
    assert "probes" not in summary
    encoder = ["--encoder", str(tmp_path / "run"), "--out", str(tmp_path / "probe")]
    assert probe.main([*arguments[:2], *encoder]) == 2
    assert not (tmp_path / "probe").exists()


@pytest.mark.full
def test_a_run_on_arrays_that_was_stopped_goes_on_with_equal_losses(tmp_path):
    from recipes.engine.main import run as pretrain

    fill(tmp_path / "data", "{}.npy", 2, 12, 14, number=20)
    arguments = ["--data", str(tmp_path / "data"), "--image-size", "8", *SMALL]
    arguments += ["--log-every", "1", "--workers", "1", "--checkpoint-every", "1"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert pretrain(mae.RECIPE, "", [*arguments, "--out", str(once)]) == 0
    last = once / "checkpoints" / sorted(p.name for p in (once / "checkpoints").iterdir())[0]
    assert pretrain(mae.RECIPE, "", [*arguments, "--out", str(twice), "--resume", str(last)]) == 0
    losses = [
        {row["step"]: row["loss"] for row in map(json.loads, rows.read_text().splitlines())}
        for rows in (folder / "metrics.jsonl" for folder in (once, twice))
    ]
    assert 1 <= len(losses[1]) < len(losses[0])
    assert losses[1].items() <= losses[0].items()


@pytest.mark.full
@pytest.mark.parametrize("name", ["simmim", "convmae"])
def test_swin_and_convmae_take_any_channels_and_refuse_other_axes(tmp_path, name, capsys):
    import importlib

    from recipes.engine.main import run as pretrain

    recipe = importlib.import_module(f"recipes.{name}").RECIPE
    fill(tmp_path / "bands", "{}.npy", 5, 40, 40, number=12)
    fill(tmp_path / "volumes", "{}.npy", 1, 40, 40, 40, number=3)
    arguments = [*SMALL, "--out", str(tmp_path / "run")]
    assert pretrain(recipe, "", ["--data", str(tmp_path / "bands"), *arguments]) == 0
    volumes = ["--data", str(tmp_path / "volumes"), *SMALL, "--out", str(tmp_path / "no")]
    assert pretrain(recipe, "", volumes) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "image" in error
    assert not (tmp_path / "no").exists()
