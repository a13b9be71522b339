"""SimMIM against the numbers of the authors' own code (`simmim_*.npz`)."""

from dataclasses import dataclass

import pytest
import torch
from einops import rearrange
from torch import Tensor

from mimkit import losses, masking, targets
from mimkit.interop import from_official, to_official
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify
from recipes.simmim import SimMIM, SimMIMConfig, SimMIMOutput
from tests.golden_files import Golden, golden

METHODS = ["simmim_vit", "simmim_swin"]


def config(file: Golden, **changes: object) -> SimMIMConfig:
    theirs = file.config
    swin = theirs["kind"] == "swin"
    ours = {
        "encoder": theirs["kind"],
        "image_size": theirs["img_size"],
        "patch_size": theirs["patch_size"],
        "dim": theirs["embed_dim"],
        "depth": tuple(theirs["depths"]) if swin else theirs["depth"],
        "heads": tuple(theirs["num_heads"]) if swin else theirs["num_heads"],
        "mlp_ratio": float(theirs["mlp_ratio"]),
        **({"window": theirs["window_size"]} if swin else {"layer_scale": theirs["init_values"]}),
    }
    return SimMIMConfig(**(ours | changes))


def load(method: str, parameters: dict[str, Tensor], **changes: object) -> SimMIM:
    model = SimMIM(config(golden(f"{method}_A"), **changes))
    converted = from_official(method, parameters)
    assert converted.dropped == ()
    model.load_state_dict(converted)
    return model


@dataclass
class Case:
    """The authors' weights, and the gradients of their loss."""

    method: str
    file: Golden
    images: Tensor
    mask: Mask
    model: SimMIM
    output: SimMIMOutput


@pytest.fixture(scope="module", params=METHODS)
def case(request: pytest.FixtureRequest) -> Case:
    method = request.param
    file = golden(f"{method}_A")
    images, mask = file.tensor("in/imgs"), Mask.from_bool(file.tensor("in/mask").bool())
    model = load(method, file.tensors("param/"))
    output = model(images, mask)
    output.loss.backward()
    return Case(method, file, images, mask, model, output)


def gradients(case: Case) -> dict[str, Tensor]:
    return to_official(
        case.method,
        {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None},
    )


def as_map(latent: Tensor, height: int) -> Tensor:
    return rearrange(latent, "b (h w) d -> b d h w", h=height)


def assert_loss(loss: Tensor, expected: Tensor) -> None:
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)


def test_the_loss_is_the_authors(case):
    assert_loss(case.output.loss, case.file.tensor("out/loss"))
    assert_loss(case.output.loss, case.file.tensor("out/loss_exact_masked_mean"))


def test_the_prediction_is_the_authors_image_at_the_masked_patches(case):
    image = case.file.tensor("out/x_rec")
    expected = gather_masked(patchify(image, case.model.patch_size), case.mask)
    torch.testing.assert_close(case.output.prediction, expected, rtol=1e-4, atol=2e-5)


def test_the_latent_is_the_authors_map(case):
    expected = case.file.tensor("out/encoder_map")
    prefix = case.model.encoder.num_prefix_tokens
    latent = as_map(case.output.latent[:, prefix:], expected.shape[2])
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=2e-5)


def test_every_stored_gradient_is_the_authors(case):
    ours = gradients(case)
    theirs = case.file.tensors("grad/")
    assert theirs
    for name, expected in theirs.items():
        tolerance = 2e-4 * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance, msg=name)


def test_every_gradient_norm_is_the_authors(case):
    theirs = case.file.tensors("gradnorm/")
    ours = {name: grad.double().norm() for name, grad in gradients(case).items()}
    assert ours.keys() == theirs.keys()
    for name, norm in theirs.items():
        torch.testing.assert_close(ours[name], norm, rtol=2e-4, atol=0, msg=name)


