"""Segmentation: data, augmentation, loss, scores, sliding windows, and whole runs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import jaccard_score
from torch import Tensor
from torch.nn import functional as F

from recipes import segment
from recipes.engine.data.decode import DECODE
from recipes.engine.data.images import model_inputs, normalize_by_image
from recipes.engine.data.segmented import (
    IGNORED,
    Augmentation,
    Labelled,
    LabelMeaning,
    Segmented,
    SegmentedData,
    load_segmented,
    read_labels,
)
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import load_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, SwinShape, ViTShape
from recipes.engine.run.world import World
from recipes.engine.segmentation import (
    Segmenter,
    confusion_of,
    pixel_loss,
    score,
    scores_of,
    slide,
)

T = TypeVar("T")
SMALL: dict[str, EncoderShape] = {
    "vit": ViTShape(image_size=32, patch_size=8, dim=16, depth=2, heads=2),
    "swin": SwinShape(image_size=32, patch_size=2, dim=8, depth=(1,) * 3, heads=(2,) * 3, window=2),
    "convvit": ConvViTShape(
        image_size=32, patch_sizes=(2, 2, 2), dim=(8, 8, 16), depth=(1, 1, 2), heads=2
    ),
}
# A small run of a folder with three classes.
SHORT = ("--num-classes", "3", "--image-size", "32", "--batch-size", "2", "--epochs", "1",
         "--head-dim", "8", "--aux-dim", "8", "--device", "cpu")  # fmt: skip


def save(file: Path, pixels: NDArray[np.uint8], mode: str | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = Image.fromarray(pixels, mode="P")
        picture.putpalette([int(value) for value in np.arange(768) * 7 % 256])
    picture.save(file)


def write_pair(root: Path, name: str, labels: NDArray[np.uint8], part: str = "") -> None:
    rng = np.random.default_rng(len(name))
    image = rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    save(root / "images" / part / f"{name}.png", image)
    save(root / "annotations" / part / f"{name}.png", labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder in ADE20K's layout: images of several sizes, classes 0 to 2, 255 ignored."""
    rng = np.random.default_rng(0)
    root = tmp_path / "set"
    for part, number in (("training", 4), ("validation", 2)):
        for index in range(number):
            labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (36 + index, 40))
            write_pair(root, f"{part}{index}", labels, part)
    return root


def load(root: Path, num_classes: int | None = 3, *, zero: bool = False) -> SegmentedData:
    return load_segmented(
        str(root), image_size=(32, 32), augmentation=Augmentation(), num_classes=num_classes,
        zero_is_ignored=zero, seed=0, decode=DECODE,
    )  # fmt: skip


class Stored(Segmented):
    """Items in memory."""

    def __init__(self, items: Tensor, *rest: Any) -> None:
        super().__init__(*rest)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, sample_id: int) -> Labelled:
        return self.items[sample_id]


# Scores


