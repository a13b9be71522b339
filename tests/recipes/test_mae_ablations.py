"""MAE's ablations: what each option computes, and that the command line reaches it."""

import dataclasses

import pytest
import torch

from mimkit import losses, masking
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify
from recipes.engine.masks import first
from recipes.mae import MAE, RECIPE, MAEConfig
from tests.recipes.command import check_command, config_for

SMALL = MAEConfig(
    image_size=(16, 24), patch_size=4, dim=32, depth=2, heads=4,
    decoder_dim=16, decoder_depth=2, decoder_heads=4,
)  # fmt: skip


def make(**changes: object) -> MAE:
    torch.manual_seed(0)
    return MAE(dataclasses.replace(SMALL, **changes))  # type: ignore[arg-type]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Mask:
    return masking.uniform(masking.key([0, 1, 2], seed=0), (4, 6), 0.75)


def test_the_loss_on_all_patches_is_the_mean_over_visible_and_masked_ones(
    images: torch.Tensor, mask: Mask
) -> None:
    model = make(loss_on="all", normalize_pixels=False)
    latent = model.encoder(images, mask)
    positions = torch.arange(24).expand(3, -1)
    prediction = model.head(model.decoder(latent, mask, positions))
    output = model(images, mask)
    expected = (prediction - patchify(images, 4)).square().mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.prediction, gather_masked(prediction, mask))


def test_predicting_all_patches_predicts_the_masked_ones_as_before(
    images: torch.Tensor, mask: Mask
) -> None:
    masked_only, everything = make(), make(loss_on="all")
    torch.testing.assert_close(
        everything(images, mask).prediction, masked_only(images, mask).prediction
    )


def test_principal_components_are_fitted_kept_in_the_state_and_scored(
    images: torch.Tensor, mask: Mask
) -> None:
    model = make(target="pca", pca_components=5)
    model.target.fit(images)
    patches = patchify(images, 4).flatten(0, 1)
    centered = patches - patches.mean(0)
    directions = torch.linalg.svd(centered, full_matrices=False).Vh[:5]
    aligned = (model.target.components * directions).sum(1).abs()
    torch.testing.assert_close(aligned, torch.ones(5), rtol=1e-4, atol=1e-4)
    other = make(target="pca", pca_components=5)
    other.load_state_dict(model.state_dict())
    output = other(images, mask)
    assert output.prediction.shape == (3, 18, 5)
    target = gather_masked(
        (centered @ model.target.components.T).unflatten(0, (3, 24)), mask
    )  # fmt: skip
    torch.testing.assert_close(output.loss, losses.masked_mse(output.prediction, target, mask))


def test_cross_decoding_scores_the_fraction_that_it_decodes(
    images: torch.Tensor, mask: Mask
) -> None:
    model = make(decoder="cross", decode_fraction=0.25, normalize_pixels=False)
    everything = model.eval()(images, mask).prediction
    torch.manual_seed(0)
    output = model.train()(images, mask)
    assert output.prediction.shape == (3, round(0.25 * 18), 48)
    distance = torch.cdist(output.prediction, everything)
    # Each decoded patch is one of those that decoding all gives, in the same order.
    found = distance.argmin(dim=2)
    assert (found.diff(dim=1) > 0).all()
    torch.testing.assert_close(
        output.prediction, everything.take_along_dim(found.unsqueeze(2), dim=1)
    )
    errors = losses.masked_pixel_loss(
        everything, images, mask, 4, normalize=None, reduction="none"
    )  # fmt: skip
    torch.testing.assert_close(output.loss, errors.gather(1, found).mean())


def test_another_subset_is_decoded_in_another_step(images: torch.Tensor, mask: Mask) -> None:
    model = make(decoder="cross", decode_fraction=0.25)
    torch.manual_seed(0)
    first, second = model(images, mask).prediction, model(images, mask).prediction
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"decode_fraction": 0.0, "decoder": "cross"}, "decode_fraction"),
        ({"decode_fraction": 0.5}, 'decoder="cross"'),
        ({"decode_fraction": 0.5, "decoder": "cross", "loss_on": "all"}, 'loss_on="masked"'),
        ({"decoder": "cross", "mask_tokens": "encoder"}, 'mask_tokens="decoder"'),
        ({"target": "pca", "pca_components": 49}, r"\[1, 48\]"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    changes: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        make(**changes)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--target", "pca", "--pca-components", "20"],
        ["--loss-on", "all", "--normalize-pixels", "False"],
        ["--decoder", "cross", "--decode-fraction", "0.25", "--decoder-depth", "2"],
        ["--sampler", "gridwise", "--views", "2"],
        ["--mask-tokens", "encoder", "--sampler", "blockwise"],
    ],
    ids=" ".join,
)
def test_the_command_line_reaches_every_ablation(arguments: list[str]) -> None:
    config = config_for(RECIPE, *arguments)
    check_command(RECIPE, *arguments)
    parts = {**dataclasses.asdict(config.model), **dataclasses.asdict(config.masking)}
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        assert str(parts[flag.removeprefix("--").replace("-", "_")]) == value
    model = MAE(config.model).train()
    masks = config.masking.draw(masking.key([0, 1], seed=0), model.encoder.grid)
    batch = torch.randn(2, 3, 32, 32)
    RECIPE.fit(model, batch)
    model(batch, masks).loss.backward()
    assert RECIPE.baselines(model, batch, first(masks))


def test_mask_tokens_inside_the_encoder_go_through_it_and_the_decoder(
    images: torch.Tensor, mask: Mask
) -> None:
    model = make(mask_tokens="encoder", normalize_pixels=False)
    output = model(images, mask)
    assert output.latent.shape == (3, 1 + 24, 32)
    # What the encoder gives for hidden patches reaches the decoder: no mask token stands there.
    decoded = model.decoder(
        output.latent,
        Mask.from_visible_ids(torch.arange(24).expand(3, -1), (4, 6)),
        mask.masked_ids,
    )
    torch.testing.assert_close(output.prediction, model.head(decoded))
    expected = losses.masked_pixel_loss(output.prediction, images, mask, 4, normalize=None)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.mask_token.grad.abs().sum() > 0


def test_hidden_pixels_do_not_reach_an_encoder_with_mask_tokens(
    images: torch.Tensor, mask: Mask
) -> None:
    model = make(mask_tokens="encoder")
    hidden = mask.is_masked.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    changed = torch.where(hidden, torch.full_like(images, 9.0), images)
    assert torch.equal(model(images, mask).latent, model(changed, mask).latent)
