"""Probes: how well simple classifiers do on frozen features, in percent.

Axes: train and test images, width (of a feature), tokens of an image, classes. Features are
computed once and cached; the probes run on the device that the features are on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mimkit.nn import AttentiveProbe
from mimkit.patches import patchify
from recipes.engine.data.sets import ProbeData
from recipes.engine.errors import say
from recipes.engine.run.config import RunConfig

# Images [B, C, H, W] -> pooled features [B, width] and tokens [B, tokens, width of a token].
Features = Callable[[Tensor], tuple[Tensor, Tensor]]

# Key in `summary.json` -> name in the table.
PROBES = {"knn": "k-NN", "linear": "linear", "attentive": "attentive"}
# Strongest first: of equally good ones the first is taken.
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
LBFGS_ITERATIONS = 300
# BatchNorm's, so that a constant feature becomes 0.
VARIANCE_EPS = 1e-5
# 40 epochs of 700 labelled images; fewer images are seen more often.
ATTENTIVE_SAMPLES = 28_000
ATTENTIVE_BATCH = 64
ATTENTIVE_LR = 2e-3
TEST_BATCH = 256


def features_to_compare(
    trained: nn.Module, untrained: nn.Module, config: RunConfig
) -> dict[str, Features]:
    """Return what is probed: an encoder, the same encoder untrained, and raw pixels."""
    return {
        "trained": encoder_features(trained, config),
        "untrained": encoder_features(untrained, config),
        "pixels": raw_pixels(pixels_per_token(trained)),
    }


def encoder_features(encoder: Any, config: RunConfig) -> Features:
    """Freeze an encoder; return pooled features and tokens of the whole images that it sees."""
    encoder.to(config.device).eval().requires_grad_(False)

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        with config.autocast():
            tokens = encoder(images.to(config.device)).float()
        return encoder.pool(tokens), tokens

    return features


def pixels_per_token(encoder: Any) -> tuple[int, ...]:
    """Return the size per axis, in pixels, of what an encoder's token stands for."""
    sides = zip(encoder.image_size, encoder.grid, strict=True)
    return tuple(size // tokens for size, tokens in sides)


def run_probes(
    features: Mapping[str, Features], probe: ProbeData, *, seed: int
) -> dict[str, dict[str, float]]:
    """Score several features with every probe, and say on stderr which ones are at it.

    Args:
        features: What is probed, by name.
        probe: The labelled images.
        seed: Seed of the attentive probe.

    Returns:
        Accuracy in percent, by probe and by name of the features.
    """
    scores = {}
    for name, f in features.items():  # a while without a word, otherwise
        say(f"probing: {name} ({', '.join(PROBES.values())})", file=sys.stderr)
        scores[name] = evaluate(f, probe, seed=seed)
    return {kind: {name: scores[name][kind] for name in features} for kind in PROBES}


def print_probes(scores: Mapping[str, Mapping[str, float]]) -> None:
    """Print the accuracies of `run_probes` as a table."""
    say(f"{'probe (accuracy, %)':<22}{'trained':>10}{'untrained':>11}{'raw pixels':>12}")
    for kind, name in PROBES.items():
        row = scores[kind]
        say(f"{name:<22}{row['trained']:>10.1f}{row['untrained']:>11.1f}{row['pixels']:>12.1f}")


def evaluate(
    features: Features, probe: ProbeData, *, seed: int, batch_size: int = 256
) -> dict[str, float]:
    """Score features with every probe.

    Args:
        features: Computes pooled features and tokens of a batch of images; it moves the images to
            its device and sets its model to evaluation mode.
        probe: The labelled images.
        seed: Seed of the attentive probe.
        batch_size: Images per call of `features`.

    Returns:
        Accuracy of "knn", "linear" and "attentive" on the test images, in percent.
    """
    train, train_tokens = compute_features(features, probe.train_images, batch_size)
    test, test_tokens = compute_features(features, probe.test_images, batch_size)
    train_labels = probe.train_labels.to(train.device)
    test_labels = probe.test_labels.to(train.device)
    return {
        "knn": knn(train, train_labels, test, test_labels),
        "linear": linear(train, train_labels, test, test_labels),
        "attentive": attentive(train_tokens, train_labels, test_tokens, test_labels, seed=seed),
    }


@torch.no_grad()
def compute_features(
    features: Features, images: Float[Tensor, "batch channels *spatial"], batch_size: int
) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch tokens token_width"]]:
    """Compute the features of many images in batches, as float32."""
    pooled, tokens = zip(*map(features, torch.split(images, batch_size)), strict=True)
    return torch.cat(pooled).float(), torch.cat(tokens).float()


def raw_pixels(patch_size: int | tuple[int, ...]) -> Features:
    """Make the features that need no model: the pixels themselves.

    Args:
        patch_size: Side of a patch in pixels, or one per axis; a patch is a token.

    Returns:
        A function from images to flattened images and flattened patches.
    """

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(start_dim=1), patchify(images, patch_size)

    return features


@torch.no_grad()
def knn(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    *,
    k: int = 10,
    temperature: float = 0.07,
) -> float:
    """Classify by the nearest neighbors, each weighted by exp(cosine / temperature).

    Args:
        train: Labelled features.
        train_labels: Their classes.
        test: Features to classify.
        test_labels: Their classes.
        k: How many neighbors vote; all if there are fewer.
        temperature: A smaller one gives the nearest neighbors a larger weight.

    Returns:
        Accuracy in percent.

    Source:
        Wu et al., arXiv:1805.01978 section 3.4; k and temperature as in DINO, arXiv:2104.14294.
    """
    train = F.normalize(train, dim=1)
    correct = 0
    batches = zip(torch.split(test, TEST_BATCH), torch.split(test_labels, TEST_BATCH), strict=True)
    for batch, labels in batches:
        cosine, ids = (F.normalize(batch, dim=1) @ train.T).topk(min(k, len(train)), dim=1)
        votes = cosine.new_zeros(len(batch), num_classes(train_labels))
        votes.scatter_add_(1, train_labels[ids], (cosine / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return 100 * correct / len(test)


def linear(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
) -> float:
    """Classify by logistic regression on standardized features.

    The strength of L2 regularization is chosen on a fifth of each class of the labelled features,
    never on the test set; the classifier is then fitted to all of them.

    Args:
        train: Labelled features.
        train_labels: Their classes.
        test: Features to classify.
        test_labels: Their classes.

    Returns:
        Accuracy in percent.
    """
    train, test = rotate_to_span(*standardize(train, test))
    # Sorted by class, every fifth image is a fifth of each class.
    is_held_out = torch.zeros_like(train_labels, dtype=torch.bool)
    is_held_out[train_labels.argsort(stable=True)[2::5]] = True
    fitting, fitting_labels = train[~is_held_out], train_labels[~is_held_out]

    def held_out_accuracy(l2: float) -> float:
        weight, bias = fit_logistic(fitting, fitting_labels, l2=l2)
        return accuracy(train[is_held_out] @ weight + bias, train_labels[is_held_out])

    weight, bias = fit_logistic(train, train_labels, l2=max(L2_STRENGTHS, key=held_out_accuracy))
    return accuracy(test @ weight + bias, test_labels)


def attentive(
    train_tokens: Float[Tensor, "train tokens width"],
    train_labels: Int64[Tensor, " train"],
    test_tokens: Float[Tensor, "test tokens width"],
    test_labels: Int64[Tensor, " test"],
    *,
    seed: int,
) -> float:
    """Classify by one learned query that attends to the standardized tokens.

    Trained on 28,000 samples by AdamW with one learning rate cycle: 440 steps of 64, which is 40
    epochs of 700 labelled images.

    Args:
        train_tokens: Labelled tokens.
        train_labels: Their classes.
        test_tokens: Tokens to classify.
        test_labels: Their classes.
        seed: Seed of the probe's weights and of the order of the images.

    Returns:
        Accuracy in percent.
    """
    train_tokens, test_tokens = standardize(train_tokens, test_tokens)
    probe = fit_attentive(train_tokens, train_labels, seed=seed)
    with torch.no_grad():
        logits = torch.cat([probe(tokens) for tokens in torch.split(test_tokens, TEST_BATCH)])
    return accuracy(logits, test_labels)


def fit_attentive(
    tokens: Float[Tensor, "train tokens width"], labels: Int64[Tensor, " train"], *, seed: int
) -> AttentiveProbe:
    """Fit the probe of `attentive` to standardized tokens."""
    dim = tokens.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # Of the CPU alone: no GPU's is touched.
        probe = AttentiveProbe(
            dim=dim,
            heads=next(heads for heads in (4, 3, 2, 1) if dim % heads == 0),
            num_classes=num_classes(labels),
        )
    probe.to(tokens.device)

    batches = shuffled_batches(len(tokens), generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=ATTENTIVE_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=ATTENTIVE_LR, total_steps=len(batches)
    )
    probe.train()
    for ids in batches.to(tokens.device):
        loss = F.cross_entropy(probe(tokens[ids]), labels[ids])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()

    return probe.eval()


def shuffled_batches(number: int, generator: torch.Generator) -> Int64[Tensor, "steps batch"]:
    """Shuffle image ids epoch after epoch, cut into batches of one size across the epochs.

    Args:
        number: How many images there are.
        generator: Source of randomness.

    Returns:
        One row of ids per step; about `ATTENTIVE_SAMPLES` ids in all.
    """
    steps = ATTENTIVE_SAMPLES // ATTENTIVE_BATCH + 1
    epochs = steps * ATTENTIVE_BATCH // number + 1
    ids = torch.cat([torch.randperm(number, generator=generator) for _ in range(epochs)])
    return ids[: steps * ATTENTIVE_BATCH].view(steps, ATTENTIVE_BATCH)


def standardize(
    train: Float[Tensor, "train *tokens width"], test: Float[Tensor, "test *tokens width"]
) -> tuple[Float[Tensor, "train *tokens width"], Float[Tensor, "test *tokens width"]]:
    """Give every feature mean 0 and variance 1 over the train set, as BatchNorm without weights."""
    axes = tuple(range(train.ndim - 1))
    variance, mean = torch.var_mean(train, dim=axes, correction=0)
    scale = (variance + VARIANCE_EPS).rsqrt()
    return (train - mean) * scale, (test - mean) * scale


def rotate_to_span(
    train: Float[Tensor, "train width"], test: Float[Tensor, "test width"]
) -> tuple[Float[Tensor, "train reduced"], Float[Tensor, "test reduced"]]:
    """Reduce features with more dimensions than samples to an orthonormal basis of their span.

    The weights of a classifier with an L2 penalty lie in the span of its training features, and the
    penalty is invariant to rotation: the fit is the same, and costs no more than its images.

    Args:
        train: Features that define the span.
        test: Features to express in the same basis; parts outside the span would get no weight.

    Returns:
        Both, with at most as many dimensions as `train` has samples.
    """
    if train.shape[1] <= train.shape[0]:
        return train, test
    basis, _ = torch.linalg.qr(train.T)
    return train @ basis, test @ basis


def fit_logistic(
    features: Float[Tensor, "train width"], labels: Int64[Tensor, " train"], *, l2: float
) -> tuple[Float[Tensor, "width classes"], Float[Tensor, " classes"]]:
    """Minimize the mean cross-entropy plus `l2 / 2` times the squared weights, without the biases.

    Args:
        features: Features to fit to.
        labels: Their classes.
        l2: Strength of the regularization.

    Returns:
        Weight and bias.
    """
    classes = num_classes(labels)
    weight = features.new_zeros(features.shape[1], classes, requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=LBFGS_ITERATIONS,
        tolerance_grad=1e-6,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + l2 / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def num_classes(labels: Int64[Tensor, " train"]) -> int:
    """Count the classes: labels start at 0."""
    return int(labels.max()) + 1


def accuracy(logits: Float[Tensor, "test classes"], labels: Int64[Tensor, " test"]) -> float:
    """Compute the share of largest logits at the label, in percent."""
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()
