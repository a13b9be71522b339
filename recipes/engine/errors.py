"""The error that a user of a recipe causes and can repair."""


class UserError(Exception):
    """One line that repeats what was passed and says what would fit.

    Args:
        message: The line, shown to the user without a traceback.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker's error is raised again around the text of its traceback: the line
        # that the user needs is the last thing in it.
        super().__init__(message.rsplit("UserError: ", maxsplit=1)[-1].strip())
