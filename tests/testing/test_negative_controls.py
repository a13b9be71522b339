"""The public checkers catch small re-creations of faults found in published code."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimkit import masking
from mimkit.masking import Key, Mask
from mimkit.nn import ViT
from mimkit.testing import assert_no_leak, assert_sampler_conforms, assert_samples_isolated

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
    """One generator for the batch: a sample's mask depends on its neighbours."""
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
    """Row-major ids cut to a common length: the end of the image is seldom masked."""
    count = masking.num_masked(36, ratio)
    drawn = masking.uniform(key, grid, num_masked=36 - 2)
    masked = drawn.masked_ids[:, :count]
    rest = torch.ones(key.batch_size, 36, dtype=torch.bool).scatter(1, masked, False)
    return ~Mask.from_bool(rest.view(-1, *grid))


@pytest.mark.parametrize(
    ("sampler", "grid", "ratio", "says"),
    [
        (never_masks_the_last_row, GRID, 0.5, "index 5 of axis 0"),
        (truncates_the_count, (10,), 0.9, "expected 9 of 10 tokens masked at ratio 0.9; got 10"),
        (draws_from_the_global_generator, GRID, 0.5, "equal masks from equal keys"),
        (draws_from_numpy, GRID, 0.5, "equal masks from equal keys"),
        (seeds_by_the_batch, GRID, 0.5, "batch's order"),
        (forgets_the_epoch, GRID, 0.5, "other masks for other epochs"),
        (shares_one_mask, GRID, 0.5, "other masks for other sample ids"),
        (truncates_to_the_smallest_of_the_batch, GRID, 0.25, "to be masked sometimes"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_faulty_sampler_is_caught(sampler, grid, ratio, says) -> None:
    with pytest.raises(AssertionError, match=says):
        assert_sampler_conforms(sampler, grid, ratio)


@pytest.mark.parametrize("grid", [(16,), (4, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("ratio", [0.1, 0.75])
def test_our_sampler_conforms(grid: tuple[int, ...], ratio: float) -> None:
    assert_sampler_conforms(masking.uniform, grid, ratio)


def test_a_sampler_of_units_conforms_with_its_own_count() -> None:
    def units(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
        return masking.uniform(key, grid, ratio, unit=2)

    assert_sampler_conforms(units, (6, 6), 0.6, num_masked=20)


class Encoder(nn.Module):
    """A patch-wise encoder to spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)

    def tokens(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).transpose(1, 2)


class Peeks(Encoder):
    """Centers tokens by a mean over hidden patches too."""

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = self.tokens(images)
        tokens = tokens - 1e-4 * tokens.mean(dim=1, keepdim=True)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


class OverlapsItsPatches(Encoder):
    """A stem whose kernel is larger than its stride looks across the patch's border."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 6, 4, padding=1)

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        return torch.take_along_dim(self.tokens(images), mask.visible_ids.unsqueeze(2), dim=1)


class GathersByBooleans(Encoder):
    """`x[visible].reshape(B, -1, C)` on samples that mask different numbers of tokens."""

    def forward(self, images: Tensor, is_masked: Tensor) -> Tensor:
        tokens = self.tokens(images)
        return tokens[~is_masked.flatten(1)].reshape(len(images), -1, tokens.shape[2])


class MixesTheBatch(Encoder):
    """Normalises by statistics of the batch."""

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = torch.take_along_dim(self.tokens(images), mask.visible_ids.unsqueeze(2), dim=1)
        return tokens - tokens.mean(dim=(0, 1))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask() -> Mask:
    return masking.uniform(masking.key([0, 1], seed=0), (4, 6), 0.75)


def test_an_encoder_that_peeks_is_caught_with_the_patch_it_looks_at(images, mask) -> None:
    with pytest.raises(AssertionError, match=r"the masked patch \(\d, \d\) of sample \d alone"):
        assert_no_leak(Peeks(), images, mask)


def test_an_overlapping_stem_is_caught_with_the_distance_of_its_reach(images, mask) -> None:
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


def test_an_encoder_that_returns_nan_is_not_called_clean(images, mask) -> None:
    with pytest.raises(AssertionError, match="not a number"):
        assert_no_leak(lambda images, mask: images / 0 * 0, images, mask)


@pytest.mark.parametrize("class_token", [True, False])
def test_our_encoder_is_clean_on_rectangular_images(images, mask, class_token: bool) -> None:
    encoder = ViT(
        image_size=(16, 24), patch_size=4, dim=16, depth=2, heads=2, class_token=class_token
    )
    assert_no_leak(encoder, images, mask)
    assert_samples_isolated(encoder, images, mask)


def test_dropout_is_not_taken_for_a_leak(images, mask) -> None:
    encoder = ViT(image_size=(16, 24), patch_size=4, dim=16, depth=2, heads=2, drop_path=0.5)
    assert_no_leak(encoder.train(), images, mask)