def test_small_variances_show_the_right_epsilon(case):
    parameters = case.file.tensors("param/")
    for name in case.file.config["lowvar_params"]:
        parameters[name] = parameters[name] * case.file.config["lowvar_factor"]
    with torch.no_grad():
        output = load(case.method, parameters)(case.images, case.mask)
    assert_loss(output.loss, case.file.tensor("lowvar/loss"))
    expected = case.file.tensor("lowvar/encoder_map")
    prefix = case.model.encoder.num_prefix_tokens
    latent = as_map(output.latent[:, prefix:], expected.shape[2])
    torch.testing.assert_close(latent, expected, rtol=2e-5, atol=2e-5)


def test_the_state_dict_goes_out_as_it_came_in(case):
    parameters = case.file.tensors("param/")
    written = to_official(case.method, load(case.method, parameters).state_dict())
    assert written.dropped == ()
    assert written.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype


def test_the_authors_buffers_are_dropped_and_named(case):
    buffers = case.file.tensors("buffer/")
    assert buffers
    assert set(from_official(case.method, buffers).dropped) == set(buffers)


def test_the_relative_bias_is_the_authors():
    file = golden("simmim_vit_A")
    model = load("simmim_vit", file.tensors("param/"))
    bias = model.encoder.rel_pos_bias[0]()[0]
    torch.testing.assert_close(bias, file.tensor("out/rel_pos_bias"))
    index = file.tensor("buffer/encoder.rel_pos_bias.relative_position_index")
    assert torch.equal(model.encoder.rel_pos_bias[0].index, index)


def test_the_windows_are_the_authors():
    file = golden("simmim_swin_A")
    model = load("simmim_swin", file.tensors("param/"))
    stage = model.encoder.layers[0]
    theirs = file.tensors("buffer/encoder.layers.0.blocks.1.attn")
    bias = stage.blocks[1].attn.rel_pos_bias
    assert torch.equal(bias.index, theirs[".relative_position_index"])
    assert torch.equal(stage.shift_mask.squeeze(1), theirs["_mask"])


def test_the_stages_are_the_authors(case):
    if case.method == "simmim_vit":
        return
    seen = []
    hooks = [
        stage.register_forward_hook(lambda _module, _inputs, out: seen.append(out[1]))
        for stage in case.model.encoder.layers
    ]
    with torch.no_grad():
        case.model(case.images, case.mask)
    for hook in hooks:
        hook.remove()
    for stage, tokens in enumerate(seen):
        expected = case.file.tensor(f"out/stage{stage}")
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=2e-5)


# Parts.


@pytest.mark.parametrize("kind", ["mask", "one"])
def test_the_reduction_is_the_authors(kind):
    """Their masks need not be equally large; ours are, so each sample is scored by itself."""
    file = golden("simmim_loss")
    patch = file.config["patch_size"]
    images, rec = file.tensor("in/x"), file.tensor("in/x_rec")
    total, count = torch.zeros(()), 0
    for row, is_masked in enumerate(file.tensor(f"{kind}/mask").bool()):
        mask = Mask.from_bool(is_masked[None])
        prediction = gather_masked(patchify(rec[row, None], patch), mask)
        loss = losses.masked_pixel_loss(
            prediction, images[row, None], mask, patch, normalize=None, kind="l1"
        )
        total, count = total + loss * mask.num_masked, count + mask.num_masked
    assert_loss(total / count, file.tensor(f"{kind}/loss"))


def test_without_masked_patches_the_loss_is_zero():
    file = golden("simmim_loss")
    mask = Mask.from_bool(file.tensor("zeros/mask").bool())
    prediction = torch.zeros(2, 0, 192)
    images = file.tensor("in/x")
    loss = losses.masked_pixel_loss(prediction, images, mask, 8, normalize=None, kind="l1")
    assert loss == file.tensor("zeros/loss") == 0


@pytest.mark.parametrize("window", golden("simmim_norm_targets").config["kernels"])
def test_window_normalized_pixels_are_the_ports(window):
    file = golden("simmim_norm_targets")
    images = file.tensor("in/x")
    mask = masking.uniform(masking.key(range(len(images)), seed=0), (6, 6), num_masked=36)
    target = targets.WindowNormalizedPixels(8, window=window)(images, mask)
    expected = patchify(file.tensor(f"out/k{window}"), 8)
    torch.testing.assert_close(target, expected, rtol=2e-5, atol=2e-5)
