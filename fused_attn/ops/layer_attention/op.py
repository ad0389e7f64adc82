"""The operators, one pair for each public function: schemas, allocation and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._floor.layout import dense_order, empty_contiguous, empty_in_order, in_order, is_channels_last
from .._floor.operators import Operators, cpp, triton
from .._floor.sharding import Axis
from . import reference

# --- allocation -------------------------------------------------------------------------------------------------


def _like_values(values: Sequence[Tensor]) -> list[Tensor]:
    order = dense_order(values[0])
    return [empty_in_order(value, order) for value in values]


def _allocate_sum(weights: Tensor, values: Sequence[Tensor]) -> tuple[Tensor]:
    return (empty_in_order(values[0], dense_order(values[0])),)


def _allocate_sum_backward(grad_out, weights: Tensor, values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return empty_contiguous(weights), _like_values(values)


def _allocate_attention(query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *_) -> tuple[Tensor, Tensor]:
    weights = query.new_empty(*query.shape[:2], len(keys), dtype=torch.float32)
    return empty_in_order(values[0], dense_order(values[0])), weights


def _allocate_attention_backward(
    grad_out, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], bias: Tensor | None, *_,
    into: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:  # fmt: skip
    return (
        empty_contiguous(query),
        [*map(empty_contiguous, keys)],
        _like_values(values) if into is None else into,
        None if bias is None else empty_contiguous(bias),
    )


# --- C++ kernels ------------------------------------------------------------------------------------------------

_weights_forward, _weights_backward = cpp("layer_attention_weights_forward"), cpp("layer_attention_weights_backward")
_sum_forward, _sum_backward = cpp("weighted_layer_sum_forward"), cpp("weighted_layer_sum_backward")


def _forward_sum(weights: Tensor, values: Sequence[Tensor], out: Tensor) -> None:
    order = dense_order(values[0])
    values = [in_order(value, order) for value in values]
    _sum_forward(weights.float().contiguous(), values, is_channels_last(order), out)


def _backward_values(grad_out, weights, values, grad_values, accumulate=False) -> Tensor:
    """The gradient of the float32 weights; ``grad_values`` are written, or added to if ``accumulate``."""
    order = dense_order(values[0])
    dense = [in_order(value, order) for value in values]
    grad_weights = torch.empty_like(weights)
    tensors = in_order(grad_out, order), weights, dense
    _sum_backward(*tensors, is_channels_last(order), accumulate, grad_weights, grad_values)
    return grad_weights


def _backward_sum(grad_out, weights, values, grad_weights, grad_values) -> None:
    grad_weights.copy_(_backward_values(grad_out, weights.float().contiguous(), values, grad_values))


def _forward_attention(query, keys, values, bias, scale, sigmoid, out, weights) -> None:
    _weights_forward(query, keys, bias, scale, sigmoid, weights)
    _forward_sum(weights, values, out)


def _backward_attention(
    grad_out, query, keys, values, bias, weights, scale, sigmoid, grad_query, grad_keys, grad_values, grad_bias,
    accumulate=False,
) -> None:  # fmt: skip
    grad_scores = _backward_values(grad_out, weights, values, grad_values, accumulate)
    _weights_backward(query, keys, scale, sigmoid, weights, grad_scores, grad_query, grad_keys)
    if bias is not None:
        grad_bias.copy_(grad_scores.sum(0).t())


# --- operators --------------------------------------------------------------------------------------------------


def _per_element(index: int, factor: int):
    """A multiplication and an addition per element of the values; backward, a product more."""

    def formula(*shapes, **_) -> int:
        return factor * sum(map(math.prod, shapes[index]))

    return formula


_MAPS = ("query", "keys", "values", "weights", "out")


def _axes(call) -> list[Axis]:
    # Groups are channels side by side, as many in each.
    return [Axis(dict.fromkeys(_MAPS, 0)), Axis({**dict.fromkeys(_MAPS, 1), "bias": 1})]


weighted_layer_sum = Operators(
    "weighted_layer_sum",
    "(Tensor weights, Tensor[] values) -> Tensor out",
    "(Tensor grad_out, Tensor weights, Tensor[] values) -> (Tensor grad_weights, Tensor[] grad_values)",
    allocate=_allocate_sum,
    allocate_backward=_allocate_sum_backward,
    kernels={
        "cpu": (_forward_sum, _backward_sum),
        "triton": (triton(__package__, "sum_forward"), triton(__package__, "sum_backward")),
    },
    reference=reference.weighted_layer_sum,
    flops=_per_element(1, 2),
    flops_backward=_per_element(2, 3),
    axes=_axes,
)

layer_attention = Operators(
    "layer_attention",
    "(Tensor query, Tensor[] keys, Tensor[] values, Tensor? bias, Scalar scale, bool sigmoid) "
    "-> (Tensor out, Tensor weights)",
    "(Tensor grad_out, Tensor query, Tensor[] keys, Tensor[] values, Tensor? bias, Tensor weights, Scalar scale, "
    "bool sigmoid) -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values, Tensor grad_bias)",
    allocate=_allocate_attention,
    allocate_backward=_allocate_attention_backward,
    kernels={
        "cpu": (_forward_attention, _backward_attention),
        "triton": (triton(__package__, "attention_forward"), triton(__package__, "attention_backward")),
    },
    or_float32=("bias",),  # scores are float32, and autocast does not cast what is added to them
    reference=reference.layer_attention,
    flops=_per_element(2, 2),
    flops_backward=_per_element(3, 3),
    axes=_axes,
)


# --- for the cache ----------------------------------------------------------------------------------------------


def attention_backward(
    impl: str, *args, into: list[Tensor] | None
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None]:
    """What the backward operator gives; but the gradients of the values are added to ``into`` where it is given."""
    grads = _allocate_attention_backward(*args, into=into)
    layer_attention.kernels[impl][1](*args, *grads, accumulate=into is not None)
    return grads


def zero_gradient(values: Sequence[Tensor]) -> Tensor:
    """Zeros that :func:`attention_backward` can add the gradient of any value to: all are in one memory order."""
    return empty_in_order(values[0], dense_order(values[0])).zero_()
