"""Negative controls: the public checkers catch small re-creations of faults in published code.

D1 to D15 are fifteen defects found in eleven code bases. Two are tested elsewhere: D10 (a README
that does not run) by the README's doctest, D14 (a teacher that is the student) with CAE's recipe.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mimkit import losses, masking, patches, targets
from mimkit.masking import Key, Mask, compat, stats
from mimkit.nn import ConvViT, ViT
from mimkit.testing import (
    assert_mask_equivariant,
    assert_no_leak,
    assert_op_correct,
    assert_reduction_exact,
    assert_sampler_conforms,
    assert_samples_isolated,
)
from recipes.cae import CAE, CAEConfig
from recipes.convmae import ConvMAE, ConvMAEConfig
from recipes.mae import MAE, MAEConfig

GRID = (6, 6)


def never_masks_the_last_row(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """Block corners drawn from [0, H - h) instead of [0, H - h]."""
    rows, columns = grid
    inner = masking.uniform(
        key, (rows - 1, columns), num_masked=masking.num_masked(rows * columns, ratio)
    )
    last_row = torch.zeros(key.batch_size, 1, columns, dtype=torch.bool)
    return Mask.from_bool(torch.cat([inner.is_masked, last_row], dim=1))


def truncates_the_count(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    return masking.uniform(key, grid, ratio, rounding="mae")


def draws_from_the_global_generator(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    noise = torch.rand(key.batch_size, 36)
    return Mask.from_noise(noise, grid, masking.num_masked(36, ratio))


def draws_from_numpy(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    noise = torch.from_numpy(np.random.rand(key.batch_size, 36))
    return Mask.from_noise(noise, grid, masking.num_masked(36, ratio))


def seeds_by_the_batch(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """One generator for the batch: a sample's mask depends on the other samples."""
    generator = torch.Generator().manual_seed(int(key.sample_ids[0]) + int(key.seed_and_epoch[0]))
    noise = torch.rand(key.batch_size, 36, generator=generator)
    return Mask.from_noise(noise, grid, masking.num_masked(36, ratio))


