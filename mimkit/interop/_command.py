"""`mimkit convert IN OUT --from F --to T`: convert a file of weights, and say what was done."""

import json
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mimkit._parser import Parser
from mimkit._text import escaped
from mimkit.interop._convert_file import convert_file
from mimkit.interop._formats import FORMATS


def _parser() -> Parser:
    parser = Parser(prog="mimkit convert", description="Convert a file of weights.")
    names = ", ".join(FORMATS)
    parser.add_argument(
        "source", type=Path, metavar="IN", help="a file, the folder of a run, or one of hf"
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="new .safetensors or .pth; hf: folder"
    )
    parser.add_argument("--from", required=True, dest="from_format", metavar="F", help=names)
    parser.add_argument("--to", required=True, dest="to_format", metavar="T", help="one of these")
    parser.add_argument("--heads", type=int, help="attention heads, if IN does not tell")
    parser.add_argument(
        "--image-size", type=int, nargs="+", help="pixels per axis, if it is no square"
    )
    parser.add_argument("--mean", type=float, nargs="+", help="hf: of its image processor")
    parser.add_argument("--std", type=float, nargs="+", help="the same")
    parser.add_argument("--receipt", type=Path, help="also write the receipt, as JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is one line on stderr.
    """
    options = vars(_parser().parse_args(arguments))
    receipt_file = options.pop("receipt")
    try:
        if receipt_file is not None and os.path.lexists(receipt_file):
            raise FileExistsError(f"{receipt_file} exists: give a new file")
        receipt = convert_file(**options)
        if receipt_file is not None:
            receipt_file.write_text(json.dumps(asdict(receipt), indent=2) + "\n")
    except (ImportError, OSError, TypeError, ValueError, pickle.UnpicklingError) as error:
        print(f"error: {escaped(error)}", file=sys.stderr)
        return 2
    print(*map(escaped, receipt.lines()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
