"""`--decode gpu` gives the crops of the CPU. Without a GPU, torchvision's call is replaced."""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import mae
from recipes.engine import run
from recipes.engine.data import decode, on_gpu
from recipes.engine.data.augment import Augmentation
from recipes.engine.data.labelled import load_labelled
from recipes.engine.data.load import load_data
from recipes.engine.data.on_gpu import EncodedCrops, check_nvjpeg, decoded_on, frame_of
from recipes.engine.data.photos import read_photo
from recipes.engine.data.sets import DataSet
from recipes.engine.dry_run import Cost, describe_loading
from recipes.engine.errors import UserError
from recipes.engine.run.config import check_decode, refuse_gpu_decoding
from recipes.engine.run.loader import make_loader, on_device
from recipes.engine.run.world import World
from tests.recipes.command import config_for

DAMAGED = 3  # sample id of the file that is damaged behind its header
INDICES = [(epoch, sample_id) for epoch in range(3) for sample_id in range(8)]


def decode_with_the_cpu(files, device):
    """Stand in for torchvision: it raises for the whole list, too."""
    import simplejpeg  # here, since a machine with a GPU needs only the last test

    try:
        return [
            torch.from_numpy(simplejpeg.decode_jpeg(file.numpy().tobytes())).permute(2, 0, 1)
            for file in files
        ]
    except ValueError as error:
        raise RuntimeError(str(error)) from error


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "decode_jpegs", decode_with_the_cpu)


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def damaged(file: bytes) -> bytes:
    """Cut out the middle of the pixels: header and end are whole."""
    return file[: len(file) // 2] + b"\xff\xd9"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of several kinds, a PNG file, one that is damaged; the last four are held out."""
    folder = tmp_path_factory.mktemp("mixed")
    photo = read_photo("chelsea.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "0.jpg": jpeg(photo, exif=exif),
        "1.jpg": jpeg(photo.convert("L")),
        "2.jpg": jpeg(photo.convert("CMYK")),
        "3.jpg": damaged(jpeg(photo)),
        "4.jpg": jpeg(photo, progressive=True, subsampling=0),
        "5.jpg": jpeg(read_photo("rocket.jpg")),
        "7.jpg": jpeg(photo)[:5000],
    }
    photo.save(folder / "6.png")
    for name in "89ab":
        files[f"{name}.jpg"] = jpeg(photo.resize((60, 40)))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def load(folder: Path, orientation: decode.Orientation = "ignore") -> DataSet:
    how = decode.Decoder(orientation=orientation)
    return load_data(str(folder), image_size=(64, 48), seed=5, decode=how)


def decibels(ours: torch.Tensor, exact: torch.Tensor) -> float:
    error = (ours.float() - exact.float()).square().mean().item()
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("orientation", ["ignore", "apply"])
def test_crops_decoded_on_a_device_are_those_of_the_cpu(mixed, orientation, stand_in):
    data = load(mixed, orientation)
    encoded = decoded_on("gpu", data).train
    assert type(encoded) is EncodedCrops
    expected = data.train.__getitems__(INDICES)
    sent = encoded.__getitems__(INDICES)
    # Gray and color JPEG files are sent; CMYK and PNG are crops by now; what is cut off is known.
    assert [plan is not None for plan in sent.images.plans[:7]] == [1, 1, 0, 1, 1, 1, 0]
    assert set(sent.unreadable_ids) == {7}
    found = encoded.to_device(sent, "cpu")
    assert found.sample_ids.tolist() == expected.sample_ids.tolist()
    assert sorted(found.unreadable_ids) == sorted(expected.unreadable_ids)
    assert set(found.unreadable_ids) == {DAMAGED, 7}
    is_sent = ~torch.isin(found.sample_ids, torch.tensor([2, 6]))
    pairs = zip(found.images[is_sent], expected.images[is_sent], strict=True)
    quality = [decibels(*pair) for pair in pairs]
    print(f"PSNR {np.mean(quality):.1f} dB mean, {min(quality):.1f} dB least")
    assert np.mean(quality) >= 45
    assert min(quality) >= 40
    inputs = on_device(sent, encoded, "cpu").images
    torch.testing.assert_close(inputs, data.train.to_inputs(found.images))


def test_boxes_and_flips_are_those_of_the_cpu(mixed, stand_in, monkeypatch):
    data = load(mixed)
    drawn = []
    real = type(data.train.crop).apply
    monkeypatch.setattr(
        type(data.train.crop),
        "apply",
        lambda self, cut, *others: drawn.append(cut) or real(self, cut, *others),
    )
    ids = [(epoch, sample_id) for epoch in range(5) for sample_id in (0, 1, 4, 5)]
    plans = decoded_on("gpu", data).train.__getitems__(ids).images.plans
    assert drawn == []
    data.train.__getitems__(ids)
    assert [plan.cut for plan in plans] == drawn
    assert len({plan.cut.is_flipped for plan in plans}) == 2


def test_one_integer_resumes(mixed, stand_in):
    train = decoded_on("gpu", load(mixed)).train

    def batches(first_step: int) -> list[torch.Tensor]:
        loader = make_loader(
            train, world=World(), batch_size=3, seed=2, first_step=first_step, num_steps=5,
            workers=0, pin_memory=False,
        )  # fmt: skip
        return [on_device(batch, train, "cpu").images for batch in loader]

    for ours, exact in zip(batches(2), batches(0)[2:], strict=True):
        assert torch.equal(ours, exact)


def test_a_file_that_the_device_does_not_take_is_decoded_by_the_cpu(mixed, monkeypatch, capsys):
    def refuse(files, device):
        raise RuntimeError("Unknown chroma subsampling")

    data = load(mixed)
    encoded = EncodedCrops(**vars(data.train))
    monkeypatch.setattr(on_gpu, "decode_jpegs", refuse)
    on_gpu._say_refused.cache_clear()
    found = encoded.to_device(encoded.__getitems__(INDICES), "cpu")
    assert torch.equal(found.images, data.train.__getitems__(INDICES).images)
    assert capsys.readouterr().err.count("nvJPEG does not decode some") == 1


def test_an_error_of_the_device_is_not_one_of_a_file(mixed, monkeypatch):
    def fail(files, device):
        raise RuntimeError("Error while decoding JPEG images: CUDA out of memory")

    encoded = EncodedCrops(**vars(load(mixed).train))
    monkeypatch.setattr(on_gpu, "decode_jpegs", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        encoded.to_device(encoded.__getitems__(INDICES), "cpu")


def test_large_batches_are_decoded_in_parts(mixed, stand_in, monkeypatch):
    encoded = decoded_on("gpu", load(mixed)).train
    sent = encoded.__getitems__(INDICES)
    whole = encoded.to_device(sent, "cpu").images
    monkeypatch.setattr(on_gpu, "_MOST_DECODED", 200_000)
    assert torch.equal(encoded.to_device(sent, "cpu").images, whole)


def test_absurd_headers_are_for_the_decoders_of_the_cpu():
    file = jpeg(Image.new("RGB", (30, 20)))
    assert frame_of(file) == (20, 30)
    at = file.index(b"\xff\xc0")
    for odd in (
        file[: at + 4] + b"\x0c" + file[at + 5 :],  # 12 bits
        file[: at + 5] + b"\xff\xff\xff\xff" + file[at + 9 :],  # too many pixels
        file[: at + 5] + b"\0\0" + file[at + 7 :],  # none
        file.replace(b"\xff\xc0", b"\xff\xc9", 1),  # arithmetic codes
        file[:-2],
        b"",
    ):
        assert frame_of(odd) is None


def test_what_the_gpu_does_not_decode_is_one_line(mixed, tmp_path, stand_in, capsys):
    for arguments, says in (
        (["--data", "photos"], "folders of RGB pictures"),
        (["--data", str(mixed), "--native-size", "64"], "omit --native-size"),
        (["--data", str(mixed), "--crop", "whole"], "omit --crop"),
        (["--data", str(mixed), "--device", "cpu"], "--device cpu contradict"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: True)
            patch.setattr("importlib.util.find_spec", lambda name: name)
            patch.setattr("torch.cuda.set_device", lambda device: None)
            code = run(
                mae.RECIPE, "", [*arguments, "--decode", "gpu", "--out", str(tmp_path / "run")]
            )
        error = capsys.readouterr().err
        assert code == 2
        assert re.search(says, error.splitlines()[-1]), error
    with pytest.raises(UserError, match="--decode gpu: images with labels are decoded on the CPU"):
        refuse_gpu_decoding("gpu", "images with labels are")
    refuse_gpu_decoding("cpu", "images with labels are")


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("has_torchvision", [False, True])
def test_what_is_missing_is_named(has_gpu, has_torchvision, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: has_torchvision or None)
    check_decode("auto", "cpu")
    check_decode("cpu", "auto")
    if has_gpu and has_torchvision:
        check_decode("gpu", "auto")
        return
    with pytest.raises(UserError, match="--decode gpu needs") as refused:
        check_decode("gpu", "auto")
    message = str(refused.value)
    assert ("NVIDIA GPU" in message) == (not has_gpu)
    assert ("torchvision" in message) == (not has_torchvision)
    assert "\n" not in message


def test_a_torchvision_that_does_not_decode_is_one_line(monkeypatch):
    def fail(files, device):
        raise RuntimeError("torchvision not compiled with nvJPEG support\nframe #0")

    monkeypatch.setattr(on_gpu, "decode_jpegs", fail)
    with pytest.raises(UserError, match="not compiled with nvJPEG support") as refused:
        check_nvjpeg("cuda")
    assert "\n" not in str(refused.value)
    wrong = [torch.zeros(3, 48, 64, dtype=torch.uint8)]
    monkeypatch.setattr(on_gpu, "decode_jpegs", lambda files, device: wrong)
    with pytest.raises(UserError, match="pixels are wrong by up to 2"):
        check_nvjpeg("cuda")


def test_labelled_pictures_are_decoded_too_but_not_for_randaugment(labelled, stand_in):
    for augmentation in (Augmentation(), Augmentation(policy=lambda image: image)):
        data = load_labelled(str(labelled), image_size=(32, 32), augmentation=augmentation, seed=0)
        if augmentation.policy is None:
            assert type(data.decoded_on("gpu").images.train) is EncodedCrops
            assert data.decoded_on("cpu").images is data.images
        else:
            with pytest.raises(UserError, match="choose --augment crop"):
                data.decoded_on("gpu")


@pytest.mark.full
def test_a_run_trains_on_images_decoded_on_a_device(mixed, stand_in, monkeypatch, tmp_path):
    config = sys.modules[check_decode.__module__]
    monkeypatch.setattr(config, "check_decode", lambda name, device: None)
    rows = []
    for where in ("cpu", "gpu"):
        out = tmp_path / where
        options = f"--device cpu --batch-size 4 --max-steps 4 --epochs 9 --workers 1 --out {out}"
        arguments = ["--data", str(mixed), "--decode", where, *options.split()]
        assert run(mae.RECIPE, "", arguments) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["loss"] for line in lines])
        assert json.loads((out / "summary.json").read_text())["unreadable_images"]
    assert rows[1] == pytest.approx(rows[0], rel=1e-3)


def test_a_dry_run_does_not_count_what_the_gpu_does_as_a_core(mixed, stand_in):
    data, config = decoded_on("gpu", load(mixed)), config_for(mae.RECIPE, "--device", "cpu")
    lines = describe_loading(config, data, Cost(1, 0, 10**9, 1))
    assert "without decoding and cropping" in lines[0]
    assert lines[1].startswith("decoding")
    assert len(describe_loading(config, load(mixed), Cost(1, 0, 10**9, 1))) == len(lines) - 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs a GPU: there is none")
def test_nvjpeg_gives_the_crops_of_the_cpu(mixed):
    data = load(mixed, "apply")
    encoded = decoded_on("gpu", data).train
    expected = data.train.__getitems__(INDICES)
    found = encoded.to_device(encoded.__getitems__(INDICES), "cuda")
    torch.cuda.synchronize()

    def whole(batch):  # nvJPEG and Pillow may not notice the damage
        is_whole = batch.sample_ids != DAMAGED
        return batch.sample_ids[is_whole].tolist(), batch.images.cpu()[is_whole]

    (found_ids, crops), (expected_ids, expected_crops) = whole(found), whole(expected)
    assert found_ids == expected_ids
    quality = [decibels(*pair) for pair in zip(crops, expected_crops, strict=True)]
    print(f"PSNR {np.mean(quality):.1f} dB mean, {min(quality):.1f} dB least")
    # nvJPEG repeats the color of subsampled pixels, where the CPU's decoders interpolate it.
    assert np.mean(quality) >= 35
    assert min(quality) >= 28
