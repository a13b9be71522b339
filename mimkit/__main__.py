"""The `mimkit` command: `mimkit --help`. Runs the recipes, the library's tools, and `doctor`.

In a wheel the recipes lie in a folder of this package, so that no package called `recipes` is
installed. They are put on the path of this process only, and run as the modules that they are.
"""

import ast
import difflib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import InspectLoader
from pathlib import Path

import mimkit
from mimkit import _completion

_HERE = Path(__file__).resolve().parent
# Where the package `recipes` is: in the wheel, or in a checkout.
_ROOTS = (_HERE / "_shipped", _HERE.parent)
_TOOLS = {
    "export": ("recipes.engine.pretrained.export", "a run's encoder as a folder for Hugging Face"),
    "convert": (
        "mimkit.interop._command",
        "weights under other names: timm, Hugging Face, ...",
    ),
    "doctor": ("mimkit._doctor", "versions, devices, kernels, what is missing for what"),
    "masks": ("mimkit.masking.__main__", "statistics and pictures of a sampler"),
    "report": ("recipes.engine.page", "one HTML page of a run, or of several compared"),
    "pictures": ("recipes.engine.pictures.__main__", "the pictures of several runs side by side"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` if `None`.

    Returns:
        The exit code: 0, 2 after a user's mistake, or 141 if what reads the output has ended. A
        command ends the process itself.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # such as `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
        return 141


def _run(arguments: Sequence[str] | None) -> int:
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    root = next((root for root in _ROOTS if (root / "recipes" / "mae.py").is_file()), None)
    modules = {name: module for name, (module, _) in _TOOLS.items()} | _recipes(root)
    if command in ("-h", "--help"):
        print(_help(root))
        return 0
    if command == "--version":
        print(f"mimkit {mimkit.__version__}")
        return 0
    if command not in [*modules, "--print-completion"]:
        print(f"error: {_unknown(command, sorted(modules))}", file=sys.stderr)
        return 2
    if root is not None:
        sys.path.insert(0, str(root))
    if command == "--print-completion":
        return _print_completion(rest, modules)
    sys.argv = [f"mimkit {command}", *rest]
    _run_as_main(modules[command])
    return 0


def _unknown(command: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(command, known, n=1)
    perhaps = f" (perhaps {close[0]!r})" if close else ""
    return f"no command is called {command!r}{perhaps}; there are {', '.join(known)}"


def _run_as_main(name: str) -> None:
    """Run a module as `python -m` does: other processes can unpickle what it defines.

    `runpy.run_module` leaves `sys.modules["__main__"]` as it is, or changes `sys.argv`.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert isinstance(spec.loader, InspectLoader)
    module = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    exec(spec.loader.get_code(name) or "", vars(module))


def _print_completion(shells: Sequence[str], modules: Mapping[str, str]) -> int:
    if len(shells) != 1 or shells[0] not in _completion.SHELLS:
        given = " ".join(shells) or "nothing"
        print(
            f"error: --print-completion takes {' or '.join(_completion.SHELLS)}; got {given}",
            file=sys.stderr,
        )
        return 2
    try:
        options = {
            name: {} if name == "doctor" else _completion.options_of(name, module)
            for name, module in modules.items()
        }
    except ModuleNotFoundError as error:
        print(f"error: {error}: completion needs mimkit[recipes]", file=sys.stderr)
        return 2
    print(_completion.script(shells[0], options), end="")
    return 0


def _recipes(root: Path | None) -> dict[str, str]:
    """Return the recipes by the name of their command."""
    files = [] if root is None else sorted((root / "recipes").glob("[a-z]*.py"))
    return {
        file.stem.replace("_", "-"): f"recipes.{file.stem}"
        for file in files
        if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    }


def _help(root: Path | None) -> str:
    recipes = {}
    for name, module in _recipes(root).items():
        file = (root or _HERE) / Path(*module.split(".")).with_suffix(".py")
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        recipes[name] = text.partition("\n")[0]
    lines = [
        "usage: mimkit COMMAND [OPTIONS]",
        "",
        "training, probing, packing (`mimkit mae --help`):",
    ]
    lines += [f"  {name:10}{text}" for name, text in recipes.items()] or [
        "  none: this installation holds no recipes"
    ]
    lines += ["", "tools:"]
    lines += [f"  {name:10}{text}" for name, (_, text) in _TOOLS.items()]
    lines += ["", 'completion of commands and options: eval "$(mimkit --print-completion bash)"']
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
