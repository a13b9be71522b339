"""The ConvMAE recipe: masks, ablations and what does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimkit import masking
from mimkit.testing import assert_no_leak
from recipes.convmae import PRESETS, RECIPE, ConvMAE, ConvMAEConfig, ConvMAEMasking
from recipes.engine.errors import UserError
from tests.recipes.command import check_command, config_for

SMALL = {
    "image_size": (16, 24),
    "patch_sizes": (2, 2, 2),
    "in_channels": 2,
    "dim": (4, 8, 16),
    "depth": (1, 1, 1),
    "heads": 2,
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
IMAGES = torch.randn(3, 2, 16, 24, generator=torch.Generator().manual_seed(0))
KEY = masking.key(range(3), seed=0)


def make_model(**changes: object) -> ConvMAE:
    torch.manual_seed(0)
    return ConvMAE(ConvMAEConfig(**(SMALL | changes)))


def test_other_channels_and_rectangles_train():
    model = make_model()
    output = model(IMAGES, masking.uniform(KEY, model.encoder.grid, 0.5))
    assert output.prediction.shape == (3, 3, 128)
    assert output.latent.shape == (3, 3, 16)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_hidden_pixels_change_no_latent():
    model = make_model()
    mask = masking.uniform(KEY, model.encoder.grid, 0.5)
    assert_no_leak(lambda images, mask: model(images, mask).latent, IMAGES, mask)


def test_every_patch_of_an_image_is_seen_by_one_of_its_parts():
    masks = ConvMAEMasking(mask_ratio=0.5, parts=2).draw(KEY, (2, 3))
    seen = torch.cat([mask.visible_ids for mask in masks], dim=1)
    assert torch.equal(seen.sort(dim=1).values, torch.arange(6).expand(3, -1))
    model = make_model()
    assert model(IMAGES, masks).latent.shape == (6, 3, 16)


def test_a_single_scale_decoder_gets_the_last_stage_alone():
    model = make_model(decoder="single-scale")
    names = {name for name, _ in make_model().named_parameters()}
    gone = names - {name for name, _ in model.named_parameters()}
    assert gone
    assert all(name.startswith("encoder.fusions.") for name in gone)


def test_plain_convolutions_see_what_is_hidden():
    model = make_model(conv="plain")
    mask = masking.uniform(KEY, model.encoder.grid, 0.5)
    with pytest.raises(AssertionError, match="hidden pixels reach the output"):
        assert_no_leak(lambda images, mask: model(images, mask).latent, IMAGES, mask)


def test_a_mask_of_the_first_stage_predicts_its_own_patches():
    model = make_model()
    mask = ConvMAEMasking(mask_ratio=0.75, mask="per-stage").draw(KEY, model.encoder.grid)
    assert mask.grid == model.encoder.fine_grid == (8, 12)
    output = model(IMAGES, mask)
    assert output.prediction.shape == (3, mask.num_masked, 8)
    assert output.latent.shape == (3, 6, 16)
    assert_no_leak(lambda images, mask: model(images, mask).latent, IMAGES, mask)
    with torch.no_grad():
        filled = RECIPE.reconstruct(model, IMAGES, mask)
    visible = ~mask.refine(2).is_masked.unsqueeze(1).expand_as(IMAGES)
    assert torch.equal(filled[visible], IMAGES[visible])


def test_a_reconstruction_keeps_the_visible_pixels():
    model = make_model()
    mask = masking.uniform(KEY, model.encoder.grid, 0.5)
    with torch.no_grad():
        filled = RECIPE.reconstruct(model, IMAGES, mask)
    hidden = mask.refine(8).is_masked.unsqueeze(1).expand_as(IMAGES)
    assert torch.equal(filled[~hidden], IMAGES[~hidden])
    assert filled[hidden].ne(IMAGES[hidden]).all()


def test_the_base_model_is_the_authors():
    """115.041 M parameters, 114.791 M of them trained."""
    with torch.device("meta"):
        model = ConvMAE(PRESETS["convmae_base"].model)
    counts = [
        sum(p.numel() for p in model.parameters() if p.requires_grad >= trained)
        for trained in (False, True)
    ]
    assert [round(count / 1e6, 3) for count in counts] == [115.041, 114.791]


def test_parts_that_cannot_be_stacked_are_refused():
    with pytest.raises(ValueError, match="number of masked tokens"):
        make_model()(IMAGES, masking.complementary(KEY, (2, 3), 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "8", "--mask-ratio", "0.75"], "0.875 would"),
        (["--parts", "3"], "--parts 3 does not divide the 16 patches of the grid (4, 4)"),
        (["--image-size", "36"], "strides of all stages (8, 8)"),
        (["--parts", "0"], "--parts 0"),
        (["--mask-ratio", "1.5"], "--mask-ratio 1.5"),
        (["--decoder-heads", "7"], "heads=7"),
    ],
)
def test_a_flag_that_does_not_fit_gets_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        check_command(RECIPE, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "share"),
    [([], 0.75), (["--parts", "4"], 0.75), (["--parts", "2"], 0.5), (["--mask-ratio", "0.5"], 0.5)],
)
def test_the_ratio_follows_from_the_parts_where_none_is_given(arguments, share):
    masks = config_for(RECIPE, *arguments).masking.draw(KEY, (4, 4))
    masks = masks if isinstance(masks, list) else [masks]
    assert {mask.num_masked / mask.num_tokens for mask in masks} == {share}


FLAGS = [
    [],
    ["--parts", "4"],
    ["--parts", "2"],
    ["--parts", "2", "--mask", "per-stage"],
    ["--mask", "per-stage"],
    ["--conv", "plain"],
    ["--decoder", "single-scale"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_every_ablation_trains(flags):
    config = config_for(RECIPE, *flags)
    torch.manual_seed(0)
    model = ConvMAE(config.model).train()
    images = torch.randn(8, 3, 32, 32)
    masks = config.masking.draw(masking.key(range(8), seed=0), model.encoder.grid)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(images, masks).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 10


@pytest.mark.full
def test_the_script_runs_as_a_user_types_it(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "recipes/convmae.py", "--max-steps", "2", "--batch-size", "8"]
    subprocess.run([*command, "--out", str(tmp_path / "out")], cwd=root, check=True)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(summary["probes"]) == {"knn", "linear", "attentive"}
