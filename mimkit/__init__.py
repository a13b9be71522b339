"""Masked-image-modelling building blocks: exact, reproducible, without work on masked tokens."""

from mimkit._containers import container
from mimkit._settings import use

__all__ = ["container", "use"]
__version__ = "0.2.0"
