"""Detection on torchvision: average precision as COCO's tools compute it, training, bad input."""

import contextlib
import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file, save_file
from torchvision.models.detection.roi_heads import RoIHeads

from mimkit.nn import ConvViTDetector, SwinTransformer, ViT
from recipes import detect
from recipes.engine.data.coco import draw_mask, load_coco
from recipes.engine.data.instances import Instances, boxes_around, join_targets, no_instances
from recipes.engine.detection.encoder import build_backbone, encoder_weights, fill_backbone
from recipes.engine.detection.model import CascadeHeads, Detector, paste
from recipes.engine.detection.score import AveragePrecision
from recipes.engine.detection.shape import DetectorShape
from recipes.engine.pretrained.encoders import build_encoder, fill_encoder, load_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, SwinShape, ViTShape
from recipes.engine.run.world import World
from tests.recipes.coco_folder import write_coco
from tests.recipes.stopping import assert_equal_runs, start
from tests.waiting import end_of, wait_until

SMALL = DetectorShape(
    window=2,
    global_blocks=(0,),
    dim=16,
    fc_dim=16,
    convs=1,
    anchors=(8, 16, 24, 32, 48),
    proposals=20,
    samples=16,
    detections=5,
)
CONVVIT = ConvViTShape(
    image_size=32, patch_sizes=(2, 2, 2), dim=(8, 8, 16), depth=(1, 1, 2), heads=2
)
VIT = ViTShape(image_size=32, patch_size=8, dim=16, depth=2, heads=2)
SWIN = SwinShape(
    image_size=32, patch_size=2, dim=8, depth=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=2
)
SHAPES = {"ConvViT": CONVVIT, "ViT": VIT, "Swin": SWIN}


def some_masks(rng: np.random.Generator, number: int, size: tuple[int, int]) -> torch.Tensor:
    """Rectangles of which a part is missing."""
    masks = torch.zeros(number, *size, dtype=torch.bool)
    for mask in masks:
        top, left = (int(rng.integers(side - 4)) for side in size)
        height, width = rng.integers(3, 14, 2)
        mask[top : top + height, left : left + width] = True
        mask[top : top + 2, left : left + 1] = False
        mask[top, left + 1] = True
    return masks


def moved(masks: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Move masks by up to two pixels."""
    places = masks.clone()
    for mask in places:
        mask.copy_(mask.roll(tuple(rng.integers(-2, 3, 2).tolist()), (0, 1)))
    return places


def runs_of(mask: torch.Tensor) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def by_pycocotools(
    images: list[tuple[dict[str, torch.Tensor], Instances]], kind: str, *, agnostic: bool
) -> list[float]:
    """AP, AP50 and AP75 by COCO's own tools, in percent."""
    truth: dict[str, Any] = {"images": [], "annotations": [], "info": {}}
    results = []
    for number, (found, there) in enumerate(images, start=1):
        height, width = there.size
        truth["images"].append({"id": number, "height": height, "width": width})
        for row in range(len(there)):
            left, top, right, bottom = there.boxes[row].tolist()
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 1 if agnostic else int(there.classes[row]),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(there.masks[row].sum()),
                    "iscrowd": int(there.is_crowd[row]),
                    "segmentation": runs_of(there.masks[row]),
                }
            )
        for row in range(len(found["scores"])):
            left, top, right, bottom = found["boxes"][row].tolist()
            results.append(
                {
                    "image_id": number,
                    "category_id": 1 if agnostic else int(found["labels"][row]),
                    "score": float(found["scores"][row]),
                    **(
                        {"bbox": [left, top, right - left, bottom - top]}
                        if kind == "bbox"
                        else {"segmentation": runs_of(found["masks"][row])}
                    ),
                }
            )
    classes = {one["category_id"] for one in truth["annotations"]}
    truth["categories"] = [{"id": label, "name": str(label)} for label in sorted(classes)]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * float(number) for number in evaluation.stats[:3]]


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    images, precision = [], AveragePrecision()
    for number in range(12):
        size = (30 + number, 40)
        masks = some_masks(rng, int(rng.integers(1, 6)) if number else 0, size)
        there = Instances(
            boxes=boxes_around(masks) if len(masks) else torch.zeros(0, 4),
            classes=torch.from_numpy(rng.integers(1, 4, len(masks))),
            masks=masks,
            is_crowd=torch.from_numpy(rng.random(len(masks)) < 0.2),
        )
        rows = torch.from_numpy(rng.random(len(masks)) < 0.8)
        drawn = torch.cat([moved(masks[rows], rng), some_masks(rng, 2, size)])
        labels = torch.cat([there.classes[rows], torch.tensor([1, 3])])
        labels = torch.where(torch.from_numpy(rng.random(len(labels)) < 0.2), 2, labels)
        seen = drawn.flatten(1).any(1)
        drawn, labels = drawn[seen], labels[seen]
        found = {
            "boxes": boxes_around(drawn),
            "labels": labels,
            "scores": torch.from_numpy(rng.random(len(drawn)).astype(np.float32)),
            "masks": drawn,
        }
        images.append((found, there))
        precision.add(found, there)
    numbers = precision.compute(World())
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        expected = by_pycocotools(images, name, agnostic=False)
        assert [numbers[kind][key] for key in ("ap", "ap50", "ap75")] == pytest.approx(expected)
        (expected_agnostic, *_) = by_pycocotools(images, name, agnostic=True)
        assert numbers[kind]["agnostic"] == pytest.approx(expected_agnostic)
        assert expected[1] > 0


