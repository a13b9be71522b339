"""The errors that a user of a recipe can repair."""


class UserError(Exception):
    """One line that repeats what was passed and says what would fit.

    Args:
        message: The line, shown to the user without a traceback.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker's error is raised again around the text of its traceback: the line
        # that the user needs is the last thing in it.
        super().__init__(message.rsplit("UserError: ", maxsplit=1)[-1].strip())


class LostProcessError(UserError):
    """Another process of the job died: every one that is left says so."""


def reason_of(error: BaseException) -> str:
    """Return why a file of weights cannot be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # PyTorch's own message is a page, and advises to switch a safety off.
    return "it is neither a safetensors file nor a checkpoint of PyTorch, or it is damaged"


def escaped(text: str) -> str:
    r"""Return a name or text from outside without characters that steer a terminal.

    Example:
        >>> print(escaped("a\x1b[2J.png"))
        a\x1b[2J.png
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
