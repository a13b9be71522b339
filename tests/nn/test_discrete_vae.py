"""`DiscreteVAE` against OpenAI's encoder (golden vectors), checkpoint shapes, training, errors."""

import pytest
import torch
from torch.nn import functional as F

from mimkit.interop import from_official, to_official
from mimkit.nn import DiscreteVAE
from mimkit.nn._discrete_vae import map_pixels, unmap_pixels
from tests.golden_files import golden

GOLDEN = golden("dalle_encoder_A")


def small(**changes: int) -> DiscreteVAE:
    shape = {"dim": 8, "groups": 3, "depth": 1, "vocabulary_size": 16, "stem_dim": 8}
    return DiscreteVAE(**(shape | changes))


@pytest.fixture(scope="module")
def model() -> DiscreteVAE:
    theirs = GOLDEN.config
    model = DiscreteVAE(
        dim=theirs["n_hid"],
        groups=theirs["group_count"],
        depth=theirs["n_blk_per_group"],
        vocabulary_size=theirs["vocab_size"],
    )
    converted = from_official("dalle", GOLDEN.tensors("param/"))
    assert converted.dropped == ()
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert unexpected == []
    assert all(name.startswith("decoder.") for name in missing)
    return model


def test_pixels_are_mapped_as_in_openais_code():
    images = GOLDEN.tensor("in/imgs01")
    mapped = GOLDEN.tensor("out/map_pixels")
    torch.testing.assert_close(map_pixels(images), mapped, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unmap_pixels(mapped), images, rtol=1e-5, atol=1e-6)


def test_logits_and_codes_equal_openais(model):
    images = GOLDEN.tensor("in/imgs01")
    with torch.no_grad():
        logits = model.encoder(map_pixels(images))
    torch.testing.assert_close(logits, GOLDEN.tensor("out/logits"), rtol=1e-4, atol=2e-5)
    assert torch.equal(model.encode(images), GOLDEN.tensor("out/codes"))


def test_the_defaults_have_the_names_and_shapes_of_openais_checkpoint():
    with torch.device("meta"):
        model = DiscreteVAE()
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    encoder = {name: shape for name, shape in shapes.items() if name.startswith("encoder.")}
    theirs = GOLDEN.config["full_size_state_dict_shapes"]
    assert len(encoder) == len(theirs)
    with torch.device("meta"):
        official = {name: torch.empty(shape) for name, shape in theirs.items()}
    converted = from_official("dalle", official)
    assert {name: list(weight.shape) for name, weight in converted.items()} == encoder


def test_a_decoder_checkpoint_round_trips():
    state = small().state_dict()
    decoder = {name: weight for name, weight in state.items() if name.startswith("decoder.")}
    official = to_official("dalle_decoder", decoder)
    assert "blocks.group_1.block_1.res_path.conv_1.w" in official
    assert from_official("dalle_decoder", official).keys() == decoder.keys()


def test_codes_and_decoded_images_have_the_stride_of_the_groups():
    vae, images = small(), torch.rand(2, 3, 8, 12)
    ids = vae.encode(images)
    assert (vae.stride, ids.shape) == (4, (2, 2, 3))
    decoded = vae.decode(ids)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_the_loss_is_the_negative_log_density_of_the_logit_laplace_distribution():
    vae = small(vocabulary_size=2)
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.zero_()
        last = vae.decoder.blocks.output.conv
        last.bias[:3], last.bias[3:] = 0.7, -1.0
    # The density of the test integrates to 1 over (0, 1).
    steps = 20_000
    pixels = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    logit, scale = pixels.logit(), torch.tensor(-1.0).exp()
    density = torch.exp(-(logit - 0.7).abs() / scale) / (2 * scale * pixels * (1 - pixels))
    assert abs(density.mean() - 1) < 1e-3
    images = torch.full((1, 3, 4, 4), 0.3)

    x = map_pixels(torch.tensor(0.3)).double()
    expected = (x.logit() - 0.7).abs() / scale + torch.log(2 * scale * x * (1 - x))
    output = vae(images)
    torch.testing.assert_close(output.reconstruction_loss, expected.float())


def test_every_parameter_has_a_gradient_and_training_lowers_the_loss():
    torch.manual_seed(0)
    vae, images = small(), torch.rand(8, 3, 8, 8).round()
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    first = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = vae(images, temperature=1.0, divergence_weight=0.01).loss
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert all(parameter.grad.abs().max() > 0 for parameter in vae.parameters())
    assert vae(images).loss.item() < first - 0.1


def test_the_divergence_is_zero_for_uniform_codes_and_largest_for_a_certain_one():
    vae = small()
    with torch.no_grad():
        last = vae.encoder.blocks.output.conv
        last.weight.zero_()
        assert abs(vae(torch.rand(1, 3, 4, 4)).divergence) < 1e-6
        last.bias[3] = 100
        divergence = vae(torch.rand(1, 3, 4, 4)).divergence
    torch.testing.assert_close(divergence, torch.tensor(16.0).log())


def test_decoding_one_hot_codes_equals_decoding_ids():
    vae, ids = small(), torch.randint(16, (1, 2, 2))
    codes = F.one_hot(ids, 16).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        mean = vae.decoder(codes)[:, :3]
    torch.testing.assert_close(vae.decode(ids), unmap_pixels(mean.sigmoid()))


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 10, 8), r"image size \(10, 8\) .* stride \(4, 4\)"),
        (torch.zeros(1, 4, 8, 8), r"\[batch, 3, height, width\]; got \(1, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        small().encode(images)
