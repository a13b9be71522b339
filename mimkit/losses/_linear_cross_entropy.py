"""Cross-entropy over a large vocabulary, a chunk of logits at a time."""

from typing import Literal, overload

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

import mimkit_kernels as kernels
from mimkit._arguments import checked
from mimkit._checks import check_classes

Scalar = Float32[Tensor, ""]


@overload
def linear_cross_entropy(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "words width"],
    bias: Float[Tensor, " words"] | None,
    target: Int64[Tensor, "*rows"],
    *,
    return_accuracy: Literal[False] = False,
) -> Scalar: ...
@overload
def linear_cross_entropy(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "words width"],
    bias: Float[Tensor, " words"] | None,
    target: Int64[Tensor, "*rows"],
    *,
    return_accuracy: Literal[True],
) -> tuple[Scalar, Scalar]: ...
@checked
def linear_cross_entropy(
    x: Float[Tensor, "*rows width"],
    weight: Float[Tensor, "words width"],
    bias: Float[Tensor, " words"] | None,
    target: Int64[Tensor, "*rows"],
    *,
    return_accuracy: bool = False,
) -> Scalar | tuple[Scalar, Scalar]:
    """Compute the cross-entropy of `F.linear(x, weight, bias)` with `target`, in chunks.

    At most `2**23` logits exist at a time on a CPU, and `2**24` on a GPU, in the dtype of
    `F.linear`: 1,024 or 2,048 rows of a vocabulary of 8,192 words. Gradients are computed with the
    loss, so the forward pass takes three times as long, and the backward pass almost no time. Sums
    are accumulated in float32.

    Args:
        x: Any number of rows.
        weight: One row per word of the vocabulary.
        bias: One value per word, or `None`.
        target: Index of the correct word of each row.
        return_accuracy: Also return the fraction of rows whose largest logit is the correct one.

    Returns:
        The mean over the rows, in float32; 0 (with zero gradient) if there are no rows.

    Raises:
        TypeError: If the target is not int64.
        ValueError: If shapes or devices do not fit, or (on a CPU or with `mimkit.use(check=True)`)
            a target is out of range.

    Source:
        mimkit's own. The value is that of `F.cross_entropy` of all logits, which CAE's loss of
        8,192 codes keeps in memory.

    Example:
        >>> import torch
        >>> x, weight = torch.eye(2), torch.zeros(8, 2)
        >>> linear_cross_entropy(x, weight, None, torch.tensor([0, 7]))  # log 8
        tensor(2.0794)
    """
    _check(x, weight, bias, target)
    loss, accuracy = kernels.linear_cross_entropy(
        x.reshape(-1, x.shape[-1]), weight, bias, target.flatten()
    )
    return (loss.float(), accuracy) if return_accuracy else loss.float()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64; got {target.dtype}")
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x [..., width] and weight [words, width] must have the same width; "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]; got {tuple(bias.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"target must be {tuple(x.shape[:-1])}, one word for each row of x; "
            f"got {tuple(target.shape)}"
        )
    devices = {tensor.device for tensor in (x, weight, bias, target) if tensor is not None}
    if len(devices) > 1:
        names = sorted(map(str, devices))
        raise ValueError(f"x, weight, bias and target must be on one device; got {names}")
    check_classes("targets", target, weight.shape[0])
