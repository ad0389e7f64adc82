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


def decomposed_bias_attention(query, key, value, bias_h, bias_w, scale, dropout_p=0.0, seed=None):
    """Attention whose logits carry a row term and a column term; shapes as in the public function."""
    batch, heads, height, width, _ = query.shape
    key_height, key_width = key.shape[2:4]
    queries, keys = height * width, key_height * key_width

    logits = (query.flatten(2, 3) * scale) @ key.flatten(2, 3).transpose(-1, -2)
    logits = logits.view(batch, heads, queries, key_height, key_width)
    if bias_h is not None:
        logits = logits + bias_h.flatten(2, 3).unsqueeze(-1)
    if bias_w is not None:
        logits = logits + bias_w.flatten(2, 3).unsqueeze(-2)
    logits = logits.flatten(3)

    # A query with no key to attend to (every logit -inf) yields zeros, not NaN.
    masked = (logits == float("-inf")).all(-1, keepdim=True)
    weights = logits.masked_fill(masked, 0.0).softmax(-1).masked_fill(masked, 0.0)
    if dropout_p > 0.0:
        keep = keep_mask(seed, batch * heads * queries, keys, dropout_p).view(weights.shape)
        weights = torch.where(keep, weights / (1.0 - dropout_p), torch.zeros_like(weights))
    out = weights @ value.flatten(2, 3)
    return out.view(batch, heads, height, width, value.shape[-1])


def rel_attention_2d(query, key, value, rel_h, rel_w, scale, rel_scale, index, dropout_p=0.0, seed=None):
    """Attention with logits scale*q.k + rel_scale*(q.rel_h + q.rel_w); shapes as in the public function."""
    bias_h, bias_w = relative_logits(query, rel_h, rel_w, key.shape[2:4], rel_scale, index)
    return decomposed_bias_attention(query, key, value, bias_h, bias_w, scale, dropout_p, seed)
