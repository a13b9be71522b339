"""Errors that a user of a recipe can fix."""


class UserError(Exception):
    """A user's mistake. The message repeats what was passed and says what would fit.

    Args:
        message: One line, printed without a traceback.
    """

    def __init__(self, message: str) -> None:
        # `DataLoader` raises a worker's error again with its traceback in the message. The line for
        # the user is at the end.
        super().__init__(message.rsplit("UserError: ", maxsplit=1)[-1].strip())


class LostProcessError(UserError):
    """Another process of the job died. Every surviving process prints this error."""


def escaped(text: str) -> str:
    r"""Return a name or text from outside without characters that steer a terminal.

    Example:
        >>> print(escaped("a\x1b[2J.png"))
        a\x1b[2J.png
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
