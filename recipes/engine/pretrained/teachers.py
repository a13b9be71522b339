"""Teachers: frozen encoders whose features are the target."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from mimkit._grids import per_axis
from mimkit.nn import ViT
from recipes.engine.errors import UserError
from recipes.engine.pretrained.encoders import fill_encoder, load_encoder
from recipes.engine.pretrained.shapes import ViTShape


def load_teacher(
    path: str | None,
    image_size: int | tuple[int, ...],
    patch_size: int | Sequence[int],
    in_channels: int,
) -> ViT:
    """Load a frozen encoder, and resample its position table to the image size.

    Args:
        path: `encoder.safetensors` of a run, or a checkpoint of the authors' MAE or CAE.
        image_size: Height and width of model inputs, in pixels.
        patch_size: Height and width of a patch, in pixels.
        in_channels: Channels of the images.

    Raises:
        UserError: If no file is given, or it holds no encoder, or one that does not fit the images.
    """
    if path is None:
        raise UserError(
            "--target features needs --teacher FILE: an encoder.safetensors with its config.yaml "
            "beside it, or a ViT-B/16 of the authors' MAE or CAE"
        )
    try:
        file = load_encoder(Path(path), ViTShape())
        shape = dataclasses.replace(file.shape, image_size=image_size)
        with torch.device("cpu"):  # real weights, even inside a `meta` device context
            teacher = shape.build()
            if not isinstance(teacher, ViT):
                raise UserError(f"--teacher {path} holds a {shape.kind}: give a ViT")
            fill_encoder(teacher, file)
    except UserError as error:
        raise UserError(str(error).replace("--encoder", "--teacher")) from error
    wanted = (per_axis("patch_size", patch_size, len(teacher.image_size)), in_channels)
    found = (teacher.patch_embed.patch_size, teacher.patch_embed.in_channels)
    if found != wanted:
        raise UserError(
            f"--teacher {path} takes patches of {found[0]} pixels and {found[1]} channels where "
            f"this model takes {wanted[0]} and {wanted[1]}"
        )
    return teacher.eval().requires_grad_(False)