def test_the_masks_of_all_processes_are_scored_together() -> None:
    """A world of two processes whose states are gathered: the same numbers as of one process."""
    rng = np.random.default_rng(0)
    alone, parts = AveragePrecision(), [AveragePrecision(), AveragePrecision()]
    for number in range(5):
        masks = some_masks(rng, 2, (30, 40))
        there = Instances(
            boxes_around(masks), torch.tensor([1, 2]), masks, torch.tensor([False, False])
        )
        drawn = moved(masks, rng)
        found = {
            "boxes": boxes_around(drawn),
            "labels": torch.tensor([1, 2]),
            "scores": torch.from_numpy(rng.random(2).astype(np.float32)),
            "masks": drawn,
        }
        alone.add(found, there)
        parts[number % 2].add(found, there)  # three images here, two there

    class Gathered(World):
        def gather(self, value: Any) -> list[Any]:
            return [value, dict(parts[1]._metric.metric_state)]

    assert parts[0].compute(Gathered()) == alone.compute(World())


def test_nothing_to_score_on_is_one_line() -> None:
    precision = AveragePrecision()
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
        "masks": torch.zeros(0, 8, 8, dtype=torch.bool),
    }
    precision.add(nothing, no_instances((8, 8)))
    with pytest.raises(detect.UserError, match="none of the images to score on has an object"):
        precision.compute(World())


@pytest.mark.parametrize("seed", range(3))
def test_polygons_and_compressed_runs_are_drawn_as_pycocotools_draws_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(40):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        runs = coco_mask.encode(np.asfortranarray(mask))
        packed = {"size": [height, width], "counts": runs["counts"].decode()}
        assert np.array_equal(draw_mask(packed, (height, width), name=""), mask)
        polygons = [rng.uniform(-3, 43, 2 * int(rng.integers(3, 9))).tolist() for _ in range(2)]
        drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))
        assert np.array_equal(draw_mask(polygons, (height, width), name=""), drawn)


def detector(name: str, **changes: Any) -> Detector:
    shape = DetectorShape(**{**vars(SMALL), **changes})
    return Detector(build_backbone(SHAPES[name], shape, seed=0, drop_path=0.0), shape, 3)


def targets() -> list[dict[str, torch.Tensor]]:
    """Of two images; the second one has no object."""
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:20, 6:18] = True
    masks[1, 16:30, 16:30] = True
    some = Instances(
        boxes_around(masks), torch.tensor([1, 3]), masks, torch.zeros(2, dtype=torch.bool)
    )
    return join_targets([some, no_instances((32, 32))])


@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_a_detector_trains_all_its_weights_and_finds_objects(name: str, cascade: bool) -> None:
    torch.manual_seed(0)
    model = detector(name, cascade=cascade)
    assert isinstance(model.roi_heads, CascadeHeads) == cascade
    kinds = {"ConvViT": ConvViTDetector, "ViT": ViT, "Swin": SwinTransformer}
    assert isinstance(model.encoder, kinds[name])
    losses = model(torch.randn(2, 3, 32, 32), targets())
    assert len(losses) == (9 if cascade else 5)
    torch.stack([*losses.values()]).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []  # DDP would wait for them
    assert all(torch.isfinite(loss) for loss in losses.values())
    model.eval().roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = model(torch.randn(2, 3, 32, 32))
    assert [len(one["scores"]) for one in found] == [5, 5]
    drawn = paste(found[0], fitted=(24, 32), size=(48, 64))
    assert drawn["masks"].shape[1:] == (48, 64)
    assert (drawn["boxes"][:, 3] <= 48).all()
    assert set(drawn["labels"].tolist()) <= {1, 2, 3}


