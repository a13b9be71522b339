"""Hugging Face's models and mimkit's: the same weights give the same loss and gradients."""

import re
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import masking
from mimkit.interop import from_hf, to_hf
from mimkit.masking import Mask
from mimkit.nn import SwinTransformer, ViT
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIM, SimMIMConfig
from tests.nn import plain

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VIT = SIZES | {"intermediate_size": 72}
DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 54,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "encoder_stride": 4,
}
BEIT = VIT | {"vocab_size": 20, "drop_path_rate": 0.0, "use_mask_token": True}
GRID = (4, 4)

# Class -> configurations. Names of classes as transformers has them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("ViTMAEForPreTraining", VIT | DECODER),
    "mae, normal eps, normalised pixels": (
        "ViTMAEForPreTraining",
        VIT | DECODER | {"layer_norm_eps": 1e-6, "norm_pix_loss": True},
    ),
    "mae, tanh": ("ViTMAEForPreTraining", VIT | DECODER | {"hidden_act": "gelu_new"}),
    "simmim vit": ("ViTForMaskedImageModeling", VIT | {"encoder_stride": 8}),
    "simmim swin": ("SwinForMaskedImageModeling", SWIN),
    "simmim swin, other eps": (
        "SwinForMaskedImageModeling",
        SWIN | {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"},
    ),
    "beit mim": (
        "BeitForMaskedImageModeling",
        BEIT | {"use_shared_relative_position_bias": True},
    ),
    "beit mim, absolute": (
        "BeitForMaskedImageModeling",
        BEIT | {"use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
    ),
    "vit": ("ViTModel", VIT),
    "vit, no bias, tanh": ("ViTModel", VIT | {"qkv_bias": False, "hidden_act": "gelu_fast"}),
    "vit classifier": ("ViTForImageClassification", VIT | {"num_labels": 5}),
    "vit mae encoder": ("ViTMAEModel", VIT | DECODER | {"mask_ratio": 0.0}),
    "swin": ("SwinModel", SWIN),
    "swin classifier": ("SwinForImageClassification", SWIN | {"num_labels": 5}),
    "beit": ("BeitModel", BEIT | {"use_relative_position_bias": True}),
    "beit, class token": (
        "BeitModel",
        BEIT | {"use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "beit classifier": (
        "BeitForImageClassification",
        BEIT | {"use_relative_position_bias": True, "num_labels": 5},
    ),
    "data2vec": ("Data2VecVisionModel", BEIT | {"use_relative_position_bias": True}),
    "data2vec classifier": (
        "Data2VecVisionForImageClassification",
        BEIT | {"use_shared_relative_position_bias": True, "num_labels": 5},
    ),
    "dinov2": ("Dinov2Model", SIZES | {"mlp_ratio": 3, "layerscale_value": 0.5}),
    "dinov2 with registers": (
        "Dinov2WithRegistersModel",
        SIZES | {"num_register_tokens": 3, "layerscale_value": 0.5},
    ),
    "dinov2 classifier": ("Dinov2ForImageClassification", SIZES),
}
PRE_TRAINING = [
    name for name, (model, _) in MODELS.items() if model.endswith(("Training", "eling"))
]
ENCODERS = [name for name in MODELS if name not in PRE_TRAINING]


def theirs_of(name: str) -> nn.Module:
    """Build a model of theirs with random weights, none of them zero."""
    architecture, options = MODELS[name]
    cls = getattr(hf, architecture)
    torch.manual_seed(0)
    model: nn.Module = cls(cls.config_class(**options)).eval()
    positions = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    plain.randomize(model)
    with torch.no_grad():
        for n, value in positions.items():  # MAE's constant tables
            model.get_parameter(n).copy_(value)
    return model


def ours_of(theirs: nn.Module) -> nn.Module:
    """Convert a model of theirs, and load it strictly."""
    converted = from_hf(theirs)
    assert set(converted.filled) <= {"fc_norm.weight", "fc_norm.bias"}
    architecture, config = type(theirs).__name__, converted.config
    assert config is not None
    if architecture == "ViTMAEForPreTraining":
        ours: nn.Module = MAE(MAEConfig(**config))
    elif architecture.endswith("ForMaskedImageModeling"):
        ours = SimMIM(SimMIMConfig(**config))
        missing = {n for n in ours.state_dict() if n.startswith("target.")}
        converted.update({n: ours.state_dict()[n] for n in missing})
    else:
        ours = (SwinTransformer if "Swin" in architecture else ViT)(**config)
    ours.load_state_dict(converted, strict=True)
    return ours.eval()


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def check_gradients(theirs: nn.Module, ours: nn.Module, *, tolerance: float = 2e-5) -> None:
    """Gradients convert as the weights do, and agree to a share of their largest."""
    found = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    config = theirs.config
    converted = from_hf(found, config, architecture=type(theirs).__name__)
    own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in own.values())
    assert converted.keys() >= own.keys()
    assert len(own) > 10
    for name, gradient in own.items():
        difference = (gradient - converted[name]).abs().max()
        assert difference <= tolerance * max(gradient.abs().max(), 1e-2 * largest), name


@pytest.mark.parametrize("name", [n for n in PRE_TRAINING if n.startswith("mae")])
def test_a_masked_autoencoder_has_the_same_loss_and_gradients(name):
    theirs = theirs_of(name)
    ours = ours_of(theirs)
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    expected = theirs(images(), noise=noise)
    mask = Mask.from_noise(noise, GRID, 12)
    output = ours(images(), mask)
    assert torch.equal(expected.mask, mask.is_masked.flatten(1).float())
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-6, atol=0)
    expected.loss.backward()
    output.loss.backward()
    check_gradients(theirs, ours)


