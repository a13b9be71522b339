"""Safe reading of checkpoint files."""

import argparse
from pathlib import Path
from typing import Any

import torch


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a safetensors or PyTorch checkpoint to the CPU without running code from it.

    Only tensors, plain containers and `argparse.Namespace` (in MAE's own checkpoints) are
    unpickled.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save`.

    Returns:
        The contents of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If a safetensors file is given and safetensors is not installed.
        pickle.UnpicklingError: If loading the file would run code.
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
