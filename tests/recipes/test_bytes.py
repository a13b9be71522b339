"""Images that stay bytes until a model reads them: the losses and gradients of normalised ones."""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mimkit import masking
from mimkit.masking import Mask
from recipes import cae, convmae, mae, pack, simmim, vit_mpp
from recipes.engine import Recipe, run
from recipes.engine.data.images import NormalizeByConstants, model_inputs
from recipes.engine.data.load import load_data
from recipes.engine.data.sets import Batch, TrainSet
from recipes.engine.loop import Moment
from recipes.engine.pretrain import Pretraining, normalize_inside
from recipes.engine.run.loader import on_device
from recipes.engine.run.world import World
from tests.recipes.command import config_for

MAE = {
    "image_size": 16, "patch_size": 4, "dim": 12, "depth": 1, "heads": 2,
    "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
SIMMIM = {"image_size": 16, "patch_size": 4, "dim": 12}
VIT = SIMMIM | {"encoder": "vit", "depth": 1, "heads": 2}
SWIN = SIMMIM | {"encoder": "swin", "depth": (1, 1), "heads": (2, 2), "window": 2}
CROSS = {"decoder": "cross", "decode_fraction": 0.5}

Build = Callable[[int], nn.Module]


def of_mae(**changes: Any) -> Build:
    return lambda channels: mae.MAE(mae.MAEConfig(**(MAE | changes), in_channels=channels))


def of_simmim(**changes: Any) -> Build:
    return lambda channels: simmim.SimMIM(simmim.SimMIMConfig(**changes, in_channels=channels))


READ_BYTES = {
    "mae": of_mae(),
    "mae, pixels as they are": of_mae(normalize_pixels=False),
    "mae, scored on all patches": of_mae(loss_on="all"),
    "mae, mask tokens in the encoder": of_mae(mask_tokens="encoder"),
    "mae, cross decoder": of_mae(**CROSS),
    "mae, one axis": of_mae(image_size=(40,), patch_size=4),
    "mae, three axes": of_mae(image_size=(4, 6, 8), patch_size=(2, 3, 4)),
    "simmim, ViT": of_simmim(**VIT),
    "simmim, Swin": of_simmim(**SWIN),
    "simmim, Swin, l2": of_simmim(**SWIN, loss="l2"),
}


class Given(TrainSet):
    """Bytes of a data set with given statistics; None where constants are not enough."""

    def __init__(self, statistics: NormalizeByConstants | None) -> None:
        self.statistics = statistics

    @property
    def byte_statistics(self) -> NormalizeByConstants | None:
        return self.statistics

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: tuple[int, int]) -> tuple[Tensor | None, int]:
        raise NotImplementedError

    def to_inputs(self, images: Tensor) -> Tensor:
        assert self.statistics is not None
        return model_inputs(images, self.statistics)


@st.composite
def byte_images(
    draw: st.DrawFn, sides: Sequence[int]
) -> tuple[Tensor, NormalizeByConstants, Sequence[int]]:
    """Draw images, the statistics of their channels, and sample ids."""
    batch, channels = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (batch, channels, *sides)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    numbers = [st.floats(low, high, width=32) for low, high in ((0.125, 2), (0.0625, 4))]
    mean, std = (draw(st.tuples(*[number] * channels)) for number in numbers)
    ids = draw(st.lists(st.integers(0, 1_000), min_size=batch, max_size=batch))
    return images, NormalizeByConstants(mean, std), ids


