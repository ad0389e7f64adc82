"""What a user would otherwise write for ``layer_attention``: each exact, differentiable, and as fast as it can be."""

from __future__ import annotations

import torch

from .._floor.declarations import Peer, compiled, given


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
    Peer("published (cat, einsum)", given(_published)),
    Peer("torch.compile of published", compiled(given(_published))),
    Peer("loop over layers", given(_loop)),
    Peer("torch.compile of the loop", compiled(given(_loop))),
)
SUM_PEERS = (
    Peer("stack, einsum", given(_sum_einsum)),
    Peer("torch.compile of stack, einsum", compiled(given(_sum_einsum))),
    Peer("loop over layers", given(_sum_loop)),
    Peer("torch.compile of the loop", compiled(given(_sum_loop))),
)
