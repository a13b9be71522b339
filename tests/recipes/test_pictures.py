"""Pictures of several runs, side by side."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from recipes.engine.errors import UserError
from recipes.engine.pictures import _captions, main, place_side_by_side


def make_run(folder: Path, color: str, *, names: tuple[str, ...] = ("curves",), seed: int) -> Path:
    folder.mkdir()
    for name in names:
        Image.new("RGB", (90, 40), color).save(folder / f"{name}.png")
    config = {"recipe": "mae", "seed": seed, "model": {"dim": 8}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text("{}\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "first", "red", names=("curves", "decode_full"), seed=0),
        make_run(tmp_path / "second", "blue", names=("curves", "attention"), seed=1),
    ]


def test_what_all_runs_have_is_put_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    (written,) = place_side_by_side(runs, tmp_path / "new")
    assert written == tmp_path / "new/curves-side-by-side.png"
    pixels = np.asarray(Image.open(written))
    reds = (pixels == [255, 0, 0]).all(axis=2)
    blues = (pixels == [0, 0, 255]).all(axis=2)
    assert reds.sum() == blues.sum() == 90 * 40
    assert reds.any(axis=0).argmax() < blues.any(axis=0).argmax()  # in the order of the runs
    assert np.array_equal(reds.any(axis=1), blues.any(axis=1))  # at one height
    above = pixels[: int(reds.any(axis=1).argmax())]
    assert (above < 100).any()  # captions


def test_a_caption_leaves_out_what_a_run_does_not_have() -> None:
    configs = [{"seed": 0, "views": 2}, {"seed": 1}]
    first, second = _captions(configs, [Path("first"), Path("second")])
    assert first.split("\n") == ["first", "seed: 0", "views: 2"]
    assert second.split("\n") == ["second", "seed: 1"]


def test_a_third_run_makes_a_third_column(runs: list[Path], tmp_path: Path) -> None:
    third = make_run(tmp_path / "third", "lime", seed=2)
    two = Image.open(place_side_by_side(runs, tmp_path / "two")[0])
    three = Image.open(place_side_by_side([*runs, third], tmp_path / "three")[0])
    assert three.width > two.width
    assert three.height == two.height


def test_the_command_prints_what_it_wrote(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*map(str, runs), "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new/curves-side-by-side.png")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "summary.json").unlink(), "is not the folder of a finished run"),
        (lambda run: (run / "config.yaml").write_text("{" * 5_000), "cannot be read"),
        (lambda run: (run / "curves.png").write_bytes(b"cut off"), "is not a whole picture"),
        (lambda run: (run / "curves.png").unlink(), "no picture is in all of"),
    ],
    ids=["unfinished", "config", "picture", "nothing in common"],
)
def test_a_run_that_does_not_fit_is_one_line(
    spoil, says: str, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(runs[1])
    assert main([*map(str, runs), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_an_output_folder_that_is_a_file_is_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([*map(str, runs), "--out", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert "file cannot be written to" in error
    assert error.count("\n") == 1


def test_the_command_starts_without_a_warning(runs: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "recipes.engine.pictures"]
    result = subprocess.run(
        [*command, *map(str, runs), "--out", str(tmp_path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_one_run_is_not_enough(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more runs"):
        place_side_by_side(runs[:1], tmp_path)
