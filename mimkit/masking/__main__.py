"""`mimkit masks describe SAMPLER`: print statistics of a sampler and draw masks.

`python -m mimkit.masking describe SAMPLER` does the same.
"""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mimkit import masking
from mimkit._parser import Parser
from mimkit.masking import Mask, stats

_SHOWN = 8  # masks in the picture
_CELL = 96  # smallest size of a mask in pixels


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Command-line arguments; `sys.argv[1:]` if `None`.

    Returns:
        The exit code: 0, or 2 after a user's mistake, which is printed to stderr.
    """
    options = vars(_parser().parse_args(arguments))
    sampler = _samplers()[options["sampler"]]
    grid, patch = tuple(options["grid"]), options["patch_size"]
    patch = patch[0] if len(patch) == 1 else patch
    given = {name: options[name] for name in _own_options(sampler) if options[name] is not None}
    try:
        key = masking.key(range(options["samples"]), seed=options["seed"])
        mask = sampler(key, grid, **given)
        marginals = stats.marginals(
            sampler, grid, num_samples=options["samples"], seed=options["seed"], **given
        )
        measured = mask[: options["distances"]]
        distance = float(stats.average_distance(measured, patch))
        print(_describe(mask, marginals, distance, measured.batch_size))
        _draw(mask, marginals, options["out"] or Path(f"{options['sampler']}.png"))
    except BrokenPipeError:  # such as `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes
        return 141
    except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _samplers() -> dict[str, Callable[..., Mask]]:
    """Return all public samplers whose options are numbers, by name."""
    functions = {name: getattr(masking, name) for name in masking.__all__}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function)
        and [*inspect.signature(function).parameters][:2] == ["key", "grid"]
        and inspect.signature(function).return_annotation is Mask
        and "weights" not in inspect.signature(function).parameters  # a tensor cannot be typed
    }


def _own_options(sampler: Callable[..., Mask]) -> list[str]:
    return [*inspect.signature(sampler).parameters][2:]


def _parser() -> Parser:
    called = sys.argv[0] if sys.argv[0].startswith("mimkit ") else "python -m mimkit.masking"
    parser = Parser(prog=called, description=__doc__)
    describe = parser.add_subparsers(required=True, metavar="describe").add_parser(
        "describe", help="print counts, marginal map and average distance; draw some masks"
    )
    samplers = describe.add_subparsers(dest="sampler", required=True, metavar="SAMPLER")
    for name, sampler in _samplers().items():
        summary = (inspect.getdoc(sampler) or "").partition("\n")[0]
        command = samplers.add_parser(name, help=summary, description=summary)
        for option in _own_options(sampler):
            command.add_argument(f"--{option.replace('_', '-')}", type=_literal, dest=option)
        command.add_argument("--grid", type=int, nargs="+", required=True, help="tokens per axis")
        command.add_argument(
            "--patch-size", type=int, nargs="+", default=[16], help="pixels per token"
        )
        command.add_argument("--samples", type=int, default=4096, help="masks for the marginal map")
        command.add_argument(
            "--distances", type=int, default=64, help="masks for the average distance"
        )
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--out", type=Path, help="picture to write; default: SAMPLER.png")
    return parser


def _literal(text: str) -> Any:
    """Parse a number or a tuple of numbers; return anything else as a string."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _describe(
    mask: Mask, marginals: Float[Tensor, "*grid"], distance: float, num_distances: int
) -> str:
    rows = marginals.reshape(-1, marginals.shape[-1]).tolist()
    return "\n".join(
        [
            f"grid                {'x'.join(map(str, mask.grid))}: {mask.num_tokens} tokens",
            f"masked, visible     {mask.num_masked}, {mask.num_visible}",
            f"ratio               {mask.num_masked / mask.num_tokens:.4f}",
            f"average distance    {distance:.2f} pixels ({num_distances} masks)",
            f"marginal map        {marginals.min():.3f} to {marginals.max():.3f} "
            f"({mask.batch_size} masks)",
            *("".join(f"{value:6.3f}" for value in row) for row in rows),
        ]
    )


def _draw(mask: Mask, marginals: Float[Tensor, "*grid"], path: Path) -> None:
    """Draw some masks (black is masked), then the marginal map."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a picture needs pillow: pip install pillow") from error
    maps = [*mask[:_SHOWN].is_masked.float(), marginals]
    height, width = maps[0].reshape(-1, maps[0].shape[-1]).shape
    scale = -(-_CELL // max(height, width))
    size, gap = (width * scale, height * scale), 4
    picture = Image.new("L", (len(maps) * (size[0] + gap) - gap, size[1]), 128)
    for column, values in enumerate(maps):
        gray = (255 * (1 - values)).round().byte().reshape(height, width)
        tile = Image.fromarray(gray.numpy()).resize(size, Image.Resampling.NEAREST)
        picture.paste(tile, (column * (size[0] + gap), 0))
    picture.save(path)
    print(f"picture             {path}")


if __name__ == "__main__":
    sys.exit(main())
