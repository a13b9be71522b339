"""CAE against the numbers of the authors' own code (`cae_A.npz`)."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mimkit.interop import from_official, to_official
from mimkit.masking import Mask
from recipes.cae import CAE, CAEConfig, CAEOutput
from tests.golden_files import golden

GOLDEN = golden("cae_A")
PREFIX = 1


def config(**changes: object) -> CAEConfig:
    theirs = GOLDEN.config
    ours = {
        "image_size": theirs["img_size"],
        "patch_size": theirs["patch_size"],
        "dim": theirs["embed_dim"],
        "depth": theirs["depth"],
        "heads": theirs["num_heads"],
        "mlp_ratio": float(theirs["mlp_ratio"]),
        "layer_scale": theirs["init_values"],
        "regressor_depth": theirs["regressor_depth"],
        "decoder_dim": theirs["decoder_embed_dim"],
        "decoder_depth": theirs["decoder_depth"],
        "decoder_heads": theirs["decoder_num_heads"],
        "decoder_layer_scale": theirs["decoder_layer_scale_init_value"],
        "vocabulary_size": theirs["vocab_size"],
        "alignment_weight": theirs["align_loss_weight"],
    }
    return CAEConfig(**(ours | changes))


def load(parameters: dict[str, Tensor], **changes: object) -> CAE:
    model = CAE(config(**changes))
    converted = from_official("cae", parameters)
    assert converted.dropped == ()
    model.load_state_dict(converted)
    return model


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Mask, Tensor]:
    is_masked = GOLDEN.tensor("in/bool_masked_pos").unflatten(1, (8, 8))
    return GOLDEN.tensor("in/imgs"), Mask.from_bool(is_masked), GOLDEN.tensor("in/token_ids")


@pytest.fixture(scope="module")
def model(inputs: tuple[Tensor, Mask, Tensor]) -> CAE:
    """The authors' weights, and the gradients of their loss."""
    model = load(GOLDEN.tensors("param/"))
    model(*inputs).loss.backward()
    return model


@pytest.fixture(scope="module")
def output(model: CAE, inputs: tuple[Tensor, Mask, Tensor]) -> CAEOutput:
    with torch.no_grad():
        return model(*inputs, return_logits=True)


def gradients(model: CAE) -> dict[str, Tensor]:
    """By official name; what has none (or is not trained) is left out."""
    return to_official(
        "cae", {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )


def assert_loss(loss: Tensor, expected: Tensor) -> None:
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)


def assert_gradient(ours: Tensor, theirs: Tensor) -> None:
    tolerance = 2e-4 * float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[tuple[tuple[Tensor, ...], Tensor]]]:
    """Record the arguments and the result of every call."""
    calls: list[tuple[tuple[Tensor, ...], Tensor]] = []
    handle = module.register_forward_hook(
        lambda _, arguments, result: calls.append((arguments, result))
    )
    yield calls
    handle.remove()


def test_the_losses_are_the_authors(output):
    assert_loss(output.loss, GOLDEN.tensor("out/loss"))
    assert_loss(output.main_loss, GOLDEN.tensor("out/loss_main"))
    assert_loss(output.alignment_loss, GOLDEN.tensor("out/loss_align_unweighted"))
    assert_loss(2 * output.alignment_loss, GOLDEN.tensor("out/loss_align_weighted"))
    assert_loss(output.token_accuracy, GOLDEN.tensor("out/mlm_acc"))


