"""MAE against the numbers of the authors' own code (`mae_A.npz`)."""

import pytest
import torch
from torch import Tensor

from mimkit import masking
from mimkit.interop import from_official, to_official
from mimkit.masking import Mask
from mimkit.patches import gather_visible
from recipes.mae import MAE, MAEConfig, MAEOutput
from tests.golden_files import golden

GOLDEN = golden("mae_A")


def config(**changes: object) -> MAEConfig:
    theirs = GOLDEN.config
    ours = {
        "image_size": theirs["img_size"],
        "patch_size": theirs["patch_size"],
        "dim": theirs["embed_dim"],
        "depth": theirs["depth"],
        "heads": theirs["num_heads"],
        "mlp_ratio": float(theirs["mlp_ratio"]),
        "decoder_dim": theirs["decoder_embed_dim"],
        "decoder_depth": theirs["decoder_depth"],
        "decoder_heads": theirs["decoder_num_heads"],
        "normalize_pixels": theirs["norm_pix_loss"],
    }
    return MAEConfig(**(ours | changes))


def load(parameters: dict[str, Tensor], **changes: object) -> MAE:
    model = MAE(config(**changes))
    converted = from_official("mae", parameters)
    assert converted.dropped == ()
    model.load_state_dict(converted)
    return model


@pytest.fixture(scope="module")
def images() -> Tensor:
    return GOLDEN.tensor("in/imgs")


@pytest.fixture(scope="module")
def mask() -> Mask:
    noise = GOLDEN.tensor("in/noise")
    count = masking.num_masked(noise.shape[1], GOLDEN.config["mask_ratio"], rounding="mae")
    return Mask.from_noise(noise, (8, 8), count)


@pytest.fixture(scope="module")
def model(images: Tensor, mask: Mask) -> MAE:
    """The authors' weights, and the gradients of their loss."""
    model = load(GOLDEN.tensors("param/"))
    model(images, mask).loss.backward()
    return model


@pytest.fixture(scope="module")
def output(model: MAE, images: Tensor, mask: Mask) -> MAEOutput:
    with torch.no_grad():
        return model(images, mask)


def gradients(model: MAE) -> dict[str, Tensor]:
    """By official name; what has none (or is not trained) is left out."""
    return to_official(
        "mae", {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    )


def assert_loss(loss: Tensor, expected: Tensor) -> None:
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)


def masked_first_patch(prediction: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Which samples mask patch 0, and what is predicted for it there."""
    rows = mask.masked_ids[:, 0] == 0
    assert rows.any()
    return rows, prediction[rows, 0]


def test_the_mask_is_the_authors(mask):
    assert torch.equal(mask.is_masked.flatten(1), GOLDEN.tensor("out/mask").bool())


def test_the_loss_is_the_authors(output):
    assert_loss(output.loss, GOLDEN.tensor("out/loss"))


def test_the_loss_on_raw_pixels_is_the_authors(images, mask):
    output = load(GOLDEN.tensors("param/"), normalize_pixels=False)(images, mask)
    assert_loss(output.loss, GOLDEN.tensor("out/loss_rawpix"))


def test_the_predictions_at_masked_positions_are_the_authors(output, mask):
    theirs = GOLDEN.tensor("out/pred")
    at_masked = mask.masked_ids.unsqueeze(2).expand(-1, -1, theirs.shape[2])
    torch.testing.assert_close(output.prediction, theirs.gather(1, at_masked), rtol=1e-4, atol=2e-5)


def test_the_latents_are_the_authors(output, mask):
    theirs = GOLDEN.tensor("out/latent")
    # Theirs follow the class token in the order of noise, ours in ascending order of position.
    order = GOLDEN.tensor("out/ids_keep").argsort(dim=1)
    assert torch.equal(GOLDEN.tensor("out/ids_keep").gather(1, order), mask.visible_ids)
    patches = theirs[:, 1:].gather(1, order.unsqueeze(2).expand(-1, -1, theirs.shape[2]))
    expected = torch.cat([theirs[:, :1], patches], dim=1)
    torch.testing.assert_close(output.latent, expected, rtol=1e-4, atol=2e-5)


def test_the_patch_embedding_is_the_authors(model, images, mask):
    theirs = GOLDEN.tensor("out/patch_embed")
    embed = model.encoder.patch_embed
    with torch.no_grad():
        torch.testing.assert_close(embed(images), theirs, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(
            embed(images, mask), gather_visible(theirs, mask), rtol=1e-4, atol=2e-5
        )


@pytest.mark.parametrize("name", GOLDEN.tensors("grad/"))
def test_every_stored_gradient_is_the_authors(model, name):
    expected = GOLDEN.tensor(f"grad/{name}")
    tolerance = 2e-4 * float(expected.abs().max())
    torch.testing.assert_close(gradients(model)[name], expected, rtol=0, atol=tolerance)


def test_every_gradient_norm_is_the_authors(model):
    theirs = GOLDEN.tensors("gradnorm/")
    ours = {name: grad.double().norm() for name, grad in gradients(model).items()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert len(trained) == len(theirs)
    for name, norm in theirs.items():
        torch.testing.assert_close(ours[name], norm, rtol=2e-4, atol=0, msg=name)


def test_no_trained_parameter_is_without_gradient(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert name.endswith("pos_embed")


def test_small_variances_show_the_right_epsilon(images, mask):
    parameters = GOLDEN.tensors("param/")
    for name in GOLDEN.config["lowvar_params"]:
        parameters[name] = parameters[name] * GOLDEN.config["lowvar_factor"]
    output = load(parameters)(images, mask)
    assert_loss(output.loss, GOLDEN.tensor("lowvar/loss"))
    rows, prediction = masked_first_patch(output.prediction, mask)
    expected = GOLDEN.tensor("lowvar/pred_patch0")[rows]
    torch.testing.assert_close(prediction, expected, rtol=2e-5, atol=2e-5)


def test_new_position_tables_are_the_authors_own(images, mask):
    parameters = GOLDEN.tensors("param/")
    fresh = to_official("mae", MAE(config()).state_dict())
    for name in ("pos_embed", "decoder_pos_embed"):
        parameters[name] = fresh[name]
    output = load(parameters)(images, mask)
    assert_loss(output.loss, GOLDEN.tensor("pristine/loss"))
    rows, prediction = masked_first_patch(output.prediction, mask)
    expected = GOLDEN.tensor("pristine/pred_patch0")[rows]
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=2e-5)


def test_the_state_dict_goes_out_as_it_came_in():
    parameters = GOLDEN.tensors("param/")
    written = to_official("mae", load(parameters).state_dict())
    assert written.dropped == ()
    assert written.keys() == parameters.keys()
    for name, value in parameters.items():
        assert torch.equal(written[name], value), name
        assert written[name].dtype == value.dtype


def test_a_list_of_masks_gives_mask_major_outputs(model, images, mask):
    masks = [mask, masking.uniform(masking.key(range(3), seed=0), (8, 8), num_masked=48)]
    with torch.no_grad():
        together = model(images, masks)
        alone = [model(images, one) for one in masks]
    for name in ("prediction", "latent"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone])
        )
    torch.testing.assert_close(together.loss, sum(one.loss for one in alone) / 2)


def test_the_order_of_noise_does_not_matter(model, images, mask, output):
    shuffled = mask.visible_ids.flip(1)
    again = Mask.from_visible_ids(shuffled, mask.grid)
    with torch.no_grad():
        assert torch.equal(model(images, again).loss, output.loss)
