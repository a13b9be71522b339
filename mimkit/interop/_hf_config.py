"""What Hugging Face's configurations say, as arguments of mimkit's classes."""

import math
from collections.abc import Mapping
from typing import Any

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def ours_from_config(config: Mapping[str, Any], family: str, task: str) -> dict[str, Any]:
    """Return the arguments of the class that a model converts to.

    Args:
        config: Their configuration.
        family: Their `model_type`.
        task: What the model becomes: "simmim", "mae", or an encoder.

    Raises:
        ValueError: If the configuration has something that mimkit's class cannot compute.
    """
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
        "mlp_ratio": _ratio(dim, hidden),
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
