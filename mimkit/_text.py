"""Text from outside, for people to read."""


def escaped(text: object) -> str:
    r"""Return a name or text from outside without characters that steer a terminal.

    Line ends, escape sequences, changes of direction and bytes that are not UTF-8 are written as
    Python escapes.

    Example:
        >>> print(escaped("a\x1b[2J.png"))
        a\x1b[2J.png
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
