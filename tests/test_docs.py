"""The documentation: its code runs, its tables are up to date, its links work.

The code blocks of a page share a namespace. A block with prompts is run as a doctest, any other
block is executed.
"""

import doctest
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
# Their code needs other packages; tests/peers/test_trainers.py runs it.
WITH_PEERS = {"trainers"}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def blocks_of(page: Path) -> list[tuple[int, str]]:
    """Return the Python blocks of a page, each with the number of lines above it."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


def run_block(page: Path, line: int, code: str, names: dict[str, Any]) -> None:
    if not code.startswith(">>>"):
        exec(compile("\n" * line + code, str(page), "exec"), names)
        return
    example = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), line)
    failures: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=failures.append, clear_globs=False)
    names.update(example.globs)
    assert not failures, "".join(failures)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.stem not in WITH_PEERS], ids=lambda page: page.stem
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": page.stem}
    for line, code in blocks_of(page):
        run_block(page, line, code, names)


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    notebook: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(notebook))


def test_a_block_that_fails_is_reported_with_its_line() -> None:
    page = Path("page.md")
    with pytest.raises(AssertionError, match=r"(?s)line 7.*Expected:\s+5.*Got:\s+4"):
        run_block(page, 6, ">>> 2 + 2\n5\n", {})
    with pytest.raises(ZeroDivisionError) as caught:
        run_block(page, 6, "x = 1\nx / 0\n", {})
    assert caught.traceback[-1].lineno + 1 == 8


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "table", ["shares", "others", pytest.param("units", marks=pytest.mark.full)]
)
def test_tables_are_up_to_date(table: str) -> None:
    text = (DOCS / "which-mask.md").read_text()
    assert load_script().update_tables(text, [table]) == text, "run `python docs/make_pictures.py`"


def test_all_tables_are_tested() -> None:
    assert set(load_script().TABLES) == {"shares", "others", "units"}


def test_the_script_draws_exactly_the_pictures_of_the_page() -> None:
    shown = set(re.findall(r"\(pictures/(\S+)\.png\)", (DOCS / "which-mask.md").read_text()))
    files = list((DOCS / "pictures").glob("*.png"))
    assert shown == {*load_script().SAMPLERS, "tube"}
    of_runs = re.findall(r"\(pictures/(\S+)\.png\)", (DOCS / "downstream.md").read_text())
    assert shown | {"front", *of_runs} == {file.stem for file in files}
    assert sum(file.stat().st_size for file in files) < 1 << 20


def anchors_of(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_point_to_existing_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    assert [page.name for page in PAGES if f"({page.name})" not in index] == ["README.md"]


def test_mae_in_forty_lines_has_at_most_forty() -> None:
    ((_, code), *_) = blocks_of(DOCS / "mae-in-40-lines.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 40


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """Return the commands in a text, as `mimkit` calls them, each with its options."""
    found = re.findall(r"(?:\bmimkit |\brecipes/)([a-z][a-z_-]*)(?:\.py)?\b([^`\n#|&]*)", text)
    return [(name.replace("_", "-"), re.findall(r"--[a-z][\w-]*", rest)) for name, rest in found]


@pytest.mark.full  # imports every recipe
def test_the_options_of_commands_in_the_documentation_exist(tmp_path: Path) -> None:
    root = DOCS.parent
    script = subprocess.run(
        [sys.executable, "-m", "mimkit", "--print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}"},
    ).stdout
    words = re.findall(r"'([a-z-]+) -'\*\) words='?([^';]*?)'? ;;", script)
    known = {name: set(options.split()) for name, options in words}
    del known["masks"]  # its options belong to samplers
    texts = [*PAGES, root / "README.md", *sorted((root / "recipes").glob("*.py"))]
    commands = [(page.name, *one) for page in texts for one in commands_in(page.read_text())]
    wrong = [
        (page, name, option)
        for page, name, options in commands
        for option in options
        if name in known and option not in known[name]
    ]
    assert not wrong
    assert sum(len(options) for _, name, options in commands if name in known) > 80


def test_commands_are_found_in_a_text() -> None:
    text = (
        "`mimkit mae --data my` or\npython recipes/vit_mpp.py --seed 1  # --not\nmimkit x | y --z"
    )
    assert commands_in(text) == [("mae", ["--data"]), ("vit-mpp", ["--seed"]), ("x", [])]
