"""Models built from weights alone, and the largest difference of the outputs of two of them.

Encoders are compared by their tokens, whole models by their predictions for masked patches.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimkit._grids import NUM_CLASS_ROWS, Grid
from mimkit.interop._formats import ENCODERS
from mimkit.interop._hf_config import CLASSES, theirs_from_encoder, theirs_from_whole
from mimkit.masking import Mask, key, uniform
from mimkit.nn import ConvViT, MAEDecoder, PixelHead, SimMIMHead, SwinTransformer, ViT
from mimkit.patches import gather_masked, patchify

_MOST_PIXELS = 1 << 22
_WIDTH_OF_HEAD = 64  # of every ViT whose authors' checkpoints mimkit reads
_WIDTH_OF_DECODER_HEAD = 32

_FAMILIES = sorted(CLASSES.values(), key=len, reverse=True)  # "ViTMAE" before "ViT"

Weights = Mapping[str, Tensor]


def model_from(model: str, weights: Weights, known: Mapping[str, Any]) -> nn.Module:
    """Build a model of mimkit for weights, and load them.

    A whole model is put together from its parts as its recipe does.

    Args:
        model: What the weights load into, as `model_of` says.
        weights: Name -> tensor, with mimkit's names.
        known: Arguments of the class, as in `encoder_from`; also `decoder_heads`.

    Raises:
        ValueError: If the weights are not those of one such model, or nothing builds it.
    """
    if model in ENCODERS.values():
        return encoder_from(model, weights, known)
    if model not in _WHOLE:
        raise ValueError(f"no {model} is built here, see whether its tensors come back")
    prefix = "encoder."
    inside = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    encoder = encoder_from(ENCODERS[model], inside, known)
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
            mlp_ratio=_mlp_ratio(weights["decoder.blocks.0.mlp.fc1.weight"]),
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


_WHOLE: dict[str, Callable[..., nn.Module]] = {
    "MAE": _Autoencoder,
    "ConvMAE": _Autoencoder,
    "SimMIM with a ViT": _SimMIM,
    "SimMIM with a Swin": _SimMIM,
}


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


Outputs = Callable[[Tensor, Mask], Tensor]


def outputs_of(model: nn.Module) -> Outputs:
    """Return a model of `model_from` as a function from images and a mask to what is compared."""
    if hasattr(model, "encoder"):
        return lambda images, mask: model(images, mask)
    return lambda images, mask: model(images)


def outputs_of_timm(encoder: Any, tensors: Weights) -> Outputs:
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
    return lambda images, mask: built.forward_features(images).reshape(len(images), -1, encoder.dim)


def _replace_activations(model: nn.Module, act: nn.Module, eps: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
        if isinstance(getattr(module, "act", None), nn.GELU):
            module.act = act


def outputs_of_hf(
    model: Any, tensors: Weights, architecture: str | None, config: Mapping[str, Any] | None
) -> Outputs:
    """Build the class of transformers for weights.

    Args:
        model: mimkit's model for them: a whole one, or an encoder, of which their base model is
            built.
        tensors: Their weights.
        architecture: The name of their class; `None` for what the configuration names, or the one
            that computes what the encoder does.
        config: Their configuration; that of `model` if `None`.

    Raises:
        CannotBuild: If the configuration does not fit.
        ModuleNotFoundError: If transformers is not installed.
        ValueError: If the class does not load the weights.
    """
    import transformers

    try:
        arguments = dict(config or _their_config(model, architecture))
        settings = transformers.AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    except (KeyError, TypeError, ValueError) as error:
        raise CannotBuild(" ".join(str(error).split())) from error
    if not hasattr(model, "encoder"):
        built = _load_hf(transformers.AutoModel, settings, _base_of(tensors))
        if settings.model_type == "vit_mae":
            return _outputs_of_vitmae(built, model.grid, is_whole=False)
        return lambda images, mask: built(images).last_hidden_state
    named = architecture or next(iter(settings.architectures or []), None)
    if named is None:
        raise CannotBuild("the configuration names no class")
    built = _load_hf(getattr(transformers, named), settings, tensors)
    if settings.model_type == "vit_mae":
        return _outputs_of_vitmae(built, model.encoder.grid, is_whole=True)
    patch_size = model.encoder.patch_embed.patch_size

    def predict(images: Tensor, mask: Mask) -> Tensor:
        output = built(images, bool_masked_pos=mask.is_masked.flatten(1))
        if "logits" in output:
            return gather_masked(output.logits, mask)
        return gather_masked(patchify(output.reconstruction, patch_size, order="c p1 p2"), mask)

    return predict


class CannotBuild(Exception):
    """No model of a package can be built for these weights, and so none can be compared."""


def _their_config(model: Any, architecture: str | None) -> dict[str, Any]:
    family = next((name for name in _FAMILIES if (architecture or "").startswith(name)), None)
    if not hasattr(model, "encoder"):
        return theirs_from_encoder(model, family)
    if family is None:
        raise ValueError("nothing tells the class of transformers")
    return theirs_from_whole(model, family)


def _base_of(tensors: Weights) -> dict[str, Tensor]:
    """Select the weights of the base model that a model with a head has."""
    mark = "embeddings.patch_embeddings."
    prefix = next((name.partition(mark)[0] for name in tensors if mark in name), "")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _load_hf(cls: Any, settings: Any, tensors: Weights) -> Any:
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:  # their loader knows the names of version 4, too
        settings.save_pretrained(folder)
        copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, f"{folder}/model.safetensors", metadata={"format": "pt"})
        built, found = cls.from_pretrained(folder, output_loading_info=True)
    lacking = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    if lacking:
        raise ValueError(f"transformers' {type(built).__name__} lacks {lacking[0]!r} in them")
    return built.eval()


def _outputs_of_vitmae(built: Any, grid: Grid, *, is_whole: bool) -> Outputs:
    """Give a ViTMAE the noise that ranks visible patches first; its encoder alone hides nothing."""
    num_tokens = math.prod(grid)

    def outputs(images: Tensor, mask: Mask) -> Tensor:
        hidden = mask.is_masked.flatten(1) * is_whole
        built.config.mask_ratio = 1 - (float(num_tokens - int(hidden[0].sum())) + 0.5) / num_tokens
        noise = hidden * num_tokens + torch.arange(float(num_tokens))
        output = built(images, noise=noise)
        return gather_masked(output.logits, mask) if is_whole else output.last_hidden_state

    return outputs


@torch.no_grad()
def largest_difference(first: Outputs, second: Outputs, model: Any) -> float:
    """Return the largest difference of two models' outputs on two fixed images of noise.

    It is relative to the largest output. Half of the patches are masked, if a mask matters.
    """
    encoder = getattr(model, "encoder", model)
    channels = next(p.shape[1] for n, p in encoder.named_parameters() if n.endswith("proj.weight"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, channels, *encoder.image_size, generator=generator)
    mask = uniform(key([0, 1], seed=0), encoder.grid, 0.5)
    expected, found = first(images, mask).double(), second(images, mask).double()
    if expected.shape != found.shape:
        raise ValueError(f"their outputs have shapes {[*expected.shape]} and {[*found.shape]}")
    return float((found - expected).abs().max() / expected.abs().max())
