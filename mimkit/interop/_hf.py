"""Conversion of Hugging Face's models (transformers): names, and what their configurations say."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimkit._state_dicts import unwrap
from mimkit.interop._hf_config import CLASSES, ours_from_config
from mimkit.interop._recognize import register_taker, select_known
from mimkit.interop._rules import (
    Converted,
    Rule,
    Translation,
    joined,
    renames,
    state_of,
    within,
)

Version = Literal[4, 5]
# What a model of theirs becomes: an encoder alone (with or without the prefix of its base model),
# `recipes.simmim.SimMIM` or `recipes.mae.MAE`.
_Task = Literal["bare", "encoder", "simmim", "mae"]


@dataclass(frozen=True)
class _Names:
    """Names inside a block of theirs.

    Attributes:
        block: Prefix of a block.
        queries: Query, key and value projections.
        out: Projection after attention.
        mlp: The two layers of the MLP.
        norms: Norms before attention and before the MLP.
        scales: The two layer scales.
        tables: Relative position tables: one shared by all blocks, and that of a block.
    """

    block: str = "layers.{i}."
    queries: tuple[str, str, str] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    out: str = "attention.o_proj"
    mlp: tuple[str, str] = ("mlp.fc1", "mlp.fc2")
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    scales: tuple[str, str] = ("lambda_1", "lambda_2")
    tables: tuple[str, str] = ("shared_position_bias", "relative_position_bias")


_OLD_QUERIES = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_OLD = _Names(
    block="encoder.layer.{i}.",
    queries=_OLD_QUERIES,
    out="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    tables=("encoder.relative_position_bias", "attention.attention.relative_position_bias"),
)
_DINO = _Names(
    block="encoder.layer.{i}.",
    norms=("norm1", "norm2"),
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
)
_OLD_DINO = _Names(
    block="encoder.layer.{i}.",
    queries=_OLD_QUERIES,
    out="attention.output.dense",
    norms=_DINO.norms,
    scales=_DINO.scales,
)
_SWIN_BLOCK = "encoder.layers.{i}.blocks.{j}."
_SWIN = _Names(block=_SWIN_BLOCK, tables=("", "attention.relative_position_bias"))
_OLD_SWIN = _Names(
    block=_SWIN_BLOCK,
    queries=("attention.self.query", "attention.self.key", "attention.self.value"),
    out="attention.output.dense",
    mlp=("intermediate.dense", "output.dense"),
    tables=("", "attention.self"),
)
_TABLE = "relative_position_bias_table"


@dataclass(frozen=True)
class _Family:
    """Models of one kind.

    Attributes:
        prefix: Prefix of the base model in models with a head.
        names: Names inside a block, of transformers 5 and 4.
        has_key_bias: Whether keys have a bias; else queries and values alone have one.
        parts: Which parts, beside those of every ViT, its models have: "scales", "tables",
            "registers", "pool_norm".
        head: Name of the classifier; `None` if it does not take one pooled token.
    """

    prefix: str
    names: Mapping[Version, _Names]
    has_key_bias: bool = True
    parts: frozenset[str] = frozenset()
    head: str | None = "classifier"


_BEIT_PARTS = frozenset({"scales", "tables", "pool_norm"})
_DINO_PARTS = frozenset({"scales"})
_FAMILIES = {
    "vit": _Family("vit.", {5: _Names(), 4: _OLD}),
    "vit_mae": _Family("vit.", {5: _Names(), 4: _OLD}),
    "swin": _Family("swin.", {5: _SWIN, 4: _OLD_SWIN}),
    "beit": _Family("beit.", {5: _Names(), 4: _OLD}, has_key_bias=False, parts=_BEIT_PARTS),
    "data2vec-vision": _Family(
        "data2vec_vision.", {5: _OLD, 4: _OLD}, has_key_bias=False, parts=_BEIT_PARTS
    ),
    "dinov2": _Family("dinov2.", {5: _DINO, 4: _OLD_DINO}, parts=_DINO_PARTS, head=None),
    "dinov2_with_registers": _Family(
        "dinov2_with_registers.",
        {5: _DINO, 4: _OLD_DINO},
        parts=_DINO_PARTS | {"registers"},
        head=None,
    ),
}
ARCHITECTURES: dict[str, tuple[str, _Task]] = {
    **{f"{name}Model": (family, "bare") for family, name in CLASSES.items()},
    **{
        f"{name}ForImageClassification": (family, "encoder")
        for family, name in CLASSES.items()
        if family != "vit_mae"
    },
    **{
        f"{CLASSES[family]}ForMaskedImageModeling": (family, "simmim")
        for family in ("vit", "swin", "beit")
    },
    "ViTMAEForPreTraining": ("vit_mae", "mae"),
}


def from_hf(
    model_or_state: nn.Module | Mapping[str, Any],
    config: Any = None,
    *,
    architecture: str | None = None,
) -> Converted:
    """Convert a Hugging Face model to mimkit's names and shapes.

    | theirs | loads into |
    |---|---|
    | `ViTMAEForPreTraining` | `recipes.mae.MAE` |
    | `ViTForMaskedImageModeling`, `Swin...`, `Beit...` | `recipes.simmim.SimMIM` |
    | `ViTModel`, `ViTMAEModel`, `BeitModel`, `Data2VecVisionModel`, `Dinov2Model`, |  |
    | `Dinov2WithRegistersModel`, and their `...ForImageClassification` | `nn.ViT` |
    | `SwinModel`, `SwinForImageClassification` | `nn.SwinTransformer` |

    Args:
        model_or_state: A model, or name -> tensor with the names of transformers 4 or 5.
        config: The model's configuration, or its `config.json` as a dictionary. A model carries
            its own.
        architecture: Name of the model's class, where configuration and names do not tell.

    Returns:
        The converted tensors; `.dropped` lists the names that have no counterpart. With a
        configuration, `.config` holds the arguments to build the class above with:
        `nn.ViT(**converted.config)`, `MAE(MAEConfig(**converted.config))`.

    Raises:
        TypeError: If it is neither a model nor a dictionary.
        ValueError: If less than nine tenths of the tensors are known, or the configuration has
            something that mimkit's class cannot compute.

    Source:
        The names of Hugging Face's transformers, versions 4 and 5.

    Example:
        >>> names = [f"layers.0.attention.{part}_proj.weight" for part in "qkv"]
        >>> converted = from_hf({name: torch.ones(8, 8) for name in names})
        >>> {name: tuple(tensor.shape) for name, tensor in converted.items()}
        {'blocks.0.attn.qkv.weight': (24, 8)}
    """
    if isinstance(model_or_state, nn.Module):
        architecture = architecture or type(model_or_state).__name__
        config = config or getattr(model_or_state, "config", None)
        _check_architecture(architecture)
        converted = from_hf(model_or_state.state_dict(), config, architecture=architecture)
        return _with_pool_norm(converted)
    tensors = unwrap(model_or_state)
    config = _as_dictionary(config)
    family, task = _identify(tensors, config, architecture)
    arguments = None if config is None else ours_from_config(config, family, task)
    translation = _translation(family, task, (5, 4))
    converted = translation.to_ours(select_known(tensors, "from_hf", translation.unknown))
    converted.config = arguments
    if arguments is not None and task == "encoder" and "head.weight" in converted:
        arguments["num_classes"] = len(converted["head.weight"])
    return converted


def _with_pool_norm(converted: Converted) -> Converted:
    """Add the norm after pooling, as it is before training, to a model built without pooling."""
    if not (converted.config or {}).get("pool_norm") or "fc_norm.weight" in converted:
        return converted
    like = converted["cls_token"].flatten()
    norm = {"fc_norm.weight": torch.ones_like(like), "fc_norm.bias": torch.zeros_like(like)}
    filled = (*converted.filled, *norm)
    return Converted(
        {**converted, **norm}, converted.dropped, filled=filled, config=converted.config
    )


def to_hf(
    model_or_state: nn.Module | Mapping[str, Any],
    architecture: str,
    config: Any = None,
    *,
    version: Version = 5,
) -> Converted:
    """Convert a model of mimkit to a Hugging Face model's names: the inverse of `from_hf`.

    Args:
        model_or_state: A model, or name -> tensor with mimkit's names.
        architecture: Name of the Hugging Face class, such as "ViTMAEForPreTraining".
        config: The configuration of their model. Of a part of a BEiT, it says whether a relative
            position table is that of the first block or shared by all.
        version: Major version of transformers whose names the result has.

    Returns:
        The converted tensors. `.dropped` lists the names that have no counterpart, such as the head
        of an encoder without one; `.filled` those that theirs has and ours has not: key biases,
        which have no effect, and DINOv2's mask token, which are zero, and DINOv2's layer scale,
        which is one. `ViTModel` has another pooler of its own: build it with
        `add_pooling_layer=False` to load strictly.

    Raises:
        TypeError: If it is neither a model nor a dictionary.
        ValueError: If the architecture is unknown, if the model has parts that theirs lacks (layer
            scale, relative positions, registers, a norm after pooling, ...), or if less than nine
            tenths of the tensors are known.

    Source:
        As in `from_hf`.

    Example:
        >>> list(to_hf({"blocks.0.attn.qkv.weight": torch.ones(24, 8)}, "ViTModel"))[0]
        'layers.0.attention.q_proj.weight'
    """
    family, task = _check_architecture(architecture)
    if version not in (4, 5):
        raise ValueError(f"version must be 4 or 5; got {version!r}")
    state = state_of(model_or_state, "to_hf")
    translation = _translation(family, task, (version,))
    if family == "data2vec-vision" and task == "bare":  # built without its pooler by default
        rules = tuple(rule for rule in translation.rules if rule.ours != "fc_norm.{rest}")
        left_out = (*translation.ours_left_out, "fc_norm.{rest}")
        translation = replace(translation, rules=rules, ours_left_out=left_out)
    unknown = partial(translation.unknown, ours=True)
    tensors = select_known(unwrap(state), f'to_hf(..., "{architecture}")', unknown)
    has_own_tables = any(re.search(r"rel_pos_bias\.[1-9]", name) for name in tensors)
    if has_own_tables or (_as_dictionary(config) or {}).get("use_relative_position_bias"):
        rules = tuple(rule for rule in translation.rules if "bias.0.table" not in str(rule.ours))
        translation = replace(translation, rules=rules)
    converted = translation.to_theirs(tensors)
    neutral = _neutral(converted, _FAMILIES[family], version)
    return Converted({**converted, **neutral}, converted.dropped, filled=tuple(neutral))


def _neutral(
    converted: Mapping[str, Tensor], family: _Family, version: Version
) -> dict[str, Tensor]:
    """Return what theirs has and ours may lack, with the values that have no effect."""
    names = family.names[version]
    query, key, _ = names.queries
    is_dino = family.head is None
    neutral = {}
    for name, tensor in converted.items():
        if family.has_key_bias and name.endswith(f"{query}.bias"):
            neutral[name.replace(query, key)] = torch.zeros_like(tensor)
        if is_dino and name.endswith("embeddings.cls_token"):
            neutral[name.replace("cls", "mask")] = torch.zeros_like(tensor[0])
        for norm, scale in zip(names.norms, names.scales, strict=True):
            if is_dino and name.endswith(f".{norm}.weight"):
                neutral[name.replace(f"{norm}.weight", scale)] = torch.ones_like(tensor)
    return {name: tensor for name, tensor in neutral.items() if name not in converted}


def _check_architecture(architecture: Any) -> tuple[str, _Task]:
    name = architecture if isinstance(architecture, str) else getattr(architecture, "__name__", "")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {sorted(ARCHITECTURES)}; got {name!r}")
    return ARCHITECTURES[name]


def _as_dictionary(config: Any) -> dict[str, Any] | None:
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"config must be a configuration or a dictionary; got {config!r:.60}")
    plain: dict[str, Any] = config.to_dict()
    return plain


def _identify(
    tensors: Iterable[str], config: Mapping[str, Any] | None, architecture: str | None
) -> tuple[str, _Task]:
    """Find out what a state dict is, from its configuration and its names."""
    text = "\n".join(tensors)
    config = config or {}
    declared = config.get("architectures") or []
    if architecture is None and len(declared) == 1 and declared[0] in ARCHITECTURES:
        architecture = declared[0]
    if architecture is not None:
        return _check_architecture(architecture)
    family = config.get("model_type") or _family_of(text)
    if family not in _FAMILIES:
        raise ValueError(f"model_type must be one of {sorted(_FAMILIES)}; got {family!r}")
    if not any(name.startswith(_FAMILIES[family].prefix) for name in tensors):
        return family, "bare"
    if family == "vit_mae":
        return family, "mae"
    marks = ("decoder.0.", "lm_head.", *(() if "classifier." in text else ("mask_token",)))
    is_pretrained = any(mark in text for mark in marks) and family in ("vit", "swin", "beit")
    return family, "simmim" if is_pretrained else "encoder"


def _family_of(text: str) -> str:
    """Tell the family by names alone."""
    marks = {
        "vit_mae": ("decoder.decoder_", "decoder.mask_token"),
        "swin": ("swin.", "encoder.layers.", "embeddings.norm."),
        "data2vec-vision": ("data2vec_vision.",),
        "dinov2_with_registers": ("register_tokens", "dinov2_with_registers."),
        "dinov2": ("dinov2.", "layer_scale1.", ".norm1."),
        "beit": ("beit.", "lambda_1", "lambda_2", _TABLE, "lm_head."),
    }
    found = (name for name, words in marks.items() if any(word in text for word in words))
    has_query_bias = "q_proj.bias" in text or "query.bias" in text
    has_key_bias = "k_proj.bias" in text or "key.bias" in text
    only_values = has_query_bias and not has_key_bias and "vit." not in text
    return next(found, "beit" if only_values else "vit")


@cache
def _translation(family: str, task: _Task, versions: tuple[Version, ...]) -> Translation:
    kind = _FAMILIES[family]
    theirs = "" if task == "bare" else kind.prefix
    ours = "encoder." if task in ("simmim", "mae") else ""
    rules: list[Rule] = []
    for version in versions:
        names = kind.names[version]
        encoder = _swin_rules(names) if family == "swin" else _vit_rules(names, kind, task)
        rules += within(encoder, theirs=theirs, ours=ours)
        if task == "mae":
            blocks = _block_rules(names, kind, "decoder_layers.{i}.", "blocks.{i}.")
            rules += within(blocks, theirs="decoder.", ours="decoder.")
            if len(versions) > 1:  # `save_pretrained` of transformers 5 renames them to this
                blocks = _block_rules(names, kind, "decoder_encoder.layer.{i}.", "blocks.{i}.")
                rules += within(blocks, theirs="decoder.", ours="decoder.")
    if task == "mae":
        rules += renames(
            ("decoder.mask_token", "decoder.mask_token"),
            ("decoder.decoder_pos_embed", "decoder.pos_embed"),
            ("decoder.decoder_embed.{rest}", "decoder.embed.{rest}"),
            ("decoder.decoder_norm.{rest}", "decoder.norm.{rest}"),
            ("decoder.decoder_pred.{rest}", "head.{rest}"),
        )
    elif task == "simmim":
        rules += [
            Rule(f"{theirs}embeddings.mask_token", "mask_token"),
            Rule("decoder.0.weight", "head.predict.weight", is_pointwise=True),
            Rule("decoder.0.bias", "head.predict.bias"),
        ]
        if family == "beit":
            head = renames(
                ("layernorm.{rest}", "encoder.norm.{rest}"),
                ("lm_head.{rest}", "head.predict.{rest}"),
            )
            rules = [*head, *(rule for rule in rules if not rule.theirs.startswith("decoder.0"))]
    elif kind.head is not None and task == "encoder":
        rules += renames((f"{kind.head}.{{rest}}", "head.{rest}"))
    constants = f"{{rest}}.{_TABLE.replace('bias_table', 'index')}"
    left_out = [constants, f"{theirs}pooler.dense.{{rest}}", "classifier.{rest}"]
    left_out += [f"{theirs}embeddings.mask_token"]
    return Translation(
        tuple(rules), left_out=tuple(left_out), ours_left_out=("target.{rest}", "head.{rest}")
    )


def _vit_rules(names: _Names, family: _Family, task: _Task) -> tuple[Rule, ...]:
    shared, block = names.tables
    tables = (
        (f"{shared}.{_TABLE}", "rel_pos_bias.0.table"),
        (f"{names.block}{block}.{_TABLE}", "rel_pos_bias.{i}.table"),
    )
    has_pool_norm = "pool_norm" in family.parts and task in ("bare", "encoder")
    return (
        *renames(
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.patch_embeddings.projection.{rest}", "patch_embed.proj.{rest}"),
            ("layernorm.{rest}", "norm.{rest}"),
            *(tables if "tables" in family.parts else ()),
            *([("pooler.layernorm.{rest}", "fc_norm.{rest}")] if has_pool_norm else ()),
            *([("embeddings.register_tokens", "reg_token")] if "registers" in family.parts else ()),
        ),
        *_block_rules(names, family, names.block, "blocks.{i}."),
    )


def _swin_rules(names: _Names) -> tuple[Rule, ...]:
    _, table = names.tables
    ours = "layers.{i}.blocks.{j}."
    return (
        *renames(
            ("embeddings.patch_embeddings.projection.{rest}", "patch_embed.proj.{rest}"),
            ("embeddings.norm.{rest}", "patch_embed.norm.{rest}"),
            (f"{names.block}{table}.{_TABLE}", f"{ours}attn.rel_pos_bias.table"),
            ("encoder.layers.{i}.downsample.{rest}", "layers.{i}.downsample.{rest}"),
            ("layernorm.{rest}", "norm.{rest}"),
        ),
        *_block_rules(names, _FAMILIES["swin"], names.block, ours),
    )


def _block_rules(names: _Names, family: _Family, theirs: str, ours: str) -> tuple[Rule, ...]:
    query, key, value = names.queries
    biases = tuple(f"{part}.bias" for part in names.queries)
    # Keys need no bias, softmax cancels it. A model with one has ours fused, one without has ours
    # apart; the rules of the other form come second, for the way from mimkit.
    fused = joined(biases, "attn.qkv.bias")
    apart = renames((f"{query}.bias", "attn.q_bias"), (f"{value}.bias", "attn.v_bias"))
    without_key = tuple(rule for rule in fused if rule.theirs != f"{key}.bias")
    has_scales = "scales" in family.parts
    rules = (
        *joined([f"{part}.weight" for part in names.queries], "attn.qkv.weight"),
        *((*fused, *apart) if family.has_key_bias else (*apart, *without_key)),
        *renames(
            (f"{names.out}.{{rest}}", "attn.proj.{rest}"),
            (f"{names.mlp[0]}.{{rest}}", "mlp.fc1.{rest}"),
            (f"{names.mlp[1]}.{{rest}}", "mlp.fc2.{rest}"),
            (f"{names.norms[0]}.{{rest}}", "norm1.{rest}"),
            (f"{names.norms[1]}.{{rest}}", "norm2.{rest}"),
            *(zip(names.scales, ("gamma_1", "gamma_2"), strict=True) if has_scales else ()),
        ),
    )
    return within(rules, theirs=theirs, ours=ours)


def _unknown_to_hf(tensors: Mapping[str, Any]) -> list[str]:
    family, task = _identify(tensors, None, None)
    return _translation(family, task, (5, 4)).unknown(tensors)


register_taker("from_hf", _unknown_to_hf)
