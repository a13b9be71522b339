"""A folder of images or arrays as a data set.

The steps: list samples (`listing`, `shards`), read one, decode it (`decode`), crop it (`images`,
`augment`), and fill a batch. Arrays are read and cropped by `arrays`.

A folder has one of two layouts. With labels: `train/<class>/<image>`, and optionally
`val/<class>/<image>`. Without labels: images at any depth, in the folder itself or in its `train/`
and `val/`. Names that begin with a dot are ignored. Instead of images, a folder may hold shards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from recipes.engine.data import arrays
from recipes.engine.data.arrays import AS_FITS, ArrayOptions, Channels
from recipes.engine.data.decode import DECODE, Decoder, formats
from recipes.engine.data.images import (
    NORMALIZE,
    CenterCrops,
    Cropping,
    NativeCrops,
    NormalizeByConstants,
    model_inputs,
    picture_size,
    to_unit,
)
from recipes.engine.data.listing import (
    NUM_PICTURES,
    Files,
    FolderId,
    Samples,
    hold_out,
    list_files,
    relabel,
)
from recipes.engine.data.sets import (
    DataSet,
    ProbeData,
    StoredSet,
    read_first,
)
from recipes.engine.data.shards import Shards, find_shards, list_shards
from recipes.engine.data.statistics import (
    MEASURED_CROPS,
    FindStatistics,
    Statistics,
    measure,
    unknown,
)
from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError
from recipes.engine.seeds import sample_rng

Form = Literal["rgb", "pictures", "arrays"]
# Samples, names of their classes, and notes on what was left out.
Listed = tuple[Samples, tuple[str, ...], list[str]]

PROBE_PER_CLASS = 50
# At 224 pixels this many inputs take 1.5 GB. With many classes, each gets fewer than 50 images.
MAX_PROBE = 2_500


@dataclass(frozen=True, eq=False, kw_only=True)
class Crops(StoredSet):
    """RGB crops of stored images, as bytes.

    Attributes:
        decode: How they are decoded.
        crop: How they are cropped.
    """

    decode: Decoder
    crop: Cropping

    def _crop(self, epoch: int, sample_id: int) -> UInt8[Tensor, "channels height width"]:
        return self._crop_file(self.samples.read(sample_id), epoch, sample_id)

    def _crop_file(
        self, file: bytes, epoch: int, sample_id: int
    ) -> UInt8[Tensor, "channels height width"]:
        height, width = self.image_size
        rng = sample_rng(self.seed, epoch, sample_id)
        return self.crop(self.decode(file), (height, width), rng)

    def to_inputs(self, images: Shaped[Tensor, batch * shape]) -> Float[Tensor, batch * shape]:
        """Normalize images."""
        return model_inputs(images, NORMALIZE)

    @property
    def byte_statistics(self) -> NormalizeByConstants:
        """ImageNet's statistics."""
        return NORMALIZE

    def picture_size(self, sample_id: int) -> tuple[int, ...]:
        """Return the size of a picture to be shown."""
        height, width = self.image_size
        if isinstance(self.crop, arrays.OfArray):  # as it is stored: there may be no more of it
            return height, width
        return picture_size((height, width))


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of a folder.

    Attributes:
        train: Samples to train on.
        held_out: Samples to test on.
        class_names: Names of the classes in the order of their labels; empty without labels.
        form: "rgb" for pictures that become RGB, "pictures" for those that keep their channels,
            "arrays" for arrays.
    """

    train: Samples
    held_out: Samples
    class_names: tuple[str, ...]
    form: Form = "rgb"

    @property
    def content(self) -> str:
        """The number of samples, and a hash of their names and sizes."""
        parts = (self.train.fingerprint, self.held_out.fingerprint)
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:8]
        return f"{len(self.train)} + {len(self.held_out)} images, {digest}"


T = TypeVar("T")


class Share(Protocol):
    """Lets one of several processes do something, and gives the result to all."""

    def __call__(self, make: Callable[[], T]) -> T:
        """Return what `make` returns."""


def alone(make: Callable[[], T]) -> T:
    """Do it in this process, the only one."""
    return make()


def split_folder(folder: Path, share: Share = alone, channels: Channels | None = None) -> Split:
    """List a folder, and print what in it is not used.

    Without `val/`, the last tenth of each class is held out; without labels, the last 4 images.

    Args:
        folder: The folder.
        share: In a job of several processes, `World.share`.
        channels: "rgb" reads pictures as RGB and leaves arrays out; "keep" reads both with the
            channels that they have; by default, what the folder has more of is read, pictures as
            RGB.

    Raises:
        UserError: If it holds too few images, or only some of them have classes.
    """
    return share(partial(_split, folder, channels))


def _split(folder: Path, channels: Channels | None = None) -> Split:
    has_train, has_val = ((folder / name).is_dir() for name in ("train", "val"))
    seen: set[FolderId] = set()
    root = folder / "train" if has_train else folder
    form, suffixes, (train, class_names, notes) = _list_root(
        root, channels, labelled=has_train, seen=seen
    )
    if has_train and has_val:
        held_out, names, more = _list_samples(
            folder / "val", suffixes, labelled=bool(class_names), seen=seen
        )
        held_out = relabel(held_out, names, class_names)
        notes += more
    else:
        train, held_out = hold_out(train, labelled=bool(class_names))
    if has_train:
        notes += _unused(folder, has_val=has_val)
    say(*(f"note: {note}" for note in notes), file=sys.stderr)
    return Split(train, held_out, class_names, form)


def _list_root(
    root: Path, channels: Channels | None, *, labelled: bool, seen: set[FolderId]
) -> tuple[Form, list[str], Listed]:
    """List the pictures of a folder; or its arrays, if there are more of them.

    Returns:
        What the files are read as, their endings, and as `_list_samples`.
    """
    pictures = [suffix for some in formats().values() for suffix in some]
    before, others = set(seen), Counter[str]()
    found, problem = None, None
    try:
        found = _list_samples(root, pictures, labelled=labelled, seen=seen, others=others)
    except UserError as error:  # there may be arrays
        problem = error
    form, suffixes = _choose_form(None if found is None else found[0], others, channels)
    if found is not None and suffixes is None:
        return form, pictures, found
    if suffixes is None:
        assert problem is not None
        raise problem
    seen.clear()
    seen |= before
    return form, suffixes, _list_samples(root, suffixes, labelled=labelled, seen=seen)


def _choose_form(
    samples: Samples | None, others: Counter[str], channels: Channels | None
) -> tuple[Form, list[str] | None]:
    """Return what files are read as, and the endings to list instead of those of pictures.

    Args:
        samples: The pictures in a folder, if any.
        others: Number of its files with each other ending.
        channels: As in `split_folder`.
    """
    num_arrays = sum(others[os.path.splitext("x" + ending)[1]] for ending in arrays.SUFFIXES)
    if channels == "rgb" or not (num_arrays or samples):
        return ("pictures" if channels == "keep" else "rgb"), None
    num_pictures, num_tiffs = 0, 0
    if isinstance(samples, Files | Shards):
        num_pictures = len(samples)
        num_tiffs = samples.names.count(arrays.TIFF, samples.rows)
    are_arrays = num_arrays > num_pictures or (
        2 * num_tiffs > num_pictures and (channels == "keep" or not _is_rgb(samples))
    )
    if isinstance(samples, Shards) and are_arrays:
        return "arrays", None
    if channels == "keep" and num_arrays:
        pictures = [suffix for some in formats().values() for suffix in some]
        return ("arrays" if are_arrays else "pictures"), [*arrays.SUFFIXES, *pictures]
    if not are_arrays:
        return ("pictures" if channels == "keep" else "rgb"), None
    return "arrays", [*arrays.SUFFIXES, *arrays.TIFF]


def _is_rgb(samples: Samples | None) -> bool:
    """Whether RGB can hold the first TIFF file: it has no more than four bands or pages."""
    names = () if samples is None else (samples.name(index) for index in range(len(samples)))
    for index, name in enumerate(names):
        if samples is not None and name.lower().endswith(arrays.TIFF):
            try:
                with samples.open(index) as file:
                    values = arrays.open_array(file, name).values
            except (UnreadableError, UserError):
                return True
            return values.ndim == 2 or (values.ndim == 3 and len(values) <= 4)
    return True


def _list_samples(
    root: Path,
    suffixes: list[str],
    *,
    labelled: bool,
    seen: set[FolderId],
    others: Counter[str] | None = None,
) -> Listed:
    """List the images in the shards of a folder, or in the folder itself if it has no shards."""
    shard_names = find_shards(root)
    if shard_names:
        return list_shards(root, shard_names, suffixes, labelled=labelled)
    return list_files(root, suffixes, labelled=labelled, seen=seen, others=others)


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
    image_size: int | tuple[int, ...],
    seed: int,
    crop: Cropping,
    native: NativeCrops | None = None,
    decode: Decoder = DECODE,
    options: ArrayOptions = AS_FITS,
    find_statistics: FindStatistics = unknown,
    share: Share = alone,
) -> DataSet:
    """Load a folder of images or arrays.

    A probe is fitted on up to 50 images per class and tested on up to 50, each at most 2,500 in
    total.

    Args:
        name: Path of the folder.
        image_size: Size of a model input per axis; one integer if it is the same on every axis.
        seed: Seed of the run.
        crop: How training images are cropped, if `options` does not say.
        native: How they are cropped instead to sizes of their own, and pictures, too. Probes get
            crops of `image_size`.
        decode: How images are decoded.
        options: How arrays are read.
        find_statistics: As in `load_data`.
        share: As in `split_folder`.

    Returns:
        The data set.

    Raises:
        UserError: If the folder holds too few readable images, only some of them have classes, or
            it holds no pictures to be cropped to sizes of their own.
    """
    split = split_folder(Path(name), share, options.channels)
    train, held_out = open_sets(
        split, image_size=image_size, seed=seed, crop=crop, decode=decode, options=options
    )
    if native is not None:
        if split.form == "arrays":
            raise UserError(f"--native-size is for pictures, and {name} holds arrays: omit it")
        train = with_own_sizes(train, native)
    if isinstance(train, arrays.Arrays) and isinstance(held_out, arrays.Arrays):
        known = find_statistics(train.num_channels, train.image_size)
        train = with_statistics(train, known, share)
        held_out = dataclasses.replace(held_out, statistics=train.statistics)
    for _ in read_first(train, range(len(train)), 1, set()):
        pass  # raises an error if nothing can be read
    looked_at = held_out
    if native is not None:
        looked_at = with_own_sizes(held_out, dataclasses.replace(native, is_random=False))
    found = DataSet(
        name=name,
        in_channels=train.num_channels,
        class_names=split.class_names,
        content=split.content,
        train=train,
        pictures=Pictures(looked_at, to_unit),
        normalize=NORMALIZE,
        load_probe=partial(load_probe, split, held_out, seed) if split.class_names else None,
        image_size=train.image_size,
        held_out=held_out,
    )
    if not isinstance(train, arrays.Arrays):
        return found
    statistics = train.statistics
    assert statistics is not None
    return dataclasses.replace(
        found,
        pictures=Pictures(looked_at, statistics.to_shown),
        normalize=statistics.from_shown,
        statistics=statistics,
    )


def open_sets(
    split: Split,
    *,
    image_size: int | tuple[int, ...],
    seed: int,
    crop: Cropping,
    decode: Decoder,
    options: ArrayOptions,
) -> tuple[StoredSet, StoredSet]:
    """Make the sets of a folder: training samples, and held-out samples that are cropped alike.

    Args:
        split: The samples.
        image_size: As in `load_folder`.
        seed: As in `load_folder`.
        crop: As in `load_folder`.
        decode: As in `load_folder`.
        options: As in `load_folder`.

    Raises:
        UserError: If no sample can be opened, or a size does not fit.
    """
    chosen = None if options.crop is None else arrays.CROPS[options.crop]
    if split.form == "rgb":
        size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        if len(size) != 2:
            raise UserError(
                f"--image-size {arrays.shown_shape(size)} must have two axes for the pictures of "
                f"{split.train.root}: height and width"
            )
        center: Cropping = CenterCrops()
        if chosen is not None:
            crop, center = map(arrays.OfArray, (chosen, arrays.evaluation_crop(chosen)))
        return (
            Crops(split.train, size, seed, decode=decode, crop=crop),
            Crops(split.held_out, size, seed, decode=decode, crop=center),
        )
    default: arrays.ArrayCrop = arrays.random_box
    if split.form == "pictures":
        default = arrays.AsPicture(crop)
    opened = arrays.open_arrays(
        split.train, image_size, chosen or default, key=options.key, seed=seed
    )
    return opened, arrays.for_evaluation(opened, split.held_out)


def with_own_sizes(samples: StoredSet, crop: NativeCrops) -> StoredSet:
    """Crop pictures to sizes of their own."""
    of_form = arrays.AsPicture(crop) if isinstance(samples, arrays.Arrays) else crop
    changes: dict[str, Any] = {"crop": of_form, "sizes_differ": True}
    return dataclasses.replace(samples, **changes)


def with_statistics(train: arrays.Arrays, known: Statistics | None, share: Share) -> arrays.Arrays:
    """Let inputs be normalised by statistics, which are measured if they are not known.

    They are of 256 crops of evenly spread samples (of several crops of each, if there are fewer),
    whatever the seed.
    """

    def crops() -> Iterator[Tensor]:
        order = spread(len(train), MEASURED_CROPS)
        is_drawn = train.crop is not arrays.whole
        rounds = -(-MEASURED_CROPS // len(train)) if is_drawn else 1
        unreadable: set[int] = set()
        for number in range(rounds):
            drawn = dataclasses.replace(train, seed=number)
            for image, _ in read_first(drawn, order, MEASURED_CROPS, unreadable):
                yield image

    statistics = known or share(lambda: measure(crops()))
    return dataclasses.replace(train, statistics=statistics)


@dataclass(frozen=True, eq=False)
class Pictures(Sequence[Tensor]):
    """Some held-out pictures, read when they are looked at.

    Attributes:
        held_out: Held-out samples.
        show: Turns crops into values in [0, 1].
    """

    held_out: StoredSet
    show: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self._read)

    def __getitem__(self, index: Any) -> Any:
        return self._read[index]

    @cached_property
    def _read(self) -> list[Tensor]:
        unreadable: set[int] = set()
        found: list[Tensor] = []
        for sample_id in spread(len(self.held_out)):
            size = self.held_out.picture_size(sample_id)
            shown = dataclasses.replace(self.held_out, image_size=size)
            left = NUM_PICTURES - len(found)
            found += [p for p, _ in read_first(shown, [sample_id], min(left, 1), unreadable)]
        return [self.show(picture) for picture in found]


def spread(number: int, few: int = NUM_PICTURES) -> list[int]:
    """Order indices so that the first few are evenly spaced over all of them."""
    step = max(1, number // few)
    return [index for start in range(step) for index in range(start, number, step)]


def load_probe(split: Split, held_out: StoredSet, seed: int) -> ProbeData:
    """Read labelled images for the probes, the same number of each class where there are enough.

    Args:
        split: Images to fit a probe on, and to test it on.
        held_out: Those to test it on, with the crops of evaluation.
        seed: Seed of the run.

    Returns:
        Center crops with their labels.
    """
    num_classes = len(split.class_names)
    per_class = max(1, min(PROBE_PER_CLASS, MAX_PROBE // num_classes))

    def read(samples: Samples, part: int) -> tuple[Tensor, Tensor]:
        rng = sample_rng(seed, part)
        crops = dataclasses.replace(held_out, samples=samples)
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
