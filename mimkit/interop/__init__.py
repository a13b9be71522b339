"""Conversion of checkpoints and models: the authors', timm's and Hugging Face's, and back."""

from mimkit.interop._convert import from_official, to_official
from mimkit.interop._convert_file import Receipt, convert_file
from mimkit.interop._files import load_checkpoint
from mimkit.interop._fit import fit_encoder
from mimkit.interop._hf import from_hf, to_hf
from mimkit.interop._hf_folder import save_hf
from mimkit.interop._rules import Converted
from mimkit.interop._timm import from_timm, to_timm, wrap_timm

__all__ = [
    "Converted",
    "Receipt",
    "convert_file",
    "fit_encoder",
    "from_hf",
    "from_official",
    "from_timm",
    "load_checkpoint",
    "save_hf",
    "to_hf",
    "to_official",
    "to_timm",
    "wrap_timm",
]
