"""Encoders as backbones of detectors: build them, fill them, and give them back."""

import dataclasses

import torch
from torch import Tensor, nn

from mimkit.nn import ConvViTDetector, SwinTransformer, ViT
from recipes.engine.detection.shape import DetectorShape
from recipes.engine.pretrained.encoders import EncoderFile, drawing_weights, fill_encoder
from recipes.engine.pretrained.shapes import ConvViTShape, EncoderShape, SwinShape, ViTShape

_TABLES = ("window_bias.table", "global_bias.table")


def build_backbone(
    shape: EncoderShape, detector: DetectorShape, *, seed: int, drop_path: float
) -> nn.Module:
    """Build an untrained encoder for detection; its tables of relative positions are at zero.

    Args:
        shape: Its shape; `image_size` is the size of the detector's images.
        detector: Its windows.
        seed: Seed of the weights.
        drop_path: Drop-path rate of the last block.

    Raises:
        UserError: If no encoder can be built with this shape.
    """
    with drawing_weights(seed):
        encoder = _build(shape, detector, drop_path)
    for name, parameter in encoder.named_parameters():
        if name in _TABLES:
            nn.init.zeros_(parameter)
        # Maps are taken before the last norm, and DDP waits for gradients that never come.
        if name.startswith("norm."):
            parameter.requires_grad_(False)
    return encoder


def _build(shape: EncoderShape, detector: DetectorShape, drop_path: float) -> nn.Module:
    arguments = dataclasses.asdict(shape) | {"drop_path": drop_path}
    if isinstance(shape, ConvViTShape):
        del arguments["multi_scale"]
        whole = max(shape.image_axes())
        return ConvViTDetector(
            **arguments, window=detector.window or whole, global_layers=detector.global_blocks
        )
    if isinstance(shape, ViTShape) and detector.window:
        return ViT(
            **arguments,
            window=detector.window,
            global_blocks=detector.global_blocks,
            class_token=False,
            learn_positions=True,
        )
    if isinstance(shape, ViTShape):
        return ViT(**arguments, learn_positions=True)
    assert isinstance(shape, SwinShape)
    return SwinTransformer(**arguments)


def fill_backbone(encoder: nn.Module, file: EncoderFile) -> None:
    """Load pre-trained weights; tables of relative positions that the file lacks stay at zero.

    Raises:
        UserError: If the weights do not fit.
    """
    weights = dict(file.weights)
    own = encoder.state_dict()
    for name in _TABLES:
        if name in own and name not in weights:
            weights[name] = own[name]
    if isinstance(encoder, ViT) and encoder.num_prefix_tokens == 0 and "cls_token" in weights:
        del weights["cls_token"]
        if "pos_embed" in weights:
            weights["pos_embed"] = weights["pos_embed"][:, 1:]
    fill_encoder(encoder, dataclasses.replace(file, weights=weights))  # type: ignore[arg-type]


def encoder_weights(
    encoder: nn.Module, shape: EncoderShape, file: EncoderFile | None
) -> dict[str, Tensor]:
    """Return an encoder's weights with what only pre-training uses: class token and last norm.

    These are the file's, or untrained ones.
    """
    whole = shape.build().state_dict()
    if file is not None:
        kept = {name: tensor for name, tensor in file.weights.items() if name in whole}
        whole |= {name: t for name, t in kept.items() if t.shape == whole[name].shape}
    trained = {name: tensor.cpu() for name, tensor in encoder.state_dict().items()}
    table = trained.get("pos_embed")
    if "cls_token" in whole and "cls_token" not in trained and table is not None:
        trained["pos_embed"] = torch.cat([whole["pos_embed"][:, :1], table], dim=1)
    return whole | trained
