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
from recipes.engine.data.images import NORMALIZE, NormalizeByConstants
from recipes.engine.errors import UserError, say
from recipes.engine.pretrained.encoders import check_no_windows, load_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, ViTShape
from recipes.engine.reading import UnreadableError, read_yaml
from recipes.engine.run.cli import run_command


def normalization_of(run_config: Path) -> tuple[NormalizeByConstants | None, str]:
    """Return what a run's evaluation normalizes by, if an image processor of Hugging Face can too.

    Args:
        run_config: The `config.yaml` of the run.

    Returns:
        The constants; or `None`, and why there are none.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        config = read_yaml(run_config)
    except UnreadableError as error:
        raise UserError(f"{run_config} is damaged: {error}") from error
    training, size = config.get("training") or {}, config["model"].get("image_size")
    reasons = {
        "its data were arrays, not pictures": config.get("statistics"),
        "photos are normalized by their own mean": config.get("data") == "photos",
        "digits are drawn, not read": config.get("data") == "digits",
        "it was trained on whole pictures": config.get("recipe") in ("segment", "detect"),
        "its --crop is another one": training.get("crop"),
        "its images are not square": isinstance(size, list) and len({*size}) > 1,
        "its pictures had not three channels": config["model"].get("in_channels", 3) != 3,
    }
    reason = next((reason for reason, is_true in reasons.items() if is_true), "")
    return (None, reason) if reason else (NORMALIZE, "")


def export(run: Path, out: Path) -> Receipt:
    """Export an encoder for Hugging Face: `mimkit convert RUN OUT --from mimkit --to hf`.

    With it goes the image processor that does what the run's evaluation does, if there is one.

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
    constants, _ = normalization_of(path.with_name("config.yaml"))
    mean, std = (constants.mean, constants.std) if constants else (None, None)
    try:
        return convert_file(path, out, from_format="mimkit", to_format="hf", mean=mean, std=std)
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

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""

    def command(options: Export) -> None:
        receipt = export(options.run, options.out)
        say(*receipt.lines())
        say(f"{options.out}: a {receipt.model}, for AutoModel.from_pretrained")
        constants, reason = normalization_of(Path(receipt.source).with_name("config.yaml"))
        if constants is None:
            say(f"no preprocessor_config.json, for AutoImageProcessor: {reason}")

    return run_command(
        command,
        Export,
        name="engine/pretrained/export",
        description="Export a run's encoder for Hugging Face.",
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
