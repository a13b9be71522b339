"""Encoders, decoders and heads for masked image modelling."""

from mimkit.nn._convvit import ConvViT
from mimkit.nn._convvit_detector import ConvViTDetector
from mimkit.nn._decoders import CrossDecoder, MAEDecoder, PixelHead
from mimkit.nn._dense import FCNHead, FeaturePyramid, UPerHead
from mimkit.nn._discrete_vae import DiscreteVAE
from mimkit.nn._embed import PatchEmbed
from mimkit.nn._heads import TokenHead
from mimkit.nn._hybrid import ConvStem
from mimkit.nn._layers import TransformerBlock
from mimkit.nn._probes import AttentiveProbe
from mimkit.nn._regressor import CAEDecoder, ContextRegressor
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._simmim_heads import InverseSwin, SimMIMHead
from mimkit.nn._swin import SwinTransformer
from mimkit.nn._tokenizers import PatchTokenizer
from mimkit.nn._vit import ViT

__all__ = [
    "AttentiveProbe",
    "CAEDecoder",
    "ContextRegressor",
    "ConvStem",
    "ConvViT",
    "ConvViTDetector",
    "CrossDecoder",
    "DiscreteVAE",
    "FCNHead",
    "FeaturePyramid",
    "InverseSwin",
    "MAEDecoder",
    "PatchEmbed",
    "PatchTokenizer",
    "PixelHead",
    "RelativePositionBias",
    "SimMIMHead",
    "SwinTransformer",
    "TokenHead",
    "TransformerBlock",
    "UPerHead",
    "ViT",
]
