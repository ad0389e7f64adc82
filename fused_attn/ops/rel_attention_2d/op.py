"""The operators: schemas, allocation, what each implementation can run, and FLOPs.

``row_term`` and ``col_term`` are either tables (2 or 3 dimensions, multiplied with the query inside the operator) or
finished logits (5 dimensions), or None.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._floor import dispatch
from .._floor.layout import empty_contiguous, empty_like_heads
from .._floor.operators import Operators, cpp, triton
from . import reference


def can_run_triton(query: Tensor, key: Tensor, value: Tensor, *_) -> str | None:
    if (reason := dispatch.triton_reason(query)) is not None:
        return reason
    depth, deepest = max(query.shape[-1], value.shape[-1]), 128 if query.dtype == torch.float32 else 256
    if depth > deepest:
        return f"it computes depths up to 128 in float32 and 256 in float16 and bfloat16, got {depth} in {query.dtype}"
    return None


def _allocate(query: Tensor, key: Tensor, value: Tensor, *_) -> tuple[Tensor, Tensor]:
    # Per query the maximum and the sum of the exponentials: the rounding of their log-sum-exp would be an error
    # common to a whole row of weights.
    statistics = query.new_empty(*query.shape[:4], 2, dtype=torch.float32)
    return empty_like_heads(query, value.shape[-1]), statistics


def _allocate_backward(grad_out, query, key, value, row_term, col_term, *_) -> tuple[Tensor, ...]:
    return (
        empty_like_heads(query, query.shape[-1]),
        empty_like_heads(key, key.shape[-1]),
        empty_like_heads(value, value.shape[-1]),
        query.new_empty(0) if row_term is None else empty_contiguous(row_term),
        query.new_empty(0) if col_term is None else empty_contiguous(col_term),
    )


def _reference(query, key, value, row_term, col_term, scale, rel_scale, key_minus_query, dropout_p, seed) -> Tensor:
    if any(term is not None and term.dim() == 5 for term in (row_term, col_term)):
        return reference.decomposed_bias_attention(query, key, value, row_term, col_term, scale, dropout_p, seed)
    index = "key_minus_query" if key_minus_query else "query_minus_key"
    return reference.rel_attention_2d(query, key, value, row_term, col_term, scale, rel_scale, index, dropout_p, seed)


def _score_elements(query_shape, key_shape) -> int:
    return math.prod(query_shape[:4]) * math.prod(key_shape[2:4])


def _table_elements(query_shape, key_shape, row_term_shape, col_term_shape) -> int:
    """Query-position pairs along the axes that have a table; finished logits cost no product."""
    keys = sum(
        key_shape[axis]
        for axis, shape in ((2, row_term_shape), (3, col_term_shape))
        if shape is not None and len(shape) < 5
    )
    return math.prod(query_shape[:4]) * keys


def _flops(query, key, value, row_term, col_term, *_, **__) -> int:
    products = (
        _score_elements(query, key) * (query[4] + value[4]) + _table_elements(query, key, row_term, col_term) * query[4]
    )
    return 2 * products


def _flops_backward(grad_out, query, key, value, row_term, col_term, *_, **__) -> int:
    # As PyTorch counts its own fused attention: the logits once more, then two products for each forward one.
    elements = _score_elements(query, key)
    products = elements * (3 * query[4] + 2 * value[4]) + 3 * _table_elements(query, key, row_term, col_term) * query[4]
    return 2 * products


rel_attention_2d = Operators(
    "rel_attention_2d",
    "(Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, Scalar scale, Scalar rel_scale, "
    "bool key_minus_query, Scalar dropout_p, Tensor? seed) -> (Tensor out, Tensor statistics)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, Tensor out, "
    "Tensor statistics, Scalar scale, Scalar rel_scale, bool key_minus_query, Scalar dropout_p, Tensor? seed) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_row_term, Tensor grad_col_term)",
    allocate=_allocate,
    allocate_backward=_allocate_backward,
    kernels={
        "cpu": (cpp("rel_attention_2d_forward"), cpp("rel_attention_2d_backward")),
        "triton": (triton(__package__, "forward"), triton(__package__, "backward")),
    },
    can_run={"triton": can_run_triton},
    reference=_reference,
    flops=_flops,
    flops_backward=_flops_backward,
    public="rel_attention_2d and decomposed_bias_attention",
)
