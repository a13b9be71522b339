"""What Hugging Face's configurations say, as arguments of mimkit's classes, and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mimkit.nn import SwinTransformer, ViT

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_THEIR_ACTIVATIONS = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}
# Their `model_type` -> how the names of its classes start.
CLASSES = {
    "vit": "ViT",
    "vit_mae": "ViTMAE",
    "swin": "Swin",
    "beit": "Beit",
    "data2vec-vision": "Data2VecVision",
    "dinov2": "Dinov2",
    "dinov2_with_registers": "Dinov2WithRegisters",
}
_MODEL_TYPES = {name: model_type for model_type, name in CLASSES.items()}
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def ours_from_config(config: Mapping[str, Any], family: str, task: str) -> dict[str, Any]:
    """Return the arguments of the class that a model converts to.

    Args:
        config: Their configuration.
        family: Their `model_type`.
        task: What the model becomes: "simmim", "mae", or an encoder.

    Raises:
        ValueError: If the configuration lacks something, or has something that mimkit's class
            cannot compute.
    """
    try:
        return _ours(config, family, task)
    except KeyError as error:
        raise ValueError(f"the configuration of a {family} lacks {error}") from error


def _ours(config: Mapping[str, Any], family: str, task: str) -> dict[str, Any]:
    act = config.get("hidden_act", "gelu")
    if act not in _ACTIVATIONS:
        raise _refusal("hidden_act", act, f"one of {sorted(_ACTIVATIONS)}")
    for name in _DROPOUTS:
        if config.get(name):
            raise _refusal(name, config[name], "0: mimkit has no dropout; set it to 0 to convert")
    ours = _swin(config) if family == "swin" else _vit(config, family)
    ours |= {"act": _ACTIVATIONS[act]}
    if task == "mae":
        return _mae(config, ours)
    if task == "simmim":
        return _simmim(config, family, ours)
    return ours | _pooling(config, family)


def _vit(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    if config.get("use_swiglu_ffn"):
        raise _refusal("use_swiglu_ffn", True, "False: nn.ViT has no gated MLP")
    if config.get("use_conv_embed") or config.get("apply_layernorm_after_vq"):
        raise _refusal("use_conv_embed", True, "False")
    is_dino = family.startswith("dinov2")
    is_beit = family in ("beit", "data2vec-vision")
    dim = config["hidden_size"]
    hidden = dim * config["mlp_ratio"] if is_dino else config["intermediate_size"]
    scale = config.get("layer_scale_init_value" if is_beit else "layerscale_value")
    ours = {
        "image_size": _axes(config["image_size"]),
        "patch_size": _axes(config["patch_size"]),
        "in_channels": config["num_channels"],
        "dim": dim,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_ratio": _ratio(dim, float(hidden)),
        "drop_path": config.get("drop_path_rate", 0.0),
        "norm_eps": config["layer_norm_eps"],
        "qkv_bias": "qv" if is_beit else config.get("qkv_bias", True),
    }
    if is_beit or is_dino:
        ours["layer_scale"] = (scale or None) if is_beit else scale
    if is_beit:
        ours["absolute_positions"] = config["use_absolute_position_embeddings"]
        shared = config["use_shared_relative_position_bias"]
        block = config["use_relative_position_bias"]
        if shared and block:
            raise _refusal("use_relative_position_bias", True, "False beside a shared one")
        ours["relative_positions"] = "shared" if shared else "block" if block else None
    if config.get("num_register_tokens"):
        ours["num_registers"] = config["num_register_tokens"]
    if family != "vit_mae":
        ours["learn_positions"] = True
    return ours


def _swin(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("use_absolute_embeddings"):
        raise _refusal("use_absolute_embeddings", True, "False: nn.SwinTransformer has none")
    if not config.get("qkv_bias", True):
        raise _refusal("qkv_bias", False, "True")
    return {
        "image_size": _axes(config["image_size"]),
        "patch_size": _axes(config["patch_size"]),
        "in_channels": config["num_channels"],
        "dim": config["embed_dim"],
        "depth": tuple(config["depths"]),
        "heads": tuple(config["num_heads"]),
        "window": config["window_size"],
        "mlp_ratio": config["mlp_ratio"],
        "drop_path": config.get("drop_path_rate", 0.0),
        "norm_eps": config["layer_norm_eps"],
    }


def _mae(config: Mapping[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    if not ours.pop("qkv_bias"):
        raise _refusal("qkv_bias", False, "True")
    dim = config["decoder_hidden_size"]
    if int(dim * ours["mlp_ratio"]) != config["decoder_intermediate_size"]:
        wanted = f"{ours['mlp_ratio']} times decoder_hidden_size, as in the encoder"
        raise _refusal("decoder_intermediate_size", config["decoder_intermediate_size"], wanted)
    return ours | {
        "decoder_dim": dim,
        "decoder_depth": config["decoder_num_hidden_layers"],
        "decoder_heads": config["decoder_num_attention_heads"],
        "normalize_pixels": config["norm_pix_loss"],
    }


def _simmim(config: Mapping[str, Any], family: str, ours: dict[str, Any]) -> dict[str, Any]:
    ours.pop("learn_positions", None)
    if family == "swin":
        return ours | {"encoder": "swin"}
    ours = {"layer_scale": None} | ours | {"encoder": "vit"}
    if not ours["qkv_bias"]:
        raise _refusal("qkv_bias", False, "True")
    relative, absolute = ours.pop("relative_positions", None), ours.pop("absolute_positions", True)
    if relative == "block" or (relative and absolute):
        raise _refusal(
            "use_relative_position_bias", True, "False: use_shared_relative_position_bias alone, "
            "or absolute positions alone, are what SimMIM has"
        )  # fmt: skip
    ours["positions"] = "relative" if relative else "absolute" if absolute else "none"
    if family == "beit":
        if not config["use_mean_pooling"]:
            raise _refusal("use_mean_pooling", False, "True: else there are two norms at the end")
        ours |= {"target": "tokens", "num_clusters": config["vocab_size"]}
    return ours


def _pooling(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family == "swin":
        return {}
    if family in ("beit", "data2vec-vision") and config["use_mean_pooling"]:
        return {"pool": "mean", "pool_norm": True}
    return {"pool": "token"}


def _axes(size: Any) -> Any:
    return tuple(size) if isinstance(size, list | tuple) else size


def _ratio(dim: int, hidden: float) -> float:
    """Return the ratio of hidden width to width that gives the width back when rounded down."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)


