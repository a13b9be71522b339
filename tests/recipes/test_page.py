"""The HTML page of one run or several."""

import errno
import json
import os
import stat
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from mimkit import viz
from mimkit._text import escaped
from recipes.engine.page import main
from recipes.engine.pictures import main as pictures
from recipes.engine.pretrained.export import main as export
from recipes.engine.reading import seal
from recipes.engine.run.state import DIGESTS


class Page(HTMLParser):
    """Collects the tags of a page, what its tags point to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.targets += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_data(self, data):
        self.texts.append(data)


def make_run(folder: Path, *, dim: int, loss: float) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"model:\n  dim: {dim}\n  depth: 2\n")
    summary = {"steps": 2, "probes": {"knn": {"trained": 62.5}}, DIGESTS: {}}
    (folder / "summary.json").write_text(json.dumps(seal(summary)))
    rows = [
        {"step": step, "loss": loss, "images_per_s": 1.0, "baselines": {"zero": 1.0}}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    viz.panel([[torch.zeros(3, 8, 8)]], ["input"]).save(folder / "reconstructions.png")
    return folder


def test_a_page_of_two_runs_holds_everything_in_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "first", dim=96, loss=0.5)
    make_run(tmp_path / "<b>second", dim=128, loss=0.25)
    assert main(["first", "<b>second", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    page = Page(Path("page.html").read_text())
    assert "script" not in page.tags
    assert "b" not in page.tags  # the name of a folder stays text
    assert page.tags.count("img") == 2
    assert page.tags.count("svg") == 1
    outside = [t for t in page.targets if not t.startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    for text in ("62.5", "model.dim", "96", "128", "<b>second"):
        assert text in page.texts
    assert main(["first", "--out", "page.html"]) == 0  # a page of ours is replaced


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "summary.json").unlink(), "it has no summary.json"),
        (lambda run: (run / "summary.json").write_text("{}"), "it has no digest"),
        (lambda run: (run / "config.yaml").write_text("[1]"), "config.yaml is not of a run"),
    ],
)
def test_a_run_that_is_not_whole_is_named(damage, message, tmp_path, capsys):
    run = make_run(tmp_path / "run", dim=8, loss=1.0)
    damage(run)
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def unread(file):
    """Return what reading a file leaves as it is: all that is known of it but its access time."""
    known = file.lstat()
    return known[: stat.ST_ATIME], known.st_mtime_ns


@pytest.mark.parametrize(
    "make",
    [
        lambda file: file.write_text("mine"),
        os.mkfifo,
        lambda file: file.mkdir(),
        lambda file: file.symlink_to("elsewhere.html"),
    ],
    ids=["file", "pipe", "folder", "link"],
)
def test_what_is_no_page_is_not_replaced(make, tmp_path, capsys):
    run = make_run(tmp_path / "run", dim=8, loss=1.0)
    other = tmp_path / "notes.html"
    make(other)
    before = unread(other)
    assert main([str(run), "--out", str(other)]) == 2
    err = capsys.readouterr().err
    assert "is not a page of this command" in err
    assert err.count("\n") == 1
    assert unread(other) == before


NAMES = ["$\\frac{$", "$x_$", "a\nb\x1b[2J", "\u202eabc", os.fsdecode(b"\xff"), "\u65e5", "n" * 200]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_any_letters_are_shown_and_nothing_else_is_printed(name, tmp_path, capfd):
    first, second = (make_run(tmp_path / n, dim=8, loss=1.0) for n in ("other", name))
    viz.panel([[torch.zeros(3, 8, 8)]], ["input"]).save(second / f"{name}.png")
    for runs in ([second], [first, second]):
        assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
        assert capfd.readouterr().err == ""
        page = (tmp_path / "page.html").read_text()
        assert not set(page) & {"\x1b", "\u202e"}
        assert escaped(name) in Page(page).texts


def test_foreign_values_in_a_summary_and_a_configuration_are_escaped(tmp_path):
    run = make_run(tmp_path / "run", dim=8, loss=1.0)
    (run / "summary.json").write_text(json.dumps(seal({"<b>\x1b[2J": "<i>\x1b[2J", DIGESTS: {}})))
    (run / "config.yaml").write_text('"<u>\\e[2J": "<s>\\e[2J"\n')
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "\x1b" not in page
    assert not {"b", "i", "u", "s"} & set(Page(page).tags)


def test_a_row_without_the_predictors_of_the_others_is_shown_with_them(tmp_path):
    run = make_run(tmp_path / "run", dim=8, loss=1.0)
    row = {"step": 3, "loss": 0.5, "images_per_s": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.write(json.dumps({**row, "step": 4, "baselines": {"one": 2.0}}) + "\n")
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("path", ["a\0b", "a" * 256, "a/" * 3000], ids=["null", "long", "deep"])
@pytest.mark.parametrize("command", [main, pictures, export])
def test_what_cannot_be_a_path_is_refused_in_one_line(command, path, tmp_path, capfd):
    run = str(make_run(tmp_path / "run", dim=8, loss=1.0))
    for arguments in ([path, run], [run, path], [run, run, "--out", path]):
        assert command(arguments) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1
        assert len(error) < 1_000


def test_a_file_of_somebody_else_with_a_temporary_name_stays(tmp_path, monkeypatch):
    run = str(make_run(tmp_path / "run", dim=8, loss=1.0))
    out = tmp_path / "out"
    out.mkdir()
    mine = [out / f"{name}{end}" for name in ("page.html", "reconstructions-side-by-side.png")
            for end in (".partial", ".1.partial")]  # fmt: skip
    for file in mine:
        file.write_text("mine")
    assert main([run, "--out", str(out / "page.html")]) == 0
    assert pictures([run, run, "--out", str(out)]) == 0
    assert [file.read_text() for file in mine] == ["mine"] * 4
    before = sorted(out.iterdir())
    monkeypatch.setattr(os, "fsync", full_disk)
    assert main([run, "--out", str(out / "page.html")]) == 2
    assert sorted(out.iterdir()) == before


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
