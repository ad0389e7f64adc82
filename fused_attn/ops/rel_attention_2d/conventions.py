"""Relative positions as other code bases define them.

Which arguments of :func:`~fused_attn.rel_attention_2d` reproduce which code base, with its learnt tables unchanged
(L = 2 * size - 1 rows along each axis)::

    Bello et al. (AA-Conv), BoTNet's reference, lucidrains:  index="key_minus_query"                    (the defaults)
    timm BottleneckAttn, HaloAttn, scale_pos_embed=True:     index="key_minus_query"
    timm BottleneckAttn, HaloAttn, scale_pos_embed=False:    index="key_minus_query", rel_scale=1.0     (timm's default)
    SAM, ViTDet, MViTv2, equal grids and full tables:        index="query_minus_key", rel_scale=1.0

In the last family the tables may have another length than the grids ask for, and the key grid may be smaller than
the query grid (MViTv2 pools the keys).  :func:`~fused_attn.sam_relative_logits` covers both::

    bias_h, bias_w = sam_relative_logits(query, rel_h, rel_w, key.shape[2:4])
    out = decomposed_bias_attention(query, key, value, bias_h, bias_w)

Swin's bias is a free table over pairs (dy, dx), not the sum of a row and a column term: see
:func:`~fused_attn.bias_attention_2d`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._floor import checks, dispatch
from .._floor.positions import Positions
from .._floor.tracing import leaf


@leaf
def sam_relative_logits(
    query: Tensor, rel_h: Tensor, rel_w: Tensor, key_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Compute the row and column logits of SAM, ViTDet and MViTv2 for :func:`~fused_attn.decomposed_bias_attention`.

    ``bias_h[b, n, y, x, k] = query[b, n, y, x] . table_h[trunc(y * max(Hk/Hq, 1) + (Hk - 1 - k) * max(Hq/Hk, 1))]``,
    where ``table_h`` is ``rel_h`` resized linearly to 2 * max(Hq, Hk) - 1 rows if it has another number of them;
    ``bias_w`` likewise.  The query is not scaled.

    Args:
        query: (B, heads, Hq, Wq, d_k), floating point.
        rel_h: (L, d_k), any L >= 1, or (heads, L, d_k); dtype of ``query``.
        rel_w: (L', d_k) or (heads, L', d_k), likewise.
        key_size: (Hk, Wk), the grid of the keys.

    Returns:
        bias_h (B, heads, Hq, Wq, Hk) and bias_w (B, heads, Hq, Wq, Wk), dtype of ``query``.  Gradients reach ``query``
        and both tables.

    Raises:
        TypeError: ``query`` or a table is not a floating-point tensor.
        ValueError: ``query`` does not have 5 dimensions or has no position, a table does not fit its shape, dtype or
            device, or ``key_size`` is not two positive sizes.

    Under autocast the products are computed in the autocast dtype, as by ``torch.einsum``; tables may be float32.

    Source: Li et al. 2022, "MViTv2", section 4.1; Kirillov et al. 2023, "Segment Anything", whose code resizes.
    """
    checks.tensors(query=query, rel_h=rel_h, rel_w=rel_w)
    if query.dim() != 5:
        raise ValueError(f"query must have 5 dimensions (B, heads, Hq, Wq, d_k), got shape {tuple(query.shape)}")
    if query.shape[2] < 1 or query.shape[3] < 1:
        raise ValueError(f"query must have at least one position, got shape {tuple(query.shape)}")
    if not isinstance(key_size, (list, tuple)) or len(key_size) != 2 or not all(map(_is_positive_size, key_size)):
        raise ValueError(f"key_size must be two positive sizes (Hk, Wk), got {key_size}")
    heads, height, width, depth = query.shape[1:]
    for name, table in (("rel_h", rel_h), ("rel_w", rel_w)):
        if (
            table.dim() not in (2, 3)
            or table.shape[-1] != depth
            or table.shape[0] == 0
            or (table.dim() == 3 and table.shape[0] != heads)
        ):
            raise ValueError(
                f"{name} must have shape (L, d_k)=(L, {depth}) or (heads, L, d_k)=({heads}, L, {depth}), "
                f"got {tuple(table.shape)}"
            )
    # What einsum will multiply.
    cast_query, *tables = dispatch.autocast(query, rel_h, rel_w)
    for name, table in zip(("rel_h", "rel_w"), tables, strict=True):
        if table.dtype != cast_query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {cast_query.dtype}, got {table.dtype}")
        if table.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {table.device}")
    rows = _rows(rel_h, height, key_size[0]).expand(heads, -1, -1, -1)
    columns = _rows(rel_w, width, key_size[1]).expand(heads, -1, -1, -1)
    bias_h = torch.einsum("bnyxd,nykd->bnyxk", query, rows)
    bias_w = torch.einsum("bnyxd,nxkd->bnyxk", query, columns)
    return bias_h, bias_w


def _is_positive_size(size: object) -> bool:
    return isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) and size >= 1


def _rows(table: Tensor, queries: int, keys: int) -> Tensor:
    """Row of the resized table for every pair along one axis: (queries, keys, d_k) or (heads, queries, keys, d_k)."""
    length = 2 * max(queries, keys) - 1
    # Whatever its number of rows, the table counts as positions of a map.
    table = Positions((table.shape[-2],), -2, "linear", relative=False).resized(table, (length,))
    # float32, as in those code bases: with other precision a coordinate just below an integer truncates differently.
    query_ratio, key_ratio = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q = torch.arange(queries, device=table.device, dtype=torch.float32)[:, None] * query_ratio
    k = torch.arange(keys, device=table.device, dtype=torch.float32)[None, :] * key_ratio
    return table[..., (q - k + (keys - 1) * key_ratio).long(), :]
