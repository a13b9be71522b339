"""State dictionaries of architectures that a converter does not know: one sentence each."""

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from mimkit.interop import from_hf, from_official, from_timm

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL_IMAGES = SMALL | {"image_size": 32, "patch_size": 8}
SMALL_CLIP = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def hugging_face(name: str, **options: object) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}Model")(config)


def from_name(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, **options)


# Model, what the message calls it, and which function takes it (none if None).
FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
    "hf vit": (partial(hugging_face, "ViT", **SMALL_IMAGES), "a ViT of Hugging Face", "from_hf"),
    "hf swin": (
        partial(hugging_face, "Swin", embed_dim=16, depths=[1, 1], num_heads=[1, 2]),
        "a Swin of Hugging Face",
        "from_hf",
    ),
    "hf swin v2": (
        partial(hugging_face, "Swinv2", embed_dim=16, depths=[1, 1], num_heads=[1, 2]),
        "a Swin V2 of Hugging Face",
        None,
    ),
    "hf dinov2": (
        partial(hugging_face, "Dinov2", **SMALL_IMAGES),
        "a DINOv2 of Hugging Face",
        "from_hf",
    ),
    "hf clip": (
        partial(hugging_face, "CLIP", text_config=SMALL_CLIP, vision_config=SMALL_IMAGES),
        "a CLIP or SigLIP of Hugging Face",
        None,
    ),
    "hf deit": (
        partial(hugging_face, "DeiT", **SMALL_IMAGES),
        "a distilled DeiT of Hugging Face",
        None,
    ),
    "hf resnet": (partial(hugging_face, "ResNet"), "a ResNet of Hugging Face", None),
    "hf convnext": (partial(hugging_face, "ConvNext"), "a ConvNeXt", None),
    "hf bert": (partial(hugging_face, "Bert", **SMALL), "a language model", None),
    "torchvision vit": (torchvision.models.vit_b_16, "a ViT of torchvision", None),
    "torchvision swin": (torchvision.models.swin_t, "a Swin of torchvision", None),
    "torchvision swin v2": (torchvision.models.swin_v2_t, "a Swin V2 of torchvision", None),
    "torchvision convnext": (torchvision.models.convnext_tiny, "a ConvNeXt of torchvision", None),
    "torchvision resnet": (torchvision.models.resnet18, "a ResNet", None),
    "torchvision efficientnet": (torchvision.models.efficientnet_b0, "an EfficientNet", None),
    "torchvision densenet": (torchvision.models.densenet121, "a DenseNet", None),
    "torchvision vgg": (torchvision.models.vgg11, "a convolutional network of torchvision", None),
    "timm convnext": (partial(from_name, "convnext_atto"), "a ConvNeXt", None),
    "timm convnext v2": (partial(from_name, "convnextv2_atto"), "a ConvNeXt V2", None),
    "timm resnet": (partial(from_name, "resnet18"), "a ResNet", None),
    "timm swin v2": (partial(from_name, "swinv2_tiny_window8_256"), "a Swin V2", None),
    "timm efficientnet": (partial(from_name, "efficientnet_b0"), "an EfficientNet", None),
    "timm mixer": (partial(from_name, "mixer_s32_224"), "an MLP-Mixer or a MetaFormer", None),
    "timm deit distilled": (
        partial(from_name, "deit_tiny_distilled_patch16_224"),
        "a distilled DeiT of timm",
        None,
    ),
    "timm eva02": (partial(from_name, "eva02_tiny_patch14_224"), "an Eva", None),
}  # fmt: skip
CONVERTERS = {
    **{
        method: partial(from_official, method)
        for method in ("mae", "mae_vit", "simmim_vit", "simmim_swin", "simmim_swin_finetune",
                       "cae", "cae_vit", "convmae", "convmae_vit", "dalle")
    },
    "from_timm": from_timm,
    "from_hf": from_hf,

}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_a_state_dict_of_another_architecture_is_one_sentence(name):
    make, kind, taker = FOREIGN[name]
    with torch.device("meta"):
        tensors = make().state_dict()
    for converter in CONVERTERS.keys() - {taker}:
        with pytest.raises(ValueError, match="does not know .* tensors, such as") as caught:
            CONVERTERS[converter](tensors)
        message = str(caught.value)
        assert kind in message, converter
        assert (f"interop.{taker}" if taker else "no function of mimkit takes") in message
        assert "\n" not in message
        assert len(message) < 400
