"""Masked-image-modelling building blocks: exact, reproducible, no work on what is hidden."""

from mimkit._settings import use

__all__ = ["use"]
__version__ = "0.1.0"