@pytest.mark.parametrize("name", [n for n in PRE_TRAINING if n.startswith("simmim")])
def test_simmim_has_the_same_loss_and_gradients(name):
    theirs = theirs_of(name)
    ours = ours_of(theirs)
    mask = masking.uniform(masking.key([0, 1, 2], seed=0), ours.encoder.grid, 0.6)
    expected = theirs(images(), bool_masked_pos=mask.is_masked.flatten(1))
    output = ours(images(), mask)
    torch.testing.assert_close(output.loss, expected.loss, rtol=2e-6, atol=0)
    expected.loss.backward()
    output.loss.backward()
    check_gradients(theirs, ours)


@pytest.mark.parametrize("name", [n for n in PRE_TRAINING if n.startswith("beit")])
def test_beit_has_the_same_loss_and_gradients(name):
    theirs = theirs_of(name)
    ours = ours_of(theirs)
    mask = masking.uniform(masking.key([0, 1, 2], seed=0), GRID, 0.5)
    hidden = mask.is_masked.flatten(1)
    labels = torch.randint(20, (int(hidden.sum()),), generator=torch.Generator().manual_seed(2))
    expected = theirs(images(), bool_masked_pos=hidden, labels=labels).loss
    latent = ours.encoder(images(), mask, mask_token=ours.mask_token)
    loss = F.cross_entropy(ours.head(latent[:, 1:], mask).flatten(0, 1), labels)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    expected.backward()
    loss.backward()
    check_gradients(theirs, ours)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_the_same_output_and_gradients(name):
    theirs = theirs_of(name)
    ours = ours_of(theirs)
    options = {"noise": torch.arange(16.0).expand(3, -1)} if "mae" in name else {}
    output, tokens = theirs(images(), **options), ours(images())
    if "classifier" in name and "dino" not in name:
        expected, found = output.logits, ours.head(ours.pool(tokens))
    elif "classifier" in name:
        expected = theirs.dinov2(images()).last_hidden_state
        found = tokens
    else:
        expected, found = output.last_hidden_state, tokens
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-6)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * weights).mean().backward()
    (expected * weights).mean().backward()
    check_gradients(theirs, ours)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", MODELS)
