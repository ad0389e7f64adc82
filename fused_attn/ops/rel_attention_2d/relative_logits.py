"""Relative position tables to row or column logits and back, as a few small matrix products in PyTorch.

The logits of one axis are (B, heads, Hq, Wq, Lk), O(N*(H+W)) in all, never N x N.  The windows of the table that
belong to each query position come from ``Tensor.unfold``: no gather, and in the backward no scatter and no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: (query dimension that the axis runs along) -> its letter in the einsum equations below.
_LETTER = {2: "y", 3: "x"}


def relative_logits(query: Tensor, table: Tensor, key_length: int, axis: int, key_minus_query: bool) -> Tensor:
    """Compute ``query[b, h, y, x] . table[i(position, k)]`` for every position k of the keys along one axis.

    Args:
        query: (B, heads, Hq, Wq, d_k), any strides.
        table: (Lq+Lk-1, d_k) or (heads, Lq+Lk-1, d_k).
        key_length: Lk, the key grid's extent along the axis.
        axis: 2 for the rows (Lq = Hq, position = y), 3 for the columns (Lq = Wq, position = x).
        key_minus_query: index convention, see :func:`..api.rel_attention_2d`.

    Returns:
        (B, heads, Hq, Wq, Lk), dtype of ``query``, unscaled.
    """
    windows = _windows(table, key_length, key_minus_query)
    return torch.einsum(f"bhyxd,{_subscripts(table, axis)}->bhyxk", query, windows)


def relative_logits_backward(
    grad_logits: Tensor, query: Tensor, table: Tensor, axis: int, key_minus_query: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`relative_logits` with respect to ``query`` and ``table``, bitwise reproducible.

    Args:
        grad_logits: (B, heads, Hq, Wq, Lk).

    Returns:
        grad_query like ``query``, grad_table like ``table``.
    """
    subscripts = _subscripts(table, axis)
    windows = _windows(table, grad_logits.shape[-1], key_minus_query)
    grad_query = torch.einsum(f"bhyxk,{subscripts}->bhyxd", grad_logits, windows)
    grad_windows = torch.einsum(f"bhyxk,bhyxd->{subscripts}", grad_logits, query)
    return grad_query, _sum_windows(grad_windows, key_minus_query).to(table.dtype)


def _subscripts(table: Tensor, axis: int) -> str:
    return ("h" if table.dim() == 3 else "") + _LETTER[axis] + "dk"


def _windows(table: Tensor, key_length: int, key_minus_query: bool) -> Tensor:
    """(..., Lq, d, Lk): the table row of every (query position, key position)."""
    if key_minus_query:
        # Row k - q + Lq-1: query q sees the window that starts at Lq-1-q.
        return table.unfold(-2, key_length, 1).flip(-3)
    # Row q - k + Lk-1: query q sees the window that starts at q, backwards.
    return table.unfold(-2, key_length, 1).flip(-1)


def _sum_windows(grad_windows: Tensor, key_minus_query: bool) -> Tensor:
    """Adjoint of :func:`_windows`, summed in float32 in the order of the query positions."""
    grad = grad_windows.flip(-3 if key_minus_query else -1).transpose(-1, -2).float()
    queries, keys = grad.shape[-3:-1]
    # Window i, element k belongs to table row i+k.  Rows padded to queries+keys and read back with length
    # queries+keys-1 move one place to the right each, which puts i+k in one column.
    skewed = torch.nn.functional.pad(grad, (0, 0, 0, queries)).flatten(-3, -2)
    length = queries + keys - 1
    return skewed[..., : queries * length, :].unflatten(-2, (queries, length)).sum(-3)
