"""Folders as Hugging Face's `save_pretrained` writes them: `config.json`, `model.safetensors`."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from mimkit.interop._hf import Version, to_hf
from mimkit.interop._hf_config import theirs_from_encoder

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_hf(encoder: nn.Module, folder: str | Path, *, version: Version = 5) -> str:
    """Save an encoder as a folder that `AutoModel.from_pretrained` of transformers loads.

    Their class is the one that computes the same: `ViTModel`; `BeitModel` for layer scale, relative
    positions, no positions, or a norm after pooling; `Dinov2WithRegistersModel` for registers;
    `SwinModel`. With a head, it is the `...ForImageClassification` of it. Stochastic depth is left
    out. `ViTModel` has a pooler of its own, which transformers initialises at random.

    Args:
        encoder: A `nn.ViT` or `nn.SwinTransformer`.
        folder: The folder, which must be new or empty.
        version: Major version of transformers whose names the weights have.

    Returns:
        The name of their class.

    Raises:
        FileExistsError: If the folder has content, or is a file.
        ModuleNotFoundError: If safetensors is not installed.
        TypeError: If it is another module.
        ValueError: If none of their classes computes the same; nothing is written then.

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
    (architecture,) = config["architectures"]
    converted = to_hf(encoder, architecture, config, version=version)
    # Parts of one tensor of ours share its memory, which the format does not have.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in converted.items()}
    weights = save({n: t.contiguous() for n, t in tensors.items()}, metadata={"format": "pt"})
    folder = Path(folder)
    check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, weights)
    _write(folder / CONFIG, _as_json(config))  # last: a folder without it is not loaded
    return str(architecture)


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
