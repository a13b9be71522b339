"""Safe reading of checkpoint files of other people."""

import argparse
import pickle
import pickletools
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mimkit._text import escaped

# What a pickle of weights needs. PyTorch's own list is longer: it has functions that allocate
# memory, and tensors that are sparse, quantized or without values.
_ALLOWED = {
    "collections OrderedDict",
    "collections defaultdict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",  # of newer dtypes
    "torch._utils _rebuild_parameter",
    "torch Size",
    "torch.storage UntypedStorage",
    "argparse Namespace",  # the options in MAE's own checkpoints
    "__builtin__ set",
}
_MOST_PICKLE_BYTES = 64_000_000
_MOST_HEADER_BYTES = 64_000_000
_DEEPEST = 64
_ZIP = b"PK\3\4"


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a safetensors or PyTorch checkpoint to the CPU without running code from it.

    Only dense tensors, plain containers and `argparse.Namespace` (in MAE's own checkpoints) are
    unpickled. A file cannot make this function use much more memory than its own size.

    Args:
        path: A `.safetensors` file, or a file written by `torch.save`.

    Returns:
        The contents of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ModuleNotFoundError: If a safetensors file is given and safetensors is not installed.
        pickle.UnpicklingError: If loading the file would run code.
        ValueError: If it is not a regular file, is damaged, or holds no dictionary.

    Source:
        mimkit's own. `torch.load(weights_only=True)` allows more functions, among them some that
        allocate memory.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"cls_token": torch.zeros(1, 1, 8)}, f"{folder}/model.pth")
        ...     list(load_checkpoint(f"{folder}/model.pth"))
        ['cls_token']
    """
    path = Path(path)
    size = _size_of(path)
    try:
        if path.suffix == ".safetensors":
            contents: Any = _read_safetensors(path, size)
        else:
            _check_pickles(path, size)
            contents = _unpickle(path)
        if not isinstance(contents, dict):
            kind = type(contents).__name__
            raise ValueError(f"it holds a {kind}, where a dictionary of tensors is expected")
        _check_values(contents)
    except (pickle.UnpicklingError, ModuleNotFoundError):
        raise
    except OSError as error:  # such as a disk that cannot be read
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # damaged files make PyTorch raise errors of every kind
        raise ValueError(f"{path} cannot be read: it is damaged") from error
    return contents


def _size_of(path: Path) -> int:
    """Return the size of a regular file; a pipe or a device may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} cannot be read: it is not a regular file")
    return status.st_size


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load, load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {path} needs safetensors: pip install safetensors"
        ) from error
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if not 2 <= header <= min(size - 8, _MOST_HEADER_BYTES):
        raise ValueError("it is not a safetensors file, or its end is missing")
    try:
        # safetensors opens no file whose name is not UTF-8.
        is_utf8 = not any("\ud800" <= letter <= "\udfff" for letter in str(path))
        return dict(load_file(path) if is_utf8 else load(path.read_bytes()))
    except SafetensorError as error:
        reason = escaped(error)
        raise ValueError(f"it is not a safetensors file, or it is damaged ({reason})") from error


def _check_pickles(path: Path, size: int) -> None:
    """Check what a file of `torch.save` asks for, before PyTorch reads it.

    A file can be a zip file for one reader, and a pickle or another zip file for the next. It is
    taken for what PyTorch takes it for: by its first bytes, without anything before or after it.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start == _ZIP:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if archive.comment or min((e.header_offset for e in entries), default=1) != 0:
                raise ValueError("it is a zip file with something else before or after it")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its parts are larger than the file")
            pickles = [e for e in entries if e.filename.split("/")[1:] == ["data.pkl"]]
            if len(pickles) != 1 or len({e.filename.split("/")[0] for e in entries}) != 1:
                raise ValueError("it is a zip file, but not one of torch.save")
            with archive.open(pickles[0]) as file:
                _check_globals(_Limited(file))
        return
    if start[:1] != pickle.PROTO:
        raise ValueError("it is neither a safetensors file nor a checkpoint of PyTorch")
    with path.open("rb") as file:
        limited = _Limited(file)
        for _ in range(5):  # magic number, version, machine, contents, names of storages
            _check_globals(limited)


class _Limited:
    """A file whose pickles end within a number of bytes."""

    def __init__(self, file: IO[bytes] | zipfile.ZipExtFile) -> None:
        self._file = file
        self._left = _MOST_PICKLE_BYTES

    def read(self, size: int) -> bytes:
        return self._counted(self._file.read(min(size, self._left)))

    def readline(self) -> bytes:
        return self._counted(self._file.readline(self._left))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left == 0:
            raise ValueError(f"its pickle has more than {_MOST_PICKLE_BYTES:,} bytes")
        return data


def _check_globals(file: _Limited) -> None:
    """Check the functions and classes that a pickle asks for."""
    for opcode, argument, _ in pickletools.genops(file):  # type: ignore[arg-type]
        if opcode.name in ("STACK_GLOBAL", "INST") or "EXT" in opcode.name:
            raise pickle.UnpicklingError("it asks for code in a way that torch.save never does")
        name = str(argument)
        if opcode.name == "GLOBAL" and not _is_allowed(name):
            wanted = ascii(name.replace(" ", "."))[1:-1]
            raise pickle.UnpicklingError(
                f"it asks for {wanted:.100}, which weights do not need: reading it could run code"
            )


def _is_allowed(name: str) -> bool:
    module, _, attribute = name.partition(" ")
    if module == "torch" and attribute.endswith("Storage"):
        return attribute[0].isupper() and not attribute.startswith("Q")  # Q: quantized
    is_dtype = module == "torch" and isinstance(vars(torch).get(attribute), torch.dtype)
    return name in _ALLOWED or is_dtype


def _unpickle(path: Path) -> Any:
    allowed: list[Any] = [argparse.Namespace]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about protocols of pickles
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, ValueError) as error:
            # Its text is pages long, repeats what is in the file, and advises to read it unchecked.
            raise ValueError("it is damaged") from error


def _check_values(contents: dict[str, Any]) -> None:
    """Check every tensor in nested containers, which must end."""
    checked: set[int] = set()

    def check(value: Any, above: tuple[int, ...]) -> None:
        if id(value) in above:
            raise ValueError("a container in it holds itself")
        if len(above) > _DEEPEST:
            raise ValueError("its containers are nested too deeply")
        if id(value) in checked:
            return
        if isinstance(value, Tensor):
            _check_tensor(value)
        if isinstance(value, torch.UntypedStorage):  # made by the pickle, of any size
            raise ValueError("it holds bytes that are no tensor")
        for inner in _inside(value):
            check(inner, (*above, id(value)))
        checked.add(id(value))

    check(contents, ())


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    elif isinstance(value, argparse.Namespace):
        yield from vars(value).values()


def _check_tensor(tensor: Tensor) -> None:
    is_plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not is_plain or tensor.device.type != "cpu":
        raise ValueError("it holds a tensor that is sparse, quantized or without values")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"it holds a tensor of shape {tuple(tensor.shape)} that is larger than its content"
        )
