"""What a user would otherwise write for ``attention_residual``: exact, differentiable, and as fast as it can be."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._floor.declarations import Peer, compiled, given


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


PEERS = (
    Peer("eager (stack)", given(_stack)),
    Peer("torch.compile of eager", compiled(given(_stack))),
    Peer("stack, products", given(_stack_products)),
    Peer("torch.compile of stack, products", compiled(given(_stack_products))),
    Peer("loop over values", given(_loop)),
    Peer("torch.compile of the loop", compiled(given(_loop))),
)
