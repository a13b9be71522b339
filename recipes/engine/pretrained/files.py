"""Reading of given files of weights, for `--encoder`, `--tokenizer` and `--teacher`."""

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mimkit._state_dicts import unwrap
from mimkit.interop import load_checkpoint
from recipes.engine.errors import UserError, say
from recipes.engine.reading import UnreadableError, sha256_of
from recipes.engine.run.state import digest_beside


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file holds.

    Attributes:
        tensors: Tensors by name.
        digest: Hash of the file's content, eight characters.
    """

    tensors: Mapping[str, Tensor]
    digest: str


def read_weights(flag: str, path: Path) -> Weights:
    """Read a file of weights without running code from it.

    If the summary of the run that wrote the file is beside it, the file must have the digest in it.

    Args:
        flag: The option that names the file, for messages.
        path: A safetensors file or a checkpoint of PyTorch, the tensors possibly under "model".

    Raises:
        UserError: If the file cannot be read, is damaged, or holds no dictionary.
    """
    shown = f"{flag} {path}"
    try:
        contents = load_checkpoint(path)
        digest = sha256_of(path)  # after a look at the content: a file may claim any size
    except UnreadableError as error:
        raise UserError(f"{shown} cannot be read: {error}") from error
    except (OSError, ValueError, TypeError, pickle.UnpicklingError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"{reason}".removeprefix(f"{path} cannot be read: ")
        raise UserError(f"{shown} cannot be read: {reason}") from error
    try:
        tensors = unwrap(contents)
    except (TypeError, ValueError) as error:
        raise UserError(f"{shown} holds no weights: {error}") from error
    _check_digest(shown, path, digest)
    return Weights(
        {name: tensor for name, tensor in tensors.items() if _is_weight(name, tensor)}, digest[:8]
    )


def _is_weight(name: object, tensor: object) -> bool:
    return isinstance(name, str) and isinstance(tensor, Tensor)


def _check_digest(shown: str, path: Path, digest: str) -> None:
    """Compare a file with its digest in the summary of the run that wrote it."""
    try:
        expected = digest_beside(path)
    except UnreadableError as error:
        say(
            f"warning: {shown} cannot be compared with its digest: summary.json beside it is "
            f"damaged or of an earlier version of mimkit ({error})",
            file=sys.stderr,
        )
        return
    if expected not in (None, digest):
        raise UserError(
            f"{shown} is damaged: its content does not have the digest in the summary.json beside "
            "it; start the command of that run again, which writes it again"
        )


def check_finite(flag: str, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are finite numbers.

    Raises:
        UserError: If a tensor has another type, or holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        problem = None
        if tensor.is_complex():
            problem = f"is of {tensor.dtype}"
        elif tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            problem = "has values that are not finite (NaN or infinity)"
        if problem:
            raise UserError(f"{flag} {path}: {name} {problem}")
