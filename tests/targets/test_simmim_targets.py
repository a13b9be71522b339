"""SimMIM's other targets and their inverses, against scikit-image, scikit-learn and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkit import losses, masking, targets
from mimkit.masking import Mask
from mimkit.patches import gather_masked, patchify
from tests.strategies import generators, images, masked_images, orders


def masked_patches(batch: Tensor, mask: Mask, patch: tuple[int, ...], order: str) -> Tensor:
    return gather_masked(patchify(batch, patch, order=order), mask)


# Down-sampled pixels.


@given(masked_images(max_tokens=12), orders, st.data())
def test_downsampled_pixels_are_the_means_of_squares(case, order, data):
    batch, mask, patch = case
    factor = tuple(
        data.draw(st.sampled_from([f for f in range(1, side + 1) if side % f == 0]))
        for side in patch
    )
    target = targets.DownsampledPixels(patch, factor, order)
    values = target(batch, mask)
    small = batch
    for axis, side in enumerate(factor, 2):
        small = small.unflatten(axis, (-1, side)).mean(axis + 1)
    inside = tuple(p // f for p, f in zip(patch, factor, strict=True))
    torch.testing.assert_close(values, masked_patches(small, mask, inside, order))
    # Inverted, every pixel has the mean of its square.
    for axis, side in enumerate(factor, 2):
        small = small.repeat_interleave(side, axis)
    expected = masked_patches(small, mask, patch, order)
    torch.testing.assert_close(target.invert(values, batch, mask), expected)


@given(generators(), orders)
def test_squares_may_be_larger_than_a_patch(generator, order):
    batch = torch.randn(2, 3, 16, 24, generator=generator)
    mask = masking.uniform(masking.key([0, 1], seed=0), (8, 12), 0.5, unit=4)
    target = targets.DownsampledPixels(2, 8, order)
    values = target(batch, mask)
    assert values.shape == (2, target.group(mask).num_masked, 3)
    means = batch.unflatten(2, (-1, 8)).mean(3).unflatten(3, (-1, 8)).mean(4)
    torch.testing.assert_close(values, gather_masked(means.flatten(2).mT, target.group(mask)))
    large = means.repeat_interleave(8, 2).repeat_interleave(8, 3)
    back = target.invert(values, batch, mask)
    torch.testing.assert_close(back, masked_patches(large, mask, (2, 2), order))


def test_partly_masked_squares_raise():
    mask = masking.uniform(masking.key([0], seed=0), (4, 4), num_masked=7)
    with pytest.raises(ValueError, match="partly masked"):
        targets.DownsampledPixels(2, 4)(torch.randn(1, 3, 8, 8), mask)
    with pytest.raises(ValueError, match="not divisible by factor"):
        targets.DownsampledPixels(4, 3)(torch.randn(1, 3, 16, 16), mask)


# Window-normalised pixels.


@given(generators(), st.sampled_from([3, 5, 9]), orders)
@settings(max_examples=15)
def test_every_pixel_is_normalised_by_its_window(generator, window, order):
    batch = torch.randn(1, 2, 6, 9, generator=generator)
    mask = masking.uniform(masking.key([0], seed=0), (2, 3), 0.5)
    target = targets.WindowNormalizedPixels(3, window, order)
    expected, reach = torch.empty_like(batch), window // 2
    for y in range(6):
        for x in range(9):
            near = batch[..., max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
            near = near.flatten(2).double()
            normal = (batch[..., y, x] - near.mean(-1)) / (near.var(-1) + 1e-6).sqrt()
            expected[..., y, x] = normal.float()
    values = target(batch, mask)
    expected = masked_patches(expected, mask, (3, 3), order)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4)
    back = target.invert(values, batch, mask)
    pixels = masked_patches(batch, mask, (3, 3), order)
    torch.testing.assert_close(back, pixels, rtol=1e-4, atol=1e-4)
    assert target.uses_ground_truth


@pytest.mark.parametrize("window", [1, 4])
def test_windows_must_be_odd_and_at_least_three(window):
    with pytest.raises(ValueError, match="odd and at least 3"):
        targets.WindowNormalizedPixels(4, window)


# Color clusters.


@given(generators(), st.integers(1, 6))
@settings(max_examples=15)
def test_clusters_match_scikit_learn(generator, num_clusters):
    cluster = pytest.importorskip("sklearn.cluster", reason="scikit-learn is not installed")
    batch = torch.rand(2, 3, 6, 5, generator=generator)
    points = batch.movedim(1, -1).reshape(-1, 3)
    initial = points[torch.randperm(len(points), generator=generator)[:num_clusters]]
    ours = targets.ColorClusters(1, num_clusters).fit(batch, initial=initial, max_iterations=300)
    theirs = cluster.KMeans(num_clusters, init=initial.numpy(), n_init=1, tol=0, algorithm="lloyd")
    theirs.fit(points.numpy())
    np.testing.assert_allclose(ours.centers.numpy(), theirs.cluster_centers_, atol=1e-5)
    mask = masking.uniform(masking.key([0, 1], seed=0), (6, 5), num_masked=30)
    assert ours(batch, mask).flatten().tolist() == theirs.predict(points.numpy()).tolist()


@given(masked_images(), generators())
def test_every_pixel_gets_its_nearest_color(case, generator):
    batch, mask, patch = case
    target = targets.ColorClusters(patch, 4)
    target.centers = torch.randn(4, batch.shape[1], generator=generator)
    ids = target(batch, mask)
    pixels = masked_patches(batch, mask, patch, "p1 p2 c").unflatten(2, (-1, batch.shape[1]))
    distances = (pixels.unsqueeze(3) - target.centers).square().sum(-1)
    assert torch.equal(ids, distances.argmin(-1))
    colors = target.centers[ids].flatten(2)
    assert torch.equal(target.invert(ids, batch, mask), colors)


def test_clusters_find_separate_colors_and_are_saved_and_loaded(tmp_path):
    colors = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    which = torch.arange(3).repeat_interleave(12).view(1, 6, 6)
    batch = colors[which].movedim(-1, 1)
    generator = torch.Generator().manual_seed(0)
    target = targets.ColorClusters(2, 3).fit(batch, generator=generator)
    assert sorted(target.centers.tolist()) == sorted(colors.tolist())
    target.save(tmp_path / "colors.pt")
    again = targets.ColorClusters(2, 3).load(tmp_path / "colors.pt")
    assert torch.equal(again.centers, target.centers)
    mask = Mask.from_visible_ids(torch.tensor([[0]]), (3, 3))
    back = again.invert(again(batch, mask), batch, mask)
    assert torch.equal(back, masked_patches(batch, mask, (2, 2), "p1 p2 c"))
    with pytest.raises(ValueError, match="holds 3 clusters, not 4"):
        targets.ColorClusters(2, 4).load(tmp_path / "colors.pt")


def test_uint8_images_are_clustered_in_the_range_0_to_1():
    batch = torch.tensor([0, 255], dtype=torch.uint8).repeat(8).view(1, 1, 4, 4)
    target = targets.ColorClusters(2, 2).fit(batch)
    assert sorted(target.centers.flatten().tolist()) == [0, 1]


def test_errors_of_color_clusters_repeat_what_was_passed():
    mask = Mask.from_visible_ids(torch.tensor([[0]]), (2, 2))
    with pytest.raises(RuntimeError, match="no colors yet"):
        targets.ColorClusters(2)(torch.rand(1, 3, 4, 4), mask)
    with pytest.raises(ValueError, match="512 clusters need at least as many pixels; got 16"):
        targets.ColorClusters(2).fit(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"initial must be \[2, 3\]"):
        targets.ColorClusters(2, 2).fit(torch.rand(1, 3, 4, 4), initial=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at least 1"):
        targets.ColorClusters(2, 0)


# Bins.


def test_values_next_to_an_edge_are_on_their_side_of_it():
    edges = np.linspace(-2.0, 2.0, 257, dtype=np.float32)[1:-1]
    below, above = np.nextafter(edges, np.float32(-9)), np.nextafter(edges, np.float32(9))
    mask = Mask.from_bool(torch.ones(1, 1, 1, dtype=torch.bool))
    bins = targets.ChannelBins((1, 255), 256, low=-2.0, high=2.0)
    for values, shift in ((below, 0), (edges, 1), (above, 1)):
        found = bins(torch.from_numpy(values).view(1, 1, 1, 255), mask).flatten()
        assert torch.equal(found, torch.arange(255) + shift)


@given(masked_images(), st.sampled_from([1, 8, 256]))
def test_bins_match_numpy(case, num_bins):
    batch, mask, patch = case
    target = targets.ChannelBins(patch, num_bins, low=-2.0, high=2.0)
    ids = target(batch, mask)
    pixels = masked_patches(batch, mask, patch, "p1 p2 c")
    edges = np.linspace(-2.0, 2.0, num_bins + 1, dtype=np.float32)
    expected = np.digitize(pixels.numpy(), edges[1:-1])
    assert np.array_equal(ids.numpy(), expected)
    inside = pixels.clamp(-2, 2)
    half = 2 / num_bins
    assert (target.invert(ids, batch, mask) - inside).abs().le(half + 1e-5).all()


def test_bins_from_high_to_low_raise():
    with pytest.raises(ValueError, match="from low to high"):
        targets.ChannelBins(4, 8, low=1.0, high=0.0)


# Histograms of oriented gradients.


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from([(4, 4), (6, 4), (8, 8)]),
    st.integers(1, 3),
    st.sampled_from([4, 9]),
    generators(),
)
@settings(max_examples=15)
def test_hog_matches_scikit_image(grid, cell, channels, num_bins, generator):
    feature = pytest.importorskip("skimage.feature", reason="scikit-image is not installed")
    patch = (2 * cell[0], cell[1])
    size = (grid[0] * patch[0], grid[1] * patch[1])
    batch = torch.rand(2, channels, *size, generator=generator, dtype=torch.float64)
    mask = masking.uniform(masking.key([0, 1], seed=0), grid, num_masked=grid[0] * grid[1])
    ours = targets.HOG(patch, cell, num_bins)(batch, mask)
    for row, image in enumerate(batch):
        per_channel = [
            feature.hog(
                channel.numpy(),
                orientations=num_bins,
                pixels_per_cell=cell,
                cells_per_block=(1, 1),
                block_norm="L2",
                feature_vector=False,
            )[:, :, 0, 0]
            for channel in image
        ]
        expected = torch.from_numpy(np.stack(per_channel))  # channels, cells down, across, bins
        expected = expected.unflatten(1, (grid[0], 2)).movedim(0, 3)  # y, i, x, c, n
        expected = expected.movedim(2, 1).reshape(grid[0] * grid[1], -1)
        torch.testing.assert_close(ours[row], expected, rtol=1e-6, atol=1e-6)


def test_hog_cannot_be_inverted():
    mask = Mask.from_visible_ids(torch.tensor([[0]]), (2, 2))
    batch = torch.rand(1, 3, 16, 16)
    target = targets.HOG(8)
    with pytest.raises(NotImplementedError, match="cannot be turned back"):
        target.invert(target(batch, mask), batch, mask)
    with pytest.raises(ValueError, match="not divisible by cell"):
        targets.HOG(8, 3)(batch, mask)


# Teachers.


@given(masked_images())
def test_tokens_are_the_codes_at_the_masked_positions(case):
    batch, mask, patch = case

    def encode(x: Tensor) -> Tensor:
        return (patchify(x, patch).mean(2) > 0).long().view(-1, *mask.grid)

    target = targets.TokenTarget(encode)
    assert torch.equal(
        target(batch, mask), (masked_patches(batch, mask, patch, "p1 p2 c").mean(2) > 0).long()
    )
    with pytest.raises(NotImplementedError, match="decode and patch_size"):
        target.invert(target(batch, mask), batch, mask)


@given(images((3, 4), (1, 1), channels=1))
def test_codes_are_decoded_together_with_those_of_visible_patches(batch):
    batch = batch.round()
    target = targets.TokenTarget(lambda x: x[:, 0].long(), lambda ids: ids[:, None].float(), 1)
    mask = masking.uniform(masking.key(range(len(batch)), seed=0), (3, 4), 0.5)
    back = target.invert(target(batch, mask), batch, mask)
    assert torch.equal(back, masked_patches(batch, mask, (1, 1), "p1 p2 c"))


def test_codes_of_another_grid_raise():
    mask = Mask.from_visible_ids(torch.tensor([[0]]), (2, 2))
    with pytest.raises(ValueError, match=r"grid \(2, 2\); got \(1, 9\)"):
        targets.TokenTarget(lambda x: x[:, 0].long().flatten(1))(torch.rand(1, 1, 3, 3), mask)
    # The same number of codes on another grid.
    with pytest.raises(ValueError, match=r"grid \(2, 2\); got \(1, 1, 4\)"):
        targets.TokenTarget(lambda x: x[:, 0].long())(torch.rand(1, 1, 1, 4), mask)
    with pytest.raises(ValueError, match=r"grid \(2, 2\).*grid \(1, 4\)"):
        targets.HOG(4, 4)(torch.rand(1, 3, 4, 16), mask)


@given(masked_images(), st.booleans())
def test_features_are_those_of_the_teacher_at_the_masked_positions(case, normalize):
    batch, mask, patch = case
    width = 5

    def teacher(x: Tensor) -> Tensor:
        tokens = patchify(x, patch).mean(2, keepdim=True) * torch.arange(1.0, 1 + width)
        return torch.cat([torch.full((len(x), 1, width), torch.nan), tokens], dim=1)

    target = targets.FeatureTarget(teacher, num_prefix=1, normalize=normalize)
    features = masked_patches(batch, mask, patch, "p1 p2 c").mean(2, keepdim=True)
    features = features * torch.arange(1.0, 1 + width)
    if normalize:
        centered = features - features.mean(-1, keepdim=True)
        features = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(target(batch, mask), features, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="cannot be turned back"):
        target.invert(features, batch, mask)


# Cross-entropy.


@given(masked_images(), st.integers(2, 5), generators())
def test_cross_entropy_is_over_the_masked_positions(case, classes, generator):
    batch, mask, _ = case
    shape = (len(batch), mask.num_tokens, 3)
    logits = torch.randn(*shape, classes, generator=generator)
    ids = torch.randint(classes, shape, generator=generator)
    errors = -logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    errors = gather_masked(errors, mask)
    full = losses.masked_cross_entropy(logits, ids, mask)
    hidden_ids = gather_masked(ids, mask)
    hidden = gather_masked(logits.flatten(2), mask).unflatten(2, (3, classes))
    expected = errors.mean() if mask.num_masked else torch.zeros(())
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(losses.masked_cross_entropy(hidden, hidden_ids, mask), expected)
    if mask.num_masked:
        each = losses.masked_cross_entropy(hidden, hidden_ids, mask, reduction="none")
        torch.testing.assert_close(each, errors.mean(-1))


@pytest.mark.untyped
def test_classes_of_another_shape_raise():
    mask = Mask.from_visible_ids(torch.tensor([[0]]), (1, 3))
    with pytest.raises(ValueError, match="shape of target and a last axis of classes"):
        losses.masked_cross_entropy(torch.zeros(1, 2, 8), torch.zeros(1, 2, 8).long(), mask)