def loss_and_gradients(
    model: nn.Module, images: Tensor, mask: Mask | list[Mask]
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)  # of the patches that a fraction is decoded of
    model.zero_grad()
    loss = model(images, mask).loss
    loss.backward()
    named = model.named_parameters()
    return loss, {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("name", READ_BYTES)
@pytest.mark.parametrize("views", [1, 2])
@settings(max_examples=6)
@given(data=st.data())
def test_loss_and_gradients_are_bit_for_bit_those_of_normalised_images(name, views, data):
    sides = READ_BYTES[name](1).encoder.image_size
    images, statistics, ids = data.draw(byte_images(sides))
    model = READ_BYTES[name](images.shape[1])
    inside, given_set = copy.deepcopy(model), Given(statistics)
    assert normalize_inside(inside, given_set)
    assert inside.state_dict().keys() == model.state_dict().keys()

    key = masking.key(ids, seed=0)
    masks = [masking.uniform(key.view(view), model.encoder.grid, 0.5) for view in range(views)]
    mask = masks[0] if views == 1 else masks
    inputs = given_set.to_inputs(images)
    expected, gradients = loss_and_gradients(model, inputs, mask)
    loss, found = loss_and_gradients(inside, images, mask)
    assert torch.equal(loss, expected)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradients[name]) for name in gradients)
    assert not torch.equal(model(images, mask).loss, expected)  # bytes that nobody normalises
    assert torch.equal(loss_and_gradients(inside, inputs, mask)[0], expected)  # floats as before


@pytest.mark.parametrize(
    "recipe", [convmae.RECIPE, cae.RECIPE, vit_mpp.RECIPE], ids=lambda recipe: recipe.name
)
def test_other_recipes_get_normalised_images(recipe):
    model = recipe.build(config_for(recipe).model)
    assert not normalize_inside(model, Given(NormalizeByConstants((0.5,) * 3, (0.25,) * 3)))


@pytest.mark.parametrize(
    "build",
    [
        of_mae(target="pca", pca_components=4),
        *(of_simmim(**SWIN, target=name) for name in ("hog", "pixels_2x", "clusters", "bins_8")),
        of_simmim(**VIT, target="window_normalized"),
    ],
)
def test_models_with_other_targets_get_normalised_images(build):
    assert not normalize_inside(build(3), Given(NormalizeByConstants((0.5,) * 3, (0.25,) * 3)))


def test_what_constants_do_not_normalise_is_normalised_before():
    assert not normalize_inside(of_mae()(3), Given(None))
    assert load_data("photos", image_size=(32, 32), seed=0).train.byte_statistics is None
    assert load_data("digits", image_size=(32, 32), seed=0).train.byte_statistics is not None


# Runs


def write_arrays(folder: Path, *shape: int, dtype: type) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(24):
        np.save(folder / f"{index:02d}.npy", rng.integers(10, 200, shape).astype(dtype))
    return folder