def test_weights_go_there_and_back(name, version):
    theirs = theirs_of(name)
    state = theirs.state_dict()
    config, architecture = theirs.config, type(theirs).__name__
    ours = from_hf(theirs)
    back = to_hf(ours, architecture, version=version)
    assert set(back.dropped) <= set(ours.filled)
    again = from_hf(back, config, architecture=architecture)
    assert again.keys() | set(ours.filled) == ours.keys()
    assert all(torch.equal(again[n], ours[n]) for n in again)
    if version == 5:
        # A model without pooling has no norm after it; nn.ViT always has.
        norm = {"pooler.layernorm.weight", "pooler.layernorm.bias"}
        kept = {n for n in state if n not in from_hf(theirs).dropped}
        assert back.keys() - set(back.filled) - norm == kept - norm
        assert all(torch.equal(back[n], state[n]) for n in kept)


@settings(max_examples=40)
@given(st.sampled_from(sorted(MODELS)), st.data())
def test_converters_are_each_others_adjoint(name, data):
    """`<from(x), y> == <x, to(y)>` for any subset of a state dict that splits no joined tensor."""
    architecture, options = MODELS[name]
    cls = getattr(hf, architecture)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in cls(cls.config_class(**options)).state_dict().items()}
    parts = re.compile(r"\b[qkv]_proj|\b(query|key|value)\b")
    whole = sorted({parts.sub("qkv", n): 0 for n in shapes})
    chosen = data.draw(st.sets(st.sampled_from(whole), min_size=1))
    names = [n for n in shapes if parts.sub("qkv", n) in chosen]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = {n: torch.randn(shapes[n], generator=generator) for n in names}
    config = cls.config_class(**options)
    ours = from_hf(x, config, architecture=architecture)
    y = {n: torch.randn(t.shape, generator=generator) for n, t in ours.items()}
    theirs = to_hf(y, architecture, config)
    left = sum(float((ours[n].double() * y[n].double()).sum()) for n in ours)
    right = sum(float((x[n].double() * theirs[n].double()).sum()) for n in x if n in theirs)
    assert left == pytest.approx(right)
    assert set(x) - set(theirs) == set(ours.dropped)


@pytest.mark.parametrize("name", MODELS)
def test_names_alone_tell_what_a_state_dict_is(name):
    theirs = theirs_of(name)
    known, guessed = from_hf(theirs), from_hf(theirs.state_dict())
    assert guessed.config is None
    assert guessed.keys() == known.keys() - set(known.filled)
    with_config = from_hf({"state_dict": theirs.state_dict()}, theirs.config.to_dict())
    assert with_config.keys() == guessed.keys()
    assert with_config.config == known.config


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"hidden_act": "quick_gelu"}, "hidden_act .* got 'quick_gelu'"),
        ("vit", {"hidden_dropout_prob": 0.1}, "hidden_dropout_prob .* must be 0"),
        ("dinov2", {"use_swiglu_ffn": True}, "gated MLP"),
        ("swin", {"use_absolute_embeddings": True}, "use_absolute_embeddings"),
        ("mae", {"decoder_intermediate_size": 99}, "decoder_intermediate_size"),
        ("beit mim", {"use_relative_position_bias": True}, "use_relative_position_bias"),
        ("beit mim", {"use_mean_pooling": False}, "two norms at the end"),
    ],
)
def test_what_mimkit_cannot_compute_is_refused(name, options, message):
    architecture, given_options = MODELS[name]
    cls = getattr(hf, architecture)
    with torch.device("meta"):
        model = cls(cls.config_class(**(given_options | options)))
    with pytest.raises(ValueError, match=message):
        from_hf(model)


