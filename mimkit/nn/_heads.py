"""Prediction heads over a large vocabulary."""

from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from mimkit._arguments import Size, checked
from mimkit.losses import linear_cross_entropy


class TokenHead(nn.Linear):
    """Linear head from tokens to logits over a tokenizer's codes.

    Args:
        dim: Width of a token.
        vocabulary_size: Number of codes.

    Source:
        CAE, Atten4Vis/CAE `decoder.head`, Xavier-uniform.

    Example:
        >>> import torch
        >>> head, tokens = TokenHead(dim=32, vocabulary_size=512), torch.randn(2, 5, 32)
        >>> head(tokens).shape, head(tokens, torch.zeros(2, 5, dtype=torch.int64)).shape
        (torch.Size([2, 5, 512]), torch.Size([]))
    """

    @checked
    def __init__(self, *, dim: Size, vocabulary_size: Size) -> None:
        super().__init__(dim, vocabulary_size)
        self.axis_sizes = {"dim": dim}
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    @checked
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
        """Return logits, or with a target the mean cross-entropy.

        The cross-entropy is computed without holding all logits in memory.

        Args:
            x: Tokens.
            target: Code of each token.
            return_accuracy: Whether to also return the top-1 accuracy, as a fraction.

        Returns:
            Logits; with a target the loss, or the loss and the accuracy.

        Raises:
            ValueError: If the target has another shape, or (on a CPU) codes out of range, or if
                `return_accuracy` is set without a target.
        """
        if target is None:
            if return_accuracy:
                raise ValueError("return_accuracy=True needs a target to compare with")
            return super().forward(x)
        loss, accuracy = linear_cross_entropy(
            x, self.weight, self.bias, target, return_accuracy=True
        )
        return (loss, accuracy) if return_accuracy else loss
