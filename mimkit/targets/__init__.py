"""Prediction targets: pixels, classes, gradient histograms, tokens and features."""

from mimkit.targets._classes import ChannelBins, ColorClusters
from mimkit.targets._hog import HOG
from mimkit.targets._pixels import NormalizedPixels, PCATarget, Pixels
from mimkit.targets._resampled import DownsampledPixels, WindowNormalizedPixels
from mimkit.targets._teachers import FeatureTarget, TokenTarget

__all__ = [
    "HOG",
    "ChannelBins",
    "ColorClusters",
    "DownsampledPixels",
    "FeatureTarget",
    "NormalizedPixels",
    "PCATarget",
    "Pixels",
    "TokenTarget",
    "WindowNormalizedPixels",
]
