"""A folder of images as a data set.

The steps: list samples (`listing`, `shards`), read one, decode it (`decode`), crop it (`images`,
`augment`), and fill a batch.

A folder has one of two layouts. With labels: `train/<class>/<image>`, and optionally
`val/<class>/<image>`. Without labels: images at any depth, in the folder itself or in its `train/`
and `val/`. Names that begin with a dot are ignored. Instead of images, a folder may hold shards.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from recipes.engine.data.decode import Decoder, formats
from recipes.engine.data.images import (
    NORMALIZE,
    CenterCrops,
    Cropping,
    model_inputs,
    picture_size,
    to_unit,
)
from recipes.engine.data.listing import (
    NUM_PICTURES,
    FolderId,
    Samples,
    hold_out,
    list_files,
    relabel,
)
from recipes.engine.data.sets import (
    Batch,
    DataSet,
    Item,
    ProbeData,
    TrainSet,
    read_first,
)
from recipes.engine.data.shards import find_shards, list_shards
from recipes.engine.errors import say
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng

PROBE_PER_CLASS = 50
# At 224 pixels this many inputs take 1.5 GB. With many classes, each gets fewer than 50 images.
MAX_PROBE = 2_500


@dataclass(frozen=True, eq=False)
class Crops(TrainSet):
    """Crops of stored images, as bytes.

    Attributes:
        samples: The images, indexed by sample id.
        decode: How they are decoded.
        crop: How they are cropped.
        image_size: Height and width of a crop in pixels.
        seed: Seed of the run.
    """

    samples: Samples
    decode: Decoder
    crop: Cropping
    image_size: tuple[int, int]
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: tuple[int, int]) -> Item:
        try:
            return self._crop(*index), index[1]
        except UnreadableError:
            return None, index[1]

    def __getitems__(self, indices: list[tuple[int, int]]) -> Batch:
        """Return a batch, which is filled in place. `DataLoader` calls this method."""
        images = torch.empty(len(indices), 3, *self.image_size, dtype=torch.uint8)
        sample_ids: list[int] = []
        unreadable_ids: list[int] = []
        for epoch, sample_id in indices:
            try:
                images[len(sample_ids)] = self._crop(epoch, sample_id)
                sample_ids.append(sample_id)
            except UnreadableError:
                unreadable_ids.append(sample_id)
        images = images[: len(sample_ids)]
        return Batch(images, torch.tensor(sample_ids, dtype=torch.int64), unreadable_ids)

    def _crop(self, epoch: int, sample_id: int) -> UInt8[Tensor, "channels height width"]:
        pixels = self.decode(self.samples.read(sample_id))
        return self.crop(pixels, self.image_size, sample_rng(self.seed, epoch, sample_id))

    def to_inputs(self, images: Shaped[Tensor, batch * shape]) -> Float[Tensor, batch * shape]:
        """Normalize images."""
        return model_inputs(images, NORMALIZE)

    def describe(self, sample_id: int) -> str:
        """Return the path of an image."""
        return self.samples.name(sample_id)


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of a folder.

    Attributes:
        train: Samples to train on.
        held_out: Samples to test on.
        class_names: Names of the classes in the order of their labels; empty without labels.
    """

    train: Samples
    held_out: Samples
    class_names: tuple[str, ...]

    @property
    def content(self) -> str:
        """The number of samples, and a hash of their names and sizes."""
        parts = (self.train.fingerprint, self.held_out.fingerprint)
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:8]
        return f"{len(self.train)} + {len(self.held_out)} images, {digest}"


# Lets one of several processes list a folder, and gives the list to all.
Share = Callable[[Callable[[], Split]], Split]


def alone(make: Callable[[], Split]) -> Split:
    """List in this process, the only one."""
    return make()


def split_folder(folder: Path, share: Share = alone) -> Split:
    """List a folder, and print what in it is not used.

    Without `val/`, the last tenth of each class is held out; without labels, the last 4 images.

    Args:
        folder: The folder.
        share: In a job of several processes, `World.share`.

    Raises:
        UserError: If it holds too few images, or only some of them have classes.
    """
    return share(partial(_split, folder))


