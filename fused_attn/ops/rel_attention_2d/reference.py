"""Plain PyTorch reference of relative-position 2D attention.  Materialises the N x N map: the oracle, not a kernel."""

from __future__ import annotations

import torch

from .._floor.dropout import keep_mask


def relative_index(queries: int, keys: int, index: str, device: torch.device) -> torch.Tensor:
    """Row of the table for every (query position, key position) along one axis: (queries, keys), int64."""
    q = torch.arange(queries, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    return k - q + queries - 1 if index == "key_minus_query" else q - k + keys - 1


def relative_logits(query, table_h, table_w, key_size, rel_scale, index):
    """Row and column logits of the tables.

    Args:
        query: (B, heads, Hq, Wq, d_k).
        table_h: (Hq+Hk-1, d_k) or (heads, Hq+Hk-1, d_k), or None; table_w likewise along the width.
        key_size: (Hk, Wk).
        rel_scale: factor on both logits.
        index: ``"key_minus_query"`` or ``"query_minus_key"``.

    Returns:
        bias_h (B, heads, Hq, Wq, Hk) or None, bias_w (B, heads, Hq, Wq, Wk) or None.
    """
    heads, height, width = query.shape[1:4]
    bias_h = bias_w = None
    scaled = query * rel_scale
    if table_h is not None:
        rows = table_h.expand(heads, *table_h.shape[-2:])
        rows = rows[:, relative_index(height, key_size[0], index, query.device)]
        bias_h = torch.einsum("bhyxd,hykd->bhyxk", scaled, rows)
    if table_w is not None:
        columns = table_w.expand(heads, *table_w.shape[-2:])
        columns = columns[:, relative_index(width, key_size[1], index, query.device)]
        bias_w = torch.einsum("bhyxd,hxkd->bhyxk", scaled, columns)
    return bias_h, bias_w


def table_logits(bias_table, query_size, key_size, index):
    """Biases of a free table: (heads, Nq, Nk) from (heads, Hq+Hk-1, Wq+Wk-1)."""
    rows, columns = (
        relative_index(queries, keys, index, bias_table.device)
        for queries, keys in zip(query_size, key_size, strict=True)
    )
    return bias_table[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3).flatten(1, 2)


def same_segment(query_segments, key_segments, batch):
    """Which keys a query attends to: bool (batch, Nq, Nk) from (S, Hq, Wq) and (S, Hk, Wk)."""
    queries, keys = query_segments.flatten(1)[:, :, None], key_segments.flatten(1)[:, None, :]
    return ((queries == keys) & (keys >= 0)).repeat(batch // len(queries), 1, 1)


def attention_weights(logits, hidden=None):
    """Softmax over the last axis; ``hidden`` says which of the first keys, whose logits are -inf, have no weight."""
    # A query with no key to attend to (every logit -inf) yields zeros, not NaN.
    masked = (logits == float("-inf")).all(-1, keepdim=True)
    weights = logits.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)
    if hidden is None:
        return weights
    # Also of a query whose other weights are NaN.
    grid = hidden.shape[-1]
    return torch.cat((weights[..., :grid].masked_fill(hidden, 0.0), weights[..., grid:]), -1)


def attention_rows(
    query, key, row_term, col_term, bias_table, segments, prefix_key, queries, *, scale, rel_scale, index
) -> torch.Tensor:  # fmt: skip
    """Weights of chosen queries: (B, heads, Q, Nk + P), float32, of float64 inputs float64.

    Args:
        query, key, bias_table, prefix_key, scale, rel_scale, index: as in the public functions.
        row_term, col_term: tables, or finished logits, which have 5 dimensions, or None.
        segments: (query_segments, key_segments), or None.
        queries: (Q,), int64, flat positions.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, height, width, _ = query.shape
    key_height, key_width = key.shape[2:4]
    y, x = queries // width, queries % width
    chosen = query[:, :, y, x].to(dtype)
    scaled = chosen * scale
    logits = (scaled @ key.flatten(2, 3).to(dtype).mT).unflatten(-1, (key_height, key_width))
    rows = relative_index(height, key_height, index, query.device)[y]
    columns = relative_index(width, key_width, index, query.device)[x]
    if bias_table is not None:
        logits = logits + bias_table[:, rows[:, :, None], columns[:, None, :]].to(dtype)
    for term, places, axis in ((row_term, rows, -1), (col_term, columns, -2)):
        if term is None:
            continue
        if term.dim() == 5:
            line = term[:, :, y, x].to(dtype)
        else:
            table = term.expand(heads, *term.shape[-2:])[:, places].to(dtype)
            line = torch.einsum("bhqd,hqkd->bhqk", chosen * rel_scale, table)
        logits = logits + line.unsqueeze(axis)
    logits, hidden = logits.flatten(3), None
    if segments is not None:
        of_queries, of_keys = segments[0].flatten(1)[:, queries, None], segments[1].flatten(1)[:, None]
        hidden = ~((of_queries == of_keys) & (of_keys >= 0)).repeat(batch // len(of_keys), 1, 1)[:, None]
        logits = logits.masked_fill(hidden, float("-inf"))
    if prefix_key is not None:
        logits = torch.cat((logits, scaled @ prefix_key.to(dtype).mT), -1)
    return attention_weights(logits, hidden)


def attention(
    query, key, value, bias=(), segments=None, prefix=None, *, scale, dropout_p=0.0, seed=None
) -> torch.Tensor:  # fmt: skip
    """Attention over a grid of keys and prefix keys.

    Args:
        query, key, value: as in the public functions.
        bias: terms of the logits of the grid, each broadcastable to (B, heads, Nq, Hk, Wk).
        segments: (query_segments, key_segments) as in the public functions, or None.
        prefix: (prefix_key, prefix_value) as in the public functions, or None.
        scale, dropout_p, seed: factor of the products, probability of dropping a weight, (1,) int64.
    """
    batch, heads, height, width, _ = query.shape
    queries, keys = height * width, key.shape[2] * key.shape[3]
    scaled = query.flatten(2, 3) * scale
    logits = (scaled @ key.flatten(2, 3).transpose(-1, -2)).view(batch, heads, queries, *key.shape[2:4])
    for term in bias:
        logits = logits + term
    logits, value = logits.flatten(3), value.flatten(2, 3)
    hidden = None
    if segments is not None:
        hidden = ~same_segment(*segments, batch)[:, None]
        logits = logits.masked_fill(hidden, float("-inf"))
    if prefix is not None:
        prefix_key, prefix_value = prefix
        logits = torch.cat((logits, scaled @ prefix_key.transpose(-1, -2)), -1)
        value = torch.cat((value, prefix_value), 2)
        keys += prefix_key.shape[2]

    weights = attention_weights(logits, hidden)
    if dropout_p > 0.0:
        keep = keep_mask(seed, batch * heads * queries, keys, dropout_p).view(weights.shape)
        weights = torch.where(keep, weights / (1.0 - dropout_p), torch.zeros_like(weights))
    return (weights.to(value.dtype) @ value).view(batch, heads, height, width, value.shape[-1])


def decomposed_bias_attention(
    query, key, value, bias_h, bias_w, segments=None, prefix=None, *, scale, dropout_p=0.0, seed=None
):
    """Attention whose logits carry a row term and a column term; shapes as in the public function."""
    terms = []
    if bias_h is not None:
        terms.append(bias_h.flatten(2, 3).unsqueeze(-1))
    if bias_w is not None:
        terms.append(bias_w.flatten(2, 3).unsqueeze(-2))
    return attention(query, key, value, terms, segments, prefix, scale=scale, dropout_p=dropout_p, seed=seed)


def rel_attention_2d(
    query, key, value, rel_h, rel_w, segments=None, prefix=None, *, scale, rel_scale, index, dropout_p=0.0, seed=None
):  # fmt: skip
    """Attention with logits scale*q.k + rel_scale*(q.rel_h + q.rel_w); shapes as in the public function."""
    bias_h, bias_w = relative_logits(query, rel_h, rel_w, key.shape[2:4], rel_scale, index)
    return decomposed_bias_attention(
        query, key, value, bias_h, bias_w, segments, prefix, scale=scale, dropout_p=dropout_p, seed=seed
    )


def bias_attention_2d(
    query, key, value, bias_table, segments=None, prefix=None, *, scale, index, dropout_p=0.0, seed=None
):  # fmt: skip
    """Attention with logits scale*q.k + bias_table[head, i(yq, yk), i(xq, xk)]; shapes as in the public function."""
    bias = table_logits(bias_table, query.shape[2:4], key.shape[2:4], index).unflatten(-1, key.shape[2:4])
    return attention(query, key, value, [bias], segments, prefix, scale=scale, dropout_p=dropout_p, seed=seed)
