"""Conversion of a file of weights, with a receipt of what was done."""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimkit._arguments import Size, checked
from mimkit._state_dicts import unwrap
from mimkit._text import escaped
from mimkit.interop._built import model_from
from mimkit.interop._files import load_checkpoint
from mimkit.interop._formats import FORMATS, HALVES, OFFICIAL, select
from mimkit.interop._hf import ARCHITECTURES, to_hf
from mimkit.interop._hf_config import theirs_from_encoder
from mimkit.interop._hf_folder import CONFIG, WEIGHTS, check_new_folder, save_hf
from mimkit.interop._outputs import (
    CannotBuild,
    Outputs,
    largest_difference,
    outputs_of,
    outputs_of_dall_e,
    outputs_of_hf,
    outputs_of_timm,
)
from mimkit.interop._rules import Converted

_RUN, _SUMMARY, _ENCODER = "config.yaml", "summary.json", "encoder.safetensors"
_MOST_CONFIG_BYTES = 1_000_000
_SHOWN = 4  # names of a list in the receipt


@dataclass(frozen=True)
class Receipt:
    """What a conversion did.

    Attributes:
        source: The file that was read.
        source_sha256: Its SHA-256.
        out: The file that was written, or the folder.
        out_sha256: SHA-256 of the weights in it.
        from_format: The names in the source.
        to_format: The names in the result.
        model: What the weights load into, and for Hugging Face the name of their class.
        num_tensors: Number of tensors written.
        dropped: Names of the source, or of mimkit in between, that were left out.
        added: Names of the result, or of mimkit in between, that the source had not.
        not_equal: Names of mimkit whose tensors differ when the result is converted back.
        difference: Largest difference of the outputs of both sides, relative to the largest output;
            `None` if they were not compared.
        compared: Which models were compared, or why none were.
        not_built: Whose code was not run though its names are there, and why: of most authors there
            is no package, and mimkit's class computes in its place. Empty if both sides' was.

    Source:
        mimkit's own.

    Example:
        >>> receipt = Receipt("a.pth", "0", "b.pth", "1", "mae", "timm", "ViT", 1, (), (), (), 0.0,
        ...                   "mimkit and timm")
        >>> receipt.lines()[-1]
        'difference    0.0e+00 of the largest output (mimkit and timm)'
    """

    source: str
    source_sha256: str
    out: str
    out_sha256: str
    from_format: str
    to_format: str
    model: str
    num_tensors: int
    dropped: tuple[str, ...]
    added: tuple[str, ...]
    not_equal: tuple[str, ...]
    difference: float | None
    compared: str
    not_built: str = ""

    def lines(self) -> list[str]:
        """Return the receipt as lines for people.

        Returns:
            One line for each part, names of long lists being cut.

        Example:
            >>> receipt = Receipt("a.pth", "0", "b.pth", "1", "mae", "timm", "ViT", 1, (), ("x",),
            ...                   (), None, "timm is not installed")
            >>> receipt.lines()[4:6]
            ['added         1: x', 'back again    every tensor equal']
        """
        same = "every tensor equal"
        difference = f"{self.difference} of the largest output ({self.compared})"
        if self.difference is not None:
            difference = f"{self.difference:.1e} of the largest output ({self.compared})"
        rows = {
            "from": f"{self.source} ({self.from_format}), SHA-256 {self.source_sha256}",
            "to": f"{self.out} ({self.to_format}), SHA-256 {self.out_sha256}",
            "model": f"{self.model}, {self.num_tensors} tensors",
            "dropped": _some(self.dropped),
            "added": _some(self.added),
            "back again": f"differ: {_some(self.not_equal)}" if self.not_equal else same,
            **({"not built": self.not_built} if self.not_built else {}),
            "difference": f"not compared: {self.compared}"
            if self.difference is None
            else difference,
        }
        return [f"{name:14}{text}" for name, text in rows.items()]


