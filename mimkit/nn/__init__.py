"""Modules built from the rooms below."""

from mimkit.nn._decoders import CrossDecoder, MAEDecoder, PixelHead
from mimkit.nn._embed import PatchEmbed
from mimkit.nn._hybrid import ConvStem
from mimkit.nn._layers import TransformerBlock
from mimkit.nn._probes import AttentiveProbe
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._swin import SwinTransformer
from mimkit.nn._vit import ViT

__all__ = [
    "AttentiveProbe",
    "ConvStem",
    "CrossDecoder",
    "MAEDecoder",
    "PatchEmbed",
    "PixelHead",
    "RelativePositionBias",
    "SwinTransformer",
    "TransformerBlock",
    "ViT",
]
