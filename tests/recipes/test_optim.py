"""Schedules, layer decay and LARS against golden values of the authors' code; mixup and cutmix."""

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.engine.data.mixing import Mixing, draw_beta, draw_box, smooth_targets
from recipes.engine.optim import LARS, layer_decay_groups, warmup_cosine, warmup_steps
from recipes.engine.pretrained.shapes import Encoder, SwinShape, ViTShape
from recipes.engine.seeds import step_generator
from tests.golden_files import golden

GOLDEN = golden("optim_schedules")


@pytest.mark.parametrize(
    ("curve", "settings"),
    [
        ("mae_pretrain", {"lr": 2.4e-3, "epochs": 800, "warmup_epochs": 40}),
        ("mae_finetune", {"lr": 2e-3, "epochs": 100, "warmup_epochs": 5, "min_lr": 1e-6}),
    ],
)
def test_the_learning_rate_is_the_authors(curve, settings):
    ours = [warmup_cosine(float(epoch), **settings) for epoch in GOLDEN[f"{curve}/epoch"]]
    np.testing.assert_allclose(ours, GOLDEN[f"{curve}/lr"], rtol=1e-12, atol=1e-18)


def test_the_cosine_through_a_discrete_schedule_is_caes():
    # CAE's table: a linear warm-up that includes its end, then a cosine without its last value.
    theirs = GOLDEN["cae_pretrain/lr_per_iter"]
    steps, warmup = len(theirs), 40
    rise = [1.5e-3 * step / (warmup - 1) for step in range(warmup)]
    fall = [
        warmup_cosine(
            step / (steps - warmup), lr=1.5e-3, epochs=1, warmup_epochs=0, min_lr=1e-5
        )
        for step in range(steps - warmup)
    ]  # fmt: skip
    np.testing.assert_allclose(rise + fall, theirs, rtol=1e-9, atol=1e-12)


@given(
    epoch=st.floats(0, 100), warmup=st.integers(0, 99), lr=st.floats(1e-5, 1e-2),
    min_lr=st.floats(0, 1e-5),
)  # fmt: skip
def test_a_cosine_from_the_start_ends_as_the_other_and_never_passes_it(epoch, warmup, lr, min_lr):
    """timm's schedule, as SimMIM uses it: the same warm-up, then a cosine from the first step."""
    settings = {"lr": lr, "epochs": 100, "warmup_epochs": warmup, "min_lr": min_lr}
    early, late = (
        warmup_cosine(epoch, **settings, from_start=from_start) for from_start in (True, False)
    )
    assert early <= late * (1 + 1e-12)
    expected = min_lr + (lr - min_lr) * (1 + math.cos(math.pi * epoch / 100)) / 2
    assert early == (late if epoch < warmup else pytest.approx(expected, rel=1e-9))
    ends = [warmup_cosine(100, **settings, from_start=start) for start in (True, False)]
    assert ends == [pytest.approx(min_lr, abs=1e-18)] * 2


@given(
    epoch=st.floats(0, 800),
    milestones=st.lists(st.integers(20, 800), min_size=1, max_size=3),
    warmup=st.integers(1, 20),
)
def test_steps_are_simmims(epoch, milestones, warmup):
    ours = warmup_steps(epoch, lr=4e-4, warmup_epochs=warmup, milestones=milestones, warmup_lr=2e-6)
    passed = bisect.bisect_right(sorted(milestones), epoch)
    rise = 2e-6 + epoch * (4e-4 - 2e-6) / warmup
    assert ours == pytest.approx(rise if epoch < warmup else 4e-4 * 0.1**passed)


