"""Plain PyTorch, in any dtype on any device: the oracle of the kernels, and what runs where they cannot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def layer_weights(query: Tensor, keys: Sequence[Tensor], bias: Tensor | None, scale: float, sigmoid: bool) -> Tensor:
    """(B, G, L): softmax or sigmoid over layers of ``scale * query.key_l + bias_l``."""
    scores = scale * torch.stack([(query * key).sum(-1) for key in keys], dim=-1)
    if bias is not None:
        scores = scores + bias.t()
    return scores.sigmoid() if sigmoid else scores.softmax(-1)


def weighted_layer_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    """(B, C, *spatial): sum over layers of ``weights[b, g(c), l] * values[l][b, c]``, one addition per layer."""
    batch, channels, *spatial = values[0].shape
    spread = weights.repeat_interleave(channels // weights.shape[1], dim=1)
    spread = spread.view(batch, channels, *(1 for _ in spatial), len(values))
    out = spread[..., 0] * values[0]
    for layer, value in enumerate(values[1:], start=1):
        out = out + spread[..., layer] * value
    return out


def layer_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Tensor | None,
    scale: float,
    sigmoid: bool,
) -> Tensor:
    # A float32 bias makes float32 weights.
    weights = layer_weights(query, keys, bias, scale, sigmoid).to(values[0].dtype)
    return weighted_layer_sum(weights, values)