def test_every_intermediate_array_is_the_authors(model, inputs):
    _, mask, token_ids = inputs
    block, decoder_block = model.regressor.blocks[0], model.decoder.blocks[0]
    watched = {
        "encoder_in": model.encoder.blocks[0],
        "encoder_out": model.encoder,
        "cross_attn": block.cross_attn,
        "norm2": block.norm2,
        "block0": block,
        "block1": model.regressor.blocks[1],
        "decoder": decoder_block,
    }
    calls = {}
    with torch.no_grad():
        contexts = {name: recorded(module) for name, module in watched.items()}
        entered = {name: context.__enter__() for name, context in contexts.items()}
        output = model(*inputs, return_logits=True)
        visible, positions = output.latent[:, 1:], model.pos_embed[0, 1:]
        # The model itself brings one mask token on for all.
        predicted = model.regressor(
            model.mask_token.expand(len(mask.masked_ids), mask.num_masked, -1),
            visible,
            positions[mask.masked_ids],
            positions[mask.visible_ids],
        )
        torch.testing.assert_close(predicted, output.latent_prediction)
        for name, context in contexts.items():
            calls[name] = list(entered[name])
            context.__exit__(None, None, None)
    (queries, visible, query_positions, visible_positions), _ = calls["block0"][-1]
    ours = {
        "encoder_in": calls["encoder_in"][0][0][0],
        "encoder_out": output.latent,
        "alignment_encoder_out": calls["encoder_out"][1][1],
        "regressor_block0_cross_attn": calls["cross_attn"][0][1],
        "regressor_block0_after_norm2": calls["norm2"][0][1],
        "regressor_q_in": queries,
        "regressor_kv_in": torch.cat([visible, queries], dim=1),
        "regressor_pos_q": query_positions,
        "regressor_pos_k": torch.cat([visible_positions, query_positions], dim=1),
        "regressor_block0": calls["block0"][-1][1],
        "regressor_block1": calls["block1"][0][1],
        "decoder_block0": calls["decoder"][0][1],
        "decoder_in": calls["decoder"][0][0][0],
        "logits": output.prediction.flatten(0, 1),
        "latent_pred": output.latent_prediction,
        "latent_target": output.latent_target,
        "labels": token_ids.gather(1, mask.masked_ids).flatten(),
    }
    stored = {
        name for name in GOLDEN.tensors("out/") if not name.startswith(("loss", "grad", "mlm"))
    }
    assert stored == ours.keys()
    for name, array in ours.items():
        expected = GOLDEN.tensor(f"out/{name}")
        torch.testing.assert_close(array, expected, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("name", GOLDEN.tensors("grad/"))
def test_every_stored_gradient_is_the_authors(model, name):
    assert_gradient(gradients(model)[name], GOLDEN.tensor(f"grad/{name}"))


def test_every_gradient_norm_is_the_authors(model):
    theirs = GOLDEN.tensors("gradnorm/")
    ours = {name: grad.double().norm() for name, grad in gradients(model).items()}
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        # Softmax does not see what the norm of the keys adds: its gradient is rounding alone.
        atol = 1e-6 if name.endswith("norm1_k.bias") else 0
        torch.testing.assert_close(ours[name], norm, rtol=2e-4, atol=atol, msg=name)


def test_the_gradients_of_alignment_alone_are_the_authors(inputs):
    model = load(GOLDEN.tensors("param/"))
    model(*inputs).alignment_loss.backward()
    ours = gradients(model)
    prefix = "out/grad_align_only__"
    assert GOLDEN.tensors(prefix)
    for name, expected in GOLDEN.tensors(prefix).items():
        assert_gradient(ours[name], expected)
    assert not [name for name in ours if name.startswith("decoder.")]


def test_small_variances_show_the_right_epsilon(inputs):
    parameters = GOLDEN.tensors("param/")
    for name in GOLDEN.config["lowvar_params"]:
        parameters[name] = parameters[name] * GOLDEN.config["lowvar_factor"]
    with torch.no_grad():
        output = load(parameters)(*inputs)
    assert_loss(output.main_loss, GOLDEN.tensor("lowvar/loss_main"))
    assert_loss(output.alignment_loss, GOLDEN.tensor("lowvar/loss_align_unweighted"))
    for name, ours in (
        ("latent_pred", output.latent_prediction),
        ("latent_target", output.latent_target),
    ):
        expected = GOLDEN.tensor(f"lowvar/{name}")
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    norms = [module for module in load(parameters).modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {GOLDEN.config["ln_eps"]}


def test_new_position_tables_are_the_authors_own(inputs):
    parameters = GOLDEN.tensors("param/")
    fresh = to_official("cae", CAE(config()).state_dict())
    for name in ("encoder.pos_embed", "rd_pos_embed"):
        parameters[name] = fresh[name]
    with torch.no_grad():
        output = load(parameters)(*inputs)
    assert_loss(output.main_loss, GOLDEN.tensor("pristine/loss_main"))
    assert_loss(output.alignment_loss, GOLDEN.tensor("pristine/loss_align_unweighted"))
    expected = GOLDEN.tensor("pristine/latent_pred")
    torch.testing.assert_close(output.latent_prediction, expected, rtol=1e-4, atol=2e-5)


def test_the_state_dict_goes_out_as_it_came_in():
    parameters = GOLDEN.tensors("param/")
    written = to_official("cae", load(parameters).state_dict())
    assert written.dropped == ()
    assert written.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(written[name], value), name


def test_the_teacher_is_written_only_when_asked_for_and_never_read():
    state = load(GOLDEN.tensors("param/")).state_dict()
    written = to_official("cae", state, duplicates=True)
    copies = {name for name in written if name.startswith("alignment_encoder.")}
    assert {name.removeprefix("alignment_") for name in copies} == {
        name for name in written if name.startswith("encoder.")
    }
    read = from_official("cae", written)
    assert set(read.dropped) == copies
    assert read.keys() == state.keys()