@checked
def convert_file(
    source: str | Path,
    out: str | Path,
    *,
    from_format: str,
    to_format: str,
    heads: Size | None = None,
    image_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Receipt:
    """Convert a file of weights from one project's names to another's.

    Formats are "mimkit", "timm", "hf", the methods of `from_official`, and the classes that `to_hf`
    knows. From a whole model, such as MAE's, an encoder's format takes the encoder. "hf" as a
    target writes a folder as `save_hf` does.

    Args:
        source: A `.safetensors` file, a file of `torch.save`, the folder of a finished run, or a
            folder of Hugging Face. A `config.yaml` or `config.json` beside the weights is used.
        out: The file to write, which must not exist: `.safetensors`, or `.pth` for
            `{"model": ...}` as the authors' code reads it. For "hf" a new or empty folder.
        from_format: The names in the source.
        to_format: The names to write.
        heads: Attention heads, which weights do not tell. "hf" needs them where no configuration
            does; a comparison takes 64 channels to a head instead.
        image_size: Pixels per axis, where the positions do not form a square.
        mean: For "hf", what its image processor normalises by, as in `save_hf`.
        std: The same.

    Returns:
        What was dropped and added, digests, and the largest difference of the outputs of both
        sides.

    Raises:
        FileExistsError: If `out` exists.
        FileNotFoundError: If the source does not.
        ModuleNotFoundError: If a package is missing that the files need.
        OSError: If a file cannot be read or written.
        pickle.UnpicklingError: If reading the source could run code.
        TypeError: If the source holds no dictionary of tensors.
        ValueError: If a format is unknown, the source is not of its format, the target cannot hold
            these weights, `mean` or `std` do not fit, or `out` has another suffix. Nothing is
            written then.

    Source:
        mimkit's own.

    Example:
        >>> import tempfile
        >>> from mimkit import nn
        >>> encoder = nn.ViT(image_size=32, patch_size=8, dim=64, depth=1, heads=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(encoder.state_dict(), f"{folder}/ours.pth")
        ...     receipt = convert_file(f"{folder}/ours.pth", f"{folder}/theirs.safetensors",
        ...                            from_format="mimkit", to_format="mae_vit")
        >>> receipt.model, receipt.num_tensors, receipt.dropped, receipt.not_equal
        ('ViT', 18, (), ())
    """
    for name, value in (("from_format", from_format), ("to_format", to_format)):
        if value not in FORMATS:
            raise ValueError(f"{name} must be one of {sorted(FORMATS)}; got {value!r}")
    if to_format != "hf" and (mean is not None or std is not None):
        raise ValueError(f'mean and std are for to_format="hf"; got {to_format!r}')
    out = Path(out)
    _check_out(out, to_format)
    path, tensors, config = _read(Path(source), from_format)
    known = {
        **config.get("model", {}),
        **({"heads": heads} if heads else {}),
        **({"image_size": tuple(image_size)} if image_size else {}),
    }
    given = _to_ours(from_format, tensors, config, known)
    known = {**(given.config or {}), **known}
    if isinstance(known.get("image_size"), int):
        known["image_size"] = (known["image_size"],) * 2
    model, ours = select(given, to_format)
    if model == "ViT" and to_format != "mimkit" and config.get("window"):
        raise ValueError(
            f"{path} was trained in a detector with attention windows of {config['window']} tokens,"
            f" which weights of {to_format} do not have"
        )
    built, compared = None, ""
    try:
        built = model_from(model, ours, known)
    except ValueError as error:
        compared = str(error)
    if to_format == "hf":
        result, architecture = _to_folder(ours, built, compared, known)
    else:
        result, architecture = FORMATS[to_format].to_theirs(ours), to_format
    back = _to_ours(to_format, result, {}, known)
    difference, not_built = None, ""
    if built is not None:
        first = _side(from_format, tensors, None if "model" in config else config)
        second = _side(architecture, result, None)
        difference, compared = _compare(first, second, model, built, back, known)
        not_built = "; ".join(dict.fromkeys(filter(None, (first.not_built, second.not_built))))
    different = not_equal(ours, result, back)
    if to_format == "hf":
        assert built is not None
        save_hf(built, out, mean=mean, std=std)
    else:
        _write(out, result)
    return Receipt(
        source=str(path),
        source_sha256=_sha256(path),
        out=str(out),
        out_sha256=_sha256(out / WEIGHTS if to_format == "hf" else out),
        from_format=from_format,
        to_format=to_format,
        model=architecture if to_format == "hf" else model,
        num_tensors=len(result),
        dropped=tuple(sorted({*ours.dropped, *result.dropped})),
        added=tuple(sorted({*ours.filled, *result.filled})),
        not_equal=different,
        difference=difference,
        compared=compared,
        not_built=not_built,
    )


def _check_out(out: Path, to_format: str) -> None:
    if to_format == "hf":
        check_new_folder(out)
    elif os.path.lexists(out):
        raise FileExistsError(f"{out} exists: give a new file")
    elif out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"OUT must end in .safetensors or .pth; got {out}")
    elif not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")


