"""Export of a run's encoder: a folder that `AutoModel.from_pretrained` of transformers loads.

python -m recipes.engine.pretrained.export RUN OUT
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mimkit.interop import Receipt, convert_file
from recipes.engine.errors import UserError, say
from recipes.engine.pretrained.encoders import check_no_windows, load_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, ViTShape
from recipes.engine.run.cli import run_command


def export(run: Path, out: Path) -> Receipt:
    """Export an encoder for Hugging Face: `mimkit convert RUN OUT --from mimkit --to hf`.

    Args:
        run: The folder of a finished run, or its `encoder.safetensors`.
        out: The folder to write, new or empty.

    Raises:
        UserError: If there is no encoder, if Hugging Face has no class that computes the same, or
            if the folder has content or cannot be written.
    """
    path = run / "encoder.safetensors" if run.is_dir() else run
    if not path.with_name("config.yaml").is_file():
        raise UserError(f"{run} holds no finished run: its config.yaml is not there")
    file = load_encoder(path, ViTShape())  # compares it with its digest, and its configuration
    check_no_windows(file)
    if isinstance(file.shape, ConvViTShape):
        raise UserError(f"{path} cannot be exported: Hugging Face has no class for a ConvViT")
    try:
        return convert_file(path, out, from_format="mimkit", to_format="hf")
    except FileExistsError as error:
        raise UserError(f"OUT {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be exported: {error}") from error
    except OSError as error:
        raise UserError(f"OUT {out} cannot be written to: {error.strerror}") from error


@dataclass(frozen=True)
class Export:
    """Options of the command.

    Attributes:
        run: Folder of a finished run of pre-training, segment or detect, or its
            encoder.safetensors.
        out: The folder to write, new or empty.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""

    def command(options: Export) -> None:
        receipt = export(options.run, options.out)
        say(*receipt.lines())
        say(f"{options.out}: a {receipt.model}, for AutoModel.from_pretrained")

    return run_command(
        command,
        Export,
        name="engine/pretrained/export",
        description="Export a run's encoder for Hugging Face.",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
