"""Image loading: from a JPEG file to the crop of a model input, and whole loaders.

The files are cut from scikit-image's photographs in ImageNet's sizes (mode 500 x 375, quality 90 to
96). Every variant takes the same box of each image and resizes it to 224 pixels bicubically: MAE's
augmentation without the drawing. Times are CPU seconds of one thread, minima of alternating passes:
other processes on the machine change them little. "torchvision v1" is the baseline.

Axes: images.
"""

from __future__ import annotations

import importlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness import Bench
from recipes import pack
from recipes.engine.data.decode import DECODE
from recipes.engine.data.folder import Crops, split_folder
from recipes.engine.data.images import NORMALIZE, RandomCrops, random_box, resize
from recipes.engine.data.listing import Samples
from recipes.engine.data.photos import FILES, read_photo
from recipes.engine.data.sets import collate
from recipes.engine.seeds import sample_rng

IMAGES, SIZE = 64, (224, 224)
MIN_PASSES = 5

Load = Callable[[int], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write JPEG files of ImageNet's sizes."""
    root = tmp_path_factory.mktemp("jpeg")
    photos = [read_photo(name) for name in FILES]
    for index in range(IMAGES):
        rng = np.random.default_rng(index)
        photo = photos[index % len(photos)]
        width, height = (500, 375) if rng.uniform() < 0.6 else (375, 500)
        if rng.uniform() < 0.2:
            width, height = (int(rng.integers(300, 900)) for _ in range(2))
        scale = max(width / photo.width, height / photo.height, rng.uniform(0.7, 1.2))
        enlarged = photo.resize((round(photo.width * scale), round(photo.height * scale)))
        left = int(rng.integers(enlarged.width - width + 1))
        top = int(rng.integers(enlarged.height - height + 1))
        crop = enlarged.crop((left, top, left + width, top + height))
        crop.save(root / f"{index:04}.jpg", quality=int(rng.integers(90, 97)))
    return root


def packed(folder: Path, out: Path, *options: str) -> Samples:
    """Pack the files, and list the shards."""
    assert pack.main([str(folder), str(out), "--workers", "1", *options]) == 0
    return split_folder(out).train


def box_of(index: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Draw the box of an image; `size` is width and height."""
    return random_box(*size, sample_rng(0, 0, index), area=(0.2, 1.0))


def torchvision_v1(samples: Samples) -> Load:
    """Decode and resize with Pillow, then make a normalized float tensor."""
    functional = importlib.import_module("torchvision.transforms.functional")
    bicubic = importlib.import_module("torchvision.transforms").InterpolationMode.BICUBIC

    def load(index: int) -> Tensor:
        with open(samples.name(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, right, bottom = box_of(index, image.size)
        crop = functional.resized_crop(
            image, top, left, bottom - top, right - left, list(SIZE), bicubic
        )
        inputs: Tensor = functional.normalize(
            functional.to_tensor(crop), NORMALIZE.mean, NORMALIZE.std
        )
        return inputs

    return load


def torchvision_v2(samples: Samples) -> Load:
    """Decode with torchvision, resize as bytes."""
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    decode_jpeg = importlib.import_module("torchvision.io").decode_jpeg
    mode = importlib.import_module("torchvision.io").ImageReadMode.RGB
    bicubic = importlib.import_module("torchvision.transforms").InterpolationMode.BICUBIC

    def load(index: int) -> Tensor:
        data = Path(samples.name(index)).read_bytes()
        image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)
        left, top, right, bottom = box_of(index, (image.shape[2], image.shape[1]))
        crop: Tensor = functional.resized_crop(
            image, top, left, bottom - top, right - left, list(SIZE), bicubic, antialias=True
        )
        return crop

    return load


def timm(samples: Samples) -> Load:
    """Decode and resize with Pillow, then make bytes, as timm's loader with prefetching does."""
    functional = importlib.import_module("torchvision.transforms.functional")
    bicubic = importlib.import_module("torchvision.transforms").InterpolationMode.BICUBIC
    to_bytes = importlib.import_module("timm.data.transforms").ToNumpy()

    def load(index: int) -> Any:
        with open(samples.name(index), "rb") as file:
            image = Image.open(file).convert("RGB")
        left, top, right, bottom = box_of(index, image.size)
        return to_bytes(
            functional.resized_crop(
                image, top, left, bottom - top, right - left, list(SIZE), bicubic
            )
        )

    return load


def mimkit(samples: Samples) -> Load:
    """Load as the recipes do."""

    def load(index: int) -> Tensor:
        pixels = DECODE(samples.read(index))
        box = box_of(index, (pixels.shape[1], pixels.shape[0]))
        return resize(pixels, box, SIZE, "bicubic")

    return load


def decode_alone(samples: Samples) -> Load:
    """Read and decode, no more: the floor."""
    return lambda index: DECODE(samples.read(index))


def as_bytes(loaded: Any) -> np.ndarray[Any, Any]:
    """Return what a variant loads as bytes [C, H, W]."""
    array = np.asarray(loaded)
    if array.dtype == np.float32:
        mean, std = (np.array(value).reshape(3, 1, 1) for value in (NORMALIZE.mean, NORMALIZE.std))
        array = (array * std + mean) * 255
    return array.astype(float)


def rates(
    variants: dict[str, Load], count: int, seconds: float, check: Callable[[str], None]
) -> dict[str, float]:
    """Return images per CPU second of each variant, in alternating passes."""
    best = dict.fromkeys(variants, float("inf"))
    for name in variants:  # also warms up
        check(name)
    end = time.perf_counter() + seconds * len(variants)
    passes = 0
    while passes < MIN_PASSES or time.perf_counter() < end:
        for name, load in variants.items():
            start = time.process_time()
            for index in range(count):
                load(index)
            best[name] = min(best[name], time.process_time() - start)
        passes += 1
    return {name: count / spent for name, spent in best.items()}


def bench_loader_sample(bench: Bench, folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    files = split_folder(folder).train
    shards = {
        f"mimkit, shards at {side}": packed(folder, tmp_path / side, "--short-side", side)
        for side in ("512", "256")
    }
    whole = packed(folder, tmp_path / "whole")
    makers = {"torchvision v1": torchvision_v1, "torchvision v2": torchvision_v2, "timm": timm}
    variants: dict[str, Load] = {}
    for name, make in makers.items():
        try:
            variants[name] = make(files)
        except ImportError as error:
            bench.note([f"{name:<28} skipped: {error}"])
    variants["mimkit, files"] = mimkit(files)
    variants["mimkit, shards, not resized"] = mimkit(whole)
    variants |= {name: mimkit(samples) for name, samples in shards.items()}
    variants["decode alone, files"] = decode_alone(files)
    variants["decode alone, shards at 256"] = decode_alone(shards["mimkit, shards at 256"])
    exact = {index: pillow(files, index) for index in range(len(files))}

    def check(name: str) -> None:
        if "decode" in name or "shards at" in name:  # other pixels
            return
        decibels = [quality(as_bytes(variants[name](i)), exact[i]) for i in exact]
        assert min(decibels) >= 50, name
        assert np.mean(decibels) >= 60, name

    found = rates(variants, len(files), bench.seconds, check)
    baseline = found.get("torchvision v1")
    for name, rate in found.items():
        speedup = f"{rate / baseline:5.2f}x" if baseline else ""
        bench.note(
            [f"{name:<28} {rate:6.0f} images / CPU second {speedup}"],
            variant=name,
            images_per_cpu_second=rate,
        )


def pillow(samples: Samples, index: int) -> np.ndarray[Any, Any]:
    """Load with Pillow: full decode and bicubic resize."""
    image = Image.open(io.BytesIO(samples.read(index))).convert("RGB")
    crop = image.crop(box_of(index, image.size)).resize(SIZE, Image.Resampling.BICUBIC)
    return np.asarray(crop).transpose(2, 0, 1).astype(float)


def quality(ours: np.ndarray[Any, Any], exact: np.ndarray[Any, Any]) -> float:
    """Return the signal-to-noise ratio in decibels."""
    return float(10 * np.log10(255**2 / max(((ours - exact) ** 2).mean(), 1e-6)))


def bench_loader_workers(bench: Bench, folder: Path) -> None:
    torch.set_num_threads(1)
    files = split_folder(folder).train
    crops = Crops(files, DECODE, RandomCrops(), SIZE, seed=0)
    count = len(files) // 20 * 20
    batches = [
        [(epoch, index) for index in range(start, start + 20)]
        for epoch in range(4)
        for start in range(0, count, 20)
    ]
    for workers in (0, 1, 2):
        best, crossed = float("inf"), 0
        for _ in range(3):
            loader = DataLoader(
                crops, batch_sampler=batches, num_workers=workers, collate_fn=collate
            )
            start = time.perf_counter()
            for batch in loader:
                crossed = batch.images.nbytes // len(batch.images)
            best = min(best, (time.perf_counter() - start) / (4 * count))
        rate = f"{1 / best:4.0f} images / s (wall)"
        bench.note(
            [f"{workers} workers: {rate}, {crossed:,} bytes an image cross"],
            workers=workers,
            images_per_s=1 / best,
            bytes=crossed,
        )
