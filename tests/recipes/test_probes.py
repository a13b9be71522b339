"""The probes: each against a second way to compute it, and none looks at the test labels."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from recipes.engine import probes
from recipes.engine.data.sets import ProbeData
from recipes.engine.probes import (
    attentive,
    evaluate,
    fit_logistic,
    knn,
    linear,
    raw_pixels,
    rotate_to_span,
    shuffled_batches,
    standardize,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Thousands of tiny operations: with more threads a busy machine takes 25 times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def clusters(
    number: int, width: int, *, classes: int = 4, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw features around one center per class; the centers are the same for every seed."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % classes
    noise = torch.randn(number, width, generator=generator)
    return centers[labels] + spread * noise, labels


def needle_tokens(number: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens of noise of which one, at a random place, holds the label."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(number, 9, 16, generator=generator)
    labels = torch.arange(number) % 4
    places = torch.randint(9, (number,), generator=generator)
    tokens[torch.arange(number), places] = 0
    tokens[torch.arange(number), places, labels] = 5
    return tokens, labels


# k-NN


@given(
    train=st.integers(1, 40),
    test=st.integers(1, 20),
    k=st.integers(1, 12),
    temperature=st.floats(0.05, 2),
    seed=st.integers(0, 1000),
)
def test_knn_equals_brute_force(train, test, k, temperature, seed):
    features, labels = clusters(train, 5, spread=2, seed=seed)
    queries, answers = clusters(test, 5, spread=2, seed=seed + 1)
    features, queries = features.double(), queries.double()
    correct = 0
    for query, answer in zip(queries.numpy(), answers.numpy(), strict=True):
        cosine = np.array(
            [f @ query / (np.linalg.norm(f) * np.linalg.norm(query)) for f in features.numpy()]
        )
        votes = np.zeros(4)
        for neighbor in np.argsort(-cosine)[:k]:
            votes[labels[neighbor]] += np.exp(cosine[neighbor] / temperature)
        correct += votes.argmax() == answer
    found = knn(features, labels, queries, answers, k=k, temperature=temperature)
    assert found == pytest.approx(100 * correct / test)


def test_knn_finds_each_image_itself_and_ignores_length():
    features, labels = clusters(60, 8)
    lengths = torch.rand(60, 1) + 0.1
    assert knn(features, labels, features * lengths, labels, k=1) == 100


def test_knn_batches_of_test_images_change_nothing(monkeypatch):
    data = (*clusters(50, 6), *clusters(30, 6, spread=3, seed=1))
    whole = knn(*data)
    monkeypatch.setattr(probes, "TEST_BATCH", 7)
    assert knn(*data) == whole


# Linear


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_the_fit_equals_scikit_learns(l2):
    features, labels = clusters(80, 6, spread=2)
    weight, bias = fit_logistic(features.double(), labels, l2=l2)
    reference = LogisticRegression(C=1 / (len(features) * l2), tol=1e-10, max_iter=10_000)
    reference.fit(features.double().numpy(), labels.numpy())
    np.testing.assert_allclose(weight.T.numpy(), reference.coef_, atol=2e-4)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, atol=2e-4)


@pytest.mark.parametrize("rank", [3, 20])
def test_a_wide_fit_in_its_span_equals_the_direct_one(rank):
    generator = torch.Generator().manual_seed(0)
    features, labels = clusters(20, 50)
    mixing = torch.randn(20, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    features = standardize(mixing @ features / rank, features)[0].double()
    test = torch.randn(10, 50, generator=generator).double()
    narrow, narrow_test = rotate_to_span(features, test)
    assert narrow.shape == (20, 20)
    torch.testing.assert_close(narrow @ narrow.T, features @ features.T)
    weight, bias = fit_logistic(features, labels, l2=1e-2)
    narrow_weight, narrow_bias = fit_logistic(narrow, labels, l2=1e-2)
    torch.testing.assert_close(
        narrow_test @ narrow_weight + narrow_bias, test @ weight + bias, rtol=0, atol=1e-3
    )


def test_features_narrower_than_they_are_many_stay_as_they_are():
    features, test = torch.randn(20, 20), torch.randn(5, 20)
    assert rotate_to_span(features, test) == (features, test)


@pytest.mark.parametrize("width", [6, 300])
def test_linear_separates_what_is_separable_and_guesses_noise(width):
    assert (
        linear(*clusters(100, width, spread=0.1), *clusters(60, width, spread=0.1, seed=1)) == 100
    )
    noise, labels = torch.randn(100, width), torch.arange(100) % 4
    assert linear(noise, labels, torch.randn(400, width), torch.arange(400) % 4) < 40


def test_linear_does_not_depend_on_the_scale_and_offset_of_a_feature():
    train, labels = clusters(100, 6, spread=2)
    test, answers = clusters(80, 6, spread=2, seed=1)
    scale, offset = torch.logspace(-1, 2, 6), torch.linspace(-5, 5, 6)
    plain = linear(train, labels, test, answers)
    moved = linear(train * scale + offset, labels, test * scale + offset, answers)
    assert moved == pytest.approx(plain, abs=2.6)


@pytest.mark.parametrize("classes", [2, 4, 7])
def test_l2_is_chosen_on_a_fifth_of_each_class(classes, monkeypatch):
    fitted = []

    def spy(features: Tensor, labels: Tensor, *, l2: float) -> tuple[Tensor, Tensor]:
        fitted.append((labels.bincount(minlength=classes).tolist(), l2))
        return fit_logistic(features, labels, l2=l2)

    monkeypatch.setattr(probes, "fit_logistic", spy)
    features, labels = clusters(25 * classes, 6, classes=classes, spread=2)
    order = torch.randperm(len(labels))
    linear(features[order], labels[order], *clusters(10, 6, classes=classes))
    *tried, final = fitted
    assert [l2 for _, l2 in tried] == list(probes.L2_STRENGTHS)
    assert all(counts == [20] * classes for counts, _ in tried)
    assert final[0] == [25] * classes
    assert final[1] in probes.L2_STRENGTHS


# Attentive


def test_attentive_finds_the_one_token_that_the_mean_drowns():
    train, labels = needle_tokens(400, seed=0)
    test, answers = needle_tokens(300, seed=1)
    drowned = linear(train.mean(dim=1), labels, test.mean(dim=1), answers)
    found = attentive(train, labels, test, answers, seed=0)
    assert found > drowned + 10
    assert found > 90


def test_attentive_depends_on_its_seed_alone(monkeypatch):
    monkeypatch.setattr(probes, "ATTENTIVE_SAMPLES", 1_000)
    data = (*needle_tokens(100, seed=0), *needle_tokens(200, seed=1))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = attentive(*data, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert attentive(*data, seed=0) == first
    assert len({attentive(*data, seed=seed) for seed in range(3)}) > 1


@pytest.mark.parametrize("width", [1, 5, 6, 9])
def test_attentive_takes_tokens_of_any_width(width, monkeypatch):
    monkeypatch.setattr(probes, "ATTENTIVE_SAMPLES", 200)
    tokens, labels = torch.randn(20, 3, width), torch.arange(20) % 2
    assert 0 <= attentive(tokens, labels, tokens, labels, seed=0) <= 100


@given(st.integers(1, 3_000))
def test_every_image_is_seen_as_often_to_within_one_epoch(number):
    ids = shuffled_batches(number, torch.Generator().manual_seed(0))
    assert ids.shape == (438, 64)
    counts = ids.flatten().bincount(minlength=number)
    assert counts.max() - counts.min() <= 1


# All


def test_the_labels_of_the_test_set_are_only_counted():
    train, labels = clusters(100, 6, classes=2, spread=3)
    test, answers = clusters(81, 6, classes=2, spread=3, seed=1)
    for probe in (knn, linear):
        right, wrong = (probe(train, labels, test, a) for a in (answers, 1 - answers))
        assert right + wrong == pytest.approx(100)


def test_standardized_features_have_mean_zero_and_variance_one():
    tokens = torch.randn(30, 7, 5) * torch.tensor([0.1, 1, 10, 100, 0]) + 3
    train, test = standardize(tokens, tokens[:2])
    torch.testing.assert_close(train.mean(dim=(0, 1)), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        train.var(dim=(0, 1), correction=0), torch.tensor([1.0, 1, 1, 1, 0]), rtol=0, atol=2e-3
    )
    assert torch.equal(test, train[:2])


@pytest.mark.parametrize(("patch_size", "tokens"), [(4, 8), ((2, 8), 8), (8, 2)])
def test_raw_pixels_are_patches_in_row_major_order(patch_size, tokens):
    images = torch.randn(3, 2, 8, 16)
    pooled, patches = raw_pixels(patch_size)(images)
    assert torch.equal(pooled, images.reshape(3, -1))
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    assert patches.shape == (3, tokens, height * width * 2)
    expected = images[:, :, -height:, -width:].permute(0, 2, 3, 1).flatten(1)
    assert torch.equal(patches[:, -1], expected)


def test_evaluate_scores_all_three_probes_without_gradients():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = torch.rand(60, 1, 8, 8, generator=generator) * 0.2
    for row in range(3):
        images[labels == row, :, row] += 1
    seen = []

    def features(batch: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((len(batch), torch.is_grad_enabled()))
        return raw_pixels(4)(batch.half())

    data = ProbeData(images[:40], labels[:40], images[40:], labels[40:])
    scores = evaluate(features, data, seed=0, batch_size=16)
    assert scores == {"knn": 100, "linear": 100, "attentive": pytest.approx(100)}
    assert seen == [(16, False), (16, False), (8, False), (16, False), (4, False)]
