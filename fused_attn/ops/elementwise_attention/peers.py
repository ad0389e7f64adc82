"""What a user would otherwise write: eager PyTorch at its leanest, and ``torch.compile`` of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer


def _softmax(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    def run(x, weight_row=None, weight_col=None, log=False):
        if weight_row is None:
            return x.log_softmax(3) + x.log_softmax(2) if log else x.softmax(3) * x.softmax(2)
        x = x.unsqueeze(1)
        return (x * weight_row).softmax(4) * (x * weight_col).softmax(3)

    return run


def _attention(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """Heads in one batched expression; the published code loops over them."""

    def run(x, weight_row, weight_col, training=True, eps=1e-5):
        x = x.unsqueeze(1)
        product = (x * weight_row).softmax(4) * (x * weight_col).softmax(3)
        normalised = F.batch_norm(product.flatten(1, 2), None, None, training=training, eps=eps)
        return (normalised.view(product.shape) * x).flatten(1, 2)

    return run


def _compiled(build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]):
    """``torch.compile`` of another peer, specialised to the shape."""
    return lambda inputs: torch.compile(build(inputs), fullgraph=True, dynamic=False)


SOFTMAX_PEERS = (Peer("eager", _softmax), Peer("torch.compile of eager", _compiled(_softmax)))
ATTENTION_PEERS = (Peer("eager", _attention), Peer("torch.compile of eager", _compiled(_attention)))
