"""Registration with PyTorch: schemas, fake kernels, autograd, and what each implementation can run.

Two operators per implementation: the whole attention, and the sum with given weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._floor import autograd, dispatch
from . import reference

_SCHEMAS = {
    "weighted_layer_sum": "(Tensor weights, Tensor[] values) -> Tensor",
    "weighted_layer_sum_backward": "(Tensor grad_out, Tensor weights, Tensor[] values) "
    "-> (Tensor grad_weights, Tensor[] grad_values)",
    "layer_attention": "(Tensor query, Tensor[] keys, Tensor[] values, Tensor? bias, Scalar scale, bool sigmoid) "
    "-> (Tensor out, Tensor weights)",
    "layer_attention_backward": "(Tensor grad_out, Tensor query, Tensor[] keys, Tensor[] values, Tensor weights, "
    "Scalar scale, bool sigmoid) "
    "-> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values, Tensor grad_bias)",
}


def layer_attention(impl, query, keys, values, bias, scale, sigmoid) -> Tensor:
    """Run the operator of ``impl``; ``out`` only."""
    return getattr(torch.ops.fused_attn, f"layer_attention_{impl}").default(query, keys, values, bias, scale, sigmoid)[
        0
    ]


def attention_backward(impl, grad_out, query, keys, values, weights, scale, sigmoid, into):
    """Gradients of query, keys, values and bias; those of the values new, or added to the tensors ``into``."""
    return _BACKWARD[impl](grad_out, query, keys, values, weights, scale, sigmoid, into)


def zero_gradient(values: Sequence[Tensor]) -> Tensor:
    """Zeros that :func:`attention_backward` can add the gradient of any value to: all are in one memory order."""
    return _empty_in_order(values[0], _order(values[0])).zero_()


def weighted_layer_sum(impl, weights, values) -> Tensor:
    return getattr(torch.ops.fused_attn, f"weighted_layer_sum_{impl}").default(weights, values)


# --- what can run -----------------------------------------------------------------------------------------------


def can_run_cpu(values: Sequence[Tensor]) -> str | None:
    return dispatch.cpu_reason(values[0])


def can_run_triton(values: Sequence[Tensor]) -> str | None:
    return dispatch.triton_reason(values[0])


def can_run_reference(values: Sequence[Tensor]) -> str | None:
    return None


#: Implementations in the order ``auto`` prefers them.  The interpreter never wins over a real kernel.
IMPLEMENTATIONS = {"cpu": can_run_cpu, "triton": can_run_triton, "reference": can_run_reference}


# --- memory order -----------------------------------------------------------------------------------------------


def _order(value: Tensor) -> tuple[int, ...]:
    """Dimensions behind the batch, outermost in memory first: channels first, or channels last."""
    dims = range(1, value.dim())
    if value.dim() > 2 and not _is_dense(value, dims) and _is_dense(value, (*dims[1:], 1)):
        return (*dims[1:], 1)
    return tuple(dims)


def _is_dense(value: Tensor, order: Sequence[int]) -> bool:
    """Whether every image is one piece of memory, its dimensions in ``order``; the batch may have any stride."""
    expected = 1
    for dim in reversed(order):
        if value.shape[dim] != 1 and value.stride(dim) != expected:
            return False
        expected *= value.shape[dim]
    return True


def _empty_in_order(like: Tensor, order: Sequence[int]) -> Tensor:
    strides, step = [0] * like.dim(), 1
    for dim in reversed((0, *order)):
        strides[dim] = step
        step *= max(like.shape[dim], 1)
    return like.new_empty_strided(like.shape, strides)


def _in_order(value: Tensor, order: Sequence[int]) -> Tensor:
    return value if _is_dense(value, order) else _empty_in_order(value, order).copy_(value)


def is_channels_last(order: Sequence[int]) -> bool:
    return order[-1] == 1 and len(order) > 1


# --- CPU kernels ------------------------------------------------------------------------------------------------


def _cpu_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    order = _order(values[0])
    out = _empty_in_order(values[0], order)
    torch.ops.fused_attn_cpu.layer_sum_forward(
        weights, [_in_order(value, order) for value in values], is_channels_last(order), out
    )
    return out


def _cpu_sum_backward(
    grad_out: Tensor, weights: Tensor, values: Sequence[Tensor], into: Sequence[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the weights, in float32, and of the values: new ones, or added to ``into``."""
    order = _order(values[0])
    grads = [_empty_in_order(value, order) for value in values] if into is None else list(into)
    grad_weights = torch.empty_like(weights)
    torch.ops.fused_attn_cpu.layer_sum_backward(
        _in_order(grad_out, order),
        weights,
        [_in_order(value, order) for value in values],
        is_channels_last(order),
        into is not None,
        grad_weights,
        grads,
    )
    return grad_weights, grads


def _weights_shape(query: Tensor, keys: Sequence[Tensor]) -> tuple[int, int, int]:
    return (*query.shape[:2], len(keys))


def _cpu_attention(query, keys, values, bias, scale, sigmoid):
    weights = query.new_empty(_weights_shape(query, keys), dtype=torch.float32)
    torch.ops.fused_attn_cpu.layer_weights_forward(query, keys, bias, scale, sigmoid, weights)
    return _cpu_sum(weights, values), weights


