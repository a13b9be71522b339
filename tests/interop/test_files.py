"""`load_checkpoint` reads checkpoint files without running code from them."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mimkit.interop import load_checkpoint

WEIGHTS = {"norm.weight": torch.randn(3), "head.bias": torch.randn(2).bfloat16()}


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def assert_same(loaded: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("as_path", [str, Path])
def test_safetensors_are_read(tmp_path, as_path):
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert_same(load_checkpoint(as_path(tmp_path / "weights.safetensors")))


@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_are_read(tmp_path, zipped):
    torch.save(WEIGHTS, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    assert_same(load_checkpoint(tmp_path / "weights.pth"))


def test_maes_checkpoints_with_their_arguments_are_read(tmp_path):
    arguments = argparse.Namespace(lr=1e-3, output_dir="./out")
    checkpoint = {"model": WEIGHTS, "optimizer": {}, "epoch": 799, "args": arguments}
    torch.save(checkpoint, tmp_path / "checkpoint-799.pth")
    loaded = load_checkpoint(tmp_path / "checkpoint-799.pth")
    assert_same(loaded["model"])
    assert loaded["epoch"] == 799
    assert loaded["args"].lr == 1e-3


def test_a_file_that_would_run_code_is_refused(tmp_path):
    trap = tmp_path / "created by the checkpoint"
    torch.save({"model": WEIGHTS, "extra": RunsCode(trap)}, tmp_path / "trap.pth")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "trap.pth")
    assert not trap.exists()
    # Without the protection, the same file does run code.
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert trap.exists()


def test_namespaces_are_allowed_in_load_checkpoint_only(tmp_path):
    torch.save({"args": argparse.Namespace()}, tmp_path / "args.pth")
    load_checkpoint(tmp_path / "args.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "args.pth", weights_only=True)


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors"])
def test_the_error_for_a_missing_file_has_its_name(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load_checkpoint(tmp_path / name)
