"""Layer-normed query, key and value inputs of a block of CAE's regressor, from one read.

    query[b, m] = norm_q(queries[b, m] + query_positions[b, m])
    key[b, t]   = norm_k(tokens[b, t] + positions[b, t])
    value[b, t] = norm_v(tokens[b, t])
    norm(x)     = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias    over the width

Axes: b batch; v visible; m queries; t tokens, visible first, then queries; d width. `tokens` and
`positions` are never stored. Each row of visible tokens, queries and positions is read once. The
query and the key of a masked position share mean and variance, which are saved in float32. The
backward pass reads the rows again. Each of its programs sums the gradients of the six weights and
biases over its rows; a second stage sums over the programs, in a fixed order and without atomics.
Outputs have the dtype in which the following linear layers compute (autocast's, if it is on), which
would cast them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mimkit_kernels._dispatch import takes_kernel
from mimkit_kernels._dtypes import dtype_obstacle, linear_dtype
from mimkit_kernels._jit import jit
from mimkit_kernels._launch import Rows, on_device, power_of_2_from, rows_in_place
from mimkit_kernels._register import register

if TYPE_CHECKING:
    import triton.language as tl


def regressor_inputs(
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    parameters: Sequence[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the inputs of cross-attention, by kernel or reference.

    Args:
        visible: [batch, visible, width].
        queries: [batch, queries, width].
        visible_positions: Position embeddings of `visible`, of the same shape.
        query_positions: Position embeddings of `queries`, of the same shape.
        parameters: Weight and bias of the norms of query, key and value: six times [width].
        eps: Epsilon of all three norms.

    Returns:
        Query [batch, queries, width], key and value [batch, visible + queries, width], in the dtype
        in which a linear layer with weights of the parameters' dtype computes.
    """
    dtype = linear_dtype(visible, parameters[0])
    arguments: tuple[Any, ...] = (visible, queries, visible_positions, query_positions)
    arguments += (*parameters, eps, dtype)

    def find_obstacle() -> str | None:
        if visible.shape[2] > MAX_WIDTH:
            return f"tokens of width {visible.shape[2]}: {MAX_WIDTH} at most"
        return dtype_obstacle(
            visible=visible.dtype,
            queries=queries.dtype,
            visible_positions=visible_positions.dtype,
            query_positions=query_positions.dtype,
            **{f"parameter {number}": tensor.dtype for number, tensor in enumerate(parameters)},
        )

    if takes_kernel("regressor_inputs", visible, find_obstacle):
        query, key, value, _ = regressor_inputs_op(*arguments)
        return query, key, value
    return regressor_inputs_reference(*arguments)


