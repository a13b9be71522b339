"""Errors that a user of a recipe can fix, and text for people."""

import os
import sys
from typing import TextIO

from mimkit._text import escaped


class UserError(Exception):
    """A user's mistake. The message repeats what was passed and says what would fit.

    Args:
        message: One line, printed without a traceback.
    """

    def __init__(self, message: str) -> None:
        # `DataLoader` raises a worker's error again with its traceback in the message. Its last
        # line is the name of this class and the line for the user, which is escaped already.
        if message.startswith("Caught ") and "\nOriginal Traceback" in message:
            message = message.rstrip("\n").rsplit("\n", maxsplit=1)[-1].partition(": ")[2]
        super().__init__(escaped(message.strip()))


class ProcessError(UserError):
    """A process cannot take part in its job. Every process that fails prints its own line."""


class LostProcessError(ProcessError):
    """Another process of the job died."""


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines for people, escaped; what one holds never becomes a second line.

    Args:
        lines: The lines.
        file: Where to print; stdout by default.
    """
    file = file or sys.stdout
    for line in lines:
        text = escaped(line).encode(file.encoding or "utf-8", "backslashreplace")
        print(text.decode(file.encoding or "utf-8"), file=file, flush=True)


def say_page(text: str) -> None:
    """Print a text of our own, such as a help text, with its colors.

    Raises:
        SystemExit: With 141 if what reads the output, such as `| head`, has seen enough.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
        raise SystemExit(141) from None
