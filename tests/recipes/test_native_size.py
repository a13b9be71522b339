"""Pictures in their own aspect ratios: `--native-size`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recipes import cae, convmae, mae, simmim, vit_mpp
from recipes.engine import dry_run
from recipes.engine.data.images import NativeCrops, native_grid
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import unpack
from recipes.engine.errors import UserError
from recipes.engine.main import check_fit, check_sizes
from recipes.engine.main import run as pretrain
from recipes.engine.reading import UnreadableError
from recipes.engine.run.loader import on_device
from tests.recipes.command import config_for
from tests.recipes.test_processes import losses, train

SIDES = [(40, 48), (20, 60), (64, 24), (33, 33), (9, 70), (13, 17)]
CROP = NativeCrops(most=30, patch=(4, 4))


def write_mixed(folder: Path, number: int = 24, mode: str = "RGB") -> Path:
    """Write noise in several sizes and aspect ratios."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    kind, channels = (np.uint16, ()) if mode == "I;16" else (np.uint8, (3,))
    most = np.iinfo(kind).max
    for index in range(number):
        shape = (*SIDES[index % len(SIDES)], *channels)
        Image.fromarray(rng.integers(0, most, shape, kind)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixed(tmp_path_factory.mktemp("native") / "pictures")


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 5_000), st.integers(1, 5_000)),
    st.tuples(st.integers(1, 32), st.integers(1, 32)),
    st.integers(2, 300),
)
def test_a_grid_has_at_most_so_many_patches_and_the_aspect_ratio_of_the_image(sides, patch, most):
    rows, columns = native_grid(sides, patch, most)
    assert 1 <= rows * columns <= most
    exact = [side / size for side, size in zip(sides, patch, strict=True)]
    assert rows < exact[0] + 1
    assert columns < exact[1] + 1
    if min(1, math.sqrt(most / math.prod(exact))) * min(exact) >= 1:
        ratio = (rows / columns) / (exact[0] / exact[1])
        assert min(ratio, 1 / ratio) > 0.5  # the share of the image that is not cut off


@settings(max_examples=25)
@given(st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(2, 60), st.integers(0, 2**32))
def test_a_crop_is_not_distorted(sides, most, seed):
    """A ramp along each axis keeps its slope, the same on both axes."""
    height, width = sides
    pixels = np.empty((height, width, 3), np.float32)
    pixels[..., 0] = np.arange(height)[:, None]
    pixels[..., 1] = np.arange(width)
    pixels[..., 2] = 1
    crop = NativeCrops(most, (4, 4), "bilinear")
    if native_grid(sides, (4, 4), most) == (1, 1):
        with pytest.raises(UnreadableError, match="too few for two patches of 4 x 4"):
            crop(pixels, (8, 8), np.random.default_rng(seed))
        return
    found = crop(pixels, (8, 8), np.random.default_rng(seed))
    assert found.shape[1] % 4 == found.shape[2] % 4 == 0
    torch.testing.assert_close(found[2], torch.ones_like(found[2]))
    middle = found[:, found.shape[1] // 4 : -1, found.shape[2] // 4 : -1]
    if min(middle.shape[1:]) >= 2 and min(sides) >= 16:
        down = (middle[0, -1] - middle[0, 0]).mean() / (middle.shape[1] - 1)
        along = (middle[1, :, -1] - middle[1, :, 0]).mean().abs() / (middle.shape[2] - 1)
        assert float(along / down) == pytest.approx(1, rel=0.25)


def test_a_batch_has_the_crops_of_its_samples_whatever_their_sizes(mixed):
    data = load_data(str(mixed), image_size=(16, 16), seed=0, native=CROP)
    again = load_data(str(mixed), image_size=(16, 16), seed=0, native=CROP).train
    indices = [(0, 3), (2, 0), (1, 7), (1, 8)]
    batch = data.train.__getitems__(indices)
    assert batch.images.ndim == 1  # one tensor is sent from a worker
    assert len({image.shape for image in unpack(batch)}) > 1
    for image, index in zip(unpack(batch), indices, strict=True):
        assert image.dtype == torch.uint8
        assert math.prod(image.shape[1:]) <= 30 * 16
        assert torch.equal(image, again[index][0])
    moved = on_device(batch, data.train, "cpu").images
    expected = data.train.to_inputs(unpack(batch)[0][None])[0]
    assert torch.equal(moved[0], expected)
    assert {picture.shape[1:] for picture in data.pictures} != {(16, 16)}
    assert data.held_out[0, 0][0].shape == (3, 16, 16)  # for probes


def test_a_picture_of_less_than_two_patches_is_left_out(tmp_path):
    write_mixed(tmp_path)
    Image.new("RGB", (4, 3)).save(tmp_path / "00.png")
    train = load_data(str(tmp_path), image_size=(16, 16), seed=0, native=CROP).train
    batch = train.__getitems__([(0, 0), (0, 1)])
    assert batch.unreadable_ids == [0]
    assert batch.sample_ids.tolist() == [1]
    nothing = on_device(train.__getitems__([(0, 0)]), train, "cpu")
    assert nothing.images == []


@pytest.mark.parametrize("recipe", [simmim, cae, convmae, vit_mpp])
def test_recipes_that_need_one_size_say_so(recipe):
    config = config_for(recipe.RECIPE, "--native-size", "64")
    with pytest.raises(UserError, match=r"--native-size 64: .* needs images of one size"):
        check_sizes(recipe.RECIPE, config)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--compile"], "omit --compile"),
        (["--views", "2"], "omit --views"),
        (["--decoder", "cross"], "a RaggedMask needs"),
        (["--target", "pca", "--pca-components", "9"], "a RaggedMask needs"),
        (["--crop", "whole"], "--native-size 64 and --crop whole contradict each other"),
    ],
)
def test_what_does_not_go_with_different_sizes_is_refused(more, says):
    def check() -> None:
        config = config_for(mae.RECIPE, "--native-size", "64", *more)
        check_sizes(mae.RECIPE, config)
        check_fit(mae.RECIPE, config)

    with pytest.raises(UserError, match=says):
        check()