def forgets_the_epoch(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    seed = int(key.seed_and_epoch[0])
    return masking.uniform(masking.key(key.sample_ids, seed=seed), grid, ratio)


def shares_one_mask(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    first = Key(key.sample_ids[:1] * 0, key.seed_and_epoch, key.view_index)
    return masking.uniform(first, grid, ratio).expand(key.batch_size)


def truncates_to_the_smallest_of_the_batch(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """Row-major ids truncated to a common length: the end of the image is rarely masked."""
    count = masking.num_masked(36, ratio)
    drawn = masking.uniform(key, grid, num_masked=36 - 2)
    masked = drawn.masked_ids[:, :count]
    rest = torch.ones(key.batch_size, 36, dtype=torch.bool).scatter(1, masked, False)
    return ~Mask.from_bool(rest.view(-1, *grid))


def never_masks_the_last_row_and_column(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D1, as published."""
    return Mask.from_bool(compat.mmpretrain(key, grid, ratio, min_block=4))


def truncates_the_context_to_the_shortest_of_the_batch(
    key: Key, grid: tuple[int, ...], ratio: float
) -> Mask:
    """D2 and D3, as published: a mask depends on the other samples of the batch."""
    return Mask.from_bool(compat.ijepa(key, grid, min_keep=1))


def fixed_size_targets(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D2 alone: targets of a fixed size never include the last row and column."""
    alone = [Key(i[None], key.seed_and_epoch, key.view_index) for i in key.sample_ids]
    target = [compat.ijepa_targets(one, grid, target_scale=(0.25, 0.25), min_keep=1,
              aspect=(1.0, 1.0))[:, 0] for one in alone]  # fmt: skip
    return Mask.from_bool(torch.cat(target))


def hard_codes_the_count(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D7: a literal 49 in the code instead of a count from the ratio."""
    shuffled = masking.uniform(key, grid, ratio).visible_ids.view(key.batch_size, 9)
    return Mask.from_visible_ids(shuffled, grid)


def never_ends(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D12: loops until a block fits, on a grid where none fits."""
    masked, height = 0, 4
    while masked < math.prod(grid) * ratio:
        if height < grid[0]:
            masked += height
    return masking.uniform(key, grid, num_masked=masked)


def compat_cae(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D12, as published, except that it raises an error instead of looping forever."""
    return Mask.from_bool(compat.cae(key, grid, ratio))


def swaps_masked_and_visible(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D15: booleans of a code base in which True means visible."""
    keep = ~masking.uniform(key, grid, ratio).is_masked
    return Mask.from_bool(keep)


@pytest.mark.parametrize(
    ("sampler", "grid", "ratio", "says"),
    [
        (
            never_masks_the_last_row_and_column,
            (7, 7),
            0.4,
            "index 6 of axis 0 and index 6 of axis",
        ),
        (fixed_size_targets, (8, 8), 0.25, "index 7 of axis 0 and index 7 of axis 1"),
        (hard_codes_the_count, GRID, 0.5, r"masks of grid \(6, 6\) at ratio 0.5; .* RuntimeError"),
        (never_ends, (1, 16), 0.5, r"sampling to end; 64 masks of grid \(1, 16\) .* in never_ends"),
        (compat_cae, (1, 16), 0.5, r"does not end on grid \(1, 16\)"),
        (
            swaps_masked_and_visible,
            GRID,
            0.75,
            "expected 27 of 36 tokens masked at ratio 0.75; got 9",
        ),
        (never_masks_the_last_row, GRID, 0.5, "index 5 of axis 0"),
        (truncates_the_count, (10,), 0.9, "expected 9 of 10 tokens masked at ratio 0.9; got 10"),
        (draws_from_the_global_generator, GRID, 0.5, "equal masks from equal keys"),
        (draws_from_numpy, GRID, 0.5, "equal masks from equal keys"),
        (seeds_by_the_batch, GRID, 0.5, "batch's order"),
        (forgets_the_epoch, GRID, 0.5, "other masks for other epochs"),
        (shares_one_mask, GRID, 0.5, "other masks for other sample ids"),
        (truncates_to_the_smallest_of_the_batch, GRID, 0.25, "to be masked in some masks"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_faulty_sampler_is_caught(sampler, grid, ratio, says) -> None:
    with pytest.raises(AssertionError, match=says):
        assert_sampler_conforms(sampler, grid, ratio)


def test_a_mask_that_depends_on_its_batch_is_caught() -> None:
    sampler = truncates_the_context_to_the_shortest_of_the_batch
    count = sampler(masking.key(torch.arange(64) * 7919 + 2**40, seed=1), (9, 9), 0.5).num_masked
    # Block sizes depend on all ids and their order, the count on the shortest context.
    with pytest.raises(AssertionError, match="batch's order; .* sample id .* the first time"):
        assert_sampler_conforms(sampler, (9, 9), 0.5, num_masked=count)


def keeps_the_fewest_of_the_batch(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D3 alone: each sample has its own count of visible tokens, the batch uses the smallest."""
    own = [8 + int(i) // 7919 % 5 for i in key.sample_ids]
    return masking.uniform(key, grid, num_masked=36 - min(own))


def test_a_count_that_depends_on_the_batch_is_caught() -> None:
    with pytest.raises(AssertionError, match="batch's size; in a batch of 1 of 64 samples, sample"):
        assert_sampler_conforms(keeps_the_fewest_of_the_batch, GRID, 0.5, num_masked=28)


def test_uneven_marginals_of_blocks_are_measured_and_not_refused() -> None:
    """D13: uneven marginals are inherent in blocks, so `stats` reports them."""
    share = stats.marginals(masking.blockwise, (14, 14), 0.75, num_samples=1000)
    assert share[0, 0] < 0.3 < 0.95 < share[7, 7]
    assert_sampler_conforms(masking.blockwise, (14, 14), 0.75)


@pytest.mark.parametrize("grid", [(16,), (4, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.75])
def test_uniform_conforms(grid: tuple[int, ...], ratio: float) -> None:
    assert_sampler_conforms(masking.uniform, grid, ratio)


def test_uniform_with_units_conforms_with_its_own_count() -> None:
    def units(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
        return masking.uniform(key, grid, ratio, unit=2)

    assert_sampler_conforms(units, (6, 6), 0.6, num_masked=20)


class Encoder(nn.Module):
    """A correct patch-wise encoder, the base of the faulty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def tokens(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).transpose(1, 2)


class CentersByAllTokens(Encoder):
    """Subtracts a mean that includes masked patches."""

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = self.tokens(images)
        tokens = tokens - 1e-4 * tokens.mean(dim=1, keepdim=True)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


class OverlapsItsPatches(Encoder):
    """A stem whose kernel is larger than its stride, so that it reads neighboring patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 6, 4, padding=1)

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        return torch.take_along_dim(self.tokens(images), mask.visible_ids.unsqueeze(2), dim=1)


class GathersByBooleans(Encoder):
    """`x[visible].reshape(B, -1, C)`, for samples with different numbers of masked tokens."""

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        tokens = self.tokens(images)
        return tokens[~is_masked.flatten(1)].reshape(len(images), -1, tokens.shape[2])


class MixesTheBatch(Encoder):
    """Normalises by batch statistics."""

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = torch.take_along_dim(self.tokens(images), mask.visible_ids.unsqueeze(2), dim=1)
        return tokens - tokens.mean(dim=(0, 1))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Mask:
    return masking.uniform(masking.key([0, 1], seed=0), (4, 6), 0.75)


def test_an_encoder_that_reads_masked_patches_is_caught_with_the_patch(images, mask) -> None:
    with pytest.raises(AssertionError, match=r"the masked patch \(\d, \d\) of sample \d alone"):
        assert_no_leak(CentersByAllTokens(), images, mask)


def test_an_overlapping_stem_is_caught_with_its_reach(images, mask) -> None:
    with pytest.raises(AssertionError, match=r"visible patch \(\d, \d\), 1\.\d patches away"):
        assert_no_leak(OverlapsItsPatches(), images, mask)


def test_a_boolean_gather_that_moves_tokens_between_samples_is_caught(images) -> None:
    is_masked = torch.zeros(2, 4, 6, dtype=torch.bool)
    is_masked[0, :3], is_masked[1, 0] = True, True  # 6 and 18 visible tokens: 24 in all
    with pytest.raises(AssertionError, match="sample 1 reaches sample 0"):
        assert_samples_isolated(GathersByBooleans(), images, is_masked)


def test_an_encoder_that_mixes_the_batch_is_caught(images, mask) -> None:
    with pytest.raises(AssertionError, match="sample 0 reaches sample 1"):
        assert_samples_isolated(MixesTheBatch(), images, mask)


def test_an_encoder_that_returns_nan_does_not_pass(images, mask) -> None:
    with pytest.raises(AssertionError, match="not a number"):
        assert_no_leak(lambda images, mask: images / 0 * 0, images, mask)


@pytest.mark.parametrize("class_token", [True, False])
def test_vit_does_not_leak_on_rectangular_images(images, mask, class_token: bool) -> None:
    encoder = ViT(
        image_size=(16, 24), patch_size=4, dim=16, depth=2, heads=2, class_token=class_token
    )
    assert_no_leak(encoder, images, mask)
    assert_samples_isolated(encoder, images, mask)


def test_drop_path_is_not_reported_as_a_leak(images, mask) -> None:
    encoder = ViT(image_size=(16, 24), patch_size=4, dim=16, depth=2, heads=2, drop_path=0.5)
    assert_no_leak(encoder.train(), images, mask)


class ConvolvesDensely(nn.Module):
    """Patch embedding, then 3x3 convolutions, each masked or unmasked.

    If the first convolution is masked, later ones cannot leak.
    """

    def __init__(self, *, masked: tuple[bool, ...]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in masked)
        self.masked = masked

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        visible = ~mask.is_masked.unsqueeze(1)
        x = self.embed(images)
        for conv, is_masked in zip(self.convs, self.masked, strict=True):
            x = conv(x * visible if is_masked else x)
        return x * visible


def leak_of(error: AssertionError) -> tuple[tuple[int, int], int, tuple[int, int], float]:
    """Parse masked patch, sample, farthest patch and distance from an error message."""
    found = re.search(
        r"masked patch \((\d), (\d)\) of sample (\d) .* patch \((\d), (\d)\), (\S+) patches",
        str(error),
    )
    assert found, error
    row, column, sample, far_row, far_column = map(int, found.groups()[:5])
    return (row, column), sample, (far_row, far_column), float(found[6])


@pytest.mark.parametrize(
    ("masked", "reach"),
    [((False,), 1), ((False, False), 2), ((False, True), 2), ((True, False), 0), ((True, True), 0)],
)
def test_an_unmasked_convolution_is_caught_with_position_and_reach(masked, reach) -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 20, 28)
    is_masked = torch.zeros(1, 5, 7, dtype=torch.bool)
    is_masked[0, 2, 4] = True
    encoder, mask = ConvolvesDensely(masked=masked), Mask.from_bool(is_masked)
    if reach == 0:
        assert_no_leak(encoder, images, mask)
        return
    with pytest.raises(AssertionError) as caught:
        assert_no_leak(encoder, images, mask)
    place, sample, far, distance = leak_of(caught.value)
    assert (place, sample) == ((2, 4), 0)
    assert max(abs(far[0] - 2), abs(far[1] - 4)) == reach  # a corner of the window
    assert distance == round(math.dist(place, far), 1) == round(reach * math.sqrt(2), 1)


def test_an_overlapping_stem_is_caught_with_the_right_position(images, mask) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_no_leak(OverlapsItsPatches(), images, mask)
    place, sample, far, distance = leak_of(caught.value)
    is_masked = mask.is_masked[sample]
    assert is_masked[place]
    assert not is_masked[far]
    assert distance == round(math.dist(place, far), 1) < 1.5


def test_the_ablation_without_masked_convolutions_is_caught() -> None:
    encoder = small_convvit(masked_conv=False)
    mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.75)
    with pytest.raises(AssertionError, match=r"as far as the visible patch \(\d, \d\)"):
        assert_no_leak(encoder, torch.rand(2, 3, 64, 96), mask)


@pytest.mark.parametrize("form", ["all tokens", "map", "fine map", "other"])
def test_changes_are_located_in_outputs_of_every_form(images, mask, form) -> None:
    def encoder(images: Tensor, mask: Mask) -> Tensor:
        cells = F.avg_pool2d(images, 2 if form == "fine map" else 4)
        return {
            "all tokens": F.pad(cells.flatten(2).transpose(1, 2), (0, 0, 1, 0)),
            "map": cells,
            "fine map": cells,
            "other": cells.flatten(1)[:, :, None, None, None],
        }[form]

    with pytest.raises(AssertionError, match="alone changes") as caught:
        assert_no_leak(encoder, images, mask)
    if form == "other":
        assert "as far as" not in str(caught.value)
        return
    place, _, far, distance = leak_of(caught.value)
    assert (place, distance) == (far, 0.0)
    assert "as far as the masked patch" in str(caught.value)


ACTIVE: list[Mask] = []


class KeepsItsMaskInAGlobal(nn.Module):
    """D5: checkpointed convolutions read the mask of the last call from a global variable."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def convolve(self, images: Tensor) -> Tensor:
        return (self.embed(images) * ~ACTIVE[-1].is_masked.unsqueeze(1)).square()

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        ACTIVE[:] = [mask]
        return checkpoint(self.convolve, images, use_reentrant=False)


def test_a_mask_in_a_global_variable_is_caught_by_the_gradient(images, mask) -> None:
    with pytest.raises(AssertionError, match="gradient of sample 0 .* before the backward pass"):
        assert_mask_equivariant(KeepsItsMaskInAGlobal(), images, mask)


def uses_the_first_mask_for_all(images: Tensor, mask: Mask) -> Tensor:
    return images.flatten(2)[:, :, mask.visible_ids[0]]


def scales_by_batch_index(images: Tensor, mask: Mask) -> Tensor:
    factor = torch.arange(1, len(images) + 1).view(-1, 1, 1)
    return images.flatten(2) * (factor if len(images) > 1 else 1 + mask.visible_ids[0, 0] * 0)


@pytest.mark.parametrize(
    "encoder", [uses_the_first_mask_for_all, scales_by_batch_index, MixesTheBatch()]
)
def test_outputs_that_depend_on_other_samples_are_caught(encoder, images, mask) -> None:
    with pytest.raises(AssertionError, match=r"the output of sample \d alone differs"):
        assert_mask_equivariant(encoder, images, mask)


def averages_over_hidden_positions(x: Tensor, visible: Tensor) -> Tensor:
    """D6: average pooling counts the zeros of masked positions."""
    return F.avg_pool2d(x * visible, 2)


def averages_over_visible_positions(x: Tensor, visible: Tensor) -> Tensor:
    return F.avg_pool2d(x * visible, 2) / F.avg_pool2d(visible.to(x), 2).clamp(min=0.25)


@pytest.mark.untyped
def test_pooling_that_counts_masked_positions_is_caught() -> None:
    torch.manual_seed(0)
    x = torch.rand(1, 2, 4, 4, requires_grad=True)
    visible = torch.rand(1, 1, 4, 4) > 0.4
    with pytest.raises(
        AssertionError, match=r"the value is off by \S+ at \[.*\]: expected \S+, got \S+;"
    ):
        assert_op_correct(
            averages_over_hidden_positions, averages_over_visible_positions, [x, visible]
        )


@pytest.mark.untyped
def test_an_operator_without_a_gradient_is_caught() -> None:
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    with pytest.raises(AssertionError, match="the value has no gradient"):
        assert_op_correct(lambda x: x.detach() * 2, lambda x: x + x, [x])
    with pytest.raises(AssertionError, match="the gradient of input 1 is off"):
        assert_op_correct(lambda x, y: x * y.detach(), torch.mul, [x, y])


def mean_over_masked(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    """D8: without masked tokens, this is 0 / 0."""
    return ((prediction - target) ** 2).mean()


def sums(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    return ((prediction - target) ** 2).sum()


def normalizes_by_the_batch(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    return (((prediction - target) / target.std()) ** 2).sum() / max(prediction.numel(), 1)


def takes_the_root_of_the_mean(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    return (((prediction - target) ** 2).sum() / max(prediction.numel(), 1) + 1e-6).sqrt()


def detaches_all_samples_but_the_first(prediction: Tensor, target: Tensor, mask: Mask) -> Tensor:
    error = ((prediction - target) ** 2).sum(dim=(1, 2)) / max(prediction[0].numel(), 1)
    return torch.cat([error[:1], error[1:].detach()]).mean()


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (mean_over_masked, "a value of 0 where nothing is masked; got nan"),
        (sums, r"value of 2 samples, .* parts of \(1, 1\) samples \(micro-batches or processes\)"),
        (normalizes_by_the_batch, "value of 2 samples"),
        (takes_the_root_of_the_mean, "value of 2 samples"),
        (detaches_all_samples_but_the_first, r"gradient of 2 samples, .*\(its largest entry\)"),
        (lambda p, t, mask: (p - t).square().mean(dim=2), r"scalar loss; got shape \(2, 7\)"),
    ],
)
def test_a_loss_with_an_inexact_reduction_is_caught(loss, says) -> None:
    with pytest.raises(AssertionError, match=says):
        assert_reduction_exact(loss)


@pytest.mark.parametrize("loss", ["masked_mse", "masked_l1", "masked_smooth_l1"])
def test_the_reductions_of_mimkits_losses_are_exact(loss) -> None:
    assert_reduction_exact(getattr(losses, loss))


def test_the_reductions_of_the_token_and_pixel_losses_are_exact() -> None:
    def codes(mask: Mask) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (mask.batch_size, mask.num_masked)
        logits = torch.randn(*shape, 6, generator=generator)
        return logits, torch.randint(0, 6, shape, generator=generator)

    def pixels(mask: Mask) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(mask.batch_size, 2, 6, 8, generator=generator)
        return torch.randn(mask.batch_size, mask.num_masked, 8, generator=generator), images

    def pixel_loss(prediction: Tensor, images: Tensor, mask: Mask) -> Tensor:
        return losses.masked_pixel_loss(prediction, images, mask, 2, normalize="patch")

    assert_reduction_exact(losses.masked_cross_entropy, inputs=codes)
    assert_reduction_exact(pixel_loss, inputs=pixels)


@pytest.mark.untyped
def test_a_prediction_of_three_channels_is_not_broadcast_to_one(mask) -> None:
    """D8: SimMIM broadcasts such a pair without an error, and trains on a meaningless loss."""
    with pytest.raises(ValueError, match="differ in shape"):
        losses.masked_mse(torch.zeros(2, 18, 3), torch.zeros(2, 18, 1), mask)


def test_normalising_patches_of_one_value_is_refused(mask) -> None:
    """D8: the unbiased variance of one value is 0 / 0."""
    with pytest.raises(ValueError, match="variance|one value|normaliz"):
        targets.NormalizedPixels(1)(torch.rand(2, 1, 4, 6), mask)


@pytest.mark.parametrize(("size", "channels"), [((256, 256), 1), ((64, 32), 5)])
def test_encoders_take_any_size_and_number_of_channels(size, channels) -> None:
    """D8 and D9: 224 pixels and 3 channels are hard-coded elsewhere."""
    images = torch.rand(1, channels, *size)
    vit = ViT(image_size=size, patch_size=16, in_channels=channels, dim=8, depth=1, heads=2)
    for encoder in (vit, small_convvit(image_size=size, in_channels=channels)):
        mask = masking.uniform(masking.key([0], seed=0), encoder.grid, 0.5)
        assert encoder(images, mask).isfinite().all()
    patched = patches.patchify(images, 16)
    assert torch.equal(patches.unpatchify(patched, vit.grid, 16), images)


def small_convvit(**options: object) -> ConvViT:
    torch.manual_seed(0)
    small: dict[str, object] = {"image_size": (64, 96), "dim": (8, 8, 16), "depth": (2, 1, 1)}
    return ConvViT(**(small | options), heads=2)


SMALL = {"dim": 16, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1}
MODELS = {
    "MAE": lambda: MAE(MAEConfig(image_size=(32, 48), patch_size=8, decoder_heads=2, **SMALL)),
    "CAE": lambda: CAE(
        CAEConfig(image_size=(32, 48), patch_size=8, decoder_heads=2, regressor_depth=1,
                  vocabulary_size=11, **SMALL)
    ),
    "ConvMAE": lambda: ConvMAE(
        ConvMAEConfig(image_size=(64, 96), dim=(8, 8, 16), depth=(1, 1, 1), heads=2,
                      decoder_dim=16, decoder_depth=1, decoder_heads=2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_encoders_of_the_recipes_do_not_leak(name) -> None:
    torch.manual_seed(0)
    encoder = MODELS[name]().encoder
    size = (64, 96) if name == "ConvMAE" else (32, 48)
    images = torch.rand(3, 3, *size)
    for ratio in (0.25, 0.75):
        mask = masking.uniform(masking.key([0, 1, 2], seed=0), encoder.grid, ratio)
        assert_no_leak(encoder, images, mask)
        assert_samples_isolated(encoder, images, mask)
        assert_mask_equivariant(encoder, images, mask)