def _refusal(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"{name} of the configuration must be {wanted}; got {value!r}")


def theirs_from_encoder(encoder: nn.Module, family: str | None = None) -> dict[str, Any]:
    """Return the configuration of the model of theirs that computes what an encoder does.

    Args:
        encoder: A `nn.ViT` or `nn.SwinTransformer`.
        family: Start of the name of their class, such as "Dinov2"; if `None`, that of the class
            with the fewest parts that computes the same.

    Raises:
        TypeError: If it is neither a `nn.ViT` nor a `nn.SwinTransformer`.
        ValueError: If no model of theirs does.
    """
    if isinstance(encoder, SwinTransformer):
        family, config = "Swin", _theirs_from_swin(encoder)
    elif isinstance(encoder, ViT):
        family = family or _family_of(encoder)
        _check_vit(encoder, family)
        config = _theirs_from_vit(encoder, family)
    else:
        kind = type(encoder).__name__
        raise TypeError(f"Hugging Face has classes for ViT and SwinTransformer; got a {kind}")
    task = "ForImageClassification" if encoder.num_classes else "Model"
    labels = [f"LABEL_{index}" for index in range(encoder.num_classes)]
    return config | {
        "architectures": [f"{family}{task}"],
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "image_size": _sides(encoder.image_size),
        "patch_size": _sides(encoder.patch_embed.patch_size),
        "num_channels": encoder.patch_embed.proj.weight.shape[1],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
    }


def theirs_from_whole(model: Any, family: str) -> dict[str, Any]:
    """Return the configuration of their pre-training model: a ViTMAE, or one of masked images.

    Args:
        model: An encoder with a decoder, or with a head alone.
        family: Start of the name of their class.

    Raises:
        ValueError: If no model of theirs computes the same.
    """
    config = theirs_from_encoder(model.encoder, family)
    if family == "ViTMAE":
        block = model.decoder.blocks[0]
        return config | {
            "decoder_hidden_size": block.attn.proj.out_features,
            "decoder_num_hidden_layers": len(model.decoder.blocks),
            "decoder_num_attention_heads": block.attn.heads,
            "decoder_intermediate_size": block.mlp.fc1.out_features,
        }
    stride = getattr(model.encoder, "stride", model.encoder.patch_embed.patch_size)
    return config | {
        "encoder_stride": _sides(stride),
        "use_mask_token": True,
        "use_mean_pooling": True,  # BEiT: the norm at the end is the head's
        "vocab_size": model.head.predict.out_features,
    }


