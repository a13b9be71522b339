"""The data set that `--data` names."""

from pathlib import Path

from recipes.engine.data.decode import DECODE, Decoder
from recipes.engine.data.folder import Share, alone, load_folder
from recipes.engine.data.images import Interpolation
from recipes.engine.data.sets import DataSet
from recipes.engine.errors import UserError


def load_data(
    name: str,
    *,
    image_size: tuple[int, ...],
    seed: int,
    crop_area: tuple[float, float] = (0.2, 1.0),
    interpolation: Interpolation = "bicubic",
    decode: Decoder = DECODE,
    share: Share = alone,
) -> DataSet:
    """Load a data set by its name.

    Args:
        name: "photos", "digits" or the path of a folder of images. A folder that is itself called
            "photos" is "./photos".
        image_size: Height and width of a model input in pixels.
        seed: Seed of the run, 0 or more.
        crop_area: Least and largest share of the image in a random crop; for folders only.
        interpolation: How random crops are resized; for folders only.
        decode: How images are decoded; for folders only.
        share: How several processes list a folder: `World.share`.

    Returns:
        The data set.

    Raises:
        UserError: If there is no such data set, or it has no images of this size.
    """
    if len(image_size) != 2:
        raise UserError(f"image_size {image_size} must have two axes for {name}: height and width")
    if min(image_size) < 1:
        raise UserError(f"image_size {image_size} has an empty side; give at least 1 pixel each")
    if seed < 0:
        raise UserError(f"seed {seed} is negative; give 0 or more")

    size = (image_size[0], image_size[1])

    # Imported here, because each data set needs packages that the others do not.
    if name == "photos":
        from recipes.engine.data.photos import load_photos

        return load_photos(image_size=size, seed=seed)
    if name == "digits":
        from recipes.engine.data.digits import load_digits

        return load_digits(image_size=size, seed=seed)
    if Path(name).is_dir():
        from recipes.engine.data.images import RandomCrops

        crops = RandomCrops(crop_area, interpolation)
        return load_folder(name, image_size=size, seed=seed, crop=crops, decode=decode, share=share)
    raise UserError(f"no data set {name!r}: choose photos, digits or an existing folder of images")
