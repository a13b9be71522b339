"""Text from outside steers no terminal and forges no line, wherever people read it."""

import ast
import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._utils import ExceptionWrapper

from mimkit._text import escaped
from recipes.engine import errors, run
from recipes.engine.errors import UserError, say
from recipes.engine.pictures import _captions
from recipes.engine.pictures import main as place_side_by_side
from recipes.engine.report import print_unreadable
from recipes.engine.run.cli import Options, run_command
from recipes.mae import RECIPE

STEERING = [
    "\x1b[2J",
    "\n",
    "\r",
    "\u202e",
    "\u2028",
    "\x85",
    "\x9b",
    "\udcff",
    "\x7f",
    "\u200b",
    "\t",
]
# Names with at least one character that steers a terminal, or that is not UTF-8.
names = st.lists(st.one_of(st.sampled_from(STEERING), st.text(max_size=3)), max_size=5).map(
    lambda parts: "".join(["a", *parts, "\x1b", "b"]).replace("\0", "").replace("/", "")
)


def is_safe(text: str) -> bool:
    """Whether a text of lines holds nothing but printable characters."""
    return all(line.isprintable() for line in text.split("\n"))


def printed(print_it: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        print_it()
    return out.getvalue()


@given(st.text(st.characters(exclude_categories=())))
def test_an_escaped_text_is_printable_and_is_escaped_once(text: str) -> None:
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    if text.isprintable():
        assert escaped(text) == text


def refuse(name: str) -> int:
    def command(options: Options) -> None:
        raise UserError(f"{name} does not fit")

    return run_command(command, Options, name="mae", description="", arguments=[])


def test_a_name_that_looks_like_an_error_does_not_cut_the_message() -> None:
    assert str(UserError("a UserError: all is well.png")) == "a UserError: all is well.png"


def test_the_error_of_a_loading_worker_is_the_line_of_the_worker() -> None:
    try:
        try:
            raise OSError("inner")
        except OSError as inner:
            raise UserError("a\nUserError: b.png") from inner
    except UserError:
        wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(UserError) as caught:
        wrapped.reraise()
    assert str(caught.value) == "a\\nUserError: b.png"


DOORS: dict[str, Callable[[str], object]] = {
    "a line": say,
    "an error": refuse,
    "unreadable images": lambda name: print_unreadable([name]),
    "--data": lambda name: run(RECIPE, "", ["--data", name]),
    "--preset": lambda name: run(RECIPE, "", ["--preset", name]),
    "--resume": lambda name: run(RECIPE, "", ["--data", "digits", "--resume", name, "--out", "x"]),
    "--config": lambda name: run(RECIPE, "", ["--config", name]),
    "--epochs": lambda name: run(RECIPE, "", ["--epochs", name]),
    "a flag": lambda name: run(RECIPE, "", [f"--{name}", "1"]),
    "folders of runs": lambda name: place_side_by_side([name, name]),
}
LINES = {"unreadable images": 2}


@pytest.mark.parametrize("door", DOORS)
@settings(max_examples=15)
@given(name=names)
def test_what_is_printed_holds_nothing_that_steers_a_terminal(door: str, name: str) -> None:
    text = printed(lambda: DOORS[door](name))
    assert text
    assert is_safe(text)
    assert text.count("\n") == LINES.get(door, 1)


def test_a_door_that_prints_a_name_as_it_is_is_noticed() -> None:
    assert not is_safe(printed(lambda: print("a\x1b[2J.png")))
    assert not is_safe(printed(lambda: print("a\u202e.png")))
    assert printed(lambda: print("a\nerror: b")).count("\n") == 2


def prints_in(source: str) -> list[int]:
    """Return the lines of a module that print or warn by themselves."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    direct = ("print", "sys.stdout.write", "sys.stderr.write", "warnings.warn", "warn")
    return [call.lineno for call in calls if ast.unparse(call.func) in direct]


def test_recipes_print_through_say_alone() -> None:
    folder = Path(errors.__file__).parents[1]
    files = [file for file in folder.rglob("*.py") if file != Path(errors.__file__)]
    assert len(files) > 40
    assert not [(file, line) for file in files for line in prints_in(file.read_text())]


def test_a_module_that_prints_by_itself_is_noticed() -> None:
    assert prints_in("import sys\nprint('a')\nsys.stderr.write('b')\nsay('c')") == [2, 3]


@given(names, names)
def test_a_caption_has_one_line_for_each_value(name: str, value: str) -> None:
    captions = _captions([{name: value}, {name: 1}], [Path("x"), Path("y")])
    for caption in captions:
        assert is_safe(caption)
        assert caption.count("\n") == 1


def test_a_line_that_the_terminals_encoding_lacks_is_printed_all_the_same() -> None:
    raw = io.BytesIO()
    terminal = io.TextIOWrapper(raw, encoding="ascii")
    say("gr\u00fc\u00dfe \u2713", file=terminal)
    assert raw.getvalue() == b"gr\\xfc\\xdfe \\u2713\n"
