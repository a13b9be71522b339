"""The transformer block and its parts.

Axes: batch; tokens; dim; heads; head_dim.
"""

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import DropRate, NotNegative, Ratio, Size, checked
from mimkit.nn._packing import Packing
from mimkit.nn._windows import Windows

NORM_EPS = 1e-6  # epsilon of every LayerNorm in MAE's models (PyTorch's default is 1e-5)

QKVBias = bool | Literal["qv"]
Activation = Literal["gelu", "gelu_tanh"]


def xavier_linear(in_features: int, out_features: int, *, bias: bool = True) -> nn.Linear:
    """Make a linear layer with MAE's initialisation: Xavier-uniform weight, zero bias."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


# On a CPU with native bfloat16, plain matrix products have a faster backward than PyTorch's fused
# attention at MIM's sequence lengths (50 to 200 tokens). They also round less: gradients of CAE-B's
# query biases are off by 1 % instead of 5 %. Where bfloat16 is emulated, fused attention is faster.
# With a learned bias, PyTorch has no fused attention on a CPU, and its fallback is slower than
# plain products in float32. Numbers: `benchmarks/bench_attention.py`.
_CPU_HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads tokens head_dim"],
    value: Float[Tensor, "batch heads tokens head_dim"],
    bias: Float[Tensor, "#batch heads queries tokens"] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Softmax attention, with `bias` added to the logits.

    Uses PyTorch's `scaled_dot_product_attention`, except on a CPU: there plain matrix products are
    used for bfloat16 where it is native, and for other dtypes with a bias.
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
    attended: Tensor = logits.softmax(dim=-1) @ value
    return attended


def attend_packed(
    query: Float[Tensor, "1 heads queries head_dim"],
    key: Float[Tensor, "1 heads tokens head_dim"],
    value: Float[Tensor, "1 heads tokens head_dim"],
    packing: Packing,
) -> Float[Tensor, "1 queries dim"]:
    """Softmax attention inside each sample of a packed sequence; returns merged heads.

    On a GPU this is one variable-length call, if every sample has a query (fused operators need
    one). Otherwise it is one call per run of samples with equal lengths. Nothing is padded.
    """
    if query.device.type == "cuda" and min(packing.num_queries) > 0:
        return _attend_nested(query, key, value, packing)
    runs = packing.runs()
    queries = query.split([samples * count for samples, count, _ in runs], dim=2)
    keys, values = (
        part.split([samples * length for samples, _, length in runs], dim=2)
        for part in (key, value)
    )
    attended = [
        merge_heads(attend(*(_split_samples(part, samples) for part in parts))).flatten(0, 1)
        for (samples, _, _), *parts in zip(runs, queries, keys, values, strict=True)
    ]
    return torch.cat(attended).unsqueeze(0)


def _split_samples(
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

    attended = F.scaled_dot_product_attention(
        nest(query, packing.query_offsets, packing.num_queries),
        nest(key, packing.offsets, packing.lengths),
        nest(value, packing.offsets, packing.lengths),
    )
    return rearrange(attended.transpose(1, 2).values(), "n h d -> 1 n (h d)")


def split_heads(
    tokens: Float[Tensor, "batch tokens dim"], heads: int
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Split the width into heads."""
    return rearrange(tokens, "b n (h d) -> b h n d", h=heads)


def merge_heads(
    tokens: Float[Tensor, "batch heads tokens head_dim"],
) -> Float[Tensor, "batch tokens dim"]:
    """Undo `split_heads`."""
    return rearrange(tokens, "b h n d -> b n (h d)")


def check_heads(dim: int, heads: int) -> None:
    """Check that `dim` is divisible by `heads`.

    Raises:
        ValueError: If it is not.
    """
    if heads < 1 or dim % heads:
        raise ValueError(f"dim={dim} is not divisible by heads={heads}")


