"""What a user would otherwise write for ``rel_attention_2d``: each exact, differentiable, and as fast as it can be.

Equal query and key grids, shared tables, the ``key_minus_query`` index and default scales, as in the benchmark shapes.
Index tables and one-hot features are made once, in ``build``, outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Peer
from .reference import relative_index


def _logits(inputs: Mapping[str, Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(scaled query, tables) -> row and column logits."""
    height, width = inputs["query"].shape[2:4]
    device = inputs["query"].device
    index_h = relative_index(height, height, "key_minus_query", device)
    index_w = relative_index(width, width, "key_minus_query", device)

    def run(query, rel_h, rel_w):
        bias_h = torch.einsum("bhyxd,ykd->bhyxk", query, rel_h[index_h])
        bias_w = torch.einsum("bhyxd,xkd->bhyxk", query, rel_w[index_w])
        return bias_h, bias_w

    return run


def _eager(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The logits in one buffer, softmax, product.  Leaner than the reference: no rule for masked queries."""
    logits, scale = _logits(inputs), inputs["query"].shape[-1] ** -0.5

    def run(query, key, value, rel_h, rel_w):
        scaled = query * scale
        bias_h, bias_w = logits(scaled, rel_h, rel_w)
        scores = (scaled.flatten(2, 3) @ key.flatten(2, 3).transpose(-1, -2)).unflatten(-1, key.shape[2:4])
        scores += bias_h.flatten(2, 3).unsqueeze(-1)
        scores += bias_w.flatten(2, 3).unsqueeze(-2)
        return (scores.flatten(-2).softmax(-1) @ value.flatten(2, 3)).unflatten(2, query.shape[2:4])

    return run


def _compiled(build: Callable[[Mapping[str, Any]], Callable[..., Tensor]]):
    """``torch.compile`` of another peer, specialised to the shape."""
    return lambda inputs: torch.compile(build(inputs), fullgraph=True, dynamic=False)


def _sdpa_dense_bias(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    logits, scale = _logits(inputs), inputs["query"].shape[-1] ** -0.5

    def run(query, key, value, rel_h, rel_w):
        bias_h, bias_w = logits(query * scale, rel_h, rel_w)
        bias = (bias_h.unsqueeze(-1) + bias_w.unsqueeze(-2)).flatten(4).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3), attn_mask=bias, scale=scale
        )
        return out.unflatten(2, query.shape[2:4])

    return run


def _sdpa_concatenated(inputs: Mapping[str, Any], pad: bool = True) -> Callable[..., Tensor]:
    """q' = [q * scale, q.rel_h, q.rel_w], k' = [k, one-hot row, one-hot column]: the logits as one inner product.

    With ``pad`` all depths are padded to one multiple of 8 with zeros: the fused kernels ask for equal depths, and
    without them SDPA forms the N x N map, which is faster all the same where it is small.
    """
    query, value = inputs["query"], inputs["value"]
    batch, heads, height, width, d_k = query.shape
    d_v, logits, scale = value.shape[-1], _logits(inputs), d_k**-0.5
    depth = d_k + height + width
    padding = -(-max(depth, d_v) // 8) * 8 - depth if pad else 0
    rows = torch.eye(height, dtype=query.dtype, device=query.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=query.dtype, device=query.device).repeat(height, 1)
    one_hot = F.pad(torch.cat((rows, columns), -1), (0, padding)).expand(batch, heads, -1, -1)

    def run(query, key, value, rel_h, rel_w):
        scaled = query * scale
        bias_h, bias_w = logits(scaled, rel_h, rel_w)
        features = F.pad(torch.cat((scaled, bias_h, bias_w), -1).flatten(2, 3), (0, padding))
        keys = torch.cat((key.flatten(2, 3), one_hot), -1)
        values = value.flatten(2, 3)
        if pad:
            values = F.pad(values, (0, depth + padding - d_v))
        out = F.scaled_dot_product_attention(features, keys, values, scale=1.0)
        return out[..., :d_v].unflatten(2, (height, width))

    return run


PEERS = (
    Peer("eager", _eager),
    Peer("torch.compile of eager", _compiled(_eager)),
    Peer("SDPA, dense bias", _sdpa_dense_bias),
    Peer("SDPA, concatenated features", _sdpa_concatenated),
    Peer("SDPA, concatenated, unpadded", partial(_sdpa_concatenated, pad=False)),
    Peer("SDPA, concatenated, compiled", _compiled(_sdpa_concatenated)),
)
