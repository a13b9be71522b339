"""`assert_no_leak` reports the right patches; correct encoders pass.

Hidden pixels of patch p can change the output at patch q if a path of convolutions leads from p to
q. For each network, the set of q is derived by hand and compared with the error message.
"""

import math
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import masking
from mimkit.masking import Key, Mask
from mimkit.nn import ConvStem, ConvViT, ViT
from mimkit.testing import (
    assert_mask_equivariant,
    assert_no_leak,
    assert_sampler_conforms,
    assert_samples_isolated,
    grids,
    ratios,
)
from recipes.cae import CAE
from recipes.cae import PRESETS as CAE_PRESETS
from recipes.convmae import PRESETS as CONVMAE_PRESETS
from recipes.convmae import ConvMAE
from recipes.mae import MAE
from recipes.mae import PRESETS as MAE_PRESETS

Patch = tuple[int, ...]


def leak_message(encoder: Callable[[Tensor, Mask], Tensor], images: Tensor, mask: Mask) -> str:
    with pytest.raises(AssertionError) as caught:
        assert_no_leak(encoder, images, mask)
    return str(caught.value)


def parse(message: str) -> tuple[Patch, int, Patch, float]:
    """Read the leaking patch, its sample, the farthest patch that it changes and the distance."""
    found = re.search(
        r"masked patch \((\d+), (\d+)\) of sample (\d+) alone .* "
        r"as far as the visible patch \((\d+), (\d+)\), (\S+) patches away",
        message,
    )
    assert found, message
    row, column, sample, far_row, far_column = map(int, found.groups()[:5])
    return (row, column), sample, (far_row, far_column), float(found[6])


def expected_leak(
    mask: Mask, reached: Callable[[Tensor, Patch], Tensor]
) -> tuple[Patch, int, Patch, float]:
    """Return the first masked patch that reaches a visible one, and the farthest one it reaches."""
    for sample, is_masked in enumerate(mask.is_masked):
        for row, column in is_masked.nonzero().tolist():
            affected = (reached(is_masked, (row, column)) & ~is_masked).nonzero().tolist()
            if affected:
                far = max(affected, key=lambda place: math.dist((row, column), place))
                distance = round(math.dist((row, column), far), 1)
                return (row, column), sample, tuple(far), distance
    raise AssertionError("nothing leaks")


def around(places: Tensor, reach: int) -> Tensor:
    """Dilate a set of patches by `reach` in all eight directions."""
    return F.max_pool2d(places.float()[None, None], 2 * reach + 1, 1, reach)[0, 0] > 0


def only(is_masked: Tensor, patch: Patch) -> Tensor:
    affected = torch.zeros_like(is_masked)
    affected[patch] = True
    return affected


MASKS = [
    masking.uniform(masking.key([1, 2], seed=seed), (5, 7), ratio)
    for seed, ratio in enumerate((0.1, 0.5, 0.75))
]