def _read(source: Path, from_format: str) -> tuple[Path, Mapping[str, Tensor], dict[str, Any]]:
    """Read weights, and the configuration beside them: a run's "model", or Hugging Face's."""
    path = source
    if source.is_dir():
        path = source / (_ENCODER if from_format == "mimkit" else WEIGHTS)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    contents = unwrap(load_checkpoint(path))
    tensors = {name: value for name, value in contents.items() if isinstance(value, Tensor)}
    if from_format == "mimkit":
        _check_digest(path)
        return path, tensors, _read_run(path.with_name(_RUN))
    is_theirs = _package_of(from_format) == "transformers"
    return path, tensors, _read_config(path.with_name(CONFIG)) if is_theirs else {}


def _check_digest(path: Path) -> None:
    """Compare weights with their digest in the summary of the run that wrote them, if there is one.

    Raises:
        ValueError: If they are damaged.
    """
    file = path.with_name(_SUMMARY)
    try:
        expected = json.loads(_text(file))["digests"][path.name] if file.is_file() else None
    except (ValueError, KeyError, TypeError, RecursionError):  # of something else
        return
    if expected is not None and expected != _sha256(path):
        raise ValueError(f"{path} is damaged: it does not have its digest in {file}")


def _read_run(file: Path) -> dict[str, Any]:
    """Read a run's configuration: "model" is its shape, empty without one."""
    if not file.is_file():
        return {"model": {}}
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {file} needs pyyaml: pip install pyyaml") from error
    try:
        run = yaml.safe_load(_text(file))
        model = {n: tuple(v) if isinstance(v, list) else v for n, v in run["model"].items()}
        detector = run.get("detector") or {}
        if detector.get("global_blocks"):
            model["global_layers"] = tuple(detector["global_blocks"])
        return {"model": model, "window": detector.get("window")}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is not the configuration of a run") from error


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict) or "model" in config:
        raise ValueError(f"{file} is not the configuration of a model")
    return config


def _text(file: Path) -> str:
    if file.stat().st_size > _MOST_CONFIG_BYTES:
        raise ValueError(f"{file} has more than {_MOST_CONFIG_BYTES:,} bytes")
    return file.read_text(encoding="utf-8")


