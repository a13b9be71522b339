"""The `mimkit` command: `mimkit --help`. Runs the recipes, the library's tools, and `doctor`.

In a wheel the recipes lie in a folder of this package, so that no package called `recipes` is
installed. They are put on the path of this process only, and run as the modules that they are.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Where the package `recipes` is: in the wheel, or in a checkout.
_ROOTS = (_HERE / "_shipped", _HERE.parent)
_TOOLS = {
    "export": ("recipes.engine.pretrained.export", "a run's encoder as a folder for Hugging Face"),
    "doctor": ("mimkit._doctor", "versions, devices, kernels, what is missing for what"),
    "masks": ("mimkit.masking", "statistics and pictures of a sampler"),
    "report": ("recipes.engine.page", "one HTML page of a run, or of several compared"),
    "pictures": ("recipes.engine.pictures", "the pictures of several runs side by side"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake. A command ends the process itself.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    root = next((root for root in _ROOTS if (root / "recipes" / "mae.py").is_file()), None)
    modules = {name: module for name, (module, _) in _TOOLS.items()} | _recipes(root)
    if command in ("-h", "--help"):
        print(_help(_recipes(root)))
        return 0
    if command not in modules:
        print(
            f"error: no command is called {command!r}; there are {', '.join(modules)}",
            file=sys.stderr,
        )
        return 2
    if root is not None:
        sys.path.insert(0, str(root))
    sys.argv = [f"mimkit {command}", *rest]
    runpy.run_module(modules[command], run_name="__main__")
    return 0


def _recipes(root: Path | None) -> dict[str, str]:
    """Return the recipes by the name of their command."""
    files = [] if root is None else sorted((root / "recipes").glob("[a-z]*.py"))
    return {
        file.stem.replace("_", "-"): f"recipes.{file.stem}"
        for file in files
        if file.stem != "script"
    }


def _help(recipes: dict[str, str]) -> str:
    lines = [
        "usage: mimkit COMMAND [OPTIONS]",
        "",
        "training, probing, packing (`mimkit mae --help`):",
    ]
    lines += [f"  {name}" for name in recipes] or ["  none: this installation holds no recipes"]
    lines += ["", "tools:"]
    lines += [f"  {name:10}{text}" for name, (_, text) in _TOOLS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
