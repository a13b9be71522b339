"""Mixup and cutmix: two images are mixed into one, and so are their targets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix with label smoothing: each image is mixed with its partner in the batch.

    The partners are the first and the last image, the second and the second to last, and so on.

    Attributes:
        num_classes: Number of classes.
        mixup: Alpha of mixup's Beta distribution; 0 for no mixup.
        cutmix: Alpha of cutmix's Beta distribution; 0 for no cutmix.
        smoothing: Label smoothing: share of each target that is spread over all classes.
        switch_probability: Probability of cutmix where both are used.

    Source:
        Mixup, arXiv:1710.09412; cutmix, arXiv:1905.04899; timm `Mixup` in mode "batch", as MAE's
        fine-tuning uses it: one draw for the whole batch.

    Example:
        >>> from recipes.engine.seeds import step_generator
        >>> mixing = Mixing(num_classes=2, smoothing=0.0)
        >>> generator = step_generator(seed=0, step=5)
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> images, targets = mixing(torch.rand(4, 3, 8, 8), labels, generator)
        >>> images.shape, targets.sum(dim=1)
        (torch.Size([4, 3, 8, 8]), tensor([1., 1., 1., 1.]))
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1
    switch_probability: float = 0.5

    def __call__(
        self,
        images: Float[Tensor, "batch channels *spatial"],
        labels: Int64[Tensor, " batch"],
        generator: torch.Generator,
    ) -> tuple[Float[Tensor, "batch channels *spatial"], Float[Tensor, "batch classes"]]:
        """Mix a batch.

        Args:
            images: Model inputs.
            labels: Their classes.
            generator: Random generator on the CPU.

        Returns:
            Mixed inputs, and the class probabilities of each.
        """
        images, share = self._mix(images, generator)
        targets = smooth_targets(labels, self.num_classes, smoothing=self.smoothing)
        return images, targets * share + targets.flip(0) * (1 - share)

    def _mix(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return mixed images, and the share of the original image in each."""
        if not (self.mixup or self.cutmix):
            return images, 1.0
        switch = torch.rand((), generator=generator).item()
        cuts = switch < self.switch_probability if self.mixup and self.cutmix else self.cutmix > 0
        share = draw_beta(self.cutmix if cuts else self.mixup, generator)
        if not cuts:
            return images * share + images.flip(0) * (1 - share), share
        box = draw_box(images.shape[2:], share, generator)
        mixed = images.clone()
        mixed[:, :, *box] = images.flip(0)[:, :, *box]
        # The border of the image may have clipped the box.
        inside = math.prod(side.stop - side.start for side in box)
        return mixed, 1 - inside / math.prod(images.shape[2:])


def smooth_targets(
    labels: Int64[Tensor, " batch"], num_classes: int, *, smoothing: float
) -> Float[Tensor, "batch classes"]:
    """Smooth labels: spread a share of each target evenly over all classes."""
    hard = F.one_hot(labels, num_classes).float()
    return hard * (1 - smoothing) + smoothing / num_classes


def draw_beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from the Beta(alpha, alpha) distribution."""
    # PyTorch's Beta distribution takes no generator.
    seed = torch.randint(2**63 - 1, (), generator=generator).item()
    return float(np.random.default_rng(int(seed)).beta(alpha, alpha))


def draw_box(lengths: Sequence[int], share: float, generator: torch.Generator) -> tuple[slice, ...]:
    """Draw a box that covers about `1 - share` of an image: a range along each axis.

    The center is drawn anywhere in the image, so the border may clip the box.
    """
    left = 1 - share
    # The root of timm on two axes, to the last bit.
    ratio = math.sqrt(left) if len(lengths) == 2 else left ** (1 / len(lengths))
    ranges = []
    for length in lengths:
        half = int(length * ratio) // 2
        center = int(torch.randint(length, (), generator=generator))
        ranges.append(slice(max(center - half, 0), min(center + half, length)))
    return tuple(ranges)
