"""What is predicted."""

from mimkit.targets._pixels import NormalizedPixels, PCATarget, Pixels

__all__ = ["NormalizedPixels", "PCATarget", "Pixels"]