def _cpu_attention_backward(grad_out, query, keys, values, weights, scale, sigmoid, into=None):
    grad_scores, grad_values = _cpu_sum_backward(grad_out, weights, values, into)
    grad_query = query.new_empty(query.shape)
    grad_keys = [key.new_empty(key.shape) for key in keys]
    torch.ops.fused_attn_cpu.layer_weights_backward(
        query, keys, scale, sigmoid, weights, grad_scores, grad_query, grad_keys
    )
    return grad_query, grad_keys, grad_values, grad_scores.sum(0).t().to(query.dtype).contiguous()


def _cpu_given(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    return _cpu_sum(weights.float().contiguous(), values)


def _cpu_given_backward(grad_out, weights, values):
    grad_weights, grad_values = _cpu_sum_backward(grad_out, weights.float().contiguous(), values)
    return grad_weights.to(weights.dtype), grad_values


# --- Triton kernels ---------------------------------------------------------------------------------------------


def _triton_attention(query, keys, values, bias, scale, sigmoid):
    from . import triton_launch

    return triton_launch.attention_forward(query, keys, values, bias, scale, sigmoid)


def _triton_attention_backward(grad_out, query, keys, values, weights, scale, sigmoid, into=None):
    from . import triton_launch

    return triton_launch.attention_backward(grad_out, query, keys, values, weights, scale, sigmoid, into)


def _triton_given(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    from . import triton_launch

    return triton_launch.sum_forward(weights.float().contiguous(), values)


def _triton_given_backward(grad_out, weights, values):
    from . import triton_launch

    grad_weights, grad_values = triton_launch.sum_backward(grad_out, weights.float().contiguous(), values)
    return grad_weights.to(weights.dtype), grad_values


# --- registration -----------------------------------------------------------------------------------------------


def _fake_attention(query, keys, values, bias, scale, sigmoid):
    weights = query.new_empty(_weights_shape(query, keys), dtype=torch.float32)
    return _empty_in_order(values[0], _order(values[0])), weights


def _fake_attention_backward(grad_out, query, keys, values, weights, scale, sigmoid):
    order = _order(values[0])
    return (
        query.new_empty(query.shape),
        [key.new_empty(key.shape) for key in keys],
        [_empty_in_order(value, order) for value in values],
        query.new_empty((len(keys), query.shape[1])),
    )


def _fake_given(weights, values):
    return _empty_in_order(values[0], _order(values[0]))


def _fake_given_backward(grad_out, weights, values):
    order = _order(values[0])
    return weights.new_empty(weights.shape), [_empty_in_order(value, order) for value in values]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _attention_context(ctx, inputs, output) -> None:
    query, keys, values, bias, scale, sigmoid = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.layers, ctx.options, ctx.has_bias = len(keys), (scale, sigmoid), bias is not None
    ctx.save_for_backward(query, *keys, *values, output[1])


def _given_context(ctx, inputs, output) -> None:
    weights, values = inputs
    ctx.save_for_backward(weights, *values)


def _register(impl: str, device_types: tuple[str, ...], kernels) -> None:
    fakes = (_fake_given, _fake_given_backward, _fake_attention, _fake_attention_backward)
    operators = {}
    for (name, schema), kernel, fake in zip(_SCHEMAS.items(), kernels, fakes, strict=True):
        base, backward, _ = name.partition("_backward")
        full = f"fused_attn::{base}_{impl}{backward}"
        torch.library.define(full, schema)
        torch.library.impl(full, device_types, kernel)
        torch.library.register_fake(full, fake)
        operators[name] = getattr(torch.ops.fused_attn, full.partition("::")[2])

    def attention_backward(ctx, grad_out, _grad_weights):
        query, *rest, weights = ctx.saved_tensors
        keys, values = rest[: ctx.layers], rest[ctx.layers :]
        operator = operators["layer_attention_backward"].default
        grad_query, grad_keys, grad_values, grad_bias = operator(grad_out, query, keys, values, weights, *ctx.options)
        return grad_query, grad_keys, grad_values, grad_bias if ctx.has_bias else None, None, None

    def given_backward(ctx, grad_out):
        weights, *values = ctx.saved_tensors
        return operators["weighted_layer_sum_backward"].default(grad_out, weights, values)

    for op, backward, setup_context, plain in (
        ("layer_attention", attention_backward, _attention_context, reference.layer_attention),
        ("weighted_layer_sum", given_backward, _given_context, reference.weighted_layer_sum),
    ):
        autograd.register(op, f"{op}_{impl}", backward, setup_context, plain)
    for name, index, factor in (
        ("weighted_layer_sum", 1, 2),
        ("weighted_layer_sum_backward", 2, 3),
        ("layer_attention", 2, 2),
        ("layer_attention_backward", 3, 3),
    ):
        register_flop_formula(operators[name])(_flop_formula(index, factor))


def _flop_formula(index: int, factor: int):
    """A multiplication and an addition per element of the values; backward, a product more."""

    def formula(*args, **_) -> int:
        return factor * sum(_numel(shape) for shape in args[index])

    return formula


#: Backward passes as plain functions that can add to given tensors, for :class:`~.cache.LayerCache`.
_BACKWARD = {"cpu": _cpu_attention_backward, "triton": _triton_attention_backward}

_register("cpu", ("cpu",), (_cpu_given, _cpu_given_backward, _cpu_attention, _cpu_attention_backward))
_register(
    "triton",
    dispatch.TRITON_DEVICES,
    (_triton_given, _triton_given_backward, _triton_attention, _triton_attention_backward),
)
