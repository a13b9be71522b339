"""Heads that score classes of a large vocabulary."""

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from mimkit.losses import linear_cross_entropy


class TokenHead(nn.Linear):
    """Linear head from tokens to the codes of a tokenizer.

    Args:
        dim: Width of a token.
        vocabulary_size: Number of codes.

    Source:
        CAE, Atten4Vis/CAE `decoder.head`, Xavier-uniform.

    Example:
        >>> head, tokens = TokenHead(dim=32, vocabulary_size=512), torch.randn(2, 5, 32)
        >>> head(tokens).shape, head(tokens, torch.zeros(2, 5, dtype=torch.int64)).shape
        (torch.Size([2, 5, 512]), torch.Size([]))
    """

    def __init__(self, *, dim: int, vocabulary_size: int) -> None:
        super().__init__(dim, vocabulary_size)
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "batch tokens dim"],
        target: Int64[Tensor, "batch tokens"] | None = None,
        *,
        return_accuracy: bool = False,
    ) -> (
        Float[Tensor, "batch tokens vocabulary"]
        | Float32[Tensor, ""]
        | tuple[Float32[Tensor, ""], Float32[Tensor, ""]]
    ):
        """Return the logits; with a target the mean cross-entropy, without the logits in memory.

        Args:
            x: Tokens.
            target: The right code of each.
            return_accuracy: Whether to return, behind the cross-entropy, the share of tokens whose
                most likely code is right.

        Raises:
            ValueError: A target of another shape, or (on a CPU) codes out of range.
        """
        if target is None:
            return super().forward(x)
        self._check(x, target)
        loss, accuracy = linear_cross_entropy(
            x, self.weight, self.bias, target, return_accuracy=True
        )
        return (loss, accuracy) if return_accuracy else loss

    def _check(self, x: Tensor, target: Tensor) -> None:
        if target.shape != x.shape[:2]:
            raise ValueError(
                f"target must hold one code per token, {tuple(x.shape[:2])}; "
                f"got {tuple(target.shape)}"
            )
        at_hand = target.device.type == "cpu" and not torch.compiler.is_compiling()
        if at_hand and target.numel():
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= self.out_features:
                raise ValueError(
                    f"token ids must be in [0, {self.out_features}), the vocabulary; "
                    f"got {low} to {high}"
                )
