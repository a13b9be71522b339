"""The probes of the papers, trained for many epochs on random crops of all labelled images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimkit.nn import AttentiveProbe
from recipes.engine.classify import Classification, plan_classifier, score
from recipes.engine.data.labelled import LabelledData
from recipes.engine.data.mixing import Mixing
from recipes.engine.loop import run_steps
from recipes.engine.optim import LARS
from recipes.engine.probes import Features
from recipes.engine.run.cli import Options
from recipes.engine.run.config import RunConfig
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.world import World

_ATTENTIVE_HEADS = 12


class FrozenProbe(nn.Module):
    """Classify images by frozen features; only the classifier has weights here.

    Args:
        features: Computes pooled features and tokens.
        head: Classifies one of them.
        on_tokens: Whether it takes the tokens.
    """

    def __init__(self, features: Features, head: nn.Module, *, on_tokens: bool) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.on_tokens = on_tokens

    def forward(
        self, images: Float[Tensor, "batch channels *spatial"]
    ) -> Float[Tensor, "batch classes"]:
        """Return the logits of each image."""
        with torch.no_grad():
            pooled, tokens = self.features(images)
        logits: Tensor = self.head(tokens if self.on_tokens else pooled)
        return logits


def linear_head(dim: int, num_classes: int) -> nn.Module:
    """Make the head of MAE's linear probe.

    Source:
        facebookresearch/mae `main_linprobe.py`.
    """
    linear = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), linear)


def attentive_head(dim: int, num_classes: int) -> nn.Module:
    """Make the head of CAE's attentive probe: 12 heads, or the next lower divisor of the width.

    Source:
        Atten4Vis/CAE `run_attentive.py`.
    """
    heads = next(number for number in range(_ATTENTIVE_HEADS, 0, -1) if dim % number == 0)
    return AttentiveProbe(dim=dim, heads=heads, num_classes=num_classes)


def train_probe(
    kind: str,
    features: Features,
    config: RunConfig,
    data: LabelledData,
    options: Options,
    path: Path,
    world: World,
) -> float:
    """Train one probe on one kind of features, from its last checkpoint on.

    Args:
        kind: "linear" or "attentive".
        features: What it classifies.
        config: Its training.
        data: Labelled images.
        options: What does not change the result.
        path: Its run folder.
        world: The processes.

    Returns:
        Its accuracy in percent.
    """
    with RunFolder(path, config, world, lock=options.lock) as folder:
        summary = folder.read_summary()
        if summary is None:
            model = _build_probe(kind, features, config, data)
            no_mixing = Mixing(data.num_classes, mixup=0.0, cutmix=0.0, smoothing=0.0)
            make_optimizer = _optimizer_of(kind, config.lr)
            task = Classification(model, make_optimizer, no_mixing, config, data, world)
            plan = plan_classifier(config, options, data)
            run_steps(task, plan, data.images.train, folder, options)
            accuracy = score(model, config, data, world, workers=options.workers)
            summary = {"accuracy": accuracy}
            folder.write_summary(summary)
    return float(summary["accuracy"])


def _build_probe(
    kind: str, features: Features, config: RunConfig, data: LabelledData
) -> FrozenProbe:
    blank = torch.zeros(1, data.images.in_channels, *config.image_size)
    with torch.no_grad():
        pooled, tokens = features(blank.to(config.device))
    torch.manual_seed(config.seed)
    if kind == "linear":
        head = linear_head(pooled.shape[1], data.num_classes)
    else:
        head = attentive_head(tokens.shape[2], data.num_classes)
    return FrozenProbe(features, head, on_tokens=kind == "attentive").to(config.device)


def _optimizer_of(kind: str, lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return what makes the optimizer: LARS (linear), or SGD with Nesterov momentum."""
    if kind == "linear":
        return lambda model: LARS(model.parameters(), lr)
    nesterov = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    return lambda model: nesterov(model.parameters())