class _QKVProjection(nn.Linear):
    """Fused QKV projection without a bias parameter; `forward` takes one as an argument."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        return F.linear(tokens, self.weight, bias)


class Attention(nn.Module):
    """Self-attention with one fused projection to queries, keys and values.

    Args:
        dim: Width of a token.
        heads: Attention heads; must divide `dim`.
        qkv_bias: Which projections have a bias: `True` for queries, keys and values (timm's
            `qkv.bias`), `False` for none, "qv" for queries and values (BEiT's `q_bias` and
            `v_bias`). A key bias has no effect: softmax cancels it.

    Raises:
        ValueError: If `qkv_bias` is something else, or `dim` is not divisible by `heads`.
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
        """Apply self-attention; with `num_queries`, return the last `num_queries` tokens only."""
        projected = self._project(tokens)
        # This way of splitting lets backward concatenate the three gradients in one copy.
        parts = rearrange(projected, "b n (t h d) -> b n t h d", t=3, h=self.heads)
        query, key, value = (part.transpose(1, 2) for part in parts.unbind(2))
        if packing is not None:
            query = split_heads(packing.last(projected.chunk(3, dim=-1)[0]), self.heads)
            packed: Tensor = self.proj(attend_packed(query, key, value, packing))
            return packed
        if num_queries is not None:
            first = tokens.shape[1] - num_queries
            query = query[:, :, first:]
            attn_bias = None if attn_bias is None else attn_bias[:, :, first:]
        out: Tensor = self.proj(merge_heads(attend(query, key, value, attn_bias)))
        return out

    def attention_weights(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        attn_bias: Float[Tensor, "#batch heads tokens tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Return the attention weights, for visualisation."""
        query, key = (split_heads(t, self.heads) for t in self._project(tokens).chunk(3, -1)[:2])
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        weights: Tensor = (logits if attn_bias is None else logits + attn_bias).softmax(dim=-1)
        return weights

    def _project(self, tokens: Tensor) -> Tensor:
        if self.q_bias is None or self.v_bias is None:
            projected: Tensor = self.qkv(tokens)
        else:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            projected = self.qkv(tokens, bias)
        return projected


class CrossAttention(nn.Module):
    """Cross-attention. Keys have no bias: softmax would cancel it."""

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
        """Project and attend from queries to keys and values."""
        return self.attend_projected(self.q(query), self.k(key), self.v(value))

    def attend_projected(
        self,
        query: Float[Tensor, "batch queries dim"],
        key: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Apply `forward` to inputs that `q`, `k` and `v` have already projected."""
        attended = attend(*(split_heads(tokens, self.heads) for tokens in (query, key, value)))
        out: Tensor = self.proj(merge_heads(attended))
        return out

    def attention_weights(
        self, query: Float[Tensor, "batch queries dim"], key: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """Return the attention weights, for visualisation."""
        queries, keys = (split_heads(t, self.heads) for t in (self.q(query), self.k(key)))
        logits = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
        weights: Tensor = logits.softmax(dim=-1)
        return weights


class Mlp(nn.Module):
    """Two linear layers with a GELU between them: exact, or its approximation by tanh."""

    def __init__(self, *, dim: int, hidden_dim: int, act: Activation = "gelu") -> None:
        super().__init__()
        if act not in get_args(Activation):
            raise ValueError(f"act must be one of {get_args(Activation)}; got {act!r}")
        self.approximate = "tanh" if act == "gelu_tanh" else "none"
        self.fc1 = xavier_linear(dim, hidden_dim)
        self.fc2 = xavier_linear(hidden_dim, dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Apply the MLP to each token."""
        out: Tensor = self.fc2(F.gelu(self.fc1(tokens), approximate=self.approximate))
        return out


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for random samples, rescale the others.

    Args:
        rate: Probability of dropping a sample, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must be in [0, 1); got {rate}")
        self.rate = rate

    @property
    def is_active(self) -> bool:
        """Whether samples may be dropped now."""
        return self.rate > 0 and self.training

    def forward(
        self, branch: Float[Tensor, "batch ..."], packing: Packing | None = None
    ) -> Float[Tensor, "batch ..."]:
        """Drop whole samples of `branch`; with `packing`, the samples of a packed sequence."""
        if not self.is_active:
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
        heads: Attention heads; must divide `dim`.
        mlp_ratio: Ratio of MLP hidden width to `dim`.
        drop_path: Stochastic depth rate, in [0, 1).
        norm_eps: Epsilon of both LayerNorms.
        layer_scale: Initial value of layer scale (`gamma_1`, `gamma_2`); `None` for no layer scale.
        qkv_bias: `True` for biases of queries, keys and values, `False` for none, "qv" for queries
            and values only.
        act: Activation of the MLP: "gelu", or "gelu_tanh" for its approximation by tanh.

    Raises:
        ValueError: If `heads` does not divide `dim`.

    Source:
        Dosovitskiy et al., arXiv:2010.11929, section 3.1; timm 0.3.2 `Block`, which MAE uses with
        epsilon 1e-6. Weights are initialised as in MAE (Xavier uniform). Layer scale and "qv" as in
        BEiT, arXiv:2106.08254, and so in SimMIM's ViT and CAE. Drop path comes after layer scale.

    Example:
        >>> TransformerBlock(dim=32, heads=4)(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    @checked
    def __init__(
        self,
        *,
        dim: Size,
        heads: Size,
        mlp_ratio: Ratio = 4.0,
        drop_path: DropRate = 0.0,
        norm_eps: NotNegative = NORM_EPS,
        layer_scale: float | None = None,
        qkv_bias: QKVBias = True,
        act: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.axis_sizes = {"dim": dim}
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim=dim, heads=heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim=dim, hidden_dim=int(dim * mlp_ratio), act=act)
        self.gamma_1 = make_layer_scale(dim, layer_scale)
        self.gamma_2 = make_layer_scale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    @checked
    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        num_queries: int | None = None,
        attn_bias: Float[Tensor, "#batch heads keys keys"] | None = None,
        packing: Packing | None = None,
        windows: Windows | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Apply the block: self-attention, then an MLP.

        Args:
            tokens: All tokens of each sample.
            num_queries: Compute and return the last `num_queries` tokens only; all if `None`.
            attn_bias: Added to the attention logits, such as a relative position bias.
            packing: Sample boundaries if `tokens` is a packed sequence, and how many tokens of each
                sample to return.
            windows: Windows to attend in, of all the patch tokens of a grid.

        Returns:
            One token per query.
        """
        kept = tokens if num_queries is None else tokens[:, tokens.shape[1] - num_queries :]
        if packing is not None:
            kept = packing.last(tokens)
        normed = self.norm1(tokens)
        if windows is None:
            attended = self.attn(normed, num_queries, attn_bias, packing)
        else:
            attended = windows.merge(self.attn(windows.split(normed), attn_bias=attn_bias))
        kept = kept + self._drop(scale(attended, self.gamma_1), packing, windows)
        transformed = scale(self.mlp(self.norm2(kept)), self.gamma_2)
        return kept + self._drop(transformed, packing, windows)

    def _drop(self, branch: Tensor, packing: Packing | None, windows: Windows | None) -> Tensor:
        if windows is not None and windows.drop_alone and self.drop_path.is_active:
            return windows.merge(self.drop_path(windows.split(branch)))
        dropped: Tensor = self.drop_path(branch, packing)
        return dropped


def make_layer_scale(dim: int, value: float | None) -> nn.Parameter | None:
    """Make a layer-scale parameter, one value per channel; `None` for no layer scale."""
    return None if value is None else nn.Parameter(torch.full((dim,), float(value)))


def scale(
    branch: Float[Tensor, "batch tokens dim"], gamma: Float[Tensor, " dim"] | None
) -> Float[Tensor, "batch tokens dim"]:
    """Apply layer scale to a residual branch, if there is one."""
    return branch if gamma is None else gamma * branch


def mean_of_tokens(tokens: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch dim"]:
    """Average the tokens of each sample.

    Raises:
        ValueError: If there are no tokens.
    """
    if tokens.shape[1] == 0:
        raise ValueError("mean pooling needs a patch token: the mask hides all of them")
    return tokens.mean(dim=1)


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """Return the rate of each block, rising linearly from 0 to `drop_path`.

    Raises:
        ValueError: If the depth is negative.
    """
    if depth < 0:
        raise ValueError(f"depth must not be negative; got {depth}")
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]