@pytest.mark.parametrize("cascade", [False, True])
def test_images_without_objects_train_every_weight_too(cascade: bool) -> None:
    model = detector("ConvViT", cascade=cascade)
    losses = model(torch.randn(1, 3, 32, 32), targets()[1:])
    torch.stack([*losses.values()]).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert losses["loss_mask"] == 0


def test_a_cascade_of_equal_heads_that_correct_nothing_scores_like_one_head() -> None:
    """The mean of equal scores is each of them, and boxes that are not corrected stay."""
    torch.manual_seed(0)
    cascade = detector("ConvViT", cascade=True).eval().roi_heads
    heads: Any = cascade
    for stage in range(3):
        heads.box_head[stage].load_state_dict(heads.box_head[0].state_dict())
        heads.box_predictor[stage].load_state_dict(heads.box_predictor[0].state_dict())
        torch.nn.init.zeros_(heads.box_predictor[stage].bbox_pred.weight)
        torch.nn.init.zeros_(heads.box_predictor[stage].bbox_pred.bias)
    plain: Any = detector("ConvViT").eval().roi_heads
    assert type(plain) is RoIHeads
    plain.box_head.load_state_dict(heads.box_head[0].state_dict())
    plain.mask_head.load_state_dict(heads.mask_head.state_dict())
    plain.mask_predictor.load_state_dict(heads.mask_predictor.state_dict())
    with torch.no_grad():
        plain.box_predictor.cls_score.load_state_dict(heads.box_predictor[0].cls_score.state_dict())
        plain.box_predictor.bbox_pred.weight.zero_()
        plain.box_predictor.bbox_pred.bias.zero_()
        maps = {str(level): torch.randn(1, 16, 16 >> level, 16 >> level) for level in range(5)}
        boxes = [torch.tensor([[2.0, 2, 20, 20], [8, 8, 30, 31], [0, 1, 12, 30]])]
        (one,), _ = plain(maps, boxes, [(32, 32)])
        (three,), _ = cascade(maps, boxes, [(32, 32)])
    for name in ("boxes", "scores", "labels", "masks"):
        assert torch.allclose(one[name].float(), three[name].float(), atol=1e-5)


