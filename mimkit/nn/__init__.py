"""Modules built from the rooms below."""

from mimkit.nn._decoders import CrossDecoder, MAEDecoder, PixelHead
from mimkit.nn._layers import TransformerBlock
from mimkit.nn._probes import AttentiveProbe
from mimkit.nn._vit import PatchEmbed, ViT

__all__ = [
    "AttentiveProbe",
    "CrossDecoder",
    "MAEDecoder",
    "PatchEmbed",
    "PixelHead",
    "TransformerBlock",
    "ViT",
]
