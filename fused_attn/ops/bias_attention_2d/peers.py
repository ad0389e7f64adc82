"""What a user would otherwise write: each exact, and as fast as it can be.

Equal query and key grids, the ``query_minus_key`` index and default scales, as in the benchmark shapes.  Index tables
and masks of segments are made once, in ``build``, outside the timed call; the biases of a head, which change with the
table, within it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._floor.declarations import Peer, compiled
from ..rel_attention_2d.reference import relative_index, same_segment


def _biases(inputs: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """bias_table -> (1 or S, heads, N, N), -inf between segments.

    ``index_select`` along one axis, for its gradient: that of an index takes twice as long at 14x14 keys, and 50 times
    as long at 7x7.
    """
    query, segments = inputs["query"], inputs.get("query_segments")
    height, width = query.shape[2:4]
    rows, columns = (relative_index(length, length, "query_minus_key", query.device) for length in (height, width))
    index = (rows[:, None, :, None] * (2 * width - 1) + columns[None, :, None, :]).flatten()
    mask = None
    if segments is not None:
        apart = ~same_segment(segments, inputs["key_segments"], len(segments))[:, None]
        mask = torch.zeros(apart.shape, dtype=query.dtype, device=query.device).masked_fill(apart, float("-inf"))

    def run(bias_table: Tensor) -> Tensor:
        bias = bias_table.flatten(1).index_select(1, index).view(1, -1, height * width, height * width)
        return bias if mask is None else bias + mask

    return run


def _eager(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """The logits in one buffer, softmax, product.  Leaner than the reference: no rule for masked queries."""
    biases = _biases(inputs)

    def run(query, key, value, bias_table, **_):
        bias = biases(bias_table)
        scores = query.flatten(2, 3) * query.shape[-1] ** -0.5 @ key.flatten(2, 3).mT
        scores.unflatten(0, (-1, len(bias))).add_(bias)
        return (scores.softmax(-1) @ value.flatten(2, 3)).unflatten(2, query.shape[2:4])

    return run


def _sdpa_dense_bias(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    biases, batch = _biases(inputs), len(inputs["query"])

    def run(query, key, value, bias_table, **_):
        bias = biases(bias_table)
        if len(bias) > 1:
            bias = bias.expand(batch // len(bias), -1, -1, -1, -1).flatten(0, 1)
        queries, keys, values = (tensor.flatten(2, 3) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias).unflatten(2, query.shape[2:4])

    return run


def _flex(inputs: Mapping[str, Any]) -> Callable[..., Tensor]:
    """FlexAttention whose score function reads the table: nothing N x N, but atomics in the table's gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    segments = inputs.get("query_segments")
    height, width = inputs["query"].shape[2:4]

    # On the CPU, Inductor lowers it only if its inputs are those of the graph.
    @partial(torch.compile, fullgraph=True, dynamic=False)
    def attention(queries, keys, values, table, query_segments, key_segments):
        def score_mod(score, batch, head, query_index, key_index):
            row = query_index // width - key_index // width + height - 1
            score = score + table[head, row, query_index % width - key_index % width + width - 1]
            if query_segments is None:
                return score
            image = batch % query_segments.shape[0]
            same = query_segments[image, query_index] == key_segments[image, key_index]
            return torch.where(same, score, float("-inf"))

        return flex_attention(queries, keys, values, score_mod=score_mod)

    parts = () if segments is None else (segments.flatten(1), inputs["key_segments"].flatten(1))

    def run(query, key, value, bias_table, **_):
        flat = (tensor.flatten(2, 3) for tensor in (query, key, value))
        return attention(*flat, bias_table, *(parts or (None, None))).unflatten(2, (height, width))

    return run


PEERS = (
    Peer("eager", _eager),
    Peer("torch.compile of eager", compiled(_eager)),
    Peer("SDPA, dense bias", _sdpa_dense_bias),
    Peer("SDPA, dense bias, compiled", compiled(_sdpa_dense_bias)),
    Peer("FlexAttention, compiled", _flex, forward_only=("cpu",)),
)
