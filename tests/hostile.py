"""Files that are made to harm whoever reads them: each is a function of the path to write to."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# A pickle that makes a terabyte of zeros.
_ALLOCATES = b"\x80\x02c__builtin__\nbytearray\n\x8a\6" + (2**40).to_bytes(6, "little") + b"\x85R."


class RunsCode:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def trap(file: Path) -> Path:
    """Return the folder that code in a hostile file would make."""
    return file.with_name(f"{file.name} ran code")


def code(file: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2)}, "extra": RunsCode(trap(file))}, file)


def code_in_an_old_file(file: Path) -> None:
    torch.save({"a": RunsCode(trap(file))}, file, _use_new_zipfile_serialization=False)


def code_in_a_bare_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(RunsCode(trap(file)), protocol=4))


def a_dictionary_that_holds_itself(file: Path) -> None:
    contents: dict[str, Any] = {"a": torch.zeros(2)}
    contents["model"] = contents
    torch.save(contents, file)


def a_list(file: Path) -> None:
    torch.save([torch.zeros(2)], file)


def a_bare_tensor(file: Path) -> None:
    torch.save(torch.zeros(2), file)


def a_sparse_tensor(file: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, file)


def a_quantized_tensor(file: Path) -> None:
    torch.save({"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, file)


def a_tensor_without_values(file: Path) -> None:
    torch.save({"a": torch.empty(10**9, device="meta")}, file)


def a_huge_view_of_one_number(file: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, file)


def deep_nesting(file: Path) -> None:
    _with_pickle(file, b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".")


def a_huge_allocation(file: Path) -> None:
    _with_pickle(file, _ALLOCATES)


def a_storage_longer_than_its_record(file: Path) -> None:
    plain = file.with_name("plain")
    torch.save({"a": torch.zeros(4)}, plain)
    with zipfile.ZipFile(plain) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, content in parts.items():
            new.writestr(name, content.replace(b"K\x04", b"M\xff\x7f"))


def a_zip_bomb(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("a/data/0", bytes(50_000_000))


def a_zip_after_a_pickle(file: Path) -> None:
    """A checkpoint for whoever looks at its end; PyTorch reads the pickles at its start."""
    torch.save({"a": bytearray(9)}, file, _use_new_zipfile_serialization=False)
    first = file.read_bytes()
    torch.save({"a": torch.zeros(2)}, file)
    file.write_bytes(first + file.read_bytes())


def two_zips_in_one(file: Path) -> None:
    """Python's zipfile finds the second list of names, PyTorch the first."""
    bad = pickle.dumps({"a": bytearray(9)}, protocol=2)
    _with_pickle(file, bad)
    first = file.read_bytes()
    same_length = "a" * (len(bad) - len(pickle.dumps({"": 1.0}, protocol=2)))
    _with_pickle(file, pickle.dumps({same_length: 1.0}, protocol=2))
    second = file.read_bytes()
    names, end = (first.index(mark) for mark in (b"PK\1\2", b"PK\5\6"))
    combined = bytearray(first[:end] + second)
    struct.pack_into("<I", combined, len(combined) - 6, names)  # where the list of names begins
    file.write_bytes(combined)


def bytes_that_are_no_tensor(file: Path) -> None:
    size = struct.pack("<B", 4) + (2**30).to_bytes(4, "little")
    made = b"ctorch.storage\nUntypedStorage\n\x8a" + size + b"\x85R"
    _with_pickle(file, b"\x80\x02}X\x01\0\0\0a" + made + b"s.")


def an_unknown_step_in_a_pickle(file: Path) -> None:
    _with_pickle(file, b"\x80\x0200000.")


def a_byte_order_with_escapes(file: Path) -> None:
    _with_pickle(file, pickle.dumps({}, protocol=2), byteorder=b"\x1b[2J\nerror: ")


def another_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "nothing")


def endless_zeros(file: Path) -> None:
    with file.open("wb") as opened:
        opened.truncate(2**36)  # takes no space


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def a_link_to_a_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def a_folder(file: Path) -> None:
    file.mkdir()


def nothing(file: Path) -> None:
    file.touch()


def text(file: Path) -> None:
    file.write_text("weights: \x1b[2J\n" * 50)


def a_damaged_zip(file: Path) -> None:
    torch.save({"a": torch.arange(1000)}, file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _with_pickle(file: Path, content: bytes, byteorder: bytes = b"little") -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", b"3\n")
        archive.writestr("a/byteorder", byteorder)


PYTORCH: tuple[Callable[[Path], None], ...] = (
    code, code_in_an_old_file, code_in_a_bare_pickle, a_dictionary_that_holds_itself, a_list,
    a_bare_tensor, a_sparse_tensor, a_quantized_tensor, a_tensor_without_values,
    a_huge_view_of_one_number, deep_nesting, a_huge_allocation, a_storage_longer_than_its_record,
    a_zip_bomb, a_zip_after_a_pickle, two_zips_in_one, bytes_that_are_no_tensor,
    an_unknown_step_in_a_pickle, a_byte_order_with_escapes, another_zip, endless_zeros, a_pipe,
    a_link_to_a_device, a_folder, nothing, text, a_damaged_zip,
)  # fmt: skip


def _safetensors(header: Any, content: bytes = bytes(16)) -> Callable[[Path], None]:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()

    def write(file: Path) -> None:
        file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content)

    return write


def _f32(*offsets: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def an_absurd_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")


def a_header_of_gigabytes(file: Path) -> None:
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 2**33))
        opened.truncate(2**34)


def a_cut_file(file: Path) -> None:
    save_file({"a": torch.zeros(1000)}, file)
    file.write_bytes(file.read_bytes()[:-100])


SAFETENSORS: dict[str, Callable[[Path], None]] = {
    "absurd header": an_absurd_header,
    "header of gigabytes": a_header_of_gigabytes,
    "cut": a_cut_file,
    "no JSON": _safetensors(b"{{{{{{{{"),
    "a list": _safetensors([1, 2]),
    "deep": _safetensors(b'{"a":' + b"[" * 100_000),
    "overlapping": _safetensors({"a": _f32(0, 8), "b": _f32(4, 12)}),
    "out of range": _safetensors({"a": _f32(0, 2**40, shape=(2**38,))}),
    "backwards": _safetensors({"a": _f32(8, 0)}),
    "wrong size": _safetensors({"a": _f32(0, 16)}),
    "huge shape": _safetensors({"a": _f32(0, 0, shape=(2**62, 2**62, 0))}, b"\0"),
    "no such type": _safetensors({"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}),
    "not a tensor": _safetensors({"a": 3}),
    "empty": nothing,
    "pipe": a_pipe,
    "device": a_link_to_a_device,
    "folder": a_folder,
    "zeros": endless_zeros,
    "text": text,
    "a pickle": code_in_a_bare_pickle,
}

# Harmless, to be read in spite of all: a check that refused everything would pass the others.
FINE = OrderedDict(model={"a": torch.zeros(2)}, args=argparse.Namespace(lr=1.0), epoch=3)
