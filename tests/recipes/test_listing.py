"""Lists of files: order, links, pipes, classes, and what is left out."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from recipes.engine.data import listing
from recipes.engine.data.folder import split_folder
from recipes.engine.data.listing import MAX_FILE_BYTES, Files, list_files
from recipes.engine.data.load import load_data
from recipes.engine.errors import UserError
from recipes.engine.reading import UnreadableError, read_bytes

SUFFIXES = (".png", ".jpg")


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def names(files: Files) -> list[str]:
    return [os.path.relpath(files.name(index), files.root) for index in range(len(files))]


def listed(root: Path, *, labelled: bool = False) -> tuple[list[str], list[str]]:
    files, _, notes = list_files(root, SUFFIXES, labelled=labelled)
    return names(files), notes


PARTS = st.sampled_from(["a", "a-2", "a.png", "b", "B", "0", "é", "z.jpg"])


@given(paths=st.sets(st.lists(PARTS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=12))
def test_files_are_sorted_by_the_parts_of_their_paths(paths, tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    expected = set()
    for path in sorted(paths, key=len, reverse=True):
        file = root.joinpath(*path[:-1], path[-1] + ".png")
        if any((root.joinpath(*path[:end])).is_file() for end in range(1, len(path))):
            continue
        if not file.exists():
            touch(root, str(file.relative_to(root)))
            expected.add(str(file.relative_to(root)))
    found, notes = listed(root)
    assert found == sorted(expected, key=lambda path: [os.fsencode(p) for p in path.split("/")])
    assert notes == []


def test_sizes_and_content_belong_to_the_names(tmp_path):
    touch(tmp_path, "b/long name.png", "a.png", "c.png", "b/b.jpg")
    files, _, _ = list_files(tmp_path, SUFFIXES, labelled=False)
    chosen = files.subset(files.sizes > 5)
    assert names(files) == ["a.png", "b/b.jpg", "b/long name.png", "c.png"]
    assert [chosen.read(index).decode() for index in range(2)] == ["b/b.jpg", "b/long name.png"]
    assert files.sizes.tolist() == [5, 7, 15, 5]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/up", ".."),
        ("a/itself", "."),
        ("a/b/up", "../.."),
        ("0-first", "z"),  # its name comes first, but z is the real folder
        ("z/other", "../a"),
        ("a/absolute", None),
    ],
)
def test_a_link_to_a_folder_does_not_multiply_the_set(link, target, tmp_path):
    root = touch(tmp_path / "set", "a/1.png", "a/b/2.png", "z/3.png")
    before, _ = listed(root)
    (root / link).symlink_to(root if target is None else target)
    after, notes = listed(root)
    assert after == before
    assert notes == [
        f"{root} holds 1 links to what is listed already, which are not followed: {link}"
    ]


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    touch(tmp_path / "elsewhere", "x/1.png", "x/2.png")
    (tmp_path / "elsewhere" / "x" / "up").symlink_to("..")
    root = touch(tmp_path / "set", "a/1.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "c").symlink_to(tmp_path / "elsewhere" / "x")
    found, notes = listed(root)
    assert found == ["a/1.png", "b/x/1.png", "b/x/2.png"]
    assert notes == [
        f"{root} holds 2 links to what is listed already, which are not followed: c, b/x/up"
    ]


def test_the_pictures_of_a_run_whose_folder_is_among_the_images_are_no_images(tmp_path):
    root = touch(tmp_path / "set", "a.png", "runs/of-mine.png")
    before, _ = listed(root)
    touch(root, *(f"runs/x/{name}" for name in (".lock", "config.yaml", "curves.png")))
    after, notes = listed(root)
    assert after == before == ["a.png", "runs/of-mine.png"]
    assert notes == [f"{root} holds 1 runs of mimkit, whose pictures are not read: runs/x"]


def test_links_to_files_are_followed_once(tmp_path):
    touch(tmp_path / "pool", "1.png", "2.png")
    root = touch(tmp_path / "set", "a/1.png")
    (root / "a" / "copy.png").symlink_to("1.png")
    (root / "a" / "pooled.png").symlink_to(tmp_path / "pool" / "1.png")
    (root / "b.png").symlink_to(tmp_path / "pool" / "1.png")
    (root / "c.png").symlink_to(tmp_path / "pool" / "2.png")
    found, notes = listed(root)
    assert found == ["a/1.png", "a/pooled.png", "c.png"]
    assert "2 links" in notes[0]


def test_a_broken_link_is_an_image_that_cannot_be_read(tmp_path):
    root = touch(tmp_path, "1.png")
    (root / "2.png").symlink_to("nowhere")
    (root / "3.png").symlink_to("3.png")
    files, _, _ = list_files(root, SUFFIXES, labelled=False)
    assert names(files) == ["1.png", "2.png", "3.png"]
    for index in (1, 2):
        with pytest.raises(UnreadableError, match="no such file|symbolic links"):
            files.read(index)


def test_held_out_images_are_no_copies_of_training_images(tmp_path):
    root = touch(tmp_path, "train/a/1.png", "train/b/2.png")
    (root / "val").symlink_to("train")
    with pytest.raises(UserError, match="val holds no images.*links to what is listed already"):
        split_folder(root)


def test_pipes_and_devices_are_named_and_never_opened(tmp_path):
    root = touch(tmp_path, "1.png")
    os.mkfifo(root / "pipe.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "to-pipe.png").symlink_to("pipe.png")
    found, notes = listed(root)
    assert found == ["1.png"]
    assert "3 pipes or devices" in notes[0]
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(UnreadableError, match="not a regular file"):
            read_bytes(root / name, most=MAX_FILE_BYTES)


def test_a_file_without_an_end_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UnreadableError, match="more than 2,147,483,648 bytes"):
        read_bytes(tmp_path / "huge.png", most=MAX_FILE_BYTES)


def test_a_file_that_has_more_than_it_says_is_not_read():
    with pytest.raises(UnreadableError, match="more than the 0 bytes that it says"):
        read_bytes("/proc/self/status", most=MAX_FILE_BYTES)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    touch(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def refuse(path: bytes):
        if path.endswith(b"dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patched:  # pytest lists the folder, too, to remove it
        patched.setattr(listing.os, "scandir", refuse)
        with pytest.raises(UserError, match="cannot list the folder .*dog: Permission denied"):
            list_files(tmp_path, SUFFIXES, labelled=True)


def test_what_is_not_read_is_counted_and_named(tmp_path):
    touch(tmp_path, "cat/1.png", "cat/2.heic", "cat/3.HEIC", "cat/README", ".hidden/4.heic")
    (tmp_path / "dog").mkdir()
    files, class_names, notes = list_files(tmp_path, SUFFIXES, labelled=True)
    assert names(files) == ["cat/1.png"]
    assert class_names == ("cat",)
    assert notes == [
        f"3 files in {tmp_path} were not read: .heic 2, no suffix 1",
        f"{tmp_path} holds 1 folders without images, which are no classes: dog",
    ]
    assert listed(tmp_path)[1] == notes[:1]


def test_names_that_steer_a_terminal_are_printed_escaped(tmp_path, capfd):
    touch(tmp_path, *(f"{number}.png" for number in range(9)), "2.\x1b[2j")
    os.mkfifo(tmp_path / "a\x1b[2J.png")
    split_folder(tmp_path)
    printed = capfd.readouterr().err
    assert printed.lower().count(r"\x1b[2j") == printed.count("\n") == 2
    assert "\x1b" not in printed


@pytest.mark.parametrize(("has_val", "scored"), [(True, "val/ is"), (False, "the last images")])
def test_folders_beside_train_are_named_as_unused(has_val, scored, tmp_path, capfd):
    for name in ("train", "test", "extra", *(["val"] if has_val else [])):
        (tmp_path / name / "a").mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / name / "a" / f"{index}.png")
    load_data(str(tmp_path), image_size=(8, 8), seed=0)
    note = capfd.readouterr().err
    assert f"{tmp_path} holds extra, test, which is not used: {scored}" in note
    assert note.count("\n") == 1
