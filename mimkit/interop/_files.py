"""Checkpoint files, read without running what is in them."""

import argparse
from pathlib import Path
from typing import Any

import torch


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to the CPU: safetensors, or PyTorch's format with weights only.

    Nothing but tensors, plain containers and `argparse.Namespace` (which MAE's own checkpoints
    hold) is unpickled.

    Args:
        path: A `.safetensors` file, or anything that `torch.save` wrote.

    Raises:
        FileNotFoundError: No such file.
        ModuleNotFoundError: A safetensors file without the package to read it.
        pickle.UnpicklingError: A file that would run code when loaded.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"reading {path} needs safetensors: pip install safetensors"
            ) from error
        return dict(load_file(path))
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return checkpoint
