"""Process-wide switches, set with `mimkit.use`."""

from types import TracebackType


class Settings:
    """The current value of every switch."""

    check: bool = False


class use:
    """Switch value checks on or off: for good when called, for a block in a `with` statement.

    Shapes, dtypes and devices are always checked. Values (are ids in range, ascending, a partition
    of the grid?) are checked where a mask is made on a CPU; `check=True` checks them in every
    operation too, at the price of a synchronisation on a GPU.

    Args:
        check: Whether every operation validates the masks that it is given.

    Example:
        >>> import mimkit
        >>> with mimkit.use(check=True):
        ...     pass  # every gather, restore and loss in here validates its mask
    """

    def __init__(self, *, check: bool) -> None:
        self._before = Settings.check
        Settings.check = check

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        Settings.check = self._before