class DenseConvolutions(nn.Module):
    """Patch embedding, then unmasked 3x3 convolutions."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth))

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        x = self.embed(images)
        for conv in self.convs:
            x = conv(x)
        tokens = x.flatten(2).transpose(1, 2)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.num_masked} of 35")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unmasked_convolutions_leak_as_far_as_their_receptive_field(depth: int, mask: Mask) -> None:
    torch.manual_seed(0)
    message = leak_message(DenseConvolutions(depth), torch.rand(2, 3, 20, 28), mask)
    assert parse(message) == expected_leak(
        mask, lambda is_masked, patch: around(only(is_masked, patch), depth)
    )


class OverlappingStem(nn.Module):
    """A stem whose kernel is larger than its stride: it overlaps neighbors by `padding` pixels."""

    def __init__(self, kernel: int, padding: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, kernel, 4, padding)

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.num_masked} of 35")
@pytest.mark.parametrize(("kernel", "padding", "reach"), [(6, 1, 1), (12, 4, 1), (14, 5, 2)])
def test_an_overlapping_stem_leaks_into_the_patches_that_it_overlaps(
    kernel: int, padding: int, reach: int, mask: Mask
) -> None:
    torch.manual_seed(0)
    message = leak_message(OverlappingStem(kernel, padding), torch.rand(2, 3, 20, 28), mask)
    assert parse(message) == expected_leak(
        mask, lambda is_masked, patch: around(only(is_masked, patch), reach)
    )


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.num_masked} of 35")
def test_a_stem_that_overlaps_on_one_side_leaks_to_that_side(mask: Mask) -> None:
    """A 3x3 kernel with stride 2, as in early convolutions, reads one pixel up and to the left."""

    def encoder(images: Tensor, mask: Mask) -> Tensor:
        tokens = F.conv2d(images, kernel, stride=2, padding=1).flatten(2).transpose(1, 2)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)

    def reached(is_masked: Tensor, patch: Patch) -> Tensor:
        affected = only(is_masked, patch)
        affected[patch[0] : patch[0] + 2, patch[1] : patch[1] + 2] = True
        return affected

    kernel = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    message = leak_message(encoder, torch.rand(2, 3, 10, 14), mask)
    assert parse(message) == expected_leak(mask, reached)


def test_conv_stem_does_not_leak() -> None:
    torch.manual_seed(0)
    stem = ConvStem(in_channels=3, channels=(8, 8))
    stem_vit = ViT(image_size=(32, 48), patch_size=2, dim=16, depth=1, heads=2, stem=stem)
    mask = masking.uniform(masking.key([0, 1], seed=0), stem_vit.grid, 0.5)
    assert_no_leak(stem_vit, torch.rand(2, 3, 32, 48), mask)


class MaskedConvolutions(nn.Module):
    """Residual blocks with masked convolutions: masked patches keep values but are not read."""

    def __init__(self, masked: tuple[bool, ...]) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in masked)
        self.masked = masked

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        visible = ~mask.is_masked.unsqueeze(1)
        x = self.embed(images)
        for conv, is_masked in zip(self.convs, self.masked, strict=True):
            x = x + conv(x * visible if is_masked else x)
        tokens = x.flatten(2).transpose(1, 2)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask.num_masked} of 35")
@pytest.mark.parametrize(
    "masked", [(False, True, True), (True, False, True), (True, True, False), (True, True, True)]
)
def test_a_mask_missing_in_one_layer_leaks_at_the_right_patches(masked: tuple, mask: Mask) -> None:
    """After that layer the leak spreads through visible patches only."""

    def reached(is_masked: Tensor, patch: Patch) -> Tensor:
        affected = only(is_masked, patch)
        for layer in masked:
            affected = affected | around(affected & ~is_masked if layer else affected, 1)
        return affected

    torch.manual_seed(0)
    encoder, images = MaskedConvolutions(masked), torch.rand(2, 3, 20, 28)
    if all(masked):
        assert_no_leak(encoder, images, mask)
    else:
        assert parse(leak_message(encoder, images, mask)) == expected_leak(mask, reached)


class OneUnmaskedBlock(ConvViT):
    """Masked convolutions on the whole map; one block of the first stage gets no mask."""

    def __init__(self, unmasked: int | None) -> None:
        super().__init__(
            image_size=(40, 56), patch_sizes=(4, 2, 1), dim=(8, 8, 8), depth=(3, 1, 1), heads=2
        )
        self.unmasked = unmasked

    def forward(self, images: Tensor, mask: Mask) -> Tensor:
        hidden = mask.refine(2).is_masked.flatten(1)[:, None, :, None]
        cells, cell = images.flatten(2).transpose(1, 2).unsqueeze(1), self.image_size
        stage = self.stages[0]
        cells = stage.embed(cells, cell)
        for index, block in enumerate(stage.blocks):
            seen = None if index == self.unmasked else hidden
            cells = block(cells, SimpleNamespace(cell=(10, 14), around=None, hidden=seen))
        tokens = cells.masked_fill(hidden, 0)[:, 0].view(len(images), 5, 2, 7, 2, -1)
        tokens = tokens.transpose(2, 3).reshape(len(images), 35, -1)
        return torch.take_along_dim(tokens, mask.visible_ids.unsqueeze(2), dim=1)


@pytest.mark.parametrize("unmasked", [None, 0, 1, 2])
def test_a_convmae_block_without_a_mask_leaks_at_the_right_patches(unmasked: int | None) -> None:
    """5x5 kernels on half patches: each block reaches one patch further."""

    def reached(is_masked: Tensor, patch: Patch) -> Tensor:
        affected = only(is_masked, patch)
        for layer in range(3):
            affected = affected | around(
                affected if layer == unmasked else affected & ~is_masked, 1
            )
        return affected

    torch.manual_seed(0)
    encoder, images, mask = OneUnmaskedBlock(unmasked), torch.rand(2, 3, 40, 56), MASKS[1]
    if unmasked is None:
        assert_no_leak(encoder, images, mask)
    else:
        assert parse(leak_message(encoder, images, mask)) == expected_leak(mask, reached)


TINY = {
    "mae": (MAE, MAE_PRESETS),
    "cae": (CAE, CAE_PRESETS),
    "convmae": (ConvMAE, CONVMAE_PRESETS),
}


@pytest.mark.parametrize("name", TINY)
def test_the_encoders_of_the_tiny_presets_do_not_leak(name: str) -> None:
    torch.manual_seed(0)
    model_type, presets = TINY[name]
    preset = presets["tiny"]
    encoder = model_type(preset.model).encoder.train()
    images = torch.randn(3, 3, *[preset.model.image_size] * 2)
    mask = preset.masking.draw(masking.key([0, 1, 2], seed=0), encoder.grid)
    assert_no_leak(encoder, images, mask)
    assert_samples_isolated(encoder, images, mask)
    assert_mask_equivariant(encoder, images, mask)


def test_a_leak_of_several_patches_is_reported_as_a_minimal_set() -> None:
    """The output counts loud patches and changes only if at least three of them are loud."""
    mask = Mask.from_bool(torch.tensor([[[True, True, True, True, False, False]]]))

    def encoder(images: Tensor, mask: Mask) -> Tensor:
        loud = (images.abs() > 5).flatten(2).sum(dim=2)
        return (loud > 2).float().unsqueeze(2)

    images = torch.zeros(1, 1, 1, 6)
    message = leak_message(encoder, images, mask)
    assert "3 masked patches, but no fewer of them, (0, 1) of sample 0" in message
    assert "1 of 1 values (most at [0, 0, 0]: expected 0, got 1)" in message


def test_every_message_about_an_encoder_has_expected_and_actual_values() -> None:
    images = torch.rand(2, 1, 4, 4)
    mask = masking.uniform(masking.key([0, 1], seed=0), (4, 4), 0.5)

    def mixes(images: Tensor, mask: Mask) -> Tensor:
        return images - images.mean(dim=0)

    for check in (assert_samples_isolated, assert_mask_equivariant):
        with pytest.raises(AssertionError) as caught:
            check(mixes, images, mask)
        message = str(caught.value)
        assert all(part in message for part in ("sample", "expected", "got", "most at ["))
    with pytest.raises(AssertionError, match=r"first one at \[0, 0, 0, 0\]"):
        assert_no_leak(lambda images, mask: images / 0 * 0, images, mask)


def advances_a_generator(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    torch.rand(1)
    return masking.uniform(key, grid, ratio)


@pytest.mark.untyped
def test_a_sampler_that_advances_a_global_generator_is_reported_with_its_name() -> None:
    with pytest.raises(AssertionError, match=r"grid \(6, 6\) advanced that of torch$"):
        assert_sampler_conforms(advances_a_generator, (6, 6), 0.5)


# Faulty samplers on grids of any shape.


def never_masks_the_last_line(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D1: the last index of the longest axis is never masked."""
    axis = max(range(len(grid)), key=grid.__getitem__)
    inner = list(grid)
    inner[axis] -= 1
    count = masking.num_masked(math.prod(grid), ratio)
    drawn = masking.uniform(key, inner, num_masked=min(count, math.prod(inner)))
    padding = [0, 0] * (len(grid) - 1 - axis) + [0, 1]
    return Mask.from_bool(F.pad(drawn.is_masked, padding))


