"""The command `mimkit`: recipes and tools by one name, from any folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mimkit
from mimkit import __main__ as command
from mimkit import _completion, _doctor

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
    assert scripts - {"script", "signals"} <= listed  # which are no commands
    assert not {"script", "signals"} & listed
    assert set(command._TOOLS) <= listed


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["mea"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: no command is called 'mea' (perhaps 'mae'); there are cae, ")
    assert err.count("\n") == 1
    assert command.main(["--frobnicate"]) == 2
    assert "called '--frobnicate'; there are " in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mimkit {mimkit.__version__}\n"


def complete(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    line = " ".join(map(shlex.quote, words))
    code = f"{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _mimkit\n"
    code += "printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("shell", _completion.SHELLS)
def test_commands_options_and_words_are_completed(shell: str) -> None:
    options = {"mae": {"--device": ("auto", "cpu"), "--data": ()}, "masks": {}}
    script = _completion.script(shell, options).removeprefix(_completion._ZSH)
    assert complete(script, "mimkit", "") == ["mae", "masks"]
    assert complete(script, "mimkit", "mas") == ["masks"]
    assert complete(script, "mimkit", "mae", "--da") == ["--data"]
    assert complete(script, "mimkit", "mae", "--device", "c") == ["cpu"]
    assert complete(script, "mimkit", "mae", "--data", "c") == []  # then, names of files
    assert complete(script, "mimkit", "masks", "--") == []
    assert complete(script, "mimkit", "unknown", "") == []


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_printed_completion_knows_the_options_of_every_recipe(tmp_path: Path) -> None:
    printed = run_mimkit("--print-completion", "bash", cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    commands = complete(printed.stdout, "mimkit", "")
    assert {"mae", "probe", "doctor"} <= set(commands)
    for name in set(commands) - set(command._TOOLS):
        assert "--help" in complete(printed.stdout, "mimkit", name, "--"), name
    assert complete(printed.stdout, "mimkit", "mae", "--device", "") == ["auto", "cpu", "cuda"]
    assert list(tmp_path.iterdir()) == []


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--print-completion", "fish"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: --print-completion takes bash or zsh; got fish\n")


@pytest.mark.full
def test_a_recipe_runs_from_any_folder_and_gives_its_exit_code(tmp_path: Path) -> None:
    planned = run_mimkit("mae", "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "parameters" in planned.stdout
    wrong = run_mimkit("mae", "--mask-rato", "3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
@pytest.mark.parametrize(
    "tool", ["doctor", "--help", "mae --help", "masks describe uniform --grid 64 64 --ratio 0.5"]
)
def test_output_that_nobody_reads_to_its_end_gives_no_traceback(tool: str, tmp_path: Path) -> None:
    code = f"{sys.executable} -m mimkit {tool} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        ["bash", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (141, "")


def test_the_doctor_names_versions_and_what_is_missing(tmp_path: Path) -> None:
    found = run_mimkit("doctor", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    first = ["versions", "device", "kernels", "decoding", "found"]
    assert [line.split()[0] for line in lines[:5]] == first
    assert all(line.startswith("missing ") and ", for " in line for line in lines[5:])


def test_the_doctor_knows_every_package_that_an_extra_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    asked = {
        re.split(r"[\[>=;]", need)[0]
        for extra in ("detect", "fast", "arrays")
        for need in extras[extra]
    }
    assert asked - {"mimkit"} <= set(_doctor._OPTIONAL)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            {"pillow": "13", "simplejpeg": "1.9"},
            "JPEG files by simplejpeg, other pictures by pillow",
        ),
        ({"pillow": "13", "simplejpeg": None}, "pictures by pillow"),
        ({"pillow": None, "simplejpeg": "1.9"}, "no images: pillow is missing"),
    ],
)
def test_the_doctor_says_who_decodes(found: dict[str, str | None], words: str) -> None:
    assert _doctor._decoding(found) == words
