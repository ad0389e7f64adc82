"""What a user would otherwise write for ``layer_attention``: each exact, differentiable, and as fast as it can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._floor.declarations import Peer


def _published(query, keys, values, scale=None, bias=None, activation="softmax"):
    """The formulation of MRLA's authors: keys and values of all layers concatenated, heads in a batched product."""
    batch, channels, *spatial = values[0].shape
    query = query.expand(batch, -1, -1) if query.dim() == 2 else query
    groups, depth = query.shape[1:]
    all_keys = torch.cat([key.unsqueeze(1) for key in keys], dim=1)  # (B, L, G, d)
    all_values = torch.cat([value.unsqueeze(1) for value in values], dim=1)  # (B, L, C, *spatial)
    all_values = all_values.reshape(batch, len(values), groups, -1)
    scores = torch.einsum("bgd,blgd->bgl", query * (depth**-0.5 if scale is None else scale), all_keys)
    if bias is not None:
        scores = scores + bias.t()
    weights = scores.softmax(-1) if activation == "softmax" else scores.sigmoid()
    return torch.einsum("bgl,blgn->bgn", weights, all_values).reshape(batch, channels, *spatial)


def _loop(query, keys, values, scale=None, bias=None, activation="softmax"):
    """A sum over the layers without concatenation: compiled, one pass over all values."""
    batch, channels, *spatial = values[0].shape
    groups, depth = query.shape[-2:]
    scale = depth**-0.5 if scale is None else scale
    scores = torch.stack([(query * key).sum(-1) for key in keys], dim=-1) * scale
    if bias is not None:
        scores = scores + bias.t()
    weights = scores.softmax(-1) if activation == "softmax" else scores.sigmoid()
    shape = (batch, groups, channels // groups, *spatial)
    ones = (1,) * (1 + len(spatial))
    out = 0.0
    for layer, value in enumerate(values):
        out = out + weights[..., layer].view(batch, groups, *ones) * value.reshape(shape)
    return out.reshape(batch, channels, *spatial)


def _as_peer(function: Callable[..., Tensor], compiled: bool) -> Callable[[Mapping[str, Any]], Callable[..., Tensor]]:
    def build(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
        # Dynamic shapes would be a handicap: every shape is compiled by itself.
        return torch.compile(function, dynamic=False) if compiled else function

    return build


def _sum_loop(weights, values):
    """The loop with given weights."""
    batch, channels, *spatial = values[0].shape
    groups = weights.shape[1]
    shape, ones = (batch, groups, channels // groups, *spatial), (1,) * (1 + len(spatial))
    out = 0.0
    for layer, value in enumerate(values):
        out = out + weights[..., layer].view(batch, groups, *ones) * value.reshape(shape)
    return out.reshape(batch, channels, *spatial)


def _sum_einsum(weights, values):
    """All values stacked and multiplied in one batched product."""
    batch, channels, *spatial = values[0].shape
    stacked = torch.stack(values, dim=1).view(batch, len(values), weights.shape[1], -1)
    return torch.einsum("bgl,blgn->bgn", weights, stacked).reshape(batch, channels, *spatial)


ATTENTION_PEERS = (
    Peer("published (cat, einsum)", _as_peer(_published, False)),
    Peer("torch.compile of published", _as_peer(_published, True)),
    Peer("loop over layers", _as_peer(_loop, False)),
    Peer("torch.compile of the loop", _as_peer(_loop, True)),
)
SUM_PEERS = (
    Peer("stack, einsum", _as_peer(_sum_einsum, False)),
    Peer("torch.compile of stack, einsum", _as_peer(_sum_einsum, True)),
    Peer("loop over layers", _as_peer(_sum_loop, False)),
    Peer("torch.compile of the loop", _as_peer(_sum_loop, True)),
)