SWIN = SwinShape(
    image_size=32, patch_size=4, dim=8, depth=(2, 1, 3), heads=(1, 2, 2), window=2
)  # fmt: skip
# SimMIM's rule: layers are numbered through all stages; patch merging belongs to its stage's last.
SWIN_LAYERS = {
    "patch_embed.proj.weight": 0,
    "patch_embed.norm.bias": 0,
    "layers.0.blocks.0.attn.qkv.weight": 1,
    "layers.0.blocks.1.attn.rel_pos_bias.table": 2,
    "layers.0.downsample.reduction.weight": 2,
    "layers.0.downsample.norm.weight": 2,
    "layers.1.blocks.0.mlp.fc1.weight": 3,
    "layers.1.downsample.norm.bias": 3,
    "layers.2.blocks.0.norm1.weight": 4,
    "layers.2.blocks.2.mlp.fc2.bias": 6,
    "norm.weight": 7,
    "head.weight": 7,
}


def test_swins_layers_are_numbered_through_all_stages():
    encoder = SWIN.build_classifier(num_classes=3, drop_path=0.0)
    named = dict(encoder.named_parameters())
    assert {name: SWIN.layer_id(name) for name in SWIN_LAYERS} == SWIN_LAYERS
    assert {SWIN.layer_id(name) for name in named} == set(range(8))
    groups = layer_decay_groups(encoder, SWIN, weight_decay=0.05, layer_decay=0.9)
    of = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert len(of) == len(named)
    for name, parameter in named.items():
        # Relative positions are excluded by name, unlike in SimMIM's pre-training.
        is_decayed = parameter.ndim > 1 and "table" not in name
        scale = pytest.approx(0.9 ** (7 - SWIN.layer_id(name)))
        assert of[id(parameter)] == (scale, 0.05 if is_decayed else 0.0), name


def test_three_steps_of_lars_are_the_authors():
    weight = torch.nn.Parameter(GOLDEN.tensor("lars/w0"))
    bias = torch.nn.Parameter(GOLDEN.tensor("lars/b0"))
    optimizer = LARS([weight, bias], lr=0.3, weight_decay=0.01)
    for step in range(3):
        weight.grad = GOLDEN.tensor(f"lars/gw{step}")
        bias.grad = GOLDEN.tensor(f"lars/gb{step}")
        optimizer.step()
        torch.testing.assert_close(
            weight.data, GOLDEN.tensor(f"lars/w{step + 1}"), rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(
            bias.data, GOLDEN.tensor(f"lars/b{step + 1}"), rtol=1e-6, atol=1e-7
        )
        assert torch.equal(weight.grad, GOLDEN.tensor(f"lars/gw{step}"))


def test_lars_moves_weights_that_are_zero():
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5).step()
    assert torch.equal(weight.data, torch.full((2, 2), -0.5))


def test_lars_does_not_move_weights_without_a_gradient_or_with_a_zero_gradient():
    still, zero = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    zero.grad = torch.zeros(2, 2)
    LARS([still, zero], lr=0.5).step()
    assert torch.equal(still.data, torch.ones(2, 2))
    assert torch.equal(zero.data, torch.ones(2, 2))


SHAPE = ViTShape(image_size=32, patch_size=8, dim=16, depth=3, heads=2)


def vit() -> Encoder:
    return SHAPE.build_classifier(num_classes=5, drop_path=0.0)