def _to_ours(
    from_format: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    known: Mapping[str, Any],
) -> Converted:
    options: dict[str, Any] = {}
    if from_format == "timm" and known.get("image_size") and "patch_embed.proj.weight" in tensors:
        patch = tensors["patch_embed.proj.weight"].shape[2:]
        options["grid"] = [n // side for n, side in zip(known["image_size"], patch, strict=False)]
    if config and "model" not in config:
        options["config"] = config
    return FORMATS[from_format].to_ours(tensors, **options)


def _to_folder(
    ours: Converted, encoder: nn.Module | None, problem: str, known: Mapping[str, Any]
) -> tuple[Converted, str]:
    """Convert to the class of Hugging Face that computes the same."""
    if encoder is None:
        raise ValueError(f"no configuration of Hugging Face fits these weights: {problem}")
    if not known.get("heads") and not any("rel_pos_bias" in name for name in ours):
        raise ValueError('"hf" needs the number of attention heads, which no weight tells: --heads')
    settings = theirs_from_encoder(encoder)
    (architecture,) = settings["architectures"]
    return to_hf(encoder, architecture, settings), architecture


@dataclass(frozen=True)
class _Side:
    """One side of a comparison.

    Attributes:
        names: The format.
        tensors: Weights under its names.
        config: What a file says of their class.
        package: The package whose class computes.
        authors: The class of the authors' package, if there is one.
        not_built: Why there is none, in one line.
    """

    names: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    package: str
    authors: Outputs | None = None
    not_built: str = ""

    def outputs(self, model: nn.Module) -> Outputs:
        """Build the class, or take mimkit's."""
        if self.authors is not None:
            return self.authors
        if self.package == "timm":
            return outputs_of_timm(model, self.tensors)
        if self.package == "transformers":
            named = None if self.names == "hf" else self.names
            return outputs_of_hf(model, self.tensors, named, self.config or None)
        return outputs_of(model)


def _side(names: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> _Side:
    """Find who computes with weights under these names; mimkit in the place of most authors."""
    if names not in OFFICIAL:
        return _Side(names, tensors, config, _package_of(names))
    reason = "the authors' code is no package"
    if names in HALVES:
        try:
            return _Side(names, tensors, config, "dall_e", outputs_of_dall_e(tensors))
        except (ModuleNotFoundError, ValueError) as error:
            reason = f"the authors' package DALL-E was not built ({error})"
    not_built = f"{reason}: mimkit's class computes in its place"
    return _Side(names, tensors, config, "mimkit", not_built=not_built)


def _package_of(names: str) -> str:
    if names == "timm":
        return "timm"
    return "transformers" if names == "hf" or names in ARCHITECTURES else "mimkit"


def _compare(
    first: _Side,
    second: _Side,
    kind: str,
    built: nn.Module,
    back: Converted,
    known: Mapping[str, Any],
) -> tuple[float | None, str]:
    """Compare the outputs of both sides, and say which they are, or why they were not compared.

    The authors' names compute in mimkit's class: on the second side, with the weights that come
    back from the result.

    Raises:
        ValueError: If the target's class does not load the result.
    """
    try:
        outputs = first.outputs(built)
    except (CannotBuild, ModuleNotFoundError, ValueError) as error:
        return None, f"{first.package}: {error}"
    try:
        theirs = built if second.package != "mimkit" else model_from(kind, back, known)
    except ValueError as error:
        return None, f"the result alone is no whole {kind}: {error}"
    try:
        found = second.outputs(theirs)
    except (CannotBuild, ModuleNotFoundError) as error:
        return None, f"{second.package}: {error}"
    again = ", converted back" if second.package == "mimkit" else ""
    names = f"{first.package} and {second.package}{again}"
    return largest_difference(outputs, found, built), names


def not_equal(ours: Converted, result: Converted, back: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the names whose tensors differ when the result has been converted back."""
    wanted = _with_key_bias({n: t for n, t in ours.items() if n not in result.dropped}, back)
    return tuple(
        sorted(n for n, t in wanted.items() if n not in back or not torch.equal(back[n], t))
    )


def _with_key_bias(tensors: dict[str, Tensor], back: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join biases of queries and values with a key bias of zero, where they come back so."""
    for name in [n for n in tensors if n.endswith(".q_bias")]:
        block = name.removesuffix("q_bias")
        if f"{block}qkv.bias" in back:
            query, value = tensors.pop(name), tensors.pop(f"{block}v_bias")
            tensors[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return tensors


def _write(out: Path, result: Converted) -> None:
    names = (out.with_name(f"{out.name}.{number}.partial") for number in itertools.count(1))
    partial = next(name for name in names if not os.path.lexists(name))  # of nobody else
    # Tensors may share memory, which the format of safetensors does not have.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in result.items()}
    try:
        if out.suffix == ".pth":
            torch.save({"model": tensors}, partial)
        else:
            _save_safetensors(tensors, partial)
        os.replace(partial, out)
    except ImportError:
        raise
    except Exception as error:  # PyTorch and safetensors have their own for a full disk
        reason = escaped(error)
        raise OSError(f"{out} cannot be written, is the disk full? ({reason:.200})") from error
    finally:
        partial.unlink(missing_ok=True)


def _save_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"writing {path} needs safetensors: pip install safetensors"
        ) from error
    save_file(tensors, path, metadata={"format": "pt"})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{len(names)}" + (f": {shown}" if names else "") + (", ..." * (len(names) > _SHOWN))
