"""SimMIM's targets, heads, rates and names, and what does not fit."""

import dataclasses
import math

import pytest
import torch

from mimkit import masking
from mimkit.interop import from_official, from_timm, to_official, to_timm
from mimkit.nn import SwinTransformer, ViT
from mimkit.patches import patchify, unpatchify
from recipes.engine import loop
from recipes.engine.data.load import load_data
from recipes.engine.errors import UserError
from recipes.engine.masks import UnitMasking
from recipes.engine.optim import parameter_groups, scheduled_lr
from recipes.engine.pretrain import Pretraining
from recipes.engine.run.world import World
from recipes.simmim import PRESETS, RECIPE, SimMIM, SimMIMConfig
from tests.golden_files import golden
from tests.recipes.command import check_command, config_for

ENCODERS = {
    "vit": {"patch_size": 8, "dim": 16, "depth": 2, "heads": 2},
    "swin": {"patch_size": 4, "dim": 8, "depth": (2, 2), "heads": (1, 2), "window": 4},
}
TARGETS = [
    "pixels", "pixels_2x", "pixels_4x", "pixels_8x", "window_normalized", "clusters", "bins_8",
    "bins_256", "hog", "tokens",
]  # fmt: skip


def build(encoder: str, **changes: object) -> SimMIM:
    torch.manual_seed(0)
    shape = {"image_size": (16, 32), "encoder": encoder, "in_channels": 2, "num_clusters": 6}
    return SimMIM(SimMIMConfig(**(shape | ENCODERS[encoder] | changes)))


def inputs(model: SimMIM, batch: int = 2) -> tuple[torch.Tensor, masking.Mask]:
    unit = 16 // model.patch_size[0] // 2
    images = torch.randn(batch, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    return images, masking.uniform(
        masking.key(range(batch), seed=0), model.encoder.grid, 0.5, unit=unit
    )


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_learned(encoder, target):
    model = build(encoder, target=target)
    images, mask = inputs(model)
    RECIPE.fit(model, images)
    before = RECIPE.baselines(model, images, mask)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        output = model(images, mask)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss < min(before.values()), "two images are learned by heart"
    assert RECIPE.reconstruct(model.eval(), images, mask).shape == images.shape
    assert output.prediction.shape[:1] == (2,)


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
@pytest.mark.parametrize("head", ["linear", "mlp", "inverse_swin_t"])
def test_every_head_predicts_the_masked_pixels(encoder, head):
    model = build(encoder, head=head, window=2)
    images, mask = inputs(model)
    output = model(images, mask)
    values = 2 * model.patch_size[0] ** 2
    assert output.prediction.shape == (2, mask.num_masked, values)
    output.loss.backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_predictions_are_put_where_they_belong(encoder):
    """A head that repeats what it is given, as an image: each pixel tells its own place."""
    model = build(encoder)
    images, mask = inputs(model, batch=1)
    stride = 8
    places = torch.arange(16.0 * 32).view(1, 1, 16, 32).repeat(1, 2, 1, 1)
    cells = patchify(places, stride, order="c p1 p2")

    class Echo(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.shape[1] == cells.shape[1]:
                return cells
            return cells[torch.zeros_like(mask.masked_ids), mask.masked_ids]

    model.head.predict = Echo()
    prediction = model(images, mask).prediction
    filled = patchify(torch.zeros_like(places), model.patch_size)
    filled[0, mask.masked_ids[0]] = prediction[0]
    image = unpatchify(filled, mask.grid, model.patch_size)
    hidden = mask.is_masked
    for axis, side in enumerate(model.patch_size, 1):
        hidden = hidden.repeat_interleave(side, axis)
    assert torch.equal(image, places * hidden.unsqueeze(1))


@pytest.mark.parametrize(("image", "patch"), [((40,), (8,)), ((4, 8, 8), (2, 4, 4))])
@pytest.mark.parametrize("target", ["pixels", "pixels_2x", "bins_8"])
def test_signals_and_volumes_are_trained_on_too(image, patch, target):
    model = build("vit", image_size=image, patch_size=patch, target=target)
    mask = masking.uniform(masking.key([0, 1], seed=0), model.encoder.grid, 0.5)
    output = model(torch.randn(2, 2, *image), mask)
    output.loss.backward()
    assert output.prediction.shape[:2] == mask.masked_ids.shape


@pytest.mark.parametrize("encoder", sorted(ENCODERS))
def test_a_list_of_masks_gives_mask_major_outputs(encoder):
    model = build(encoder).eval()
    images, mask = inputs(model)
    masks = [mask, ~mask]
    with torch.no_grad():
        together = model(images, masks)
        alone = [model(images, one) for one in masks]
    for name in ("prediction", "latent"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(one, name) for one in alone])
        )