@given(st.integers(2, 5), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_iou_and_accuracy_are_those_of_scikit_learn(classes: int, pixels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, predicted = torch.randint(classes, (2, pixels), generator=generator)
    ignored = torch.full((7,), IGNORED)
    scores = scores_of(
        confusion_of(torch.cat([labels, ignored]), predicted[torch.arange(pixels + 7) % pixels],
                     classes)
    )  # fmt: skip
    seen = sorted({*labels.tolist(), *predicted.tolist()})
    wanted = 100 * jaccard_score(labels, predicted, labels=seen, average=None, zero_division=0)
    found = [iou for iou in scores.iou if iou is not None]
    assert found == pytest.approx(list(wanted))
    assert [index for index, iou in enumerate(scores.iou) if iou is not None] == seen
    assert scores.miou == pytest.approx(wanted.mean())
    assert scores.pixel_accuracy == pytest.approx(100 * (labels == predicted).float().mean().item())
    recalls = [(predicted[labels == each] == each).float().mean() for each in labels.unique()]
    assert scores.mean_accuracy == pytest.approx(100 * torch.stack(recalls).mean().item())


def test_images_without_any_labelled_pixel_have_score_and_loss_zero() -> None:
    labels = torch.full((2, 4, 4), IGNORED)
    scores = scores_of(confusion_of(labels, torch.zeros_like(labels), 3))
    assert (scores.miou, scores.mean_accuracy, scores.pixel_accuracy) == (0, 0, 0)
    logits = torch.randn(2, 3, 2, 2, requires_grad=True)
    loss = pixel_loss(logits, labels, 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@given(st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_the_loss_of_a_batch_is_the_mean_over_its_parts(number: int, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(number, 3, 4, 4), torch.randint(3, (number, 8, 8))
    labels[torch.rand(labels.shape) < 0.3] = IGNORED
    parts = [pixel_loss(logits[i : i + 1], labels[i : i + 1], 1) for i in range(number)]
    assert torch.allclose(pixel_loss(logits, labels, number), torch.stack(parts).mean())
    plain = F.cross_entropy(
        F.interpolate(logits, (8, 8), mode="bilinear"), labels, ignore_index=IGNORED,
        reduction="none",
    )  # fmt: skip
    assert torch.allclose(pixel_loss(logits, labels, number), plain.mean())


# Windows


@settings(max_examples=30)
@given(
    st.tuples(st.integers(5, 40), st.integers(5, 40)),
    st.tuples(st.integers(4, 16), st.integers(4, 16)),
)
def test_windows_cover_every_pixel_and_average_to_the_whole(
    size: tuple[int, int], window: tuple[int, int]
) -> None:
    images = torch.randn(2, 3, *size)
    seen: list[Sequence[int]] = []

    def head(crops: Tensor) -> Tensor:  # each pixel for itself, so that windows change nothing
        seen.append(crops.shape[2:])
        return 2 * crops - 1

    assert torch.allclose(slide(head, images, window), 2 * images - 1, atol=1e-5)
    assert set(map(tuple, seen)) == {window}


def test_overlapping_windows_are_averaged() -> None:
    """The first of two windows says 0 everywhere and the second 1: their overlap is 1/2."""

    def head(crops: Tensor) -> Tensor:
        return torch.arange(len(crops), dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)

    found = slide(head, torch.zeros(1, 1, 6, 8), (6, 6))
    assert found[0, 0, 0].tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1]


# Augmentation


@settings(max_examples=40)
@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.tuples(st.integers(8, 24), st.integers(8, 24)),
    st.integers(0, 2**32 - 1),
)
def test_labels_move_with_their_pixels(
    stored: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 20, stored, dtype=np.uint8))
    item = torch.stack([labels * 10] * 3 + [labels])
    side = max(min(stored) / min(size), max(stored) / (4 * min(size)))  # no resizing
    out = Augmentation(scale=(side, side), distort=False)(item, size, rng)
    assert out.shape == (4, *size)
    counted = out[3] != IGNORED
    assert torch.equal(out[0][counted], out[3][counted] * 10)
    assert counted.sum() == min(size[0], stored[0]) * min(size[1], stored[1])


def test_a_resized_crop_has_the_labels_of_its_pixels_and_no_new_ones() -> None:
    labels = torch.zeros(40, 40, dtype=torch.uint8)
    labels[:, 20:] = 7
    item = torch.stack([labels * 30] * 3 + [labels])
    for seed in range(20):
        out = Augmentation(distort=False)(item, (32, 32), np.random.default_rng(seed))
        assert set(out[3].unique().tolist()) <= {0, 7, IGNORED}
        counted = out[3] != IGNORED
        agree = (out[0] > 105) == (out[3] == 7)
        assert agree[counted].float().mean() > 0.95


def test_distortion_changes_colors_alone_and_keeps_gray_gray_in_hue_and_saturation() -> None:
    item = torch.full((4, 8, 8), 90, dtype=torch.uint8)
    changed = 0
    for seed in range(20):
        out = Augmentation(scale=(1, 1))(item, (8, 8), np.random.default_rng(seed))
        assert torch.equal(out[3], item[3])
        assert out[:3].float().std(dim=0).max() <= 0.6  # rounding
        changed += not torch.equal(out, item)
    assert changed > 10


# Files


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("mode", ["L", "P"])
def test_labels_of_gray_and_palette_files_are_the_numbers_in_them(
    tmp_path: Path, mode: str, zero: bool
) -> None:
    labels = np.array([[0, 1], [3, 255]], np.uint8)
    save(tmp_path / "labels.png", labels, mode)
    with Image.open(tmp_path / "labels.png") as picture:
        assert picture.mode == mode
    values = read_labels(tmp_path / "labels.png")
    meaning = LabelMeaning(4 - zero, zero_is_ignored=zero)
    wanted = [[IGNORED, 0], [2, IGNORED]] if zero else labels.tolist()
    assert meaning.classes(values, Path("x")).tolist() == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "class",
            r"training0.png hold 3, where the classes are 0 to 2 .* give other --num-classes",
        ),
        ("size", r"training0.png have 10 x 40 pixels, their image .*training0.png has 36 x 40"),
        ("colors", r"training0.png are a picture in colors \(RGB\): give a gray or palette PNG"),
        ("missing", r"1 of 4 images in .*training have no labels, the first .*training0.png"),
        ("no labels", r"must hold the folders images and annotations \(or labels, or masks\)"),
        ("one part", r"images holds only one of training and validation"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(
    folder: Path, change: str, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = folder / "annotations" / "training" / "training0.png"
    if change == "class":
        save(file, np.full((36, 40), 3, np.uint8))
    elif change == "size":
        save(file, np.zeros((10, 40), np.uint8))
    elif change == "colors":
        save(file, np.zeros((36, 40, 3), np.uint8))
    elif change == "missing":
        file.unlink()
    elif change == "no labels":
        (folder / "annotations").rename(folder / "others")
    elif change == "one part":
        (folder / "images" / "validation").rename(folder / "images" / "test")
    arguments = ["--data", str(folder), "--encoder", "none", "--out", str(tmp_path / "run")]
    assert segment.main([*arguments, *SHORT]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in lines) == 1
    assert re.search(message, lines[-1])


def test_a_folder_without_parts_holds_out_a_tenth(tmp_path: Path) -> None:
    for index in range(12):
        write_pair(tmp_path, f"{index:02}", np.full((8, 8), index % 3, np.uint8))
    data = load(tmp_path)
    assert (len(data.train), len(data.test)) == (11, 1)
    item, _ = data.test[0, 0]
    assert item is not None
    assert item[3].unique().tolist() == [11 % 3]


def test_a_folder_needs_the_number_of_classes(folder: Path) -> None:
    with pytest.raises(UserError, match="needs --num-classes"):
        load(folder, None)


def test_zero_is_ignored_on_request(folder: Path) -> None:
    data = load(folder, 2, zero=True)
    item, _ = data.test[0, 0]
    assert item is not None
    assert data.class_names == ("1", "2")
    assert set(item[3].unique().tolist()) == {0, 1, IGNORED}


# Models and runs


@pytest.mark.parametrize("kind", SMALL)
def test_every_weight_but_the_last_norm_is_trained(kind: str) -> None:
    encoder = SMALL[kind].build_backbone(drop_path=0.0)
    model = Segmenter(encoder, num_classes=3, head_dim=8, aux_dim=8)
    main, aux = model(torch.randn(2, 3, 32, 32))
    (main.sum() + aux.square().sum()).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == ["encoder.norm.weight", "encoder.norm.bias"]
    assert not any(p.requires_grad for p in encoder.get_submodule("norm").parameters())


def test_the_confusion_of_two_processes_is_that_of_one() -> None:
    """Each process scores its share; the sum of their matrices has every image once."""
    torch.manual_seed(0)
    items = torch.randint(0, 3, (5, 4, 32, 32), dtype=torch.uint8)
    test = Stored(items, None, (32, 32), normalize_by_image, 0)
    data = SegmentedData("x", test, test, ("a", "b", "c"))
    options = segment.OPTIONS(data="scenes", encoder="none", preset="tiny", device="cpu")
    config, _ = segment.resolve_segmentation(options)
    model = Segmenter(
        SMALL["convvit"].build_backbone(drop_path=0.0), num_classes=3, head_dim=8, aux_dim=8
    )
    matrices: list[Tensor] = []

    class Half(World):
        def total(self, value: Tensor) -> Tensor:
            matrices.append(value.clone())
            return value

        def gather(self, value: T) -> list[T]:
            return [value]

    def run(world: World) -> float:
        return score(model, config, data, world, batch_size=2, workers=0).miou

    whole = run(Half())
    for rank in range(2):
        run(Half(rank, 2))
    assert torch.equal(matrices[0], matrices[1] + matrices[2])
    assert matrices[0].sum() == 5 * 32 * 32
    assert whole == scores_of(matrices[0]).miou


def test_a_run_writes_scores_weights_and_a_picture_and_its_encoder_is_taken_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", str(folder), *SHORT]
    out = tmp_path / "run"
    assert segment.main([*data, "--encoder", "none", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["miou"]) == {"scratch"}
    assert len(summary["miou"]["scratch"]) == 1
    assert set(summary["iou"]) == {"0", "1", "2"}
    assert (out / "segmentations.png").is_file()
    assert f"{summary['miou']['scratch'][0]:.1f}" in text
    file = load_encoder(out, ViTShape())
    assert file.shape.image_size == 32
    assert set(load_file(out / "encoder.safetensors")) == set(file.weights)

    assert segment.main([*data, "--encoder", "none", "--out", str(out)]) == 0
    assert capsys.readouterr().out == text  # a finished run prints its summary again

    both = ["--encoder", str(out), "--scratch", "always", "--runs", "2"]
    assert segment.main([*data, *both, "--out", str(tmp_path / "both")]) == 0
    summary = json.loads((tmp_path / "both" / "summary.json").read_text())
    assert {kind: len(values) for kind, values in summary["miou"].items()} == {
        "pretrained": 2, "scratch": 2,
    }  # fmt: skip


def test_layers_that_an_encoder_lacks_are_refused_in_one_sentence() -> None:
    sizes = {"num_classes": 3, "head_dim": 8, "aux_dim": 8}
    with pytest.raises(ValueError, match="--layers must be blocks from 0 to 1; got"):
        Segmenter(SMALL["vit"].build_backbone(drop_path=0.0), layers=(0, 0, 1, 2), **sizes)
    swin = SwinShape(image_size=32, patch_size=2, dim=8, depth=(1, 1), heads=(2, 2), window=2)
    with pytest.raises(ValueError, match="a Swin Transformer of 2 stages has no third map"):
        Segmenter(swin.build_backbone(drop_path=0.0), **sizes)


@pytest.mark.full
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_run_that_is_resumed_ends_as_if_it_had_not_stopped(
    folder: Path, tmp_path: Path, workers: str
) -> None:
    data = ["--data", str(folder), *SHORT, "--epochs", "3", "--encoder", "none",
            "--checkpoint-every", "2", "--workers", workers]  # fmt: skip
    assert segment.main([*data, "--out", str(tmp_path / "whole")]) == 0
    stopped = tmp_path / "stopped"
    assert segment.main([*data, "--out", str(stopped)]) == 0
    for name in ("summary.json", "model.safetensors", "encoder.safetensors"):
        (stopped / name).unlink()
    newest = max((stopped / "checkpoints").glob("step-*"))
    (newest / "COMPLETE").unlink()
    assert segment.main([*data, "--out", str(stopped)]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "preset",
    # The others have a gigabyte of weights or more.
    ["tiny", *(pytest.param(name, marks=pytest.mark.full) for name in segment.PUBLISHED)],
)
def test_a_dry_run_says_what_a_preset_costs_and_what_was_published(
    preset: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    small = [] if preset == "tiny" else ["--data", str(folder)]
    assert segment.main(["--preset", preset, "--encoder", "none", "--dry-run", *small]) == 0
    text = capsys.readouterr().out
    assert "parameters" in text
    assert ("published" in text) == (preset in segment.PUBLISHED)


def test_batch_norm_with_one_image_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert segment.main(["--encoder", "none", "--batch-size", "1", "--dry-run"]) == 2
    assert "batch norm" in capsys.readouterr().err


def test_a_preset_of_a_paper_needs_an_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    assert segment.main(["--preset", "mae_b_ade20k"]) == 2
    assert "--preset mae_b_ade20k needs --encoder" in capsys.readouterr().err


def test_scenes_are_normalized_by_image_and_labels_kept() -> None:
    items = torch.randint(0, 255, (2, 4, 8, 8), dtype=torch.uint8)
    stored = Stored(items, None, (8, 8), normalize_by_image, 0)
    inputs = stored.to_inputs(items)
    assert torch.equal(inputs[:, 3], items[:, 3].float())
    assert torch.equal(inputs[:, :3], model_inputs(items[:, :3], normalize_by_image))