def regressor_inputs_reference(
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `regressor_inputs` in plain PyTorch."""
    # On a CPU, concatenating first is faster than normalizing each part.
    tokens = torch.cat([visible, queries], dim=1)
    positions = torch.cat([visible_positions, query_positions], dim=1)

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, weight.dtype)
        out = F.layer_norm(x.to(wide), x.shape[2:], weight.to(wide), bias.to(wide), eps)
        return out.to(dtype)

    query = norm(queries + query_positions, query_weight, query_bias)
    key = norm(tokens + positions, key_weight, key_bias)
    return query, key, norm(tokens, value_weight, value_bias)


# Kernels


class Inputs(NamedTuple):
    """What both kernels read; they take it whole.

    Attributes:
        visible: Rows of the visible tokens.
        queries: Rows of the queries.
        visible_positions: Rows of the visible tokens' position embeddings.
        query_positions: Rows of the queries' position embeddings.
        num_visible: Visible tokens per sample.
        num_queries: Queries per sample.
        total: Tokens of the batch.
        dim: Width.
    """

    visible: Rows
    queries: Rows
    visible_positions: Rows
    query_positions: Rows
    num_visible: int
    num_queries: int
    total: int
    dim: int


@jit
def _load_row(
    rows: Rows, sample: tl.tensor, row: tl.tensor, column: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """Load one row of a sample."""
    start = rows.data + sample * rows.batch + row * rows.row
    return tl.load(start + column, mask=column < width, other=0.0)


@jit
def _load_token(
    inputs: Inputs, place: tl.tensor, column: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Load one token, alone and with its position embedding.

    Returns:
        Token; token plus position; sample; row within the sample; width, which is 0 after the last
        token so that masks are empty.
    """
    length = inputs.num_visible + inputs.num_queries
    sample, row = place // length, place % length
    width = tl.where(place < inputs.total, inputs.dim, 0)
    # Both loads are on their way before the first value is converted.
    if row < inputs.num_visible:
        token = _load_row(inputs.visible, sample, row, column, width)
        position = _load_row(inputs.visible_positions, sample, row, column, width)
        token, position = token.to(tl.float32), position.to(tl.float32)
    else:
        query = row - inputs.num_visible
        token = _load_row(inputs.queries, sample, query, column, width)
        position = _load_row(inputs.query_positions, sample, query, column, width)
        token, position = token.to(tl.float32), position.to(tl.float32)
    return token, token + position, sample, row, width


@jit
def _store_either(
    first: tl.tensor,
    second: tl.tensor,
    values: tl.tensor,
    sample: tl.tensor,
    row: tl.tensor,
    width: tl.tensor,
    column: tl.tensor,
    inputs: Inputs,
) -> None:
    """Store one row of a sample of the concatenation [first, second]."""
    inside = column < tl.where(row < inputs.num_visible, width, 0)
    outside = column < tl.where(row < inputs.num_visible, 0, width)
    here = first + (sample * inputs.num_visible + row) * inputs.dim
    there = second + (sample * inputs.num_queries + row - inputs.num_visible) * inputs.dim
    tl.store(here + column, values.to(first.dtype.element_ty), mask=inside)
    tl.store(there + column, values.to(second.dtype.element_ty), mask=outside)


@jit
def _load_weight(weight: tl.tensor, column: tl.tensor, dim: tl.tensor) -> tl.tensor:
    """Load the weight or bias of a norm."""
    return tl.load(weight + column, mask=column < dim, other=0.0).to(tl.float32)


@jit
def _mean_and_scale(
    x: tl.tensor, column: tl.tensor, dim: tl.tensor, eps: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """Return the mean of a row, and one over its standard deviation."""
    mean = tl.sum(x, axis=0) / dim
    deviation = tl.where(column < dim, x - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(deviation * deviation, axis=0) / dim + eps)


@jit
def _through_norms(
    grad_k: tl.tensor,
    x_k: tl.tensor,
    scale_k: tl.tensor,
    grad_v: tl.tensor,
    x_v: tl.tensor,
    scale_v: tl.tensor,
    dim: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the gradients of two norms' inputs; `grad_*` are those of their normalized rows `x_*`.

    The four sums over the row are one reduction, so that warps wait for each other once.
    """
    of_k, of_v = tl.join(grad_k, grad_k * x_k), tl.join(grad_v, grad_v * x_v)
    mean_k, mean_v = tl.split(tl.sum(tl.join(of_k, of_v), axis=0) / dim)
    plain_k, along_k = tl.split(mean_k)
    plain_v, along_v = tl.split(mean_v)
    through_k = scale_k * (grad_k - plain_k - x_k * along_k)
    return through_k, scale_v * (grad_v - plain_v - x_v * along_v)


@jit
def _scale(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, column: tl.tensor, dim: tl.tensor
) -> tl.tensor:
    """Apply weight and bias of a norm to a normalized row."""
    return x * _load_weight(weight, column, dim) + _load_weight(bias, column, dim)


@jit
def _forward_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    statistics: tl.tensor,
    inputs: Inputs,
    query_weight: tl.tensor,
    query_bias: tl.tensor,
    key_weight: tl.tensor,
    key_bias: tl.tensor,
    value_weight: tl.tensor,
    value_bias: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: one token.

    One warp holds a row of the usual widths, so no sum over a row waits for other warps. The six
    weights come from the cache: kept in registers, they would need more warps per row.
    """
    dim = inputs.dim
    column = tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64)
    token, moved, sample, row, width = _load_token(inputs, place, column)
    mean_k, scale_k = _mean_and_scale(moved, column, dim, eps)
    mean_v, scale_v = _mean_and_scale(token, column, dim, eps)
    line = statistics + place * 4
    tl.store(line, mean_k)
    tl.store(line + 1, scale_k)
    tl.store(line + 2, mean_v)
    tl.store(line + 3, scale_v)
    normed = (moved - mean_k) * scale_k
    inside = column < dim
    to_key = _scale(normed, key_weight, key_bias, column, dim)
    tl.store(key + place * dim + column, to_key.to(key.dtype.element_ty), mask=inside)
    to_value = _scale((token - mean_v) * scale_v, value_weight, value_bias, column, dim)
    tl.store(value + place * dim + column, to_value.to(value.dtype.element_ty), mask=inside)
    if row >= inputs.num_visible:
        to_query = _scale(normed, query_weight, query_bias, column, dim)
        target = query + (sample * inputs.num_queries + row - inputs.num_visible) * dim
        tl.store(target + column, to_query.to(query.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    grad_visible: tl.tensor,
    grad_queries: tl.tensor,
    grad_visible_positions: tl.tensor,
    grad_query_positions: tl.tensor,
    partial: tl.tensor,
    grad_query: tl.tensor,
    grad_key: tl.tensor,
    grad_value: tl.tensor,
    inputs: Inputs,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    value_weight: tl.tensor,
    statistics: tl.tensor,
    rows: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One program: `rows` tokens, and their sums for the gradients of weights and biases."""
    dim = inputs.dim
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight_q = _load_weight(query_weight, column, dim)
    weight_k = _load_weight(key_weight, column, dim)
    weight_v = _load_weight(value_weight, column, dim)
    sum_q = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_qx = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_k = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_kx = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_v = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_vx = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(0, rows):
        place = part * rows + step
        token, moved, sample, row, width = _load_token(inputs, place, column)
        line = statistics + place * 4
        mean_k = tl.load(line, mask=place < inputs.total, other=0.0)
        scale_k = tl.load(line + 1, mask=place < inputs.total, other=0.0)
        mean_v = tl.load(line + 2, mask=place < inputs.total, other=0.0)
        scale_v = tl.load(line + 3, mask=place < inputs.total, other=0.0)
        inside = column < width
        of_key = tl.load(grad_key + place * dim + column, mask=inside, other=0.0).to(tl.float32)
        of_value = tl.load(grad_value + place * dim + column, mask=inside, other=0.0)
        of_value = of_value.to(tl.float32)
        source = grad_query + (sample * inputs.num_queries + row - inputs.num_visible) * dim
        is_query = column < tl.where(row < inputs.num_visible, 0, width)
        of_query = tl.load(source + column, mask=is_query, other=0.0).to(tl.float32)

        x_k = (moved - mean_k) * scale_k
        x_v = (token - mean_v) * scale_v
        sum_q += of_query
        sum_qx += of_query * x_k
        sum_k += of_key
        sum_kx += of_key * x_k
        sum_v += of_value
        sum_vx += of_value * x_v
        # 0 in masked columns, since gradients are 0 there.
        of_normed = of_key * weight_k + of_query * weight_q
        of_moved, of_token = _through_norms(
            of_normed, x_k, scale_k, of_value * weight_v, x_v, scale_v, dim
        )
        of_token += of_moved
        _store_either(grad_visible, grad_queries, of_token, sample, row, width, column, inputs)
        if grad_visible_positions is not None:
            _store_either(
                grad_visible_positions, grad_query_positions, of_moved,
                sample, row, width, column, inputs,
            )  # fmt: skip
    line = partial + part * 6 * dim + column
    tl.store(line, sum_qx, mask=column < dim)
    tl.store(line + dim, sum_q, mask=column < dim)
    tl.store(line + 2 * dim, sum_kx, mask=column < dim)
    tl.store(line + 3 * dim, sum_k, mask=column < dim)
    tl.store(line + 4 * dim, sum_vx, mask=column < dim)
    tl.store(line + 5 * dim, sum_v, mask=column < dim)


# Launchers

MAX_WIDTH = 2048  # with wider rows, registers spill
_PARTS = 512  # programs in the backward pass


def _columns(width: int, values: int) -> dict[str, Any]:
    """Return the constants of a launch; a thread holds about `values` values of a row."""
    block = power_of_2_from(width)
    warps = min(max(block // (32 * values), 1), 16)
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": True}


def _describe(
    visible: Tensor, queries: Tensor, visible_positions: Tensor, query_positions: Tensor
) -> Inputs:
    (batch, num_visible, dim), num_queries = visible.shape, queries.shape[1]
    return Inputs(
        rows_in_place(visible),
        rows_in_place(queries),
        rows_in_place(visible_positions),
        rows_in_place(query_positions),
        num_visible,
        num_queries,
        total=batch * (num_visible + num_queries),
        dim=dim,
    )


def _launch_forward(
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    *parameters_and_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *parameters, eps, dtype = parameters_and_rest
    (batch, num_visible, dim), num_queries = visible.shape, queries.shape[1]
    length, device = num_visible + num_queries, visible.device
    query = torch.empty((batch, num_queries, dim), dtype=dtype, device=device)
    key, value = (torch.empty((batch, length, dim), dtype=dtype, device=device) for _ in "kv")
    statistics = torch.empty((batch, length, 4), dtype=torch.float32, device=device)
    if key.numel():
        with on_device(visible):
            _forward_kernel[(batch * length,)](
                query,
                key,
                value,
                statistics,
                _describe(visible, queries, visible_positions, query_positions),
                *(parameter.contiguous() for parameter in parameters),
                eps,
                **_columns(dim, 32),
            )
    return query, key, value, statistics


def _launch_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    statistics: Tensor,
    needs_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _describe(visible, queries, visible_positions, query_positions)
    rows = max(-(-inputs.total // _PARTS), 1)
    parts = -(-inputs.total // rows)
    partial = torch.empty((parts, 6, inputs.dim), dtype=torch.float32, device=visible.device)
    grads = [
        torch.empty(tensor.shape if needed else (0,), dtype=tensor.dtype, device=tensor.device)
        for tensor, needed in (
            (visible, True),
            (queries, True),
            (visible_positions, needs_positions),
            (query_positions, needs_positions),
        )
    ]
    if partial.numel():
        with on_device(visible):
            _backward_kernel[(parts,)](
                *grads[:2],
                *(grads[2:] if needs_positions else (None, None)),
                partial,
                grad_query.contiguous(),
                grad_key.contiguous(),
                grad_value.contiguous(),
                inputs,
                query_weight.contiguous(),
                key_weight.contiguous(),
                value_weight.contiguous(),
                statistics,
                rows,
                **_columns(inputs.dim, 4),
            )
    return (*grads, partial.sum(dim=0))  # type: ignore[return-value]


# Registration


def _forward_reference(
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    *parameters_and_rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (visible, queries, visible_positions, query_positions, *parameters_and_rest)
    *_, eps, _ = parameters_and_rest
    tokens = torch.cat([visible, queries], dim=1).float()
    positions = torch.cat([visible_positions, query_positions], dim=1)
    statistics = [
        part
        for x in (tokens + positions, tokens)
        for variance, mean in [torch.var_mean(x.float(), dim=2, correction=0)]
        for part in (mean, (variance + eps).rsqrt())
    ]
    return (*regressor_inputs_reference(*arguments), torch.stack(statistics, dim=2))


def _backward_reference(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    visible: Tensor,
    queries: Tensor,
    visible_positions: Tensor,
    query_positions: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    statistics: Tensor,
    needs_positions: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = torch.cat([visible, queries], dim=1).float()
    positions = torch.cat([visible_positions, query_positions], dim=1)
    split = [visible.shape[1], queries.shape[1]]
    key_x, value_x = tokens + positions, tokens
    key_mean, key_scale, value_mean, value_scale = statistics.unsqueeze(3).unbind(2)
    key_x, value_x = (key_x - key_mean) * key_scale, (value_x - value_mean) * value_scale
    of_query = torch.cat([torch.zeros_like(visible, dtype=torch.float32), grad_query], dim=1)

    def through_norm(of_x: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        return scale * (
            of_x - of_x.mean(dim=2, keepdim=True) - x * (of_x * x).mean(dim=2, keepdim=True)
        )

    of_moved = through_norm(grad_key * key_weight + of_query * query_weight, key_x, key_scale)
    of_token = of_moved + through_norm(grad_value * value_weight, value_x, value_scale)
    sums = [
        total.float().sum(dim=(0, 1))
        for grad, x in ((of_query, key_x), (grad_key, key_x), (grad_value, value_x))
        for total in (grad * x, grad)
    ]
    grad_visible, grad_queries = of_token.split(split, dim=1)
    places = of_moved.split(split, dim=1) if needs_positions else of_moved.new_empty(2, 0)
    return (
        grad_visible.to(visible.dtype, copy=True),
        grad_queries.to(queries.dtype, copy=True),
        places[0].to(visible_positions.dtype, copy=True),
        places[1].to(query_positions.dtype, copy=True),
        torch.stack(sums),
    )


def _fake_forward(
    visible: Tensor, queries: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, (batch, num_queries, dim) = rest[-1], queries.shape
    length = visible.shape[1] + num_queries
    return (
        visible.new_empty((batch, num_queries, dim), dtype=dtype),
        visible.new_empty((batch, length, dim), dtype=dtype),
        visible.new_empty((batch, length, dim), dtype=dtype),
        visible.new_empty((batch, length, 4), dtype=torch.float32),
    )


def _fake_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, positions, needs_positions = rest[:2], rest[2:4], rest[-1]
    return (
        *(tensor.new_empty(tensor.shape) for tensor in tokens),
        *(tensor.new_empty(tensor.shape if needs_positions else (0,)) for tensor in positions),
        tokens[0].new_empty((6, tokens[0].shape[2]), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, _ = inputs
    weights, biases = tensors[4::2], tensors[5::2]
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*tensors[:4], *weights, output[3])


def _backward(
    ctx: Any, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    needs_positions = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    saved = ctx.saved_tensors
    *grads, sums = regressor_inputs_backward_op(
        grad_query, grad_key, grad_value, *saved, needs_positions
    )
    kinds = [
        kind
        for weight, bias in zip(saved[4:7], ctx.bias_dtypes, strict=True)
        for kind in (weight.dtype, bias)
    ]
    of_parameters = [total.to(kind) for total, kind in zip(sums.unbind(0), kinds, strict=True)]
    if not needs_positions:
        grads[2:] = [None, None]
    return *grads, *of_parameters, None, None


_TENSORS = "Tensor visible, Tensor queries, Tensor visible_positions, Tensor query_positions, "
regressor_inputs_op = register(
    f"regressor_inputs({_TENSORS}Tensor query_weight, Tensor query_bias, Tensor key_weight, "
    "Tensor key_bias, Tensor value_weight, Tensor value_bias, float eps, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch=_launch_forward,
    reference=_forward_reference,
    fake=_fake_forward,
    backward=_backward,
    setup_context=_setup_context,
)
regressor_inputs_backward_op = register(
    f"regressor_inputs_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, {_TENSORS}"
    "Tensor query_weight, Tensor key_weight, Tensor value_weight, Tensor statistics, "
    "bool needs_positions) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch=_launch_backward,
    reference=_backward_reference,
    fake=_fake_backward,
)
