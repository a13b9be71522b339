"""The data set that `--data` names."""

from pathlib import Path

from recipes.engine.data.arrays import AS_FITS, ArrayOptions
from recipes.engine.data.decode import DECODE, Decoder
from recipes.engine.data.folder import Share, alone, load_folder
from recipes.engine.data.images import Interpolation, NativeCrops, RandomCrops
from recipes.engine.data.sets import DataSet
from recipes.engine.data.statistics import FindStatistics, unknown
from recipes.engine.errors import UserError


def load_data(
    name: str,
    *,
    image_size: int | tuple[int, ...],
    seed: int,
    crop_area: tuple[float, float] = (0.2, 1.0),
    interpolation: Interpolation = "bicubic",
    native: NativeCrops | None = None,
    decode: Decoder = DECODE,
    options: ArrayOptions = AS_FITS,
    find_statistics: FindStatistics = unknown,
    share: Share = alone,
) -> DataSet:
    """Load a data set by its name.

    Args:
        name: "photos", "digits" or the path of a folder of images or arrays. A folder that is
            itself called "photos" is "./photos".
        image_size: Size of a model input per axis; one integer if it is the same on every axis.
        seed: Seed of the run, 0 or more.
        crop_area: Least and largest share of the image in a random crop; for folders only.
        interpolation: How random crops are resized; for folders only.
        native: As in `load_folder`.
        decode: How images are decoded; for folders only.
        options: How arrays are read; for folders only.
        find_statistics: Finds what arrays are normalised by: (channels, image size) -> statistics,
            or None to measure them.
        share: How several processes list a folder: `World.share`.

    Returns:
        The data set.

    Raises:
        UserError: If there is no such data set, or it has no images of this size.
    """
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if min(sides) < 1:
        raise UserError(f"image_size {sides} has an empty side; give at least 1 pixel each")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; give 0 or more")
    if Path(name).is_dir() and name not in ("photos", "digits"):
        data = load_folder(
            name,
            image_size=image_size,
            seed=seed,
            crop=RandomCrops(crop_area, interpolation),
            native=native,
            decode=decode,
            options=options,
            find_statistics=find_statistics,
            share=share,
        )
        len(data.pictures)  # read now, so that an error comes before training
        return data
    if name not in ("photos", "digits"):
        raise UserError(
            f"no data set {name!r}: choose photos, digits or an existing folder of images"
        )
    if native is not None:
        raise UserError(
            f"--native-size needs a folder of pictures: those of {name} have the size of "
            "--image-size, omit it"
        )
    if len(sides) != 2:
        raise UserError(f"image_size {sides} must have two axes for {name}: height and width")
    size = (sides[0], sides[1])

    # Imported here, because each data set needs packages that the others do not.
    if name == "photos":
        from recipes.engine.data.photos import load_photos

        return load_photos(image_size=size, seed=seed)
    from recipes.engine.data.digits import load_digits

    return load_digits(image_size=size, seed=seed)
