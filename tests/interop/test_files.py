"""`load_checkpoint` reads checkpoint files without running code from them."""

import argparse
import io
import os
import pickle
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mimkit._state_dicts import unwrap
from mimkit.interop import load_checkpoint
from tests import hostile

WEIGHTS = {"norm.weight": torch.randn(3), "head.bias": torch.randn(2).bfloat16()}


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
    torch.save({"model": WEIGHTS, "extra": hostile.RunsCode(trap)}, tmp_path / "trap.pth")
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


LEAST_MEMORY = 2**31  # bytes: far less than what the hostile files ask for


@pytest.fixture
def little_memory():
    """Let this process use two gigabytes more of address space than it does."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LEAST_MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("write", hostile.PYTORCH, ids=lambda write: write.__name__)
def test_a_hostile_pytorch_file_gives_one_clear_error(write, tmp_path, little_memory):
    file = tmp_path / "weights.pth"
    write(file)
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)) as caught:
        load_checkpoint(file)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert not hostile.trap(file).exists()


@pytest.mark.parametrize("kind", hostile.SAFETENSORS)
def test_a_hostile_safetensors_file_gives_one_clear_error(kind, tmp_path, little_memory):
    file = tmp_path / "weights.safetensors"
    hostile.SAFETENSORS[kind](file)
    with pytest.raises((ValueError, OSError)) as caught:
        load_checkpoint(file)
    assert str(caught.value).isprintable()


def test_plain_pytorch_would_run_the_code_or_use_the_memory(tmp_path):
    file = tmp_path / "weights.pth"
    for write in (hostile.code, hostile.code_in_an_old_file):
        write(file)
        torch.load(file, weights_only=False)
        assert hostile.trap(file).exists()
        hostile.trap(file).rmdir()
    hostile.a_huge_view_of_one_number(file)
    assert torch.load(file, weights_only=True)["a"].nbytes == 2**42
    torch.save(hostile.FINE, file)
    assert load_checkpoint(file)["epoch"] == 3


@given(st.data())
@settings(max_examples=50)
def test_a_file_with_any_byte_changed_is_read_or_refused_with_a_sentence(data):
    buffer = io.BytesIO()
    is_zip = data.draw(st.booleans())
    torch.save(WEIGHTS, buffer, _use_new_zipfile_serialization=is_zip)
    content = bytearray(buffer.getvalue())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "weights.pth").write_bytes(content)
        said = ""
        try:
            assert isinstance(load_checkpoint(file), dict)
        except (ValueError, pickle.UnpicklingError) as error:
            said = str(error)
        assert said.isprintable()
        assert "weights_only" not in said  # PyTorch's advice to read it unchecked


def test_a_file_with_countless_ways_to_its_weights_is_no_endless_loop(tmp_path):
    contents = WEIGHTS
    for _ in range(50):
        contents = {"one": contents, "other": contents}
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="several state dicts in one dictionary") as caught:
        unwrap(load_checkpoint(tmp_path / "weights.pth"))
    assert len(str(caught.value)) < 200


def test_safetensors_are_read_from_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(save(WEIGHTS))
    assert_same(load_checkpoint(folder / "a.safetensors"))
