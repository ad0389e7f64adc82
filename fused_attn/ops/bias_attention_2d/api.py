"""Public function: check, choose, run.  The operators and their kernels are those of rel_attention_2d."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf, pinned
from ..rel_attention_2d import api as shared


@leaf
def bias_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_table: Tensor,
    *,
    index: str = "query_minus_key",
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Compute attention over a 2D grid with a free bias for every head and every relative position.

    ``out[q] = sum_k softmax_k(scale * query[q].key[k] + bias_table[head, i(yq, yk), i(xq, xk)]) value[k]`` for every
    query ``q = (yq, xq)`` over all keys ``k = (yk, xk)`` of its segment, and over the prefix keys, which have no bias.

    Args:
        query: (B, heads, Hq, Wq, d_k), float32, float16 or bfloat16 (float64: reference only).  Any strides.
        key: (B, heads, Hk, Wk, d_k), dtype of ``query``.
        value: (B, heads, Hk, Wk, d_v), dtype of ``query``.
        bias_table: (heads, Hq+Hk-1, Wq+Wk-1), dtype of ``query``, or float32.  Unscaled.
        index: place in the table that belongs to (query position q, key position k) along an axis with Lq and Lk
            positions.  ``"query_minus_key"``: q - k + Lk - 1 (Swin, MaxViT, CoAtNet; LeViT's offsets, mirrored).
            ``"key_minus_query"``: k - q + Lq - 1.
        query_segments: (S, Hq, Wq), int32, on the device of ``query``; S divides B, and image b has the segments
            b mod S: the order of Swin's windows.  A query attends to the keys of its own segment alone.
        key_segments: (S, Hk, Wk), int32, likewise; both are given or neither.  A key of a negative segment is padding:
            no query attends to it.  The values of hidden keys must be finite, as 0 * NaN is NaN in the output.
        prefix_key: (B, heads, P, d_k), dtype of ``query``: further keys that every query attends to, whatever its
            segment, with logits of ``scale * query.key`` and no bias; class tokens, say.
        prefix_value: (B, heads, P, d_v), their values; both are given or neither.
        scale: factor of the content term; ``d_k**-0.5`` when None.  A number, as in
            :func:`~fused_attn.rel_attention_2d`.
        dropout_p: probability of dropping an attention weight, in [0, 1); as in
            :func:`~fused_attn.rel_attention_2d`.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, heads, Hq, Wq, d_v), dtype of ``query``, in the memory order of ``query``.

    Raises:
        TypeError: an argument is not a tensor, not of a floating-point dtype, or segments are not int32.
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach query, key, value, bias_table, prefix_key and prefix_value; they are computed without atomics and
    are bitwise the same at every run and number of threads; those of the table are summed in float32 whatever the
    dtype.  A query without a key to attend to yields zeros, and zero gradients.  Under autocast the inputs are cast to
    the autocast dtype, but for ``bias_table``.

    Source: Liu et al. 2021, "Swin Transformer", eq. 4; Dai et al. 2021, "CoAtNet", eq. 3.
    """
    return run(
        impl, query, key, value, bias_table, query_segments, key_segments, prefix_key, prefix_value, scale, index,
        dropout_p,
    )[0]  # fmt: skip


def _check(
    query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor,
    query_segments: Tensor | None, key_segments: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None,
    scale: object, index: str, dropout_p: object,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments of the operator."""
    segments, scale, key_minus_query, dropout_p = shared.check_attention(
        query, key, value, query_segments, key_segments, prefix_key, prefix_value, scale, index, dropout_p
    )
    checks.tensor("bias_table", bias_table)
    heads, height, width = query.shape[1:4]
    shape = (heads, max(height + key.shape[2] - 1, 0), max(width + key.shape[3] - 1, 0))
    if bias_table.shape != shape:
        raise ValueError(f"bias_table must have shape (heads, Hq+Hk-1, Wq+Wk-1)={shape}, got {tuple(bias_table.shape)}")
    return (
        *map(pinned, (query, key, value)), None, None, pinned(bias_table, 0), *segments, pinned(prefix_key),
        pinned(prefix_value), scale, 1.0, key_minus_query, dropout_p,
    )  # fmt: skip


run = shared.op.rel_attention_2d.public(_check, op="bias_attention_2d")
