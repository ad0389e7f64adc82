"""The operators: schemas, allocation, what each implementation can run, and FLOPs.

``statistics`` (..., L, 2) holds, per token and value, the logit and ``1 / sqrt(mean(value**2) + eps)``, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._floor import dispatch
from .._floor.layout import empty_contiguous, rows
from .._floor.operators import Operators, cpp, triton
from .._floor.sharding import Axis
from . import reference

# The Triton kernels name every value as an argument, and hold whole rows in registers.
_MOST_VALUES, _DEEPEST = 32, 8192


def can_run_triton(values: Sequence[Tensor], query: Tensor, *_) -> str | None:
    if (reason := dispatch.triton_reason(query)) is not None:
        return reason
    if len(values) > _MOST_VALUES:
        return f"it takes up to {_MOST_VALUES} values, got {len(values)}"
    if query.shape[0] > _DEEPEST:
        return f"it takes values of up to {_DEEPEST} numbers per token, got {query.shape[0]}"
    return None


def _allocate(values: Sequence[Tensor], *_) -> tuple[Tensor, Tensor]:
    first = values[0]
    return empty_contiguous(first), first.new_empty(*first.shape[:-1], len(values), 2, dtype=torch.float32)


_cpp_forward, _cpp_backward = cpp("attention_residual_forward"), cpp("attention_residual_backward")


def _forward(values, query, norm_weight, eps, out, statistics) -> None:
    _cpp_forward([*map(rows, values)], query, norm_weight, eps, rows(out), statistics)


def _backward(grad_out, values, query, norm_weight, statistics, eps, grad_values, grad_query, grad_norm_weight) -> None:
    tensors = rows(grad_out), [*map(rows, values)], query, norm_weight, statistics
    _cpp_backward(*tensors, [*map(rows, grad_values)], grad_query, grad_norm_weight)


def _flops(values, *_, **__) -> int:
    # Mean square, inner product with the query, weighted sum.
    return 6 * len(values) * math.prod(values[0])


def _flops_backward(grad_out, values, *_, **__) -> int:
    # Inner product with the gradient, three terms of the value's gradient, one of the query's.
    return 9 * len(values) * math.prod(values[0])


def _axes(call) -> list[Axis]:
    # Tokens are on their own, whatever dimensions they are laid out in.
    of_tokens = range(call["values"][0].dim() - 1)
    return [Axis(dict.fromkeys(("values", "out", "statistics"), dim)) for dim in of_tokens]


attention_residual = Operators(
    "attention_residual",
    "(Tensor[] values, Tensor query, Tensor? norm_weight, Scalar eps) -> (Tensor out, Tensor statistics)",
    "(Tensor grad_out, Tensor[] values, Tensor query, Tensor? norm_weight, Tensor statistics, "
    "Scalar eps) -> (Tensor[] grad_values, Tensor grad_query, Tensor grad_norm_weight)",
    allocate=_allocate,
    kernels={
        "cpu": (_forward, _backward),
        "triton": (triton(__package__, "forward"), triton(__package__, "backward")),
    },
    can_run={"triton": can_run_triton},
    reference=reference.attention_residual,
    flops=_flops,
    flops_backward=_flops_backward,
    axes=_axes,
)
