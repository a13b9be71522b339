"""The command `mimkit`: recipes and tools by one name, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimkit import __main__ as command

ROOT = Path(__file__).resolve().parents[2]


def run_mimkit(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    return subprocess.run(
        [sys.executable, "-m", "mimkit", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
        timeout=600,
    )


def test_help_lists_every_recipe_and_tool(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    listed = set(capsys.readouterr().out.split())
    scripts = {file.stem.replace("_", "-") for file in (ROOT / "recipes").glob("[a-z]*.py")}
    assert scripts - {"script"} <= listed
    assert set(command._TOOLS) <= listed


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["mea"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no command is called 'mea'; there are ")
    assert err.count("\n") == 1


def test_a_recipe_runs_from_any_folder_and_gives_its_exit_code(tmp_path: Path) -> None:
    planned = run_mimkit("mae", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "parameters" in planned.stdout
    wrong = run_mimkit("mae", "--mask-rato", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_names_versions_and_what_is_missing(tmp_path: Path) -> None:
    found = run_mimkit("doctor", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["versions", "device", "kernels", "found"]
    assert all(line.startswith("missing ") and ", for " in line for line in lines[4:])