def _family_of(encoder: ViT) -> str:
    """Choose the class for a ViT: BEiT has most options, DINOv2 has registers, ViT has neither."""
    block: Any = encoder.blocks[0]
    if encoder.reg_token is not None:
        return "Dinov2WithRegisters"
    has_pool_norm = not isinstance(encoder.fc_norm, nn.Identity)
    has_parts = block.attn.q_bias is not None or block.gamma_1 is not None
    has_parts = has_parts or has_pool_norm or len(encoder.rel_pos_bias) > 0
    return "Beit" if has_parts or encoder.pos_embed is None else "ViT"


def _theirs_from_vit(encoder: ViT, family: str) -> dict[str, Any]:
    block: Any = encoder.blocks[0]
    num_tables, has_scale = len(encoder.rel_pos_bias), block.gamma_1 is not None
    config = {
        "model_type": _MODEL_TYPES[family],
        "hidden_size": encoder.dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": block.attn.heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _THEIR_ACTIVATIONS[block.mlp.approximate],
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    if family in ("Beit", "Data2VecVision"):
        config |= {
            "use_mask_token": False,
            "use_absolute_position_embeddings": encoder.pos_embed is not None,
            "use_relative_position_bias": num_tables > 1,
            "use_shared_relative_position_bias": num_tables == 1,
            "use_mean_pooling": not isinstance(encoder.fc_norm, nn.Identity),
            "layer_scale_init_value": 0.1 if has_scale else 0.0,
        }
    elif family.startswith("Dinov2"):
        config |= {
            "mlp_ratio": block.mlp.fc1.out_features // encoder.dim,
            "use_swiglu_ffn": False,
            "layerscale_value": 1.0,
        }
        if family == "Dinov2WithRegisters":
            config["num_register_tokens"] = encoder.num_prefix_tokens - 1
    return config


def _check_vit(encoder: ViT, family: str) -> None:
    """Check that the class of theirs that comes closest computes the same."""
    block: Any = encoder.blocks[0]
    attention, pool = block.attn, encoder._pool
    has_pool_norm = not isinstance(encoder.fc_norm, nn.Identity)
    is_beit, is_dino = family in ("Beit", "Data2VecVision"), family.startswith("Dino")
    problems = {
        "images that have not two axes": len(encoder.image_size) != 2,
        "attention windows": encoder.window is not None,
        "no class token": encoder.cls_token is None,
        "a stem": hasattr(encoder.patch_embed, "stem"),
        "layer scale, tables or no positions, and qkv_bias=False": is_beit
        and attention.q_bias is None
        and attention.qkv.bias is None,
        "registers and qkv_bias other than True, or pool_norm=True": is_dino
        and (attention.qkv.bias is None or has_pool_norm),
        "registers and a head": is_dino and encoder.num_classes > 0,
        "registers and an mlp_ratio that is no integer": is_dino
        and block.mlp.fc1.out_features % encoder.dim != 0,
        f"positions and images that are not square, as a {family}": not family.startswith("ViT")
        and (encoder.pos_embed is not None or len(encoder.rel_pos_bias) > 0)
        and len({*encoder.image_size}) > 1,
        f'pool="{pool}" and pool_norm={has_pool_norm}': (has_pool_norm or encoder.num_classes > 0)
        and has_pool_norm != (pool == "mean"),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ValueError(f"no model of Hugging Face computes what a ViT does with {problem}")


def _theirs_from_swin(encoder: SwinTransformer) -> dict[str, Any]:
    stages: Any = encoder.layers
    block = stages[0].blocks[0]
    windows = [math.isqrt(stage.blocks[0].attn.tokens_inside) for stage in stages]
    if len({*windows}) > 1:
        raise ValueError(
            f"no model of Hugging Face computes what a SwinTransformer does whose stages have "
            f"windows of several sizes; got {windows}"
        )
    return {
        "model_type": "swin",
        "embed_dim": block.norm1.normalized_shape[0],
        "depths": [len(stage.blocks) for stage in stages],
        "num_heads": [stage.blocks[0].attn.heads for stage in stages],
        "window_size": windows[0],
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": _THEIR_ACTIVATIONS[block.mlp.approximate],
        "qkv_bias": True,
        "use_absolute_embeddings": False,
    }


def _sides(sizes: Sequence[int]) -> Any:
    return sizes[0] if len({*sizes}) == 1 else list(sizes)
