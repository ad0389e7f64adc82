"""What a user would otherwise write for ``rel_attention_2d``: each exact, differentiable, and as fast as it can be.

Equal query and key grids, shared tables, the ``key_minus_query`` index and default scales, as in the benchmark shapes.
Index tables and one-hot features are made once, in ``build``, outside the timed call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Peer
from .reference import rel_attention_2d, relative_index


def _eager(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    scale = inputs["query"].shape[-1] ** -0.5

    def run(query, key, value, rel_h, rel_w):
        return rel_attention_2d(query, key, value, rel_h, rel_w, scale, scale, "key_minus_query")

    return run


def _compiled(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    return torch.compile(_eager(inputs), fullgraph=True, dynamic=False)


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


def _sdpa_concatenated(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """q' = [q * scale, q.rel_h, q.rel_w], k' = [k, one-hot row, one-hot column]: the logits as one inner product.

    All depths are padded to one multiple of 8 with zeros: the fused kernels ask for equal depths, and without them
    SDPA forms the N x N map.
    """
    query, value = inputs["query"], inputs["value"]
    batch, heads, height, width, d_k = query.shape
    d_v, logits, scale = value.shape[-1], _logits(inputs), d_k**-0.5
    depth = -(-max(d_k + height + width, d_v) // 8) * 8
    rows = torch.eye(height, dtype=query.dtype, device=query.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=query.dtype, device=query.device).repeat(height, 1)
    one_hot = F.pad(torch.cat((rows, columns), -1), (0, depth - d_k - height - width)).expand(batch, heads, -1, -1)

    def run(query, key, value, rel_h, rel_w):
        scaled = query * scale
        bias_h, bias_w = logits(scaled, rel_h, rel_w)
        features = F.pad(torch.cat((scaled, bias_h, bias_w), -1).flatten(2, 3), (0, depth - d_k - height - width))
        keys = torch.cat((key.flatten(2, 3), one_hot), -1)
        values = F.pad(value.flatten(2, 3), (0, depth - d_v))
        out = F.scaled_dot_product_attention(features, keys, values, scale=1.0)
        return out[..., :d_v].unflatten(2, (height, width))

    return run


PEERS = (
    Peer("eager", _eager),
    Peer("torch.compile of eager", _compiled),
    Peer("SDPA, dense bias", _sdpa_dense_bias),
    Peer("SDPA, concatenated features", _sdpa_concatenated),
)
