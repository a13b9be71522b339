"""CAE's fine-tuning encoder and attentive probe against golden vectors (`cae_finetune_vit_A`)."""

import pytest
import torch
from torch import Tensor, nn

from mimkit.interop import from_official, to_official
from mimkit.nn import AttentiveProbe, ViT
from tests.golden_files import golden

GOLDEN = golden("cae_finetune_vit_A")
CONSTANT = ".relative_position_index"


def encoder(**changes: object) -> ViT:
    theirs = GOLDEN.config
    return ViT(
        image_size=theirs["img_size"],
        patch_size=theirs["patch_size"],
        dim=theirs["embed_dim"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        layer_scale=0.1,
        qkv_bias="qv",
        first_axis="row",
        **changes,
    )


@pytest.fixture(scope="module")
def images() -> Tensor:
    return GOLDEN.tensor("in/imgs")


@pytest.fixture(scope="module")
def tokens(images: Tensor) -> Tensor:
    """Tokens of the frozen encoder, checked against the authors'."""
    model = encoder()
    parameters = GOLDEN.tensors("attentive/param/")
    headless = {name: value for name, value in parameters.items() if not name.startswith("head.")}
    converted = from_official("cae_vit", headless)
    weights = {name: w for name, w in converted.items() if not name.startswith("fc_norm.")}
    model.load_state_dict(weights)
    with torch.no_grad():
        tokens = model(images)
    torch.testing.assert_close(
        tokens, GOLDEN.tensor("attentive/tokens_after_norm"), rtol=1e-4, atol=2e-5
    )
    return tokens


@pytest.fixture(scope="module")
def probe() -> AttentiveProbe:
    theirs = GOLDEN.config
    model = AttentiveProbe(
        dim=theirs["embed_dim"], heads=theirs["num_heads"], num_classes=theirs["num_classes"]
    )
    converted = from_official("cae_probe", GOLDEN.tensors("attentive/param/"))
    model.load_state_dict(converted)
    return model


def test_the_fine_tuned_features_and_logits_equal_the_authors(images):
    parameters = GOLDEN.tensors("finetune/param/")
    num_classes = GOLDEN.config["num_classes"]
    model = encoder(pool_norm=True, relative_positions="block", num_classes=num_classes).eval()
    converted = from_official("cae_vit", parameters)
    assert all(name.endswith(CONSTANT) for name in converted.dropped)
    model.load_state_dict(converted)
    with torch.no_grad():
        features = model.pool(model(images))
        logits = model.head(features)
    for name, ours in (("features", features), ("logits", logits)):
        expected = GOLDEN.tensor(f"finetune/{name}")
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-6}
    written = to_official("cae_vit", model.state_dict())
    weights = {name for name in parameters if not name.endswith(CONSTANT)}
    assert written.keys() == weights
    assert all(torch.equal(written[name], parameters[name]) for name in weights)


def test_the_attentive_probe_equals_the_authors_in_training(probe, tokens):
    expected = GOLDEN.tensors("attentive/")
    probe.train()
    captured: dict[str, Tensor] = {}
    for name, module in (("pooled", probe.cross_attn), ("bn", probe.fc_norm)):
        module.register_forward_hook(lambda _, __, out, name=name: captured.__setitem__(name, out))
    with torch.no_grad():
        logits = probe(tokens)
        torch.testing.assert_close(captured["pooled"], expected["pooled"], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(captured["bn"], expected["bn_train"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, expected["logits_train"], rtol=1e-4, atol=1e-4)
        for name in ("mean", "var"):
            ours = getattr(probe.fc_norm, f"running_{name}")
            theirs = expected[f"bn_running_{name}_after"]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
        # The released code uses batch statistics here; the golden values use running ones.
        probe.eval()
        probe(tokens)
        torch.testing.assert_close(captured["bn"], expected["bn_eval"], rtol=1e-4, atol=1e-4)


def test_a_pre_training_checkpoint_loads_into_the_encoder():
    parameters = golden("cae_A").tensors("param/")
    converted = from_official("cae_vit", parameters)
    theirs = golden("cae_A").config
    model = ViT(
        image_size=theirs["img_size"],
        patch_size=theirs["patch_size"],
        dim=theirs["embed_dim"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        layer_scale=0.1,
        qkv_bias="qv",
    )
    model.load_state_dict(converted)
    assert set(converted.dropped) == {n for n in parameters if not n.startswith("encoder.")}


def test_the_probes_attention_weights_give_its_pooled_token(probe, tokens):
    probe.eval()
    with torch.no_grad():
        weights = probe.attention(tokens)
        attention = probe.cross_attn
        values = attention.v(probe.norm_v(tokens)).unflatten(2, (attention.heads, -1))
        attended = torch.einsum("bhn,bnhd->bhd", weights, values).flatten(1)
        expected = GOLDEN.tensor("attentive/pooled").squeeze(1)
        torch.testing.assert_close(attention.proj(attended), expected, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(weights.sum(2), torch.ones(weights.shape[:2]))
