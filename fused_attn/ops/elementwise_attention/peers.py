"""What a user would otherwise write: eager PyTorch at its leanest, and ``torch.compile`` of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer, compiled


def _softmax(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    def run(x, weight_row=None, weight_col=None, row_mask=None, col_mask=None, temperature=1.0, log=False):
        if weight_row is None:
            x = x if temperature == 1.0 else x / temperature
            excluded = _excluded(row_mask, col_mask)
            if excluded is not None:
                # Finite, as LoFTR's -1e9: softmax over a whole row of -inf is NaN.
                x = x.masked_fill(excluded, torch.finfo(x.dtype).min)
            out = x.log_softmax(3) + x.log_softmax(2) if log else x.softmax(3) * x.softmax(2)
            return out if excluded is None else out.masked_fill(excluded, float("-inf") if log else 0.0)
        x = x.unsqueeze(1)
        return (x * weight_row).softmax(4) * (x * weight_col).softmax(3)

    return run


def _excluded(row_mask: Tensor | None, col_mask: Tensor | None) -> Tensor | None:
    """Pairs of which one takes no part, to broadcast to (B, C, H, W); None: there are none."""
    rows = None if row_mask is None else ~row_mask[:, None, :, None]
    cols = None if col_mask is None else ~col_mask[:, None, None]
    return cols if rows is None else rows if cols is None else rows | cols


def _attention(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Heads in one batched expression; the published code loops over them."""

    def run(x, weight_row, weight_col, training=True, eps=1e-5):
        x = x.unsqueeze(1)
        product = (x * weight_row).softmax(4) * (x * weight_col).softmax(3)
        normalised = F.batch_norm(product.flatten(1, 2), None, None, training=training, eps=eps)
        return (normalised.view(product.shape) * x).flatten(1, 2)

    return run


SOFTMAX_PEERS = (Peer("eager", _softmax), Peer("torch.compile of eager", compiled(_softmax)))
ATTENTION_PEERS = (Peer("eager", _attention), Peer("torch.compile of eager", compiled(_attention)))
