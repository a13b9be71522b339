"""Image files in a folder: list, split and read them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recipes.engine.errors import UserError

try:
    import simplejpeg
except ModuleNotFoundError:  # Pillow reads the same files, about half as fast.
    simplejpeg = None

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

# What Pillow raises for files that are missing, truncated, not images or far too large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

# A run stops when more images than this and a larger share of the data set are unreadable.
MAX_UNREADABLE = 10
MAX_UNREADABLE_SHARE = 0.01

HELD_OUT_SHARE = 0.1
# Held-out pictures of a folder whose reconstructions are shown.
NUM_PICTURES = 4


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The image files of a folder.

    Attributes:
        root: The folder.
        paths: Paths relative to the folder, encoded for the file system. They are one array,
            because reference counts would copy a list of a million strings into every worker.
        labels: Class of each file, counted from 0; all 0 without labels.
    """

    root: Path
    paths: NDArray[np.bytes_]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(self.paths[index])

    def subset(self, chosen: NDArray[np.int64] | NDArray[np.bool_]) -> ImageFiles:
        """Select files by their indices or by a boolean array."""
        return ImageFiles(self.root, self.paths[chosen], self.labels[chosen])


def list_images(root: Path, *, labelled: bool) -> tuple[ImageFiles, tuple[str, ...]]:
    """List the images in a folder and its subfolders, and their classes.

    Args:
        root: The folder.
        labelled: Whether its subfolders are classes.

    Returns:
        The files sorted by path, and the names of their classes. There are no names if no subfolder
        holds images.

    Raises:
        UserError: If there are no images, or only some of them are in subfolders.
    """
    # Sorted by parts: as whole strings, "cat-2/1.jpg" would come before "cat/1.jpg".
    paths = sorted(find_images(root), key=lambda path: path.split("/"))
    if not paths:
        raise UserError(f"{root} holds no images: expected files ending in {', '.join(SUFFIXES)}")
    classes = [path.partition("/")[0] for path in paths if "/" in path]
    if not labelled or not classes:
        return ImageFiles(root, encode(paths), np.zeros(len(paths), np.int64)), ()
    if len(classes) < len(paths):
        stray = next(path for path in paths if "/" not in path)
        raise UserError(
            f"{root / stray} has no class while other images do: "
            "move it into the folder of its class, or all images into one folder"
        )
    class_names, labels = np.unique(classes, return_inverse=True)
    return ImageFiles(root, encode(paths), labels), tuple(class_names.tolist())


def find_images(root: Path) -> Iterator[str]:
    """Find the images in a folder and its subfolders, and follow links.

    Paths are relative and use slashes.
    """
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root)
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield (inside / name).as_posix()


def encode(paths: list[str]) -> NDArray[np.bytes_]:
    """Encode paths as one array."""
    return np.array([os.fsencode(path) for path in paths])


def relabel(files: ImageFiles, names: tuple[str, ...], class_names: tuple[str, ...]) -> ImageFiles:
    """Give held-out files the class numbers of training.

    Args:
        files: The held-out files.
        names: Names of their classes.
        class_names: Names of the training classes.

    Returns:
        The files with new labels.

    Raises:
        UserError: If the training images have classes and the held-out files have none or others.
    """
    if class_names and not names:
        raise UserError(f"{files.root} has no class folders while the training images do")
    if unknown := sorted(set(names) - set(class_names)):
        raise UserError(f"{files.root / unknown[0]} is a class without training images")
    if not names:
        return files
    labels = np.array([class_names.index(name) for name in names])
    return ImageFiles(files.root, files.paths, labels[files.labels])


def hold_out(files: ImageFiles, *, labelled: bool) -> tuple[ImageFiles, ImageFiles]:
    """Split files into training files and held-out files, which are the last ones.

    Args:
        files: The files, sorted by class.
        labelled: Whether to hold out a tenth of each class, at least one image; otherwise the last
            four images of the folder.

    Returns:
        Training files and held-out files.

    Raises:
        UserError: If there are too few files to split.
    """
    counts = np.bincount(files.labels)
    if labelled:
        num_held_out = np.maximum(1, (counts * HELD_OUT_SHARE).astype(np.int64))
    else:
        num_held_out = np.minimum(NUM_PICTURES, counts // 2)
    # Rank 1 is a class's last file.
    rank = counts.cumsum()[files.labels] - np.arange(len(files))
    is_held_out = (rank <= num_held_out[files.labels]) & (counts[files.labels] > 1)
    if not is_held_out.any():
        raise UserError(
            f"{files.root} has too few images to hold one out: "
            "give two or more, or a val folder beside train"
        )
    return files.subset(~is_held_out), files.subset(is_held_out)


def read_image(path: Path) -> Image.Image:
    """Read a file as RGB, and ignore its orientation tag, as the papers' loaders do.

    Args:
        path: The file.

    Returns:
        The image.

    Raises:
        OSError: If it is not an image; or one of the other errors in `UNREADABLE`.
    """
    data = path.read_bytes()
    if simplejpeg is not None and data.startswith(b"\xff\xd8"):
        with suppress(ValueError):  # CMYK or damaged: leave it to Pillow
            return Image.fromarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
    image: Image.Image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def check_readable(files: ImageFiles, unreadable: Iterable[int]) -> None:
    """Check that few images are unreadable.

    Args:
        files: The images.
        unreadable: Indices of the images that could not be read.

    Raises:
        UserError: If more than 10 images and more than 1 % of all images are unreadable.
    """
    indices = sorted(unreadable)
    limit = max(MAX_UNREADABLE, MAX_UNREADABLE_SHARE * len(files))
    if len(indices) > limit:
        examples = ", ".join(str(files.path(index)) for index in indices[:3])
        raise UserError(
            f"{len(indices)} of {len(files)} images cannot be read, among them {examples}: "
            "remove or replace them"
        )


def first_readable(files: ImageFiles, order: Iterable[int], number: int) -> Iterator[Image.Image]:
    """Read the first images that can be read, and skip the others.

    Args:
        files: The files.
        order: Indices of the files to try.
        number: Largest number of images to read.

    Yields:
        The images.

    Raises:
        UserError: If too many cannot be read.
    """
    unreadable: set[int] = set()
    for index in order:
        if number == 0:
            return
        try:
            image = read_image(files.path(index))
        except UNREADABLE:
            unreadable.add(index)
            check_readable(files, unreadable)
            continue
        number -= 1
        yield image
