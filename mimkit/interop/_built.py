"""Models built from weights alone, and the largest difference of the outputs of two of them."""

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimkit._grids import NUM_CLASS_ROWS
from mimkit.interop._hf_config import theirs_from_encoder
from mimkit.nn import ConvViT, SwinTransformer, ViT

_MOST_PIXELS = 1 << 22
_WIDTH_OF_HEAD = 64  # of every ViT whose authors' checkpoints mimkit reads

Weights = Mapping[str, Tensor]


def encoder_from(model: str, weights: Weights, known: Mapping[str, Any]) -> nn.Module:
    """Build an encoder of mimkit for weights, and load them.

    Args:
        model: "ViT", "SwinTransformer" or "ConvViT".
        weights: Name -> tensor, with mimkit's names.
        known: Arguments of the class, of which those are used that weights do not tell:
            `image_size`, `heads`, `norm_eps`, `act`. Without `image_size`, a square that fits the
            positions; without `heads`, 64 channels to a head.

    Raises:
        ValueError: If the weights are not those of one such model.
    """
    infer, cls, hidden = {
        "ViT": (_vit, ViT, {"norm_eps", "act"}),
        "SwinTransformer": (_swin, SwinTransformer, {"norm_eps", "act"}),
        "ConvViT": (_convvit, ConvViT, set[str]()),
    }[model]
    try:
        arguments = infer(weights, known) | {n: known[n] for n in hidden if known.get(n)}
        _check_size(arguments["image_size"])
        with torch.device("meta"):  # no memory, whatever a configuration says
            cls(**arguments).load_state_dict(weights, assign=True)
        encoder: nn.Module = cls(**arguments).eval()
        encoder.load_state_dict(weights)
    except (ArithmeticError, KeyError, IndexError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights are not those of one {model}: {reason:.200}") from error
    return encoder


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
        "mlp_ratio": _mlp_ratio(weights["blocks.0.mlp.fc1.weight"]),
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
        "mlp_ratio": _mlp_ratio(weights["layers.0.blocks.0.mlp.fc1.weight"]),
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
        "mlp_ratio": tuple(_mlp_ratio(weights[f"{b}.0.mlp.fc1.weight"]) for b in blocks),
        "kernel_size": weights["stages.0.blocks.0.depthwise.weight"].shape[-1],
        "multi_scale": any(name.startswith("fusions.") for name in weights),
        "pool_norm": "fc_norm.weight" in weights,
        "relative_positions": "block" if tables else None,
        "layer_scale": 1.0 if "blocks.0.gamma_1" in weights else None,
        "num_classes": _num_classes(weights),
    }


def _count(pattern: str, names: Iterable[str]) -> int:
    return 1 + max(int(match[1]) for match in map(re.compile(pattern).match, names) if match)


def _root(count: int, axes: int, what: str) -> tuple[int, ...]:
    side = round(count ** (1 / axes))
    if side**axes != count:
        raise ValueError(f"{count} {what} are no square grid: give --image-size")
    return (side,) * axes


