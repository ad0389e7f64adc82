"""What a user would otherwise write for the two ops: each exact, and as fast as it can be.

Equal query and key grids, shared tables, the ``key_minus_query`` index and default scales, as in the benchmark shapes.
Each is written once, on finished row and column logits; for ``rel_attention_2d`` they are formed from the tables
first, within the timed call.  Index tables and one-hot features are made once, in ``build``, outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer, compiled
from .reference import relative_index

#: Made from the inputs of a call: (query * scale, key, value, bias_h, bias_w) -> out.
Attention = Callable[[Mapping[str, Any]], Callable[..., Tensor]]


def _eager(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The logits in one buffer, softmax, product.  Leaner than the reference: no rule for masked queries."""

    def run(scaled, key, value, bias_h, bias_w):
        scores = (scaled.flatten(2, 3) @ key.flatten(2, 3).transpose(-1, -2)).unflatten(-1, key.shape[2:4])
        scores += bias_h.flatten(2, 3).unsqueeze(-1)
        scores += bias_w.flatten(2, 3).unsqueeze(-2)
        return (scores.flatten(-2).softmax(-1) @ value.flatten(2, 3)).unflatten(2, scaled.shape[2:4])

    return run


def _sdpa_dense_bias(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    def run(scaled, key, value, bias_h, bias_w):
        bias = (bias_h.unsqueeze(-1) + bias_w.unsqueeze(-2)).flatten(4).flatten(2, 3)
        queries, keys, values = (tensor.flatten(2, 3) for tensor in (scaled, key, value))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        return out.unflatten(2, scaled.shape[2:4])

    return run


def _sdpa_concatenated(inputs: Mapping[str, Any], pad: bool = True) -> Callable[..., Tensor]:
    """q' = [q * scale, bias_h, bias_w], k' = [k, one-hot row, one-hot column]: the logits as one inner product.

    With ``pad`` all depths are padded to one multiple of 8 with zeros: the fused kernels ask for equal depths, and
    without them SDPA forms the N x N map, which is faster all the same where it is small.
    """
    query, value = inputs["query"], inputs["value"]
    batch, heads, height, width, d_k = query.shape
    d_v, depth = value.shape[-1], d_k + height + width
    padding = -(-max(depth, d_v) // 8) * 8 - depth if pad else 0
    rows = torch.eye(height, dtype=query.dtype, device=query.device).repeat_interleave(width, 0)
    columns = torch.eye(width, dtype=query.dtype, device=query.device).repeat(height, 1)
    one_hot = F.pad(torch.cat((rows, columns), -1), (0, padding)).expand(batch, heads, -1, -1)

    def run(scaled, key, value, bias_h, bias_w):
        features = F.pad(torch.cat((scaled, bias_h, bias_w), -1).flatten(2, 3), (0, padding))
        keys = torch.cat((key.flatten(2, 3), one_hot), -1)
        values = value.flatten(2, 3)
        if pad:
            values = F.pad(values, (0, depth + padding - d_v))
        out = F.scaled_dot_product_attention(features, keys, values, scale=1.0)
        return out[..., :d_v].unflatten(2, (height, width))

    return run


def _flex(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """FlexAttention whose score function captures the logits: nothing N x N, but atomics in their gradients."""
    from torch.nn.attention.flex_attention import flex_attention

    width = inputs["query"].shape[3]

    # On the CPU, Inductor lowers it only if its inputs are those of the graph: the logits are formed outside.
    @partial(torch.compile, fullgraph=True, dynamic=False)
    def attention(queries, keys, values, rows, columns):
        def add_logits(score, batch, head, query_index, key_index):
            row = rows[batch, head, query_index, key_index // width]
            return score + row + columns[batch, head, query_index, key_index % width]

        return flex_attention(queries, keys, values, score_mod=add_logits, scale=1.0)

    def run(*tensors):
        return attention(*(tensor.flatten(2, 3) for tensor in tensors)).unflatten(2, tensors[0].shape[2:4])

    return run


def _segment_anything_fast(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """SAM's Triton kernel; it is written for 64x64 positions, depth 64 and half precision."""
    query, value = inputs["query"], inputs["value"]
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        raise NotImplementedError("it computes float16 and bfloat16 on CUDA only")
    if query.shape[2:] != (64, 64, 64) or value.shape[-1] != 64:
        raise NotImplementedError("it computes 64x64 positions of depth 64 only")
    from segment_anything_fast import flash_4

    # Tunes anew; otherwise it would unpickle a file from the working directory.
    flash_4.BEST_CONFIGS = {}

    def run(scaled, key, value, bias_h, bias_w):
        logits = torch.cat((bias_h, bias_w), -1).flatten(2, 3)
        queries, keys, values = (tensor.flatten(2, 3) for tensor in (scaled, key, value))
        out = torch.ops.customflash.custom_flash_aligned(queries, keys, values, logits, 1.0)
        return out.unflatten(2, scaled.shape[2:4])

    return run


# --- the two ops ------------------------------------------------------------------------------------------------


def _with_tables(build: Attention, inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """``rel_attention_2d`` on top of an attention with finished logits."""
    attention, (height, width, d_k) = build(inputs), inputs["query"].shape[2:]
    device = inputs["query"].device
    index_h = relative_index(height, height, "key_minus_query", device)
    index_w = relative_index(width, width, "key_minus_query", device)

    def run(query, key, value, rel_h, rel_w):
        scaled = query * d_k**-0.5
        bias_h = torch.einsum("bhyxd,ykd->bhyxk", scaled, rel_h[index_h])
        bias_w = torch.einsum("bhyxd,xkd->bhyxk", scaled, rel_w[index_w])
        return attention(scaled, key, value, bias_h, bias_w)

    return run


def _with_logits(build: Attention, inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """``decomposed_bias_attention``: the logits are there."""
    attention, scale = build(inputs), inputs["query"].shape[-1] ** -0.5
    return lambda query, key, value, bias_h, bias_w: attention(query * scale, key, value, bias_h, bias_w)


def _peers(op: Callable[[Attention, Mapping[str, Any]], Callable[..., Tensor]]) -> tuple[Peer, ...]:
    def plain(build: Attention):
        return partial(op, build)

    return (
        Peer("eager", plain(_eager)),
        Peer("torch.compile of eager", compiled(plain(_eager))),
        Peer("SDPA, dense bias", plain(_sdpa_dense_bias)),
        Peer("SDPA, concatenated features", plain(_sdpa_concatenated)),
        Peer("SDPA, concatenated, unpadded", plain(partial(_sdpa_concatenated, pad=False))),
        Peer("SDPA, concatenated, compiled", compiled(plain(_sdpa_concatenated))),
        Peer("FlexAttention, compiled", plain(_flex), forward_only=("cpu",)),
        Peer(
            "segment-anything-fast",
            plain(_segment_anything_fast),
            requires={
                "segment_anything_fast": "pip install git+https://github.com/pytorch-labs/segment-anything-fast.git"
            },
            forward_only=("cpu", "cuda"),
        ),
    )


REL_PEERS = _peers(_with_tables)
BIAS_PEERS = _peers(_with_logits)
