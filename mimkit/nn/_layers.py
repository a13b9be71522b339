"""The transformer block and what it is made of.

Axes: batch; tokens; dim; heads; head_dim.
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit.nn._packing import Packing

NORM_EPS = 1e-6  # of every LayerNorm in MAE's models (PyTorch's default is 1e-5)

QKVBias = bool | Literal["qv"]


def xavier_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer with Xavier-uniform weight and zero bias, as MAE initialises its own."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


# Where bfloat16 products are native, they beat the backward of PyTorch's fused attention at the
# lengths that MIM uses (50 to 200 tokens), and round less: gradients of CAE-B's query biases are
# off by 1 %, not 5 %. Where they are emulated, it is the other way round. With a learned bias,
# PyTorch has no fused attention for a CPU, and its fallback is slower than the products in float32.
# `benchmarks/bench_attention.py` has the numbers.
_CPU_HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    bias: Float[Tensor, "#batch heads queries tokens"] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention, with `bias` added to its logits.

    Plain matrix products on a CPU, for bfloat16 if it has it, for other types with a bias; else
    PyTorch's fused operator.
    """
    if bias is not None:
        bias = bias.to(query.dtype)
    has_bias = bias is not None
    is_plain = _CPU_HAS_BFLOAT16 if query.dtype == torch.bfloat16 else has_bias
    if query.device.type != "cpu" or not is_plain:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    mixed: Tensor = logits.softmax(dim=-1) @ value
    return mixed


def attend_packed(
    query: Float[Tensor, "1 heads queries head_dim"],
    key: Float[Tensor, "1 heads tokens head_dim"],
    value: Float[Tensor, "1 heads tokens head_dim"],
    packing: Packing,
) -> Float[Tensor, "1 queries dim"]:
    """Softmax attention within each of the samples that lie packed in one sequence, heads merged.

    On a GPU one call of variable length, where each sample has a query (fused operators need one);
    else one call for all neighbors of the same length, so that nothing is padded there either.
    """
    if query.device.type == "cuda" and min(packing.num_queries) > 0:
        return _attend_nested(query, key, value, packing)
    runs = packing.runs()
    queries = query.split([samples * count for samples, count, _ in runs], dim=2)
    keys, values = (
        part.split([samples * length for samples, _, length in runs], dim=2)
        for part in (key, value)
    )
    mixed = [
        merge_heads(attend(*(_apart(part, samples) for part in parts))).flatten(0, 1)
        for (samples, _, _), *parts in zip(runs, queries, keys, values, strict=True)
    ]
    return torch.cat(mixed).unsqueeze(0)


def _apart(
    rows: Float[Tensor, "1 heads rows head_dim"], samples: int
) -> Float[Tensor, "samples heads tokens head_dim"]:
    return rearrange(rows, "1 h (s n) d -> s h n d", s=samples)


def _attend_nested(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
    def nest(part: Tensor, offsets: Tensor, lengths: tuple[int, ...]) -> Tensor:
        rows = rearrange(part, "1 h n d -> n h d").contiguous()
        nested: Tensor = torch.nested.nested_tensor_from_jagged(
            rows, offsets, min_seqlen=min(lengths), max_seqlen=max(lengths)
        )
        return nested.transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        nest(query, packing.query_offsets, packing.num_queries),
        nest(key, packing.offsets, packing.lengths),
        nest(value, packing.offsets, packing.lengths),
    )
    return rearrange(mixed.transpose(1, 2).values(), "n h d -> 1 n (h d)")


def split_heads(
    tokens: Float[Tensor, "batch tokens dim"], heads: int
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Cut the width into heads."""
    return rearrange(tokens, "b n (h d) -> b h n d", h=heads)


def merge_heads(
    tokens: Float[Tensor, "batch heads tokens head_dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """Undo `split_heads`."""
    return rearrange(tokens, "b h n d -> b n (h d)")


def check_heads(dim: int, heads: int) -> None:
    """Check that `dim` can be cut into `heads`.

    Raises:
        ValueError: It cannot.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} cannot be cut into heads={heads} of equal width")


