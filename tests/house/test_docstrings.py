"""The docstring of every public function and class has what a reader of the site looks for."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from tests.public_calls import ROOMS, public_names

_ROOMS = {room.__name__.split(".")[-1]: room for room in ROOMS}
_PUBLIC = {
    name: getattr(_ROOMS[name.split(".")[0]], name.split(".")[1])
    for name in public_names()
    if name.count(".") == 1  # not the methods
}
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source|Example):\n((?:(?: .*)?\n)*)", re.M)
_ENTRY = re.compile(r"^    (\w+):", re.M)
_PROMPT = re.compile(r"^ *>>> (?!.*doctest: *\+SKIP)", re.M)


def lacking(value: Any) -> Iterator[str]:
    """Yield what the docstring of a function or class lacks: parameters as "Args: name"."""
    sections = dict(_SECTION.findall((inspect.getdoc(value) or "") + "\n"))
    signature = inspect.signature(value)
    named = _ENTRY.findall(sections.get("Args", "") + sections.get("Attributes", ""))
    yield from (f"Args: {name}" for name in signature.parameters if name not in named)
    returns = not inspect.isclass(value) and signature.return_annotation not in (None, "None")
    needed = {"Returns": returns, "Raises": _raises(value), "Source": True, "Example": True}
    yield from (name for name, is_needed in needed.items() if is_needed and name not in sections)
    if "Example" in sections and not _PROMPT.search(sections["Example"]):
        yield "Example: a line that is executed"


def _raises(value: Any) -> bool:
    """Whether a function, or the constructor of a class, has a `raise` of its own."""
    parts = [value]
    if inspect.isclass(value):
        parts = [vars(value)[n] for n in ("__init__", "__post_init__") if n in vars(value)]
    written = [
        part for part in map(inspect.unwrap, parts) if part.__code__.co_filename != "<string>"
    ]
    trees = [ast.parse(textwrap.dedent(inspect.getsource(part))) for part in written]
    return any(isinstance(node, ast.Raise) and node.exc for t in trees for node in ast.walk(t))


@pytest.mark.parametrize("name", _PUBLIC)
def test_a_docstring_has_arguments_result_errors_source_and_example(name: str) -> None:
    assert not list(lacking(_PUBLIC[name]))


def test_what_a_docstring_lacks_is_found() -> None:
    def bare(first: int, second: int = 0) -> int:
        """Add.

        Args:
            first: A number.
        """
        if first < 0:
            raise ValueError
        return first + second

    def unrun(value: int) -> None:
        """Show.

        Args:
            value: A number.

        Source:
            Nobody.

        Example:
            >>> show(1)  # doctest: +SKIP
        """

    class Bare:
        """A class.

        Attributes:
            size: A number.

        Example:
            >>> Bare(2, 1).size
            2
        """

        def __init__(self, size: int, color: int) -> None:
            if size < color:
                raise ValueError
            self.size = size

    assert list(lacking(bare)) == ["Args: second", "Returns", "Raises", "Source", "Example"]
    assert list(lacking(unrun)) == ["Example: a line that is executed"]
    assert list(lacking(Bare)) == ["Args: color", "Raises", "Source"]