@pytest.mark.parametrize("window", [0, 2])
def test_an_encoder_goes_in_and_out_again(tmp_path: Path, window: int) -> None:
    """Also one whose class token windows leave out."""
    pretrained = build_encoder(VIT, seed=3)
    save_file(dict(pretrained.state_dict()), tmp_path / "encoder.safetensors")
    file = load_encoder(tmp_path / "encoder.safetensors", VIT)
    shape = DetectorShape(**{**vars(SMALL), "window": window})
    encoder = build_backbone(VIT, shape, seed=0, drop_path=0.0)
    fill_backbone(encoder, file)
    assert torch.equal(encoder.blocks[1].attn.qkv.weight, pretrained.blocks[1].attn.qkv.weight)
    out = encoder_weights(encoder, VIT, file)
    save_file(out, tmp_path / "out.safetensors")
    again = build_encoder(VIT, seed=5)
    fill_encoder(again, load_encoder(tmp_path / "out.safetensors", VIT))
    for name, tensor in pretrained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def run(*arguments: str) -> int:
    return detect.main(["--encoder", "none", "--image-size", "32", "--batch-size", "2", *arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set, and a finished run on it of four steps."""
    root = tmp_path_factory.mktemp("detect")
    data = write_coco(root / "coco")
    out = root / "run"
    assert run("--data", str(data), "--epochs", "4", "--log-every", "1", "--out", str(out)) == 0
    return data, out


def test_a_run_leaves_numbers_pictures_and_weights(folders: tuple[Path, Path]) -> None:
    data, out = folders
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 4
    assert list(summary["box_ap"]) == list(summary["mask_ap"]) == ["scratch"]
    assert len(summary["box_ap"]["scratch"]) == 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "loss_mask", "loss_box_reg", "loss_objectness"} <= rows[-1].keys()
    assert (out / "detections.png").stat().st_size > 1_000
    file = load_encoder(out / "encoder.safetensors", ConvViTShape())
    assert file.shape.kind == "ConvViT"
    assert "global_bias.table" in file.weights


def test_all_seeds_are_trained_with_and_without_the_encoder(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The encoder is of images of 64 pixels, the detector's have 32."""
    encoder = build_encoder(detect.PRESETS["tiny"].model, seed=7)
    (tmp_path / "given").mkdir()
    save_file(dict(encoder.state_dict()), tmp_path / "given" / "encoder.safetensors")
    out = tmp_path / "run"
    line = ["--data", str(folders[0]), "--epochs", "1", "--out", str(out), "--scratch", "always"]
    given = ["--encoder", str(tmp_path / "given"), "--seeds", "2"]
    assert run(*line, *given) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    for kind in ("box_ap", "mask_ap"):
        assert {name: len(values) for name, values in summary[kind].items()} == {
            "pretrained": 2,
            "scratch": 2,
        }
    assert sorted(folder.name for folder in out.iterdir() if folder.is_dir()) == [
        "checkpoints",
        "pretrained-1",
        "scratch-0",
        "scratch-1",
    ]
    assert "range" in printed
    assert run(*line, *given) == 0  # prints it again
    assert "range" in capsys.readouterr().out


def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, out = folders
    line = ["--data", str(data), "--epochs", "4", "--log-every", "1", "--checkpoint-every", "1"]
    assert run(*line, "--out", str(tmp_path / "run")) == 0
    (tmp_path / "run" / "summary.json").unlink()
    for name in ("encoder.safetensors", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    (last / "COMPLETE").unlink()  # as if it had been killed while it wrote the last one
    assert run(*line, "--out", str(tmp_path / "run")) == 0
    ended, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", out))
    assert all(torch.equal(ended[name], whole[name]) for name in whole)


@pytest.mark.full
def test_a_run_that_was_stopped_by_a_signal_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "coco")
    more = ["--encoder", "none", "--image-size", "32", "--batch-size", "2", "--epochs", "12"]
    stopped, undisturbed = tmp_path / "stopped", tmp_path / "undisturbed"
    process = start("step", "detect", data, stopped, *more)
    wait_until(stopped.with_suffix(".reached").exists, "step", process)
    process.send_signal(signal.SIGTERM)
    code, printed = end_of(process)
    assert code == 143
    assert "stopped by SIGTERM after step 5 of 12, which is saved" in printed
    for out in (stopped, undisturbed):
        code, printed = end_of(start("none", "detect", data, out, *more))
        assert code == 0, printed
    assert_equal_runs(stopped, undisturbed, weights="model.safetensors")


def test_a_dry_run_trains_nothing(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--data", str(folders[0]), "--dry-run", "--out", str(tmp_path / "run")) == 0
    assert "2 images of 2 classes" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"category_id": 0}, "annotation 10 has category_id 0"),
        ({"segmentation": {"size": [12, 16], "counts": "zz"}}, "do not decode"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "a mask of size [9, 9]"),
    ],
)
def test_bad_annotations_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: dict[str, Any], says: str
) -> None:
    data = write_coco(tmp_path / "coco", lambda entries: entries["annotations"][0].update(spoil))
    assert run("--data", str(data), "--epochs", "1", "--out", str(tmp_path / "run")) == 2
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in printed


def test_a_zero_area_box_is_scored_as_pycocotools_scores_it(tmp_path: Path) -> None:
    """It counts as an object that nothing finds."""
    empty = {"size": [12, 16], "counts": [12 * 16]}
    change = {"bbox": [1, 1, 0, 4], "segmentation": empty}
    data = write_coco(tmp_path, lambda entries: entries["annotations"][0].update(change))
    _, there = load_coco(data)[0].load(0)
    found = {
        "boxes": there.boxes[1:2],
        "labels": there.classes[1:2],
        "scores": torch.tensor([0.9]),
        "masks": there.masks[1:2],
    }
    precision = AveragePrecision()
    precision.add(found, there)
    numbers = precision.compute(World())
    for kind, name in (("box", "bbox"), ("mask", "segm")):
        expected = by_pycocotools([(found, there)], name, agnostic=False)
        assert [numbers[kind][key] for key in ("ap", "ap50", "ap75")] == pytest.approx(expected)