def losses_of(recipe: Recipe, data: str | Path, out: Path, *options: str) -> list[dict[str, Any]]:
    sizes = ["--batch-size", "8", "--max-steps", "4", "--log-every", "1", "--workers", "0"]
    arguments = ["--data", str(data), "--out", str(out), *sizes, *options]
    assert run(recipe, "", arguments) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [{name: row[name] for name in ("loss", "grad_norm", "baselines")} for row in rows]


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What models got in training."""
    seen: list[torch.dtype] = []
    real = Pretraining.forward

    def forward(self: Pretraining, model: nn.Module, inputs: Any) -> Any:
        images = inputs[0]
        seen.append((images if isinstance(images, Tensor) else images[0]).dtype)
        return real(self, model, inputs)

    monkeypatch.setattr(Pretraining, "forward", forward)
    return seen


@pytest.mark.parametrize(
    ("recipe", "kind", "options"),
    [
        (mae.RECIPE, "pictures", ["--accumulate", "2"]),
        (mae.RECIPE, "pictures", ["--views", "2"]),
        (mae.RECIPE, "pictures", ["--native-size", "64"]),
        (mae.RECIPE, "shards", []),
        (mae.RECIPE, "gray", ["--channels", "keep"]),
        (mae.RECIPE, "bands", ["--image-size", "16"]),
        (mae.RECIPE, "signals", ["--image-size", "64", "--patch-size", "8"]),
        (simmim.RECIPE, "pictures", []),
    ],
)
def test_a_run_on_bytes_has_the_losses_of_a_run_on_normalised_images(
    recipe, kind, options, pictures, tmp_path, monkeypatch, dtypes
):
    data = pictures
    if kind == "shards":
        assert pack.main([str(pictures), str(tmp_path / "shards"), "--workers", "0"]) == 0
        data = tmp_path / "shards"
    if kind in ("bands", "signals"):
        shape = (5, 18, 20) if kind == "bands" else (2, 90)
        data = write_arrays(tmp_path / kind, *shape, dtype=np.uint8)
    found = losses_of(recipe, data, tmp_path / "bytes", *options)
    assert set(dtypes) == {torch.uint8}
    monkeypatch.setattr("recipes.engine.pretrain.normalize_inside", lambda *_: False)
    expected = losses_of(recipe, data, tmp_path / "floats", *options)
    assert set(dtypes) == {torch.uint8, torch.float32}
    assert found == expected


def test_a_run_on_floats_gets_floats(tmp_path, dtypes):
    data = write_arrays(tmp_path / "floats", 3, 40, 40, dtype=np.uint16)
    losses_of(mae.RECIPE, data, tmp_path / "run")
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize(("name", "is_inside"), [("digits", True), ("photos", False)])
def test_a_step_on_a_bundled_set_has_the_loss_of_normalised_images(name, is_inside, monkeypatch):
    config = config_for(mae.RECIPE, "--data", name, "--device", "cpu")
    data = load_data(name, image_size=(32, 32), seed=0)
    model = dataclasses.replace(config.model, in_channels=data.in_channels)
    config = dataclasses.replace(config, model=model, accumulate=2)
    batch = data.train.__getitems__([(0, index) for index in range(5)])
    steps = []
    for _ in range(2):
        task = Pretraining(mae.RECIPE, config, data, World())
        moved = on_device(batch, data.train, "cpu", keep_bytes=task.takes_bytes)
        assert (moved.images.dtype == torch.uint8) == task.takes_bytes
        steps.append((task.takes_bytes, task.step(moved, Moment(0, 0.0)), task.extras()))
        monkeypatch.setattr("recipes.engine.pretrain.normalize_inside", lambda *_: False)
    assert [step[0] for step in steps] == [is_inside, False]
    assert steps[0][1:] == steps[1][1:]


def test_a_process_without_a_readable_image_takes_part_with_bytes(pictures):
    config = config_for(mae.RECIPE, "--data", str(pictures), "--device", "cpu")
    data = load_data(str(pictures), image_size=(32, 32), seed=0)
    task = Pretraining(mae.RECIPE, config, data, World())
    assert task.takes_bytes
    none = torch.empty(0, dtype=torch.int64)
    nothing = Batch(data.train.__getitems__([]).images, none, [3])
    images, masks = task.prepare(nothing, Moment(0, 0.0))
    assert images.dtype == torch.uint8
    assert images.shape == (0, 3, 32, 32)
    task.model(images, masks).loss.backward()
    assert not any(w.grad.any() for w in task.model.parameters() if w.grad is not None)


@pytest.mark.full
@pytest.mark.parametrize("recipe", [mae.RECIPE, simmim.RECIPE], ids=lambda recipe: recipe.name)
def test_a_compiled_model_that_reads_bytes_is_one_graph(recipe):
    config = config_for(recipe, "--data", "digits", "--device", "cpu")
    model = recipe.build(dataclasses.replace(config.model, in_channels=2))
    assert normalize_inside(model, Given(NormalizeByConstants((0.5, 0.25), (0.25, 0.5))))
    mask = config.masking.draw(masking.key(torch.arange(4), seed=0), model.encoder.grid)
    images = torch.randint(256, (4, 2, *model.encoder.image_size), dtype=torch.uint8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, gradients = loss_and_gradients(model, images, mask)
    torch.compiler.reset()
    loss, found = loss_and_gradients(compiled, images, mask)
    torch.testing.assert_close(loss, expected)
    found = {name.removeprefix("_orig_mod."): values for name, values in found.items()}
    torch.testing.assert_close(found, gradients)
