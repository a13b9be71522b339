"""Shards: packing, ids, the index, and damage."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import pack
from recipes.engine import run
from recipes.engine.data.arrays import ArrayOptions
from recipes.engine.data.load import load_data
from recipes.engine.data.shards import INDEX, find_shards, list_shards, make_index
from recipes.engine.errors import UserError
from recipes.mae import RECIPE

QUICK = ["--workers", "0"]


def write_images(root: Path, paths: list[str], side: int = 24) -> Path:
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / path)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [f"train/{label}/{i:02}.png" for label in ("cat", "cat-2", "dog") for i in range(6)]
    names += [f"val/{label}/{i:02}.jpg" for label in ("cat", "dog") for i in range(3)]
    write_images(tmp_path / "set", [*names, "train/dog/03.jpg"])
    (tmp_path / "set" / "train" / "cat" / "01.png").write_bytes(b"no image at all")
    return tmp_path / "set"


def packed(folder: Path, out: Path, *options: str) -> Path:
    assert pack.main([str(folder), str(out), "--shard-size", "20KB", *QUICK, *options]) == 0
    return out


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_shards_have_the_items_classes_and_ids_of_their_folder(folder, workers, tmp_path):
    out = packed(folder, tmp_path / "out", "--workers", workers)
    assert len(find_shards(out / "train")) > 1
    one, other = (load_data(str(path), image_size=(16, 16), seed=0) for path in (folder, out))
    assert one.class_names == other.class_names == ("cat", "cat-2", "dog")
    assert len(one.train) == len(other.train) == 19
    indices = [(epoch, sample_id) for epoch in range(2) for sample_id in range(19)]
    batch, packed_batch = one.train.__getitems__(indices), other.train.__getitems__(indices)
    assert torch.equal(batch.images, packed_batch.images)
    assert batch.unreadable_ids == packed_batch.unreadable_ids == [1, 1]
    for pair in zip(one.pictures, other.pictures, strict=True):
        assert torch.equal(*pair)
    probes = one.load_probe(), other.load_probe()
    assert torch.equal(probes[0].test_images, probes[1].test_images)
    assert torch.equal(probes[0].train_labels, probes[1].train_labels)
    assert "cat/00.png" in other.train.describe(0)


def test_items_of_shards_survive_pickling(folder, tmp_path):
    train = load_data(str(packed(folder, tmp_path / "out")), image_size=(8, 8), seed=0).train
    first = train[0, 0][0]
    assert torch.equal(pickle.loads(pickle.dumps(train))[0, 0][0], first)


def test_without_labels_or_val_the_same_images_are_held_out(tmp_path):
    folder = write_images(tmp_path / "set", [f"{i}.png" for i in range(9)] + ["b/1.png", "0/2.png"])
    out = packed(folder, tmp_path / "out")
    one, other = (load_data(str(path), image_size=(8, 8), seed=0) for path in (folder, out))
    assert len(one.train) == len(other.train) == 7
    for sample_id in range(7):
        assert torch.equal(one.train[0, sample_id][0], other.train[0, sample_id][0])
    assert other.class_names == ()


def test_files_that_differ_in_their_ending_get_different_keys(tmp_path):
    folder = write_images(tmp_path / "set", ["a.png", "a.jpg", "a.b.png", "a_b.jpg", "c.png"])
    out = packed(folder, tmp_path / "out")
    one, other = (load_data(str(path), image_size=(8, 8), seed=0) for path in (folder, out))
    for sample_id in range(len(one.train)):
        assert torch.equal(one.train[0, sample_id][0], other.train[0, sample_id][0])


def test_large_images_are_resized_and_small_ones_are_copied(tmp_path):
    folder = write_images(tmp_path / "set", ["small.png", "small-2.png"], side=16)
    write_images(folder, ["large.png", "large-2.png"], side=64)
    out = packed(folder, tmp_path / "out", "--short-side", "32")
    with tarfile.open(out / "shard-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert files["small.png"] == (folder / "small.png").read_bytes()
    assert Image.open(io.BytesIO(files["large.jpg"])).size == (36, 32)


def test_packing_continues_after_the_last_complete_shard(folder, tmp_path, monkeypatch):
    whole = packed(folder, tmp_path / "whole")
    verify, calls = pack.verify_shard, []

    def stop(file: Path, written: object) -> None:
        calls.append(file.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        verify(file, written)

    monkeypatch.setattr(pack, "verify_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        packed(folder, tmp_path / "out")
    with pytest.raises(UserError, match="not finished"):
        load_data(str(tmp_path / "out"), image_size=(8, 8), seed=0)
    packed(folder, tmp_path / "out")
    assert calls[:3] == ["shard-000000.partial", "shard-000001.partial", "shard-000001.partial"]
    for part in ("train", "val"):
        for name in find_shards(whole / part):
            ours = tmp_path / "out" / part / name
            assert ours.read_bytes() == (whole / part / name).read_bytes()
    assert packed(folder, tmp_path / "out")  # once more: nothing is left to do


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "50"], "another quality"),
        (["--shard-size", "1MB"], "another shard_size"),
        (["--shard-size", "big"], "big is no size"),
        (["--quality", "0"], "quality"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, message, folder, tmp_path, capfd):
    packed(folder, tmp_path / "out")
    capfd.readouterr()
    arguments = [str(folder), str(tmp_path / "out"), "--shard-size", "20KB", *QUICK, *options]
    assert pack.main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_holds_something_else_is_not_written_to(folder, tmp_path, capfd):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "mine.txt").write_text("mine")
    assert pack.main([str(folder), str(tmp_path / "out"), *QUICK]) == 2
    assert "holds mine.txt: choose a new folder" in capfd.readouterr().err
    assert [file.name for file in (tmp_path / "out" / "train").iterdir()] == ["mine.txt"]


def test_a_shard_that_does_not_hold_what_was_written_is_an_error(tmp_path):
    write_tar(tmp_path / "one.tar", [("a.png", png())])
    with pytest.raises(UserError, match="differs from what was written"):
        pack.verify_shard(tmp_path / "one.tar", [("a.png", b"another hash")])


# Shards of others


def test_classes_come_from_cls_or_json(tmp_path):
    members = []
    for key, label in (("a", "10"), ("b", "9"), ("c", "9"), ("d", "10")):
        members += [(f"{key}.png", png()), (f"{key}.cls", label.encode())]
    members += [("e.json", json.dumps({"label": 9}).encode()), ("e.png", png()), ("e.txt", b"x")]
    (tmp_path / "train").mkdir()
    write_tar(tmp_path / "train" / "x-0.tar", members)
    data = load_data(str(tmp_path), image_size=(8, 8), seed=0)
    assert data.class_names == ("9", "10")
    split = data.load_probe.args[0]
    assert split.train.labels.tolist() == [1, 0, 0]
    assert split.held_out.labels.tolist() == [1, 0]


def test_a_missing_index_is_made_again(folder, tmp_path, capfd):
    out = packed(folder, tmp_path / "out")
    before = load_data(str(out), image_size=(8, 8), seed=0)
    capfd.readouterr()
    (out / "train" / INDEX).unlink()
    after = load_data(str(out), image_size=(8, 8), seed=0)
    assert f"had no {INDEX}: one was written" in capfd.readouterr().err
    assert before.content == after.content
    assert (out / "train" / INDEX).exists()


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, "its last block"])
def test_a_shard_that_is_cut_is_one_line(keep, has_index, folder, tmp_path):
    out = packed(folder, tmp_path / "out")
    shard = out / "train" / "shard-000000.tar"
    data = shard.read_bytes()
    if keep == "its last block":
        end = len(data.rstrip(b"\0"))
        shard.write_bytes(data[: -(-end // 512) * 512])
    else:
        shard.write_bytes(data[: int(keep * len(data))])
    if not has_index:
        (out / "train" / INDEX).unlink()
    message = "shard-000000.tar has .* bytes, but" if has_index else "cut or damaged|hold no images"
    with pytest.raises(UserError, match=message):
        load_data(str(out), image_size=(8, 8), seed=0)


def test_a_shard_that_is_missing_or_new_is_one_line(folder, tmp_path):
    out = packed(folder, tmp_path / "out")
    (out / "train" / "shard-000001.tar").rename(out / "train" / "shard-9.tar")
    with pytest.raises(UserError, match=r"shard-000001\.tar is missing, but"):
        load_data(str(out), image_size=(8, 8), seed=0)


@pytest.mark.parametrize("damage", ["cut", "noise", "numbers"])
def test_a_damaged_index_is_one_line(damage, folder, tmp_path):
    out = packed(folder, tmp_path / "out")
    file = out / "train" / INDEX
    if damage == "numbers":
        content = dict(np.load(file))
        content["offsets"] = content["offsets"] + 10**9
        np.savez(file, **content)
    else:
        file.write_bytes(file.read_bytes()[:200] if damage == "cut" else b"noise" * 50)
    with pytest.raises(UserError, match="index .* is damaged: remove it"):
        load_data(str(out), image_size=(8, 8), seed=0)


WRONG_COLUMNS = {
    "fractions": lambda column: np.full(column.shape, 0.5),
    "complex": lambda column: np.zeros(column.shape, complex),
    "text": lambda column: np.full(column.shape, "x") if column.dtype.kind != "U" else None,
    "another axis": lambda column: column.reshape(-1, 1),
    "an entry more": lambda column: np.append(column, column[-1:]) if column.ndim else None,
    "below": lambda column: column.astype(int) - 2**40 if column.dtype.kind == "i" else None,
    "above": lambda column: np.full(column.shape, 2**62) if column.dtype.kind == "i" else None,
}


@pytest.mark.parametrize("kind", WRONG_COLUMNS)
def test_whatever_is_wrong_in_an_index_is_one_line(kind, tmp_path):
    write_tar(tmp_path / "x.tar", [("a/1.png", png(0)), ("b/2.png", png(1))])
    index = make_index(tmp_path, ["x.tar"], (".png",))
    tried = 0
    for name, column in index.items():
        wrong = WRONG_COLUMNS[kind](column)
        if wrong is None or (name == "skipped" and kind in ("below", "above")):
            continue
        np.savez(tmp_path / INDEX, **{**index, name: wrong})
        with pytest.raises(UserError, match=r"index .* is damaged: remove it|says"):
            list_shards(tmp_path, ["x.tar"], (".png",), labelled=True)
        tried += 1
    assert tried >= 6


def test_an_index_that_claims_more_than_is_in_it_is_not_read(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(0))])
    np.savez_compressed(tmp_path / INDEX, text=np.zeros(10**7, np.uint8))
    with pytest.raises(UserError, match="index .* is damaged: remove it"):
        list_shards(tmp_path, ["x.tar"], (".png",), labelled=True)


def odd_shard(file: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "many long names":
        long = tarfile.TarInfo("././@LongLink")
        long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1
        file.write_bytes((long.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 3_000)
    else:
        member = tarfile.TarInfo("a.png")
        member.pax_headers = {"GNU.sparse.map": "x,y"}
        with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(member)


@pytest.mark.parametrize(
    "kind", ["pipe", "device", "link to itself", "many long names", "a map that is no numbers"]
)
def test_a_shard_that_is_something_else_is_one_line(kind, tmp_path):
    odd_shard(tmp_path / "x.tar", kind)
    with pytest.raises(UserError, match=r"shard .*x\.tar (cannot be read|is cut or damaged)"):
        list_shards(tmp_path, ["x.tar"], (".png",), labelled=True)


@pytest.mark.parametrize("second", ["a.png", "a.jpg"])
def test_two_images_with_one_key_are_one_line(second, tmp_path):
    write_tar(tmp_path / "x.tar", [("a.png", png(0)), (second, png(1))])
    with pytest.raises(UserError, match=rf"two images with the key a: a\.png and {second}"):
        load_data(str(tmp_path), image_size=(8, 8), seed=0)


@pytest.mark.parametrize(("kind", "channels"), [(np.uint8, None), (np.uint16, "keep")])
def test_stacks_of_bands_are_the_same_arrays_in_shards(kind, channels, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.engine.data.folder.MEASURED_CROPS", 6)
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "set").mkdir()
    for index in range(6):
        bands = np.random.default_rng(index).integers(0, 255, (13, 20, 20)).astype(kind)
        tifffile.imwrite(tmp_path / f"set/{index}.tif", bands)
    out = packed(tmp_path / "set", tmp_path / "packed", "--short-side", "12")
    options = ArrayOptions(channels=channels)
    before, after = (
        load_data(str(folder), image_size=(8, 8), seed=0, options=options)
        for folder in (tmp_path / "set", out)
    )
    assert after.in_channels == before.in_channels == 13
    assert after.statistics == before.statistics
    for index in ((0, 0), (3, 1)):
        assert torch.equal(after.train[index][0], before.train[index][0])


@pytest.mark.parametrize("pictures", [0, 2])
def test_arrays_are_not_packed_but_named_in_one_line(pictures, tmp_path, capfd):
    folder = write_images(tmp_path / "set", [f"{i}.png" for i in range(pictures)])
    folder.mkdir(exist_ok=True)
    for index in range(3):
        np.save(folder / f"{index}.npy", np.ones((2, 12, 14)))
    assert pack.main([str(folder), str(tmp_path / "out"), "--workers", "0"]) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1
    assert "arrays (.npy), which are not packed: give the folder itself as --data" in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_a_run_on_shards_has_the_losses_of_a_run_on_the_folder(tmp_path):
    folder = write_images(tmp_path / "set", [f"{i:02}.png" for i in range(16)])
    out = packed(folder, tmp_path / "packed")
    losses = []
    for data, workers in ((folder, "0"), (out, "0"), (out, "1")):
        path = tmp_path / f"run-{data.name}-{workers}"
        options = ["--data", str(data), "--out", str(path), "--epochs", "3", "--batch-size", "4"]
        assert run(RECIPE, "", [*options, "--workers", workers, "--log-every", "1"]) == 0
        rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows])
    assert len(losses[0]) == 9
    assert losses[0] == losses[1] == losses[2]
