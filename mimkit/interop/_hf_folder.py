"""Folders as Hugging Face's `save_pretrained` writes them: `config.json`, `model.safetensors`."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mimkit._arguments import checked
from mimkit.interop._hf import Version, to_hf
from mimkit.interop._hf_config import theirs_from_encoder

CONFIG, WEIGHTS, PROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
_MARGIN = 256 / 224  # what is resized over what is kept, in the papers' evaluation


@checked
def save_hf(
    encoder: nn.Module,
    folder: str | Path,
    *,
    version: Version = 5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> str:
    """Save an encoder as a folder that `AutoModel.from_pretrained` of transformers loads.

    Their class is the one that computes the same: `ViTModel`; `BeitModel` for layer scale, relative
    positions, no positions, or a norm after pooling; `Dinov2WithRegistersModel` for registers;
    `SwinModel`. With a head, it is the `...ForImageClassification` of it. Stochastic depth is left
    out. `ViTModel` has a pooler of its own, which transformers initialises at random.

    Args:
        encoder: A `nn.ViT` or `nn.SwinTransformer`.
        folder: The folder, which must be new or empty.
        version: Major version of transformers whose names the weights have.
        mean: Mean of each channel by which inputs are normalised, of pixels in [0, 1]. With it
            comes a `preprocessor_config.json`, which `AutoImageProcessor` loads: shorter side
            resized to 256/224 of the encoder's size, bicubic, and the center cropped. `None` for
            none.
        std: Standard deviation of each channel.

    Returns:
        The name of their class.

    Raises:
        FileExistsError: If the folder has content, or is a file.
        ModuleNotFoundError: If safetensors is not installed.
        TypeError: If it is another module.
        ValueError: If none of their classes computes the same, or `mean` and `std` do not fit the
            encoder; nothing is written then.

    Source:
        The folders of Hugging Face's transformers, versions 4 and 5.

    Example:
        >>> import tempfile
        >>> from mimkit import nn
        >>> encoder = nn.ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_hf(encoder, folder), sorted(path.name for path in Path(folder).iterdir())
        ('ViTModel', ['config.json', 'model.safetensors'])
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("save_hf needs safetensors: pip install safetensors") from error
    config = theirs_from_encoder(encoder)
    processor = None
    if mean is not None or std is not None:
        processor = _processor(config["image_size"], config["num_channels"], mean, std)
    (architecture,) = config["architectures"]
    converted = to_hf(encoder, architecture, config, version=version)
    # Parts of one tensor of ours share its memory, which the format does not have.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in converted.items()}
    weights = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
    folder = Path(folder)
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights)
    if processor is not None:
        _write(folder / PROCESSOR, _as_json(processor))
    _write(folder / CONFIG, _as_json(config))  # last: a folder without it is not loaded
    return str(architecture)


def _processor(
    image_size: int | list[int],
    num_channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the configuration of their image processor that does what evaluation does here."""
    if len(mean or ()) != num_channels or len(std or ()) != num_channels or min(std or (0,)) <= 0:
        raise ValueError(
            f"mean and std must be {num_channels} numbers each, those of std above 0; got "
            f"{mean} and {std}"
        )
    if not isinstance(image_size, int):
        raise ValueError(
            f"mean and std need an encoder of square images, which their image processor crops; "
            f"got {image_size}"
        )
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(image_size * _MARGIN)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [*(mean or ())],
        "image_std": [*(std or ())],
    }


def check_new_folder(folder: Path) -> None:
    """Check that a folder is new or empty.

    Raises:
        FileExistsError: If it has content, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "has content" if folder.is_dir() else "is a file"
        raise FileExistsError(f"{folder} {problem}: give a new or empty folder")


def _as_json(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, file)
