"""The parser of the library's own commands; the recipes have tyro."""

import argparse
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says a mistake in one line on stderr, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong, without the usage above it."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
