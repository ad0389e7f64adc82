"""What a user would otherwise write for ``attention_residual``: exact, differentiable, and as fast as it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer


def _stack(values, query, norm_weight=None, eps=1e-6):
    """The formulation of the paper's pseudocode: everything stacked."""
    stacked = torch.stack(values)
    weights = (F.rms_norm(stacked, query.shape, norm_weight, eps) * query).sum(-1).softmax(0)
    return (weights.unsqueeze(-1) * stacked).sum(0)


def _stack_products(values, query, norm_weight=None, eps=1e-6):
    """Stacked, with the norm folded into the logits: two products and a mean square."""
    stacked = torch.stack(values)
    score = query if norm_weight is None else query * norm_weight
    rms = (stacked.square().mean(-1) + eps).rsqrt()
    weights = ((stacked @ score) * rms).softmax(0)
    return torch.einsum("l...,l...d->...d", weights, stacked)


def _loop(values, query, norm_weight=None, eps=1e-6):
    """No stack: logits of every value, then a sum over the values; compiled, two passes over each."""
    score = query if norm_weight is None else query * norm_weight
    logits = [(value * score).sum(-1) * (value.square().mean(-1) + eps).rsqrt() for value in values]
    weights = torch.stack(logits).softmax(0)
    out = 0.0
    for layer, value in enumerate(values):
        out = out + weights[layer].unsqueeze(-1) * value
    return out


def _as_peer(function: Callable[..., Tensor], compiled: bool) -> Callable[[Mapping[str, Any]], Callable[..., Tensor]]:
    def build(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
        # Dynamic shapes would be a handicap: every shape is compiled by itself.
        return torch.compile(function, dynamic=False) if compiled else function

    return build


PEERS = (
    Peer("eager (stack)", _as_peer(_stack, False)),
    Peer("torch.compile of eager", _as_peer(_stack, True)),
    Peer("stack, products", _as_peer(_stack_products, False)),
    Peer("torch.compile of stack, products", _as_peer(_stack_products, True)),
    Peer("loop over values", _as_peer(_loop, False)),
    Peer("torch.compile of the loop", _as_peer(_loop, True)),
)