def _split(folder: Path) -> Split:
    has_train, has_val = ((folder / name).is_dir() for name in ("train", "val"))
    seen: set[FolderId] = set()
    root = folder / "train" if has_train else folder
    train, class_names, notes = _list_samples(root, labelled=has_train, seen=seen)
    if has_train and has_val:
        held_out, names, more = _list_samples(folder / "val", labelled=bool(class_names), seen=seen)
        held_out = relabel(held_out, names, class_names)
        notes += more
    else:
        train, held_out = hold_out(train, labelled=bool(class_names))
    if has_train:
        notes += _unused(folder, has_val=has_val)
    say(*(f"note: {note}" for note in notes), file=sys.stderr)
    return Split(train, held_out, class_names)


def _list_samples(
    root: Path, *, labelled: bool, seen: set[FolderId]
) -> tuple[Samples, tuple[str, ...], list[str]]:
    """List the images in the shards of a folder, or in the folder itself if it has no shards."""
    suffixes = [suffix for some in formats().values() for suffix in some]
    shard_names = find_shards(root)
    if shard_names:
        return list_shards(root, shard_names, suffixes, labelled=labelled)
    return list_files(root, suffixes, labelled=labelled, seen=seen)


def _unused(folder: Path, *, has_val: bool) -> Iterator[str]:
    """Name the other entries of a folder that has `train/`."""
    others = sorted(
        name
        for name in os.listdir(folder)
        if name not in ("train", "val") and not name.startswith(".")
    )
    if others:
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        scored = "val/ is" if has_val else "the last images of train/ are"
        yield f"{folder} holds {names}, which is not used: {scored} scored on"


def load_folder(
    name: str,
    *,
    image_size: tuple[int, int],
    seed: int,
    crop: Cropping,
    decode: Decoder,
    share: Share = alone,
) -> DataSet:
    """Load a folder of images.

    A probe is fitted on up to 50 images per class and tested on up to 50, each at most 2,500 in
    total.

    Args:
        name: Path of the folder.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the run.
        crop: How training images are cropped.
        decode: How images are decoded.
        share: As in `split_folder`.

    Returns:
        The data set.

    Raises:
        UserError: If the folder holds too few readable images, or only some of them have classes.
    """
    split = split_folder(Path(name), share)
    train = Crops(split.train, decode, crop, image_size, seed)
    shown = Crops(split.held_out, decode, CenterCrops(), picture_size(image_size), seed)
    pictures = read_first(shown, spread(len(shown)), NUM_PICTURES, set())
    for _ in read_first(train, range(len(train)), 1, set()):
        pass  # raises an error if nothing can be read
    return DataSet(
        name=name,
        in_channels=3,
        class_names=split.class_names,
        content=split.content,
        train=train,
        pictures=[to_unit(picture) for picture, _ in pictures],
        normalize=NORMALIZE,
        load_probe=partial(load_probe, split, decode, image_size, seed)
        if split.class_names
        else None,
    )


def spread(number: int) -> list[int]:
    """Order indices so that the first few are evenly spaced over all of them."""
    step = max(1, number // NUM_PICTURES)
    return [index for start in range(step) for index in range(start, number, step)]


def load_probe(split: Split, decode: Decoder, image_size: tuple[int, int], seed: int) -> ProbeData:
    """Read labelled images for the probes, the same number of each class where there are enough.

    Args:
        split: Images to fit a probe on, and to test it on.
        decode: How they are decoded.
        image_size: Height and width of a model input in pixels.
        seed: Seed of the run.

    Returns:
        Center crops with their labels.
    """
    num_classes = len(split.class_names)
    per_class = max(1, min(PROBE_PER_CLASS, MAX_PROBE // num_classes))

    def read(samples: Samples, part: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(seed, part)
        crops = Crops(samples, decode, CenterCrops(), image_size, seed)
        unreadable: set[int] = set()
        images: list[Tensor] = []
        ids: list[int] = []
        for label in range(num_classes):
            order = rng.permutation((samples.labels == label).nonzero()[0]).tolist()
            for image, sample_id in read_first(crops, order, per_class, unreadable):
                images.append(image)
                ids.append(sample_id)
        return crops.to_inputs(torch.stack(images)), torch.from_numpy(samples.labels[ids])

    return ProbeData(*read(split.train, part=0), *read(split.held_out, part=1))