def truncates_to_the_smallest_count(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D3: the number of visible ids is the smallest in the batch."""
    num_tokens = math.prod(grid)
    own = [1 + int(i) // 7919 % num_tokens for i in key.sample_ids]
    return masking.uniform(key, grid, num_masked=num_tokens - min(own))


def truncates_the_ratio(key: Key, grid: tuple[int, ...], ratio: float) -> Mask:
    """D11: MAE's float expression for the count."""
    return masking.uniform(key, grid, ratio, rounding="mae")


SHAPES = grids(min_tokens=4, max_tokens=200).filter(lambda grid: max(grid) > 2)


@pytest.mark.untyped
@settings(max_examples=15)
@given(SHAPES, ratios())
def test_a_line_that_is_never_masked_is_reported_on_any_grid(grid, ratio) -> None:
    count = masking.num_masked(math.prod(grid), ratio)
    inner = math.prod(grid) // max(grid) * (max(grid) - 1)
    # A larger count is impossible. An equal one allows a single mask; another check fails first.
    if count >= inner:
        return
    axis = max(range(len(grid)), key=grid.__getitem__)
    last = f"index {grid[axis] - 1} of axis {axis}"
    with pytest.raises(AssertionError, match=f"masked in some masks; .*{last}"):
        assert_sampler_conforms(never_masks_the_last_line, grid, ratio)


@pytest.mark.untyped
@settings(max_examples=15)
@given(SHAPES, ratios())
@example((4,), 0.75)  # the count is right for all 64 samples, and for the first one alone
def test_a_count_that_depends_on_the_batch_is_caught_on_any_grid(grid, ratio) -> None:
    with pytest.raises(AssertionError, match="tokens masked|batch's size|valid"):
        assert_sampler_conforms(truncates_to_the_smallest_count, grid, ratio)


@pytest.mark.untyped
@settings(max_examples=15)
@given(SHAPES, ratios())
def test_a_truncated_count_is_caught_wherever_it_differs(grid, ratio) -> None:
    num_tokens = math.prod(grid)
    exact = masking.num_masked(num_tokens, ratio)
    truncated = masking.num_masked(num_tokens, ratio, rounding="mae")
    if exact == truncated:
        assert_sampler_conforms(truncates_the_ratio, grid, ratio)
        return
    with pytest.raises(
        AssertionError, match=f"expected {exact} of {num_tokens} .* got {truncated}"
    ):
        assert_sampler_conforms(truncates_the_ratio, grid, ratio)
