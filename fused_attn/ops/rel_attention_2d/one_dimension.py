"""Public function for sequences: a view of rel_attention_2d on a grid of one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf, pinned
from . import op
from .api import check_attention


@leaf
def rel_attention_1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_table: Tensor | None = None,
    *,
    scale: float | None = None,
    rel_scale: float | None = None,
    index: str = "key_minus_query",
    key_padding: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Compute attention over a sequence with relative position embeddings: audio, text, time series.

    ``out[q] = sum_k softmax_k(scale * query[q].key[k] + rel_scale * query[q].rel_table[i(q, k)]) value[k]`` for every
    query position q over all key positions k: :func:`~fused_attn.rel_attention_2d` on grids of height 1.

    Args:
        query: (B, heads, Lq, d_k), float32, float16 or bfloat16 (float64: reference only).  Any strides.
        key: (B, heads, Lk, d_k), dtype of ``query``.
        value: (B, heads, Lk, d_v), dtype of ``query``.
        rel_table: (Lq+Lk-1, d_k), or (heads, Lq+Lk-1, d_k) for one table per head; dtype of ``query``.  None: no
            relative term.
        scale: factor of the content term; ``d_k**-0.5`` when None.  A number, as in
            :func:`~fused_attn.rel_attention_2d`.
        rel_scale: factor of the relative term; ``scale`` when None.
        index: row of the table that belongs to (query position q, key position k).  ``"key_minus_query"``:
            k - q + Lq - 1.  ``"query_minus_key"``: q - k + Lk - 1.
        key_padding: (B, Lk), bool, on the device of ``query``: True where a key is padding, which no query attends to,
            as PyTorch's ``key_padding_mask``.  The values there must be finite, as 0 * NaN is NaN in the output.
        query_segments: (S, Lq), int32, on the device of ``query``; S divides B, and sequence b has the segments
            b mod S.  A query attends to the keys of its own segment alone: packed sequences.
        key_segments: (S, Lk), int32, likewise; both are given or neither.  A key of a negative segment is padding.
        prefix_key: (B, heads, P, d_k), dtype of ``query``: further keys that every query attends to, with logits of
            ``scale * query.key`` and no other term.
        prefix_value: (B, heads, P, d_v), their values; both are given or neither.
        dropout_p: probability of dropping an attention weight, in [0, 1); as in
            :func:`~fused_attn.rel_attention_2d`.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, heads, Lq, d_v), dtype of ``query``, in the memory order of ``query``.

    Raises:
        TypeError: an argument is not a tensor, not of a floating-point dtype, segments are not int32, or the padding is
            not bool.
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Every query sees all keys: there is no causal mask.  Gradients, determinism, queries without keys and autocast are
    those of :func:`~fused_attn.rel_attention_2d`.  ``cpu`` holds O(L) while it runs; ``triton`` holds the relative
    logits of every pair, O(L * L) numbers per head, as the keys are all in one row.

    Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations", eq. 4, on the keys alone.
    """
    arguments = grid_arguments(
        query, key, value, rel_table, query_segments, key_segments, prefix_key, prefix_value, key_padding
    )
    return run(impl, *arguments, scale, rel_scale, index, dropout_p)[0].squeeze(2)


def grid_arguments(
    query: Tensor, key: Tensor, value: Tensor, rel_table: Tensor | None, query_segments: Tensor | None,
    key_segments: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None, key_padding: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The tensors as those of a grid of one row; raises where they are not those of sequences."""
    for name, tensor, layout in (("query", query, "q, d_k"), ("key", key, "k, d_k"), ("value", value, "k, d_v")):
        checks.tensor(name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (B, heads, L{layout}), got shape {tuple(tensor.shape)}")
    batch, heads, length, depth = query.shape
    keys = key.shape[2]
    if value.shape[2] != keys:
        raise ValueError(f"value must have the length of key, Lk={keys}, got {value.shape[2]}")
    if rel_table is not None:
        checks.tensor("rel_table", rel_table)
        rows = max(length + keys - 1, 0)
        if rel_table.shape != (rows, depth) and rel_table.shape != (heads, rows, depth):
            raise ValueError(
                f"rel_table must have shape (Lq+Lk-1, d_k)=({rows}, {depth}) or "
                f"(heads, Lq+Lk-1, d_k)=({heads}, {rows}, {depth}), got {tuple(rel_table.shape)}"
            )
    for name, segments, expected in (("query_segments", query_segments, length), ("key_segments", key_segments, keys)):
        if isinstance(segments, Tensor) and (segments.dim() != 2 or segments.shape[1] != expected):
            raise ValueError(f"{name} must have shape (S, L{name[0]})=(S, {expected}), got {tuple(segments.shape)}")
    if key_padding is not None:
        check_padding("key_padding", key_padding, batch, keys, key.device)
    return (
        query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2), rel_table,
        query_segments.unsqueeze(1) if isinstance(query_segments, Tensor) else query_segments,
        key_segments.unsqueeze(1) if isinstance(key_segments, Tensor) else key_segments,
        prefix_key, prefix_value, key_padding,
    )  # fmt: skip


def check_padding(name: str, padding: object, batch: int, length: int, device: torch.device) -> None:
    """Require a mask of padded positions, bool (batch, length)."""
    if not isinstance(padding, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(padding).__name__}")
    if padding.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {padding.dtype}")
    if padding.shape != (batch, length):
        raise ValueError(f"{name} must have shape (B, L)=({batch}, {length}), got {tuple(padding.shape)}")
    if padding.device != device:
        raise ValueError(f"{name} must be on the device of the sequences, {device}, got {padding.device}")


def check(
    query: Tensor, key: Tensor, value: Tensor, rel_table: Tensor | None, query_segments: Tensor | None,
    key_segments: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None, key_padding: Tensor | None,
    scale: object, rel_scale: object, index: str, dropout_p: object,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the operator, from those of :func:`grid_arguments`."""
    segments, scale, key_minus_query, dropout_p = check_attention(
        query, key, value, query_segments, key_segments, prefix_key, prefix_value, scale, index, dropout_p
    )
    if key_padding is not None:
        segments = _padded_segments(segments, key_padding, query.shape[3])
    rel_scale = scale if rel_scale is None else checks.number("rel_scale", rel_scale)
    return (
        *map(pinned, (query, key, value)), None, pinned(rel_table, 0), None, *segments, pinned(prefix_key),
        pinned(prefix_value), scale, rel_scale, key_minus_query, dropout_p,
    )  # fmt: skip


def _padded_segments(
    segments: tuple[Tensor | None, Tensor | None], key_padding: Tensor, queries: int
) -> tuple[Tensor, Tensor]:
    """Segments of every sequence, with padded keys in a negative one."""
    of_queries, of_keys = segments
    batch, keys = key_padding.shape
    if of_queries is None or of_keys is None:
        of_queries = key_padding.new_zeros(batch, 1, queries, dtype=torch.int32)
        of_keys = key_padding.new_zeros(batch, 1, keys, dtype=torch.int32)
    else:
        of_queries, of_keys = (each.repeat(batch // len(each), 1, 1) for each in (of_queries, of_keys))
    return of_queries, of_keys.masked_fill(key_padding.unsqueeze(1), -1)


run = op.rel_attention_2d.public(check, op="rel_attention_1d", names={"col_term": "rel_table"})
