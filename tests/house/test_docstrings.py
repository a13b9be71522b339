"""The docstring of everything public has what a reader of the site looks for.

`python -m tests.house.test_docstrings` counts: functions and classes, then their methods, then
properties, each as "N of N".

The rule. A function or class has `Args`, `Returns` if it returns something, `Raises` if it raises
something itself, `Source`, and an `Example` that is executed. A method, also one from a base class
of mimkit, has the same, but for two things: its source is its class's, and the example may be its
class's if that one calls it (`.pool(`; for `forward` and `__call__`, a call of the object). A
property has a sentence and an annotated type.
"""

import ast
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.public_calls import ROOMS, public_names

_ROOMS = {room.__name__.split(".")[-1]: room for room in ROOMS}
_PUBLIC = {
    name: getattr(_ROOMS[name.split(".")[0]], name.split(".")[1])
    for name in public_names()
    if name.count(".") == 1  # not the methods
}
_NEEDS_A_GPU = ("pin_memory",)  # so that it has no example


def members(is_wanted: Callable[[Any], bool]) -> dict[str, tuple[type, Any]]:
    """Return public members of the public classes, also inherited ones, with their class."""
    found: dict[str, tuple[type, Any]] = {}
    for name, value in _PUBLIC.items():
        ours = [c for c in getattr(value, "__mro__", ()) if c.__module__.startswith("mimkit")]
        for member in dict.fromkeys(key for parent in ours for key in vars(parent)):
            plain = inspect.getattr_static(value, member)
            if (not member.startswith("_") or member == "__call__") and is_wanted(plain):
                found[f"{name}.{member}"] = value, getattr(value, member)
    return found


def is_method(value: Any) -> bool:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    return inspect.isroutine(inspect.unwrap(value))


_METHODS = members(is_method)
_PROPERTIES = members(lambda value: isinstance(value, property))
_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Source|Example):\n((?:(?: .*)?\n)*)", re.M)
_ENTRY = re.compile(r"^    (\w+):", re.M)
_PROMPT = re.compile(r"^ *>>> (?!.*doctest: *\+SKIP)", re.M)


def lacking(value: Any) -> Iterator[str]:
    """Yield what the docstring of a function or class lacks: parameters as "Args: name"."""
    sections = dict(_SECTION.findall((inspect.getdoc(value) or "") + "\n"))
    signature = inspect.signature(value)
    named = _ENTRY.findall(sections.get("Args", "") + sections.get("Attributes", ""))
    parameters = (name for name in signature.parameters if name != "self")
    yield from (f"Args: {name}" for name in parameters if name not in named)
    returns = not inspect.isclass(value) and signature.return_annotation not in (None, "None")
    needed = {"Returns": returns, "Raises": _raises(value), "Source": True, "Example": True}
    yield from (name for name, is_needed in needed.items() if is_needed and name not in sections)
    if "Example" in sections and not _PROMPT.search(sections["Example"]):
        yield "Example: a line that is executed"


def lacking_in_method(owner: type, method: Any) -> Iterator[str]:
    """Yield what the docstring of a method lacks, by the rule above."""
    name = method.__name__
    in_class = dict(_SECTION.findall((inspect.getdoc(owner) or "") + "\n")).get("Example", "")
    exempt = {"Source"}
    if name in _NEEDS_A_GPU or calls(in_class, name):
        exempt.add("Example")
    yield from (part for part in lacking(method) if part not in exempt)


def calls(example: str, method: str) -> bool:
    """Whether an example calls a method, or for `forward` and `__call__` an object."""
    code = "".join(part.source for part in doctest.DocTestParser().get_examples(example))
    nodes = list(ast.walk(ast.parse(code)))
    made = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    functions = [node.func for node in nodes if isinstance(node, ast.Call)]
    if method in ("forward", "__call__"):
        return any(
            isinstance(f, ast.Call) or (isinstance(f, ast.Name) and f.id in made) for f in functions
        )
    return any(isinstance(f, ast.Attribute) and f.attr == method for f in functions)


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


@pytest.mark.parametrize("name", _METHODS)
def test_a_method_has_arguments_result_errors_and_an_example(name: str) -> None:
    assert not list(lacking_in_method(*_METHODS[name]))


@pytest.mark.parametrize("name", _PROPERTIES)
def test_a_property_has_a_sentence_and_a_type(name: str) -> None:
    getter = _PROPERTIES[name][1].fget
    assert inspect.getdoc(getter)
    assert "return" in getter.__annotations__


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


def test_what_the_docstring_of_a_method_lacks_is_found() -> None:
    class Shown:
        """A class.

        Example:
            >>> shown = Shown()
            >>> shown(1)
            1
        """

        def __call__(self, value: int) -> int:
            """Return it.

            Args:
                value: A number.

            Returns:
                The number.
            """
            return value

        def half(self, value: int) -> int:
            """Halve it."""
            if value % 2:
                raise ValueError
            return value // 2

    assert list(lacking_in_method(Shown, Shown.__call__)) == []
    lacks = list(lacking_in_method(Shown, Shown.half))
    assert lacks == ["Args: value", "Returns", "Raises", "Example"]
    assert not calls(">>> shown = Shown()\n", "__call__")


def main() -> None:
    """Print how many public things have all that they should have, and name the others."""
    kinds = {
        "functions and classes": {name: list(lacking(v)) for name, v in _PUBLIC.items()},
        "methods": {name: list(lacking_in_method(*pair)) for name, pair in _METHODS.items()},
        "properties": {
            name: [] if inspect.getdoc(pair[1].fget) else ["a sentence"]
            for name, pair in _PROPERTIES.items()
        },
    }
    for kind, found in kinds.items():
        print(f"{kind}: {sum(not lacks for lacks in found.values())} of {len(found)}")
        for name, lacks in found.items():
            if lacks:
                print(f"  {name}: {', '.join(lacks)}")


if __name__ == "__main__":
    main()
