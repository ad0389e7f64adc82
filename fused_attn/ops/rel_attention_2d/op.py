"""The operators: schemas, allocation, what each implementation can run, and FLOPs.

``row_term`` and ``col_term`` are either tables (2 or 3 dimensions, multiplied with the query inside the operator) or
finished logits (5 dimensions), or None.  The public functions give the operators either those or a ``bias_table``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._floor import checks, dispatch, dropout, sharding
from .._floor.batching import Fold, Folded, along
from .._floor.layout import empty_contiguous, empty_like_heads
from .._floor.operators import Operators, cpp, triton
from .._floor.second import Block
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


def _allocate_backward(
    grad_out, query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key,
    prefix_value, *_,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    def of(argument: Tensor | None) -> Tensor | None:
        return None if argument is None else empty_contiguous(argument)

    return (
        empty_like_heads(query, query.shape[-1]),
        empty_like_heads(key, key.shape[-1]),
        empty_like_heads(value, value.shape[-1]),
        *map(of, (row_term, col_term, bias_table, prefix_key, prefix_value)),
    )


def _reference(
    query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key, prefix_value, scale,
    rel_scale, key_minus_query, dropout_p, seed,
) -> Tensor:  # fmt: skip
    index = "key_minus_query" if key_minus_query else "query_minus_key"
    segments = None if query_segments is None else (query_segments, key_segments)
    prefix = None if prefix_key is None else (prefix_key, prefix_value)
    common = {"segments": segments, "prefix": prefix, "scale": scale, "dropout_p": dropout_p, "seed": seed}
    if bias_table is not None:
        return reference.bias_attention_2d(query, key, value, bias_table, index=index, **common)
    if any(term is not None and term.dim() == 5 for term in (row_term, col_term)):
        return reference.decomposed_bias_attention(query, key, value, row_term, col_term, **common)
    return reference.rel_attention_2d(query, key, value, row_term, col_term, rel_scale=rel_scale, index=index, **common)


_MAPS = ("query", "key", "value", "prefix_key", "prefix_value", "out", "statistics")


#: Numbers of logits that a block has at most, unless one row of queries has more.
_BLOCK = 2**22


def _query_rows(values: Mapping[str, Any]) -> Iterable[Block]:
    """Rows of queries with what their logits are made of: the same operation on another grid of queries."""
    batch, heads, height, width, _ = values["query"].shape
    keys = values["key"].shape[2]
    row, table = values["row_term"], "row_term"
    if values["bias_table"] is not None:
        row, table = values["bias_table"], "bias_table"
    if values["dropout_p"] > 0.0:
        return [{}]  # which weights are dropped depends on the size of the grid

    def block(start: int, stop: int) -> Block:
        parts = dict.fromkeys(("query", "out", "grad_out"), (2, start, stop))
        parts["query_segments"] = (1, start, stop)
        for name in ("row_term", "col_term"):
            if values[name] is not None and values[name].dim() == 5:
                parts[name] = (2, start, stop)
        if row is not None and table not in parts:  # rows of the table: differences of positions
            first, last = (height - stop, height - start) if values["key_minus_query"] else (start, stop)
            parts[table] = (row.dim() - 2, first, last + keys - 1)
        return parts

    step = max(1, _BLOCK // max(1, batch * heads * width * keys * values["key"].shape[3]))
    return [block(start, min(start + step, height)) for start in range(0, height, step)] or [{}]


def _draw_seed(query, *args) -> Tensor | None:
    dropout_p = args[-1]
    if not dropout_p > 0.0:
        return None
    seed = torch.randint(0, 2**63 - 1, (1,), device=query.device, dtype=torch.int64)
    return sharding.beside(query, seed, drawn=True)


def _axes(call) -> list[sharding.Axis]:
    terms = {name: call[name].dim() for name in ("row_term", "col_term") if call[name] is not None}
    logits = [name for name, dims in terms.items() if dims == 5]
    of_images, unit = dict.fromkeys((*_MAPS, *logits), 0), 1
    if call["query_segments"] is not None:
        sets, batch = call["query_segments"].shape[0], call["query"].shape[0]
        if sets == batch:
            of_images |= dict.fromkeys(("query_segments", "key_segments"), 0)
        else:  # image b has the segments b mod sets, in a shard too
            unit = sets
    images = sharding.Axis(of_images, unit, _own_part_of_the_mask)
    if call["seed"] is not None:
        return [images]  # the mask's rows of some heads are in as many pieces as there are images
    of_heads = {**dict.fromkeys((*_MAPS, *logits), 1), "bias_table": 0}
    return [images, sharding.Axis(of_heads | {name: 0 for name, dims in terms.items() if dims == 3})]


def _folds(call: Mapping[str, Any]) -> Sequence[Fold]:
    """Into images, and into heads, where a table of all heads becomes one for each."""
    if call["seed"] is not None:
        return []  # which weights are dropped depends on the place in the batch and among the heads
    images, heads = along(_axes(call))
    terms = {name: call[name] for name in ("row_term", "col_term") if call[name] is not None}
    shared = {name: Folded(0, repeats=call["query"].shape[1]) for name, term in terms.items() if term.dim() == 2}
    return [images, {**heads, **shared}]


def _own_part_of_the_mask(call: dict, shard: int) -> None:
    """The dropout of a shard of the images, numbered from 0: its rows of the mask begin behind those before it."""
    if call["seed"] is not None:
        call["seed"] = dropout.behind(call["seed"], shard * math.prod(call["query"].shape[:4]))


def _score_elements(query_shape, key_shape, prefix_key_shape) -> int:
    prefix = 0 if prefix_key_shape is None else prefix_key_shape[2]
    return math.prod(query_shape[:4]) * (math.prod(key_shape[2:4]) + prefix)


def _table_elements(query_shape, key_shape, row_term_shape, col_term_shape) -> int:
    """Query-position pairs along the axes that have a table; finished logits cost no product."""
    keys = sum(
        key_shape[axis]
        for axis, shape in ((2, row_term_shape), (3, col_term_shape))
        if shape is not None and len(shape) < 5
    )
    return math.prod(query_shape[:4]) * keys


def _flops(
    query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key, *_, **__
) -> int:  # fmt: skip
    # Biases of a free table are added, as finished logits are: no product.
    scores = _score_elements(query, key, prefix_key) * (query[4] + value[4])
    return 2 * (scores + _table_elements(query, key, row_term, col_term) * query[4])


def _flops_backward(
    grad_out, query, key, value, row_term, col_term, bias_table, query_segments, key_segments, prefix_key, *_, **__
) -> int:  # fmt: skip
    # As PyTorch counts its own fused attention: the logits once more, then two products for each forward one.
    scores = _score_elements(query, key, prefix_key) * (3 * query[4] + 2 * value[4])
    return 2 * (scores + 3 * _table_elements(query, key, row_term, col_term) * query[4])


rel_attention_2d = Operators(
    "rel_attention_2d",
    "(Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, Tensor? bias_table, "
    "Tensor? query_segments, Tensor? key_segments, Tensor? prefix_key, Tensor? prefix_value, Scalar scale, "
    "Scalar rel_scale, bool key_minus_query, Scalar dropout_p, Tensor? seed) -> (Tensor out, Tensor statistics)",
    "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor? row_term, Tensor? col_term, "
    "Tensor? bias_table, Tensor? query_segments, Tensor? key_segments, Tensor? prefix_key, Tensor? prefix_value, "
    "Tensor out, Tensor statistics, Scalar scale, Scalar rel_scale, bool key_minus_query, Scalar dropout_p, "
    "Tensor? seed) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_row_term, "
    "Tensor grad_col_term, Tensor grad_bias_table, Tensor grad_prefix_key, Tensor grad_prefix_value)",
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
    or_float32=("bias_table",),
    apart=("query_segments", "key_segments", "seed"),
    drawn=_draw_seed,
    blocks=_query_rows,
    folds=_folds,
    axes=_axes,
)


def check_options(dropout_p: float, impl: str) -> None:
    """What the modules of these operators check when they are made, before a call does."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    checks.one_of("impl", impl, ("auto", *rel_attention_2d.can_run))