def test_the_base_model_is_the_default():
    vit, swin = SimMIMConfig(image_size=224), SimMIMConfig(image_size=192, encoder="swin")
    assert (vit.patch_size, vit.dim, vit.depth, vit.heads) == (16, 768, 12, 12)
    assert (swin.patch_size, swin.dim, swin.depth) == (4, 128, (2, 2, 18, 2))
    assert SimMIMConfig(image_size=224, dim=384, heads=6).depth == 12


@pytest.mark.parametrize(
    ("preset", "millions", "masked"),
    [("vit_base", 86.257, 120), ("swin_base", 89.874, 1408), ("swin_base_100", 89.874, 1408)],
)
def test_presets_have_the_authors_size_and_masks(preset, millions, masked):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = SimMIM(config.model)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 3) == millions
    mask = config.masking.draw(masking.key([0], seed=0), model.encoder.grid)
    assert mask.num_masked == masked


# Rates.


def rate(preset: str, epoch: float) -> float:
    return scheduled_lr(epoch, config_for(RECIPE, "--preset", preset, "--device", "cpu"))


@pytest.mark.parametrize(
    ("preset", "epoch", "expected"),
    [
        ("swin_base", 0, 2e-6),
        ("swin_base", 5, (2e-6 + 4e-4) / 2),
        ("swin_base", 10, 4e-4),
        ("swin_base", 699.9, 4e-4),
        ("swin_base", 700, 4e-5),
        ("swin_base", 800, 4e-5),
        ("vit_base", 10, 4e-4),
        ("swin_large", 700, 4e-5),
        ("swin_base_100", 0, 4e-6),
        ("swin_base_100", 5, (4e-6 + 8e-4) / 2),
        # timm's cosine does not wait for the end of the warm-up.
        ("swin_base_100", 10, 4e-5 + 7.6e-4 * (1 + math.cos(0.1 * math.pi)) / 2),
        ("swin_base_100", 50, (8e-4 + 4e-5) / 2),
        ("swin_base_100", 100, 4e-5),
    ],
)
def test_rates_are_the_published_ones(preset, epoch, expected):
    assert rate(preset, epoch) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("preset", "lr"),
    [("vit_base", 4e-4), ("swin_base", 4e-4), ("swin_large", 4e-4), ("swin_base_100", 8e-4)],
)
def test_presets_are_trained_as_published(preset, lr):
    training = PRESETS[preset].training
    assert training.scaled_lr == pytest.approx(lr)
    assert (training.batch_size, training.weight_decay, training.clip_grad) == (2048, 0.05, 5.0)
    assert training.betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("encoder", "spared"), [("vit", "encoder.cls_token"), ("swin", "mask_token")]
)
def test_what_the_authors_spare_is_not_decayed(encoder, spared):
    model = build(encoder)
    decayed, others = parameter_groups(model, weight_decay=0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    many = {names[id(p)] for p in others["params"] if p.ndim > 1}
    assert many == {spared}
    assert any("table" in names[id(p)] for p in decayed["params"])


def test_a_wrapped_model_is_decayed_as_it_is_without(monkeypatch):
    """`DistributedDataParallel` has other names for the parameters, and no `not_decayed`."""
    monkeypatch.setattr(loop, "distribute", lambda model, *_, **__: torch.nn.Sequential(model))
    config = config_for(RECIPE, "--data", "digits", "--device", "cpu")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, in_channels=1))
    data = load_data("digits", image_size=(32, 32), seed=0)
    task = Pretraining(RECIPE, config, data, World())
    spared = {id(p) for p in task.optimizer.param_groups[1]["params"]}
    assert id(task.model.mask_token) in spared


