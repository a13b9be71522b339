"""Models of mimkit built from weights alone, for a comparison of outputs."""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimkit._grids import NUM_CLASS_ROWS
from mimkit.interop._formats import ENCODERS
from mimkit.masking import Mask
from mimkit.nn import (
    AttentiveProbe,
    CAEDecoder,
    ContextRegressor,
    ConvViT,
    ConvViTDetector,
    DiscreteVAE,
    MAEDecoder,
    PixelHead,
    SimMIMHead,
    SwinTransformer,
    ViT,
)

_MOST_PIXELS = 1 << 22
_WIDTH_OF_HEAD = 64  # of every ViT whose authors' checkpoints mimkit reads
_WIDTH_OF_DECODER_HEAD = 32  # of MAE and ConvMAE
_GLOBAL_LAYERS = (0, 3, 6, 10)  # of ConvMAE's detector

Weights = Mapping[str, Tensor]


def model_from(model: str, weights: Weights, known: Mapping[str, Any]) -> nn.Module:
    """Build a model of mimkit for weights, and load them.

    A pre-training model is put together from its parts as its recipe does.

    Args:
        model: What the weights load into, as `model_of` says.
        weights: Name -> tensor, with mimkit's names.
        known: Arguments of the class, of which those are used that weights do not tell:
            `image_size`, `heads`, `decoder_heads`, `global_layers`, `norm_eps`, `act`. Without
            `image_size`, a square that fits the positions; without `heads`, 64 channels to a head.

    Raises:
        ValueError: If the weights are not those of one such model.
    """
    if model in _CLASSES:
        return _class_from(model, weights, known)
    prefix = "encoder."
    inside = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    encoder = _class_from(ENCODERS[model], inside, known)
    try:
        whole = _WHOLE[model](encoder, weights, known).eval()
        whole.load_state_dict({n: t for n, t in weights.items() if not n.startswith("target.")})
    except (ArithmeticError, KeyError, IndexError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights are not those of one {model}: {reason:.200}") from error
    return whole


class _Autoencoder(nn.Module):
    """MAE and ConvMAE: the encoder sees visible patches, a decoder predicts the masked ones."""

    def __init__(self, encoder: Any, weights: Weights, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        dim, in_dim = weights["decoder.embed.weight"].shape
        self.decoder = MAEDecoder(
            grid=encoder.grid,
            in_dim=in_dim,
            dim=dim,
            depth=_count(r"decoder\.blocks\.(\d+)\.", weights),
            heads=known.get("decoder_heads") or max(dim // _WIDTH_OF_DECODER_HEAD, 1),
            mlp_ratio=mlp_ratio(weights["decoder.blocks.0.mlp.fc1.weight"]),
            num_prefix=encoder.num_prefix_tokens,
            **{name: known[name] for name in ("norm_eps", "act") if known.get(name)},
        )
        embeds = [p for n, p in encoder.named_parameters() if n.endswith("embed.proj.weight")]
        patch_size = [side // n for side, n in zip(encoder.image_size, encoder.grid, strict=True)]
        self.head = PixelHead(dim=dim, patch_size=patch_size, in_channels=embeds[0].shape[1])

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        predicted: Tensor = self.head(self.decoder(self.encoder(images, mask), mask))
        return predicted


class _SimMIM(nn.Module):
    """SimMIM: the encoder sees mask tokens, a linear head predicts the masked patches."""

    def __init__(self, encoder: Any, weights: Weights, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.Parameter(torch.empty_like(weights["mask_token"]))
        num_outputs, patch = len(weights["head.predict.weight"]), encoder.patch_embed.patch_size
        token = getattr(encoder, "stride", patch)
        if token == patch:  # also classes
            token = patch = (1,) * len(patch)
        self.head = SimMIMHead(
            grid=getattr(encoder, "out_grid", encoder.grid),
            dim=weights["head.predict.weight"].shape[1],
            token=token,
            patch=patch,
            values=num_outputs // math.prod(token),
        )

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        latent = self.encoder(images, mask, mask_token=self.mask_token)
        predicted: Tensor = self.head(latent[:, self.encoder.num_prefix_tokens :], mask)
        return predicted


class _CAE(nn.Module):
    """CAE: a regressor predicts latents of the masked patches, a decoder and a head the rest."""

    def __init__(self, encoder: Any, weights: Weights, known: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        positions, head = weights["pos_embed"], weights["head.weight"]
        width = positions.shape[-1]
        layers = {"linear": nn.Linear(encoder.dim, width), "norm": nn.LayerNorm(width, eps=1e-6)}
        has_projection = "project.linear.weight" in weights
        self.project = nn.Sequential(OrderedDict(layers)) if has_projection else nn.Identity()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty_like(positions), requires_grad=False)
        first = "regressor.blocks.0."
        blocks: dict[str, Any] = {
            "dim": width,
            "heads": _heads(width, {"heads": known.get("decoder_heads")}),
            "mlp_ratio": mlp_ratio(weights[f"{first}mlp.fc1.weight"]),
            "layer_scale": 1.0 if f"{first}gamma_1" in weights else None,
        }
        depth = _count(r"regressor\.blocks\.(\d+)\.", weights)
        self.regressor = ContextRegressor(depth=depth, **blocks)
        self.decoder = CAEDecoder(depth=_count(r"decoder\.blocks\.(\d+)\.", weights), **blocks)
        self.head = nn.Linear(width, len(head), bias="head.bias" in weights)

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        prefix = self.encoder.num_prefix_tokens
        visible = self.project(self.encoder(images, mask)[:, prefix:])
        positions = self.pos_embed[0, prefix:]
        latent = self.regressor.from_mask_token(self.mask_token[0, 0], visible, positions, mask)
        predicted: Tensor = self.head(self.decoder(latent, positions[mask.masked_ids]))
        return predicted


_WHOLE: dict[str, Callable[..., nn.Module]] = {
    "MAE": _Autoencoder,
    "ConvMAE": _Autoencoder,
    "CAE": _CAE,
    "SimMIM with a ViT": _SimMIM,
    "SimMIM with a Swin": _SimMIM,
}


class Codes(nn.Module):
    """The halves of a discrete VAE for which there are weights.

    Attributes:
        input_shape: Shape of a sample: of an image, or of logits of codes for the decoder alone.
    """

    def __init__(self, *, halves: Iterable[str], **sizes: Any) -> None:
        super().__init__()
        vae = DiscreteVAE(**sizes)
        self.encoder = vae.encoder if "encoder" in halves else None
        self.decoder = vae.decoder if "decoder" in halves else None
        codes = (vae.vocabulary_size, 4, 4)
        image = (vae.in_channels, 4 * vae.stride, 4 * vae.stride)
        self.input_shape = codes if self.encoder is None else image

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of codes, and what the decoder makes of their distribution."""
        outputs = []
        if self.encoder is not None:
            x = self.encoder(x)
            outputs.append(x.flatten(1))
        if self.decoder is not None:
            outputs.append(self.decoder(x.softmax(dim=1)).flatten(1))
        return torch.cat(outputs, dim=1)


def _class_from(model: str, weights: Weights, known: Mapping[str, Any]) -> nn.Module:
    """Build an encoder, or another class of mimkit, for weights, and load them.

    Raises:
        ValueError: If the weights are not those of one such model.
    """
    infer, cls, hidden = _CLASSES[model]
    try:
        arguments = infer(weights, known) | {n: known[n] for n in hidden if known.get(n)}
        _check_size(arguments.get("image_size", 0))
        with torch.device("meta"):  # no memory, whatever a configuration says
            cls(**arguments).load_state_dict(weights, assign=True)
        built = cls(**arguments).eval()
        built.load_state_dict(weights)
    except (ArithmeticError, KeyError, IndexError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights are not those of one {model}: {reason:.200}") from error
    return built


def _check_size(image_size: int | Sequence[int]) -> None:
    sides = image_size if isinstance(image_size, Sequence) else (image_size,) * 2
    if math.prod(sides) > _MOST_PIXELS:
        raise ValueError(f"images of {tuple(sides)} pixels are too large to try")


def _vit(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    projection, num_class = weights["patch_embed.proj.weight"], int("cls_token" in weights)
    dim, channels, *patch = projection.shape
    tables = [name for name in weights if name.startswith("rel_pos_bias.")]
    registers = weights.get("reg_token")
    depth = _count(r"blocks\.(\d+)\.", weights)
    return {
        "image_size": known.get("image_size") or _sides(_vit_grid(weights, len(patch)), patch),
        "patch_size": tuple(patch),
        "in_channels": channels,
        "dim": dim,
        "depth": depth,
        "heads": weights[tables[0]].shape[1] if tables else _heads(dim, known),
        "mlp_ratio": mlp_ratio(weights["blocks.0.mlp.fc1.weight"]),
        "class_token": bool(num_class),
        "pool": "token" if num_class and "fc_norm.weight" not in weights else "mean",
        "pool_norm": "fc_norm.weight" in weights,
        "absolute_positions": "pos_embed" in weights,
        "relative_positions": {0: None, depth: "block"}.get(len(tables), "shared"),
        "layer_scale": 1.0 if "blocks.0.gamma_1" in weights else None,
        "qkv_bias": "qv" if "blocks.0.attn.q_bias" in weights
        else "blocks.0.attn.qkv.bias" in weights,
        "num_registers": 0 if registers is None else registers.shape[1],
        "num_classes": _num_classes(weights),
    }  # fmt: skip


def _vit_grid(weights: Weights, axes: int) -> tuple[int, ...]:
    """Return the square grid that the positions are for; without positions, any will do."""
    num_class = int("cls_token" in weights)
    if "pos_embed" in weights:
        return _root(weights["pos_embed"].shape[1] - num_class, axes, "positions")
    table = next((t for name, t in weights.items() if name.startswith("rel_pos_bias.")), None)
    if table is None:
        return (2,) * axes
    spans = _root(len(table) - NUM_CLASS_ROWS * num_class, axes, "relative positions")
    return tuple((span + 1) // 2 for span in spans)


def _swin(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    dim, channels, *patch = weights["patch_embed.proj.weight"].shape
    stages = range(_count(r"layers\.(\d+)\.", weights))
    tables = [weights[f"layers.{i}.blocks.0.attn.rel_pos_bias.table"] for i in stages]
    window = max((math.isqrt(len(table)) + 1) // 2 for table in tables)
    merged = 2 ** (len(stages) - 1)
    return {
        "image_size": known.get("image_size") or tuple(window * merged * side for side in patch),
        "patch_size": tuple(patch),
        "in_channels": channels,
        "dim": dim,
        "depth": tuple(_count(rf"layers\.{i}\.blocks\.(\d+)\.", weights) for i in stages),
        "heads": tuple(table.shape[1] for table in tables),
        "window": window,
        "mlp_ratio": mlp_ratio(weights["layers.0.blocks.0.mlp.fc1.weight"]),
        "num_classes": _num_classes(weights),
    }


def _convvit(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    embeds = ("stages.0.embed", "stages.1.embed", "embed")
    projections = [weights[f"{embed}.proj.weight"] for embed in embeds]
    patches = [tuple(projection.shape[2:]) for projection in projections]
    blocks = ("stages.0.blocks", "stages.1.blocks", "blocks")
    strides = [math.prod(sides) for sides in zip(*patches, strict=True)]
    tables = [name for name in weights if name.startswith("rel_pos_bias.")]
    dim = tuple(len(projection) for projection in projections)
    return {
        "image_size": known.get("image_size")
        or _sides(_root(weights["pos_embed"].shape[1], 2, "positions"), strides),
        "patch_sizes": tuple(patches),
        "in_channels": projections[0].shape[1],
        "dim": dim,
        "depth": tuple(_count(rf"{re.escape(block)}\.(\d+)\.", weights) for block in blocks),
        "heads": weights[tables[0]].shape[1] if tables else _heads(dim[-1], known),
        "mlp_ratio": tuple(mlp_ratio(weights[f"{b}.0.mlp.fc1.weight"]) for b in blocks),
        "kernel_size": weights["stages.0.blocks.0.depthwise.weight"].shape[-1],
        "multi_scale": any(name.startswith("fusions.") for name in weights),
        "pool_norm": "fc_norm.weight" in weights,
        "relative_positions": "block" if tables else None,
        "layer_scale": 1.0 if "blocks.0.gamma_1" in weights else None,
        "num_classes": _num_classes(weights),
    }


def _detector(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    window = weights["window_bias.table"]
    spans = _root(len(window), 2, "relative positions of a window", advice="")
    found = _convvit(weights, known)
    depth = found["depth"][-1]
    shared = "image_size", "patch_sizes", "in_channels", "dim", "depth", "mlp_ratio", "kernel_size"
    return {name: found[name] for name in shared} | {
        "heads": window.shape[1],
        "window": (spans[0] + 1) // 2,
        "global_layers": [
            i for i in known.get("global_layers") or _GLOBAL_LAYERS if 0 <= i < depth
        ],
    }


def _probe(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    num_classes, dim = weights["head.weight"].shape
    return {"dim": dim, "heads": _heads(dim, known), "num_classes": num_classes}


def _codes(weights: Weights, known: Mapping[str, Any]) -> dict[str, Any]:
    del known
    halves = {name.partition(".")[0] for name in weights}
    sizes: dict[str, Any] = {}
    if "decoder" in halves:
        last, first = weights["decoder.blocks.output.conv.weight"], "decoder.blocks.input.weight"
        sizes = {"in_channels": len(last) // 2, "dim": last.shape[1]}
        sizes |= dict(zip(("stem_dim", "vocabulary_size"), weights[first].shape, strict=False))
    if "encoder" in halves:
        dim, channels, *_ = weights["encoder.blocks.input.weight"].shape
        vocabulary = len(weights["encoder.blocks.output.conv.weight"])
        sizes |= {"in_channels": channels, "dim": dim, "vocabulary_size": vocabulary}
    half = min(halves)
    return sizes | {
        "halves": halves,
        "groups": _count(rf"{half}\.blocks\.group_(\d+)\.", weights),
        "depth": _count(rf"{half}\.blocks\.group_1\.block_(\d+)\.", weights),
    }


# What is built by one class: how its arguments follow from weights, and which weights do not tell.
_CLASSES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., nn.Module], set[str]]] = {
    "ViT": (_vit, ViT, {"norm_eps", "act"}),
    "SwinTransformer": (_swin, SwinTransformer, {"norm_eps", "act"}),
    "ConvViT": (_convvit, ConvViT, set()),
    "ConvViTDetector": (_detector, ConvViTDetector, set()),
    "AttentiveProbe": (_probe, AttentiveProbe, set()),
    "DiscreteVAE": (_codes, Codes, set()),
}


def _count(pattern: str, names: Iterable[str]) -> int:
    """Count the numbers in names. A gap in them shows when the weights are loaded."""
    return len({int(match[1]) for match in map(re.compile(pattern).match, names) if match})


def _root(
    count: int, axes: int, what: str, *, advice: str = ": give --image-size"
) -> tuple[int, ...]:
    side = round(count ** (1 / axes))
    if side**axes != count:
        raise ValueError(f"{count} {what} are no square grid{advice}")
    return (side,) * axes


def _sides(grid: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    return tuple(cells * side for cells, side in zip(grid, patch, strict=True))


def _heads(dim: int, known: Mapping[str, Any]) -> int:
    return int(known.get("heads") or max(dim // _WIDTH_OF_HEAD, 1))


def mlp_ratio(first_layer: Tensor) -> float:
    hidden, dim = first_layer.shape
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _num_classes(weights: Weights) -> int:
    return len(weights["head.weight"]) if "head.weight" in weights else 0