class _QKVProjection(nn.Linear):
    """The fused projection without a bias of its own; one may come with the call."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        return F.linear(tokens, self.weight, bias)


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values.

    Args:
        dim: Width of a token.
        heads: Attention heads; divides `dim`.
        qkv_bias: What has a bias: `True` for queries, keys and values (timm's `qkv.bias`), `False`
            for none, "qv" for all but the keys (BEiT's `q_bias` and `v_bias`), whose bias softmax
            would not see.

    Raises:
        ValueError: Another `qkv_bias`, or a width that the heads do not divide.
    """

    def __init__(self, *, dim: int, heads: int, qkv_bias: QKVBias = True) -> None:
        super().__init__()
        check_heads(dim, heads)
        if qkv_bias not in (True, False, "qv"):
            raise ValueError(f'qkv_bias must be True, False or "qv"; got {qkv_bias!r}')
        self.heads = heads
        self.qkv = (
            _QKVProjection(dim)
            if qkv_bias == "qv"
            else xavier_linear(dim, 3 * dim, bias=qkv_bias is True)
        )
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = xavier_linear(dim, dim)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        num_queries: int | None = None,
        attn_bias: Float[Tensor, "#batch heads tokens tokens"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Mix tokens of each sample, for the last `num_queries` of them only if that is given."""
        projected = self._project(tokens)
        # Cut so that the three gradients are put side by side in one copy.
        parts = rearrange(projected, "b n (t h d) -> b n t h d", t=3, h=self.heads)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        if packing is not None:
            query = split_heads(packing.last(projected.chunk(3, dim=-1)[0]), self.heads)
            answers: Tensor = self.proj(attend_packed(query, key, value, packing))
            return answers
        if num_queries is not None:
            first = tokens.shape[1] - num_queries
            query = query[:, :, first:]
            attn_bias = None if attn_bias is None else attn_bias[:, :, first:]
        mixed: Tensor = self.proj(merge_heads(attend(query, key, value, attn_bias)))
        return mixed

    def _project(self, tokens: Tensor) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            projected: Tensor = self.qkv(tokens)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            projected = self.qkv(tokens, bias)
        return projected


class CrossAttention(nn.Module):
    """Attention of queries to other tokens; keys have no bias, which softmax would not see."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.q = xavier_linear(dim, dim)
        self.k = xavier_linear(dim, dim, bias=False)
        self.v = xavier_linear(dim, dim)
        self.proj = xavier_linear(dim, dim)

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        key: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Answer each query by a mix of the values whose keys fit it."""
        return self.answer(self.q(query), self.k(key), self.v(value))

    def answer(
        self,
        query: Float[Tensor, "batch queries dim"],
        key: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """As `forward`, of what `q`, `k` and `v` made already."""
        mixed = attend(*(split_heads(tokens, self.heads) for tokens in (query, key, value)))
        answer: Tensor = self.proj(merge_heads(mixed))
        return answer

    def shares(
        self, query: Float[Tensor, "batch queries dim"], key: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """Return how much of each token goes into each answer: to look at, not to train."""
        queries, keys = (split_heads(t, self.heads) for t in (self.q(query), self.k(key)))
        logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        shares: Tensor = logits.softmax(dim=-1)
        return shares


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = xavier_linear(dim, hidden_dim)
        self.fc2 = xavier_linear(hidden_dim, dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Transform each token by itself."""
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens)))
        return out


class DropPath(nn.Module):
    """Leave out a residual branch for some samples while training, and scale up the others.

    Args:
        rate: Fraction of samples to leave out, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must be a fraction in [0, 1); got {rate}")
        self.rate = rate

    def forward(
        self, branch: Float[Tensor, "batch ..."], packing: Packing | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Drop whole samples of `branch`, which may lie packed in a batch of one."""
        if self.rate == 0 or not self.training:
            return branch
        if packing is not None:
            keep = branch.new_empty(len(packing.lengths)).bernoulli_(1 - self.rate)
            return branch * packing.spread(keep) / (1 - self.rate)
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        keep = branch.new_empty(shape).bernoulli_(1 - self.rate)
        return branch * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate when printed."""
        return f"rate={self.rate}"


class TransformerBlock(nn.Module):
    """Pre-norm transformer block, with timm's parameter names.

    Args:
        dim: Width of a token.
        heads: Attention heads; divides `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        drop_path: Fraction of samples whose residual branches are left out in training.
        norm_eps: Epsilon of both LayerNorms.
        layer_scale: What the learned factors of both residual branches (`gamma_1`, `gamma_2`) are
            at first; `None` for no factors.
        qkv_bias: `True` for biases of queries, keys and values, `False` for none; "qv" for all but
            the keys.

    Source:
        Dosovitskiy et al., arXiv:2010.11929, section 3.1; timm 0.3.2 `Block`, which MAE uses with
        epsilon 1e-6. Weights are initialised as MAE does (Xavier uniform). Layer scale and "qv" as
        in BEiT, arXiv:2106.08254, and so in SimMIM's ViT and CAE; paths are dropped after scaling.

    Example:
        >>> TransformerBlock(dim=32, heads=4)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = NORM_EPS,
        layer_scale: float | None = None,
        qkv_bias: QKVBias = True,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim=dim, heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio))
        self.gamma_1 = make_layer_scale(dim, layer_scale)
        self.gamma_2 = make_layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        num_queries: int | None = None,
        attn_bias: Float[Tensor, "#batch heads tokens tokens"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Mix tokens, then transform each.

        Args:
            tokens: All tokens of each sample.
            num_queries: Return the last so many tokens only, and do no work on what the others
                would become; all tokens if `None`.
            attn_bias: Added to the logits of attention: relative positions.
            packing: Where samples of unequal lengths lie in a batch of one, and how many tokens of
                each to return.
        """
        kept = tokens if num_queries is None else tokens[:, tokens.shape[1] - num_queries :]
        if packing is not None:
            kept = packing.last(tokens)
        mixed = self.attn(self.norm1(tokens), num_queries, attn_bias, packing)
        kept = kept + self.drop_path(scale(mixed, self.gamma_1), packing)
        transformed = scale(self.mlp(self.norm2(kept)), self.gamma_2)
        out: Tensor = kept + self.drop_path(transformed, packing)
        return out


def make_layer_scale(dim: int, value: float | None) -> nn.Parameter | None:
    """Make the learned factors of a residual branch, one a channel, if there is a first value."""
    return None if value is None else nn.Parameter(torch.full((dim,), value))


def scale(
    branch: Float[Tensor, "batch tokens dim"], gamma: Float[Tensor, " dim"] | None
) -> Float[Tensor, "batch tokens dim"]:
    """Multiply a residual branch by its learned factors, if it has any."""
    return branch if gamma is None else gamma * branch


def mean_of_tokens(tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
    """Average the tokens of each sample.

    Raises:
        ValueError: There are none.
    """
    if tokens.shape[1] == 0:
        raise ValueError("no patch token is left to pool: the mask hides them all")
    return tokens.mean(dim=1)


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """Return the rate of each block, rising linearly from 0 to `drop_path`.

    Raises:
        ValueError: A negative depth.
    """
    if depth < 0:
        raise ValueError(f"depth must not be negative; got {depth}")
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]