def test_what_an_encoder_of_ours_has_in_part_is_said():
    state = from_hf(theirs_of("beit, class token"))
    weights = {n: t for n, t in state.items() if "rel_pos_bias" not in n and "gamma" not in n}
    converted = to_hf(weights, "ViTModel")
    assert set(converted.filled) == {f"layers.{i}.attention.k_proj.bias" for i in range(2)}


def test_unknown_architectures_are_named():
    with pytest.raises(ValueError, match=r"'ViTMAEForPreTraining'.*got 'CLIPModel'"):
        to_hf({"cls_token": torch.zeros(1, 1, 4)}, "CLIPModel")
    with torch.device("meta"):
        clip = hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT))
    with pytest.raises(ValueError, match="got 'CLIPVisionModel'"):
        from_hf(clip)


# Models of ours with a part that only some classes of theirs have: options, and what has it.
PARTS = {
    "layer scale": ({"layer_scale": 0.1}, ("Beit", "Data2VecVision", "Dinov2")),
    "registers": ({"num_registers": 2}, ("Dinov2WithRegisters",)),
    "shared table": ({"relative_positions": "shared"}, ("Beit", "Data2VecVision")),
    "tables": ({"relative_positions": "block"}, ("Beit", "Data2VecVision")),
    "norm after pooling": ({"pool_norm": True}, ("Beit", "Data2VecVision")),
    "head": ({"num_classes": 5}, ()),
    "nothing else": ({}, ()),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["ViT", "ViTMAE", "Beit", "Data2VecVision", "Dinov2"])
def test_what_their_class_lacks_is_refused_or_dropped(kind, part):
    options, takers = PARTS[part]
    ours = ViT(image_size=32, patch_size=8, dim=32, depth=2, heads=4, mlp_ratio=2, **options)
    if part not in ("head", "nothing else") and not kind.startswith(takers):
        with pytest.raises(ValueError, match=r"does not know .*gamma_1|reg_token|table|fc_norm"):
            to_hf(ours, f"{kind}Model")
        return
    sizes = SIZES | ({"mlp_ratio": 2} if kind == "Dinov2" else {"intermediate_size": 64})
    sizes["layer_norm_eps"] = 1e-6
    if kind in ("Beit", "Data2VecVision"):
        sizes = sizes | {
            "use_absolute_position_embeddings": True,
            "use_shared_relative_position_bias": part == "shared table",
            "use_relative_position_bias": part == "tables",
            "use_mean_pooling": part == "norm after pooling",
            "layer_scale_init_value": 0.1 if part == "layer scale" else 0.0,
        }
    cls = getattr(hf, f"{kind}Model")
    theirs = cls(cls.config_class(**sizes)).eval()
    converted = to_hf(ours, f"{kind}Model", theirs.config)
    dropped = {"head": ("head.weight", "head.bias")}
    if kind == "Data2VecVision":  # built without pooling by default
        dropped["norm after pooling"] = ("fc_norm.weight", "fc_norm.bias")
    assert converted.dropped == dropped.get(part, ())
    pooler = {n: t for n, t in theirs.state_dict().items() if n.startswith("pooler.dense.")}
    constants = {n: t for n, t in theirs.state_dict().items() if n.endswith("position_index")}
    theirs.load_state_dict({**converted, **pooler, **constants}, strict=True)
    if kind != "ViTMAE":  # which hides patches
        with torch.no_grad():
            expected, found = theirs(images()).last_hidden_state, ours.eval()(images())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_registers_go_to_the_class_that_has_them():
    options = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}
    ours = ViT(**options, num_registers=3, learn_positions=True).eval()
    config = hf.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, layer_norm_eps=1e-6)
    theirs = hf.Dinov2WithRegistersModel(config).eval()
    converted = to_hf(ours, "Dinov2WithRegistersModel")
    theirs.load_state_dict(converted, strict=True)
    assert {"embeddings.mask_token", "encoder.layer.1.layer_scale2.lambda1"} <= {*converted.filled}
    with torch.no_grad():
        expected, found = theirs(images()).last_hidden_state, ours(images())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