def test_crops_are_the_authors():
    for name, preset in PRESETS.items():
        if name != "tiny":
            assert preset.training.crop_area == (0.67, 1.0)
            assert preset.training.interpolation == "bilinear"


@pytest.mark.parametrize(
    ("target", "loss"),
    [("pixels", "l1"), ("hog", "l1"), ("features", "cosine"), ("tokens", "cross_entropy")],
)
def test_a_target_on_the_command_line_brings_its_loss(target, loss):
    assert config_for(RECIPE, "--target", target).model.scored_by == loss


# What does not fit.


@pytest.mark.untyped
@pytest.mark.parametrize(
    ("encoder", "changes", "complaint"),
    [
        ("vit", {"target": "depth"}, "target must be one of"),
        ("vit", {"head": "transformer"}, "head must be one of"),
        ("vit", {"target": "bins_8", "loss": "l1"}, "loss 'l1' does not fit target 'bins_8'"),
        ("vit", {"loss": "cross_entropy"}, "loss 'cross_entropy' does not fit target 'pixels'"),
        ("vit", {"depth": (2, 2)}, "depth of a vit encoder must be one number"),
        ("swin", {"depth": 2}, "depth of a swin encoder must be one number a stage"),
        ("vit", {"head": "inverse_swin_t", "target": "hog"}, "has nothing to split"),
        ("vit", {"target": "pixels_16x"}, "choose a finer target"),
        ("swin", {"patch_size": 5}, "not divisible by patch size"),
        ("vit", {"heads": 3}, "is not divisible by heads=3"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(encoder, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        build(encoder, **changes)


@pytest.mark.untyped
def test_an_unknown_encoder_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"\('vit', 'swin'\); got 'resnet'"):
        SimMIMConfig(image_size=32, encoder="resnet")


def test_units_must_divide_the_grid():
    with pytest.raises(ValueError, match="--unit 3 does not divide the 8x8 patches"):
        UnitMasking(0.6, unit=3).draw(masking.key([0], seed=0), (8, 8))
    with pytest.raises(ValueError, match="unit must be 1 or more"):
        UnitMasking(0.6, unit=0)
    with pytest.raises(ValueError, match="mask_ratio must be a fraction between 0 and 1"):
        UnitMasking(1.0, unit=2)


# Names.

METHODS = {
    "simmim_vit": golden("simmim_vit_A").tensors("param/"),
    "simmim_swin": golden("simmim_swin_A").tensors("param/"),
}


def fine_tuning_names(method: str) -> dict[str, torch.Tensor]:
    """What a pre-training checkpoint gives, under the authors' names of fine-tuning."""
    return to_official(f"{method}_finetune", from_official(f"{method}_finetune", METHODS[method]))


@pytest.mark.parametrize(
    "method", ["simmim_vit", "simmim_swin", "simmim_vit_finetune", "simmim_swin_finetune", "timm"]
)
def test_converters_are_each_others_adjoint(method):
    """`<from(x), y> == <x, to(y)>`: what renames weights renames gradients."""
    bare = method.removesuffix("_finetune")
    if method == "timm":
        names = to_timm(from_official("simmim_swin_finetune", METHODS["simmim_swin"]))
        come, go = from_timm, to_timm
    else:
        names = METHODS[bare] if bare == method else fine_tuning_names(bare)
        come, go = (lambda x: from_official(method, x)), (lambda y: to_official(method, y))
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(value.shape, generator=generator) for name, value in names.items()}
    y = {name: torch.randn(value.shape, generator=generator) for name, value in come(x).items()}
    there, back = come(x), go(y)
    assert back.keys() == x.keys()
    assert there.dropped == back.dropped == ()
    left = sum((there[name].double() * y[name].double()).sum() for name in y)
    right = sum((x[name].double() * back[name].double()).sum() for name in x)
    torch.testing.assert_close(left, right)
    for name in list(x)[::5]:  # any part by itself
        if method != "timm":
            assert torch.equal(go(come({name: x[name]}))[name], x[name])


def test_a_checkpoint_gives_the_vit_that_is_fine_tuned():
    converted = from_official("simmim_vit_finetune", {"model": METHODS["simmim_vit"]})
    assert set(converted.dropped) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    shape = {"image_size": 64, "dim": 32, "depth": 2, "heads": 2, "layer_scale": 0.1}
    encoder = ViT(**shape, absolute_positions=False, relative_positions="block", qkv_bias="qv")
    encoder.load_state_dict(converted)
    shared = METHODS["simmim_vit"]["encoder.rel_pos_bias.relative_position_bias_table"]
    assert all(torch.equal(bias.table, shared) for bias in encoder.rel_pos_bias)


def test_a_checkpoint_gives_the_swin_that_is_fine_tuned_and_timms():
    converted = from_official("simmim_swin_finetune", METHODS["simmim_swin"])
    encoder = SwinTransformer(image_size=64, dim=16, depth=(2, 2, 2), heads=(1, 2, 4), window=4)
    encoder.load_state_dict(converted)
    timms = to_timm(encoder.state_dict())
    assert "layers.1.downsample.reduction.weight" in timms
    assert "layers.0.downsample.reduction.weight" not in timms
    assert "layers.0.blocks.1.attn.relative_position_bias_table" in timms
    back = from_timm(timms)
    assert back.keys() == encoder.state_dict().keys()
    classified = SwinTransformer(
        image_size=64, dim=16, depth=(2, 2, 2), heads=(1, 2, 4), window=4, num_classes=5
    )
    named = to_timm(classified.state_dict())
    assert {"head.fc.weight", "head.fc.bias"} < named.keys()
    assert "head.weight" in from_timm(named)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--unit", "3"], "--unit 3 does not divide"),
        (["--unit", "0"], "--unit 0 is too small"),
        (["--unit", "two"], "two"),
        (["--window", "0"], "--window 0 is too small"),
        (["--image-size", "30"], "(30, 30)"),
        (["--target", "pixels_32x"], "choose a finer target"),
        (["--target", "depth"], "depth"),
        (["--target", "features"], "--target features needs --teacher FILE"),
        (["--target", "features", "--teacher", "nowhere"], "--teacher nowhere is not a file"),
        (["--target", "tokens", "--tokenizer", "nowhere"], "--tokenizer nowhere is not a file"),
        (["--head", "transformer"], "transformer"),
        (["--target", "bins_8", "--loss", "l1"], "loss 'l1' does not fit target 'bins_8'"),
        (["--loss", "cross_entropy"], "loss 'cross_entropy' does not fit target 'pixels'"),
        (["--unit", "1", "--target", "pixels_8x"], "give --unit 2 or a multiple of it"),
        (["--mask-ratio", "0"], "--mask-ratio 0.0"),
        (["--mask-ratio", "1"], "--mask-ratio 1.0"),
        (["--mask-ratio", "nan"], "--mask-ratio nan"),
        (["--mask-ratio", "0.99"], "hides all 8x8 patches"),  # by SimMIM's count
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, complaint):
    with pytest.raises(UserError) as caught:
        check_command(RECIPE, "--data", "digits", *arguments)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
