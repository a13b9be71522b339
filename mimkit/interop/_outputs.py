"""What two models of the same weights give for fixed inputs, and the largest difference of it.

Encoders are compared by their tokens, whole models by their predictions for masked patches.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mimkit._grids import Grid
from mimkit.interop._built import Codes, Weights, mlp_ratio
from mimkit.interop._hf_config import CLASSES, theirs_from_encoder, theirs_from_whole
from mimkit.masking import Mask, key, uniform
from mimkit.nn import AttentiveProbe, ConvViTDetector, SwinTransformer
from mimkit.patches import gather_masked, patchify

_FAMILIES = sorted(CLASSES.values(), key=len, reverse=True)  # "ViTMAE" before "ViT"
_NUM_TOKENS = 16  # of a sample for a probe

Outputs = Callable[[Tensor, Any], Tensor]  # of a model's input, and a mask if it has patches


def outputs_of(model: Any) -> Outputs:
    """Return a model of `model_from` as a function from its input to what is compared."""
    if isinstance(model, ConvViTDetector):
        return lambda images, _: torch.cat([level.flatten(1) for level in model(images)], dim=1)
    if hasattr(model, "encoder") and not isinstance(model, Codes):
        return lambda images, mask: model(images, mask)
    return lambda inputs, _: model(inputs)


def outputs_of_dall_e(tensors: Weights) -> Outputs:
    """Build OpenAI's encoder or decoder, of their package DALL-E.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        ValueError: If their class has other sizes.
    """
    from dall_e import Decoder, Encoder

    first, last = tensors["blocks.input.w"], tensors["blocks.output.conv.w"]
    is_encoder = first.shape[-1] > 1  # the decoder's input layer has no neighborhood
    depth = {name.split(".")[2] for name in tensors if name.startswith("blocks.group_1.")}
    sizes = {"n_blk_per_group": len(depth)}
    if is_encoder:
        sizes |= {"input_channels": first.shape[1], "n_hid": len(first), "vocab_size": len(last)}
    else:
        sizes |= {"n_init": len(first), "vocab_size": first.shape[1], "n_hid": last.shape[1]}
        sizes |= {"output_channels": len(last) // 2}
    cls = Encoder if is_encoder else Decoder
    built: Any = cls(**sizes).eval()
    try:
        built.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"dall_e's {cls.__name__} does not load them: {reason:.200}") from error
    if is_encoder:
        return lambda images, _: built(images).flatten(1)
    return lambda codes, _: built(codes.softmax(dim=1)).flatten(1)


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
                "global_pool": "avg" if has_pool_norm else "token",  # decides about `fc_norm`
                "use_abs_pos_emb": encoder.pos_embed is not None,
                "use_rel_pos_bias": len(encoder.rel_pos_bias) > 0,
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
    options["mlp_ratio"] = mlp_ratio(block.mlp.fc1.weight)
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
    """Return the largest difference of two models' outputs for fixed inputs.

    It is relative to the largest output.

    Raises:
        ValueError: If the outputs have different shapes.
    """
    noise, mask = _fixed_inputs(model)
    expected, found = first(noise, mask).double(), second(noise, mask).double()
    if expected.shape != found.shape:
        raise ValueError(f"their outputs have shapes {[*expected.shape]} and {[*found.shape]}")
    return float((found - expected).abs().max() / expected.abs().max())


def _fixed_inputs(model: Any) -> tuple[Tensor, Mask | None]:
    """Return two samples of noise, and for images in patches a mask of half of them."""
    mask, shape = None, tuple[int, ...]()
    if isinstance(model, AttentiveProbe):
        shape = (_NUM_TOKENS, model.axis_sizes["dim"])
    elif isinstance(model, Codes):
        shape = model.input_shape
    else:
        encoder = getattr(model, "encoder", model)
        embeds = (p for n, p in encoder.named_parameters() if n.endswith("proj.weight"))
        shape = (next(embeds).shape[1], *encoder.image_size)
        mask = uniform(key([0, 1], seed=0), encoder.grid, 0.5)
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)), mask
