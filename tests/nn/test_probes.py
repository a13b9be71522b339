"""The attentive probe against the authors' (`cae_finetune_vit_A.npz`, keys `attentive/`)."""

import pytest
import torch
from torch import Tensor, nn

from mimkit.nn import AttentiveProbe
from tests.golden_files import golden

GOLDEN = golden("cae_finetune_vit_A")
NAMES = {"attentive_blocks.0.": "", "cross_attn.q_bias": "cross_attn.q.bias"} | {
    "cross_attn.v_bias": "cross_attn.v.bias"
}
OURS = ("query_token", "attentive_blocks.", "fc_norm.", "head.")


def authors_probe() -> AttentiveProbe:
    weights: dict[str, Tensor] = {}
    for name, value in GOLDEN.tensors("attentive/param/").items():
        if name.startswith(OURS):
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = value
    config = GOLDEN.config
    probe = AttentiveProbe(
        dim=config["embed_dim"], heads=config["num_heads"], num_classes=config["num_classes"]
    )
    probe.load_state_dict(weights)
    return probe


@pytest.fixture
def tokens() -> Tensor:
    return GOLDEN.tensor("attentive/tokens_after_norm")


def close(ours: Tensor, key: str) -> None:
    theirs = GOLDEN.tensor(f"attentive/{key}")
    torch.testing.assert_close(ours, theirs.view(ours.shape), rtol=1e-4, atol=2e-5)


def test_pooling_normalisation_and_logits_equal_the_authors(tokens):
    probe = authors_probe().train()
    captured: dict[str, Tensor] = {}
    probe.fc_norm.register_forward_hook(
        lambda _, inputs, output: captured.update(pooled=inputs[0], bn=output)
    )
    logits = probe(tokens)
    close(captured["pooled"], "pooled")
    close(captured["bn"], "bn_train")
    close(logits, "logits_train")
    close(probe.fc_norm.running_mean, "bn_running_mean_after")
    close(probe.fc_norm.running_var, "bn_running_var_after")
    probe.eval()(tokens)
    close(captured["bn"], "bn_eval")


def test_every_parameter_of_the_probe_has_a_gradient(tokens):
    probe = authors_probe().train()
    probe(tokens).pow(3).sum().backward()
    for name, parameter in probe.named_parameters():
        # Softmax cancels a constant that is added to every key.
        if name != "norm_k.bias":
            assert parameter.grad.abs().max() > 1e-6, name


def test_every_norm_has_maes_epsilon_and_batch_norm_no_affine():
    probe = AttentiveProbe(dim=8, heads=2, num_classes=3)
    norms = [module for module in probe.modules() if isinstance(module, nn.LayerNorm)]
    assert [norm.eps for norm in norms] == [1e-6] * 3
    assert not probe.fc_norm.affine


def test_the_probe_does_not_depend_on_token_order(tokens):
    probe = authors_probe().eval()
    order = torch.randperm(tokens.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probe(tokens[:, order]), probe(tokens), rtol=1e-4, atol=1e-5)


def test_a_probe_in_evaluation_does_not_mix_samples(tokens):
    probe = authors_probe().eval()
    torch.testing.assert_close(probe(tokens[:1]), probe(tokens)[:1], rtol=1e-4, atol=1e-5)