def test_layer_decay_is_the_authors():
    encoder = vit()
    by_id = {id(parameter): name for name, parameter in encoder.named_parameters()}
    ours = {
        by_id[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in layer_decay_groups(encoder, SHAPE, weight_decay=0.05, layer_decay=0.65)
        for parameter in group["params"]
    }
    names = GOLDEN["mae_layer_decay/names"].tolist()
    assert ours.keys() == set(names)
    theirs = zip(
        GOLDEN["mae_layer_decay/lr_scale"], GOLDEN["mae_layer_decay/weight_decay"], strict=True
    )
    for name, expected in zip(names, theirs, strict=True):
        assert ours[name] == pytest.approx(expected, rel=1e-12), name


def test_frozen_parameters_are_in_no_group():
    encoder = vit()
    encoder.blocks.requires_grad_(False)
    encoder.pos_embed.requires_grad_(False)
    groups = layer_decay_groups(encoder, SHAPE, weight_decay=0.05, layer_decay=0.65)
    assert {group["lr_scale"] for group in groups} == {0.65**4, 1.0}
    assert all(parameter.requires_grad for group in groups for parameter in group["params"])


# Mixing

ALPHAS = st.sampled_from([0.0, 0.3, 0.8, 1.0])


def numbered_images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    """Return images whose pixels all equal the image's index in the batch."""
    return torch.arange(batch).float().view(batch, 1, 1, 1).expand(batch, 1, *size)


@given(
    batch=st.integers(1, 7),
    mixup=ALPHAS,
    cutmix=ALPHAS,
    smoothing=st.sampled_from([0.0, 0.1]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    step=st.integers(0, 1000),
)
def test_targets_are_the_shares_of_the_mixed_images(batch, mixup, cutmix, smoothing, size, step):
    # Each image has its own class, so without smoothing a target is the histogram of the pixels.
    mixing = Mixing(num_classes=batch + 1, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
    labels = torch.arange(batch)
    images = numbered_images(batch, size)
    mixed, targets = mixing(images, labels, step_generator(seed=3, step=step))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(batch))
    assert torch.equal(images, numbered_images(batch, size))  # the input has not changed
    hard = (targets - smoothing / (batch + 1)) / (1 - smoothing)
    torch.testing.assert_close(
        (hard * torch.arange(batch + 1.0)).sum(dim=1), mixed.mean(dim=(1, 2, 3)),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


@given(step=st.integers(0, 1000), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_cutmix_takes_each_pixel_from_one_of_two_images(step, size):
    mixing = Mixing(num_classes=6, mixup=0.0, smoothing=0.0)
    mixed, targets = mixing(
        numbered_images(6, size), torch.arange(6), step_generator(seed=0, step=step)
    )
    for index in range(6):
        partner = 5 - index
        own = (mixed[index] == index).float().mean()
        assert ((mixed[index] == index) | (mixed[index] == partner)).all()
        torch.testing.assert_close(targets[index, index], own)


def test_without_mixing_only_the_targets_are_smoothed():
    images = torch.rand(4, 3, 5, 5)
    labels = torch.tensor([2, 0, 1, 1])
    mixing = Mixing(num_classes=3, mixup=0.0, cutmix=0.0, smoothing=0.3)
    mixed, targets = mixing(images, labels, step_generator(seed=0, step=0))
    assert torch.equal(mixed, images)
    torch.testing.assert_close(targets[0], torch.tensor([0.1, 0.1, 0.8]))
    assert torch.equal(targets, smooth_targets(labels, 3, smoothing=0.3))


def test_mixing_is_a_function_of_seed_and_step():
    images, labels = torch.rand(4, 3, 8, 8), torch.arange(4)
    mixing = Mixing(num_classes=4)

    def draw(seed: int, step: int) -> bytes:
        mixed, targets = mixing(images, labels, step_generator(seed=seed, step=step))
        return mixed.numpy().tobytes() + targets.numpy().tobytes()

    assert draw(1, 7) == draw(1, 7)
    assert len({draw(seed, step) for seed in range(3) for step in range(5)}) == 15


def test_half_of_the_steps_are_cutmix():
    mixing = Mixing(num_classes=2, smoothing=0.0)
    images = numbered_images(2, (16, 16))
    is_cut = []
    for step in range(400):
        mixed, _ = mixing(images, torch.arange(2), step_generator(seed=0, step=step))
        is_cut.append(bool(((mixed == 0) | (mixed == 1)).all()))
    assert 160 < sum(is_cut) < 240


def test_shares_follow_the_beta_distribution():
    generator = step_generator(seed=0, step=0)
    for alpha in (0.3, 1.0):
        draws = np.array([draw_beta(alpha, generator) for _ in range(2000)])
        assert draws.mean() == pytest.approx(0.5, abs=0.04)
        assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_a_box_lies_inside_the_image_and_leaves_at_least_its_share(height, width, share, seed):
    generator = step_generator(seed=seed, step=0)
    rows, columns = draw_box((height, width), share, generator)
    top, bottom, left, right = rows.start, rows.stop, columns.start, columns.stop
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - share) * height * width + 1e-6