def _sides(grid: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    return tuple(cells * side for cells, side in zip(grid, patch, strict=True))


def _heads(dim: int, known: Mapping[str, Any]) -> int:
    return int(known.get("heads") or max(dim // _WIDTH_OF_HEAD, 1))


def _mlp_ratio(first_layer: Tensor) -> float:
    hidden, dim = first_layer.shape
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _num_classes(weights: Weights) -> int:
    return len(weights["head.weight"]) if "head.weight" in weights else 0


Encode = Callable[[Tensor], Tensor]


def encode_ours(encoder: Any) -> Encode:
    """Return the encoder as a function from images to tokens."""
    return lambda images: encoder(images)


def encode_timm(encoder: Any, tensors: Weights) -> Encode:
    """Build timm's model for weights that mimkit's encoder stands for.

    Raises:
        ModuleNotFoundError: If timm is not installed.
        ValueError: If timm has no model for these weights.
    """
    from timm.models.beit import Beit
    from timm.models.swin_transformer import SwinTransformer as TimmSwin
    from timm.models.vision_transformer import VisionTransformer

    if len(encoder.image_size) != 2:
        raise ValueError("timm's models take images of two axes")
    embed = encoder.patch_embed
    options: dict[str, Any] = {
        "img_size": encoder.image_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.weight.shape[1],
        "num_classes": encoder.num_classes,
    }
    if isinstance(encoder, SwinTransformer):
        stages: Any = encoder.layers
        blocks = [stage.blocks for stage in stages]
        options |= {
            "embed_dim": embed.proj.weight.shape[0],
            "depths": [len(inside) for inside in blocks],
            "num_heads": [inside[0].attn.heads for inside in blocks],
            "window_size": max(math.isqrt(inside[0].attn.tokens_inside) for inside in blocks),
        }
        model, block = TimmSwin, blocks[0][0]
    else:
        block = encoder.blocks[0]
        has_pool_norm = not isinstance(encoder.fc_norm, nn.Identity)
        is_beit = block.attn.q_bias is not None or len(encoder.rel_pos_bias) > 0
        model = Beit if is_beit else VisionTransformer
        options |= {
            "embed_dim": encoder.dim,
            "depth": len(encoder.blocks),
            "num_heads": block.attn.heads,
            "init_values": None if block.gamma_1 is None else 1.0,
            "global_pool": "avg" if has_pool_norm or encoder.cls_token is None else "token",
        }
        if is_beit:
            options |= {
                "use_abs_pos_emb": encoder.pos_embed is not None,
                "use_rel_pos_bias": len(encoder.rel_pos_bias) > 0,
                "use_fc_norm": has_pool_norm,
            }
        else:
            positions = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
            options |= {
                "class_token": encoder.cls_token is not None,
                "reg_tokens": 0 if encoder.reg_token is None else encoder.reg_token.shape[1],
                "no_embed_class": positions == math.prod(encoder.grid),
                "pos_embed": "learn" if positions else "none",
                "qkv_bias": block.attn.qkv.bias is not None,
                "fc_norm": has_pool_norm,
            }
    options["mlp_ratio"] = _mlp_ratio(block.mlp.fc1.weight)
    act = nn.GELU(approximate=block.mlp.approximate)
    built: Any = model(**options).eval()
    _replace_activations(built, act, block.norm1.eps)
    try:
        built.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"timm's {model.__name__} does not load them: {reason:.200}") from error
    return lambda images: built.forward_features(images).reshape(len(images), -1, encoder.dim)


def _replace_activations(model: nn.Module, act: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
        if isinstance(getattr(module, "act", None), nn.GELU):
            module.act = act


def encode_hf(encoder: nn.Module, tensors: Weights, config: Mapping[str, Any] | None) -> Encode:
    """Build the base model of transformers for weights; with `config`, that it belongs to.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        ValueError: If transformers has no model for these weights.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel

    arguments = dict(theirs_from_encoder(encoder) if config is None else config)
    mark = "embeddings.patch_embeddings."
    prefix = next((name.partition(mark)[0] for name in tensors if mark in name), "")
    base = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    settings = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    with tempfile.TemporaryDirectory() as folder:  # their loader knows the names of version 4, too
        settings.save_pretrained(folder)
        tensors = {name: tensor.clone().contiguous() for name, tensor in base.items()}
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        built, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    lacking = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    if lacking:
        raise ValueError(f"transformers' {type(built).__name__} lacks {lacking[0]!r} in them")
    built = built.eval()
    if arguments.get("mask_ratio") is not None:  # a ViTMAE hides nothing here
        built.config.mask_ratio = 0.0
        noise = torch.arange(float(math.prod(encoder.grid)))  # type: ignore[arg-type]
        return lambda images: built(images, noise=noise.expand(len(images), -1)).last_hidden_state
    return lambda images: built(images).last_hidden_state


@torch.no_grad()
def largest_difference(first: Encode, second: Encode, encoder: Any) -> float:
    """Return the largest difference of two encoders' tokens on two fixed images of noise.

    It is relative to the largest token.
    """
    channels = next(p.shape[1] for n, p in encoder.named_parameters() if n.endswith("proj.weight"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, *encoder.image_size, generator=generator)
    expected, found = first(images).double(), second(images).double()
    if expected.shape != found.shape:
        raise ValueError(f"their tokens have the shapes {[*expected.shape]} and {[*found.shape]}")
    return float((found - expected).abs().max() / expected.abs().max())
