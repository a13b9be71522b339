"""Images a second from files on disk to the device, as a recipe loads them.

    python -m benchmarks.load_images --rows FILE [--images 4096] [--batch-size 256] [--workers 12]

Run by `run_gpu.sh`. The files are JPEGs that it draws first, 500 x 375 pixels each.
"""

import argparse
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Report
from recipes.engine.data.load import load_data
from recipes.engine.run import loader
from recipes.engine.run.world import World


def draw_files(folder: Path, number: int) -> None:
    """Write JPEGs that are as hard to decode as photographs: noise of several scales."""
    rng = np.random.default_rng(0)
    for i in range(number):
        small = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
        image = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        image += rng.integers(-8, 9, image.shape, dtype=np.int16)
        path = folder / f"{i:06}.jpg"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=85)


def main() -> int:
    """Time the loader, workers and copies to the device included."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        draw_files(Path(folder), options.images)
        data = load_data(folder, image_size=(options.size, options.size), seed=0)
        steps = 3 * len(data.train) // options.batch_size
        batches = loader.make_loader(
            data.train, world=World(), batch_size=options.batch_size, seed=0, first_step=0,
            num_steps=steps, workers=options.workers, pin_memory=device == "cuda",
        )  # fmt: skip
        times, dtype = [], None
        for batch in batches:
            dtype = str(batch.images.dtype)
            loader.on_device(batch, data.train, device, keep_bytes=True)  # as MAE takes them
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
    # The first half fills the queues of the workers.
    half = len(times) // 2
    rate = options.batch_size * (len(times) - 1 - half) / (times[-1] - times[half])
    decoder = "Pillow" if find_spec("simplejpeg") is None else "simplejpeg"
    print(f"{rate:.0f} images/s to {device}, {dtype} from the loader, {options.workers} workers, "
          f"{decoder}")  # fmt: skip
    record = {"bench": "load_images", "images_per_s": rate, "dtype": dtype, "decoder": decoder}
    Report(file=options.rows).save(record | {"workers": options.workers, "size": options.size})
    return 0


if __name__ == "__main__":
    sys.exit(main())