def test_only_folders_of_pictures_have_sizes_of_their_own(tmp_path):
    for index in range(6):
        np.save(tmp_path / f"{index}.npy", np.ones((2, 12, 14), np.float32))
    for name in ("photos", str(tmp_path)):
        with pytest.raises(UserError, match="--native-size .* omit it"):
            load_data(name, image_size=(8, 8), seed=0, native=CROP)


def test_a_dry_run_counts_the_largest_square_pictures(mixed, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "LOADER_SECONDS", 0.01)
    for most, grid in ((64, "8 x 8"), (150, "12 x 12")):
        arguments = ["--data", str(mixed), "--native-size", str(most), *SMALL, "--dry-run"]
        assert pretrain(mae.RECIPE, "", [*arguments, "--image-size", "32"]) == 0
        assert f"G per image of {grid} patches, forward and backward" in capsys.readouterr().out


SMALL = ("--epochs", "2", "--batch-size", "5", "--warmup-epochs", "0", "--log-every", "1")


@pytest.mark.full
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_mae_trains_on_mixed_sizes_and_goes_on_bit_by_bit(mode, tmp_path):
    folder = write_mixed(tmp_path / "data", mode=mode)
    arguments = ["--data", str(folder), "--native-size", "30", "--image-size", "16", *SMALL]
    arguments += ["--checkpoint-every", "1", "--workers", "1", "--patch-size", "4"]
    arguments += ["--channels", "keep"] if mode == "I;16" else []
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert pretrain(mae.RECIPE, "", [*arguments, "--out", str(once)]) == 0
    config = yaml.safe_load((once / "config.yaml").read_text())
    assert config["model"]["in_channels"] == (1 if mode == "I;16" else 3)
    first = min((once / "checkpoints").iterdir())
    again = [*arguments, "--out", str(twice), "--resume", str(first)]
    assert pretrain(mae.RECIPE, "", again) == 0
    before, after = (rows_of(folder) for folder in (once, twice))
    assert all(math.isfinite(row["loss"]) and row["baselines"] for row in before.values())
    assert 1 <= len(after) < len(before)
    assert all(before[step]["loss"] == row["loss"] for step, row in after.items())
    assert (once / "encoder.safetensors").read_bytes() == (
        twice / "encoder.safetensors"
    ).read_bytes()
    assert Image.open(once / "reconstructions.png").width > 300


def rows_of(run: Path) -> dict[int, dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


@pytest.mark.full
def test_two_processes_and_parts_of_a_batch_give_the_losses_of_one(tmp_path):
    write_mixed(tmp_path / "pictures", 36)
    (tmp_path / "pictures/00.png").write_bytes(b"broken")
    native = ["--native-size", "30", "--image-size", "16"]
    train(tmp_path / "one", 1, *native)
    train(tmp_path / "parts", 1, *native, "--accumulate", "8")
    train(tmp_path / "two", 2, *native, "--accumulate", "2")
    for name in ("parts", "two"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), rtol=1e-5)
