"""Probes: classifiers on frozen tokens."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mimkit._arguments import Count, Size, checked
from mimkit.nn._layers import NORM_EPS, CrossAttention


class AttentiveProbe(nn.Module):
    """Attentive probe: a learned query attends to frozen tokens, then BatchNorm and a linear layer.

    Args:
        dim: Width of the tokens.
        heads: Attention heads; must divide `dim`.
        num_classes: Number of classes.

    Raises:
        ValueError: If `heads` does not divide `dim`.

    Source:
        CAE, arXiv:2202.03026, section 4.2 "attentive probing"; Atten4Vis/CAE `run_attentive.py`:
        no residual, no MLP, BatchNorm without affine parameters. The released code does not run as
        it is. It also normalises by batch statistics in evaluation; this class uses running ones.

    Example:
        >>> AttentiveProbe(dim=32, heads=4, num_classes=10)(torch.randn(8, 17, 32)).shape
        torch.Size([8, 10])
    """

    @checked
    def __init__(self, *, dim: Size, heads: Size, num_classes: Count) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        self.query_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm_q = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_k = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_v = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attn = CrossAttention(dim=dim, heads=heads)
        self.fc_norm = nn.BatchNorm1d(dim, affine=False)
        self.head = nn.Linear(dim, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @checked
    def forward(self, tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch classes"]:
        """Return class logits.

        Args:
            tokens: Frozen features, prefix tokens included or not.

        Returns:
            Logits.
        """
        query = self.norm_q(self.query_token).expand(tokens.shape[0], -1, -1)
        answer = self.cross_attn(query, self.norm_k(tokens), self.norm_v(tokens))
        logits: Tensor = self.head(self.fc_norm(answer.squeeze(1)))
        return logits

    @torch.no_grad()
    @checked
    def attention(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads tokens"]:
        """Return the query's attention weights over the tokens; they sum to 1 for each head.

        Args:
            tokens: Frozen features, as for `forward`.

        Returns:
            Weights in [0, 1], without a gradient.

        Example:
            >>> probe = AttentiveProbe(dim=32, heads=4, num_classes=10)
            >>> weights = probe.attention(torch.randn(8, 17, 32))
            >>> weights.shape, torch.allclose(weights.sum(dim=2), torch.ones(8, 4))
            (torch.Size([8, 4, 17]), True)
        """
        query = self.norm_q(self.query_token).expand(tokens.shape[0], -1, -1)
        return self.cross_attn.attention_weights(query, self.norm_k(tokens)).squeeze(2)
