"""`python -m mimkit.interop convert IN OUT --from F --to T`: as `mimkit convert IN OUT ...`."""

import sys
from collections.abc import Sequence

from mimkit.interop import _command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is one line on stderr.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["nothing"]
    if command in ("-h", "--help"):
        return _command.main(["--help"])
    if command != "convert":
        print(f"error: the command is convert; got {command!r}", file=sys.stderr)
        return 2
    return _command.main(rest)


if __name__ == "__main__":
    sys.exit(main())
