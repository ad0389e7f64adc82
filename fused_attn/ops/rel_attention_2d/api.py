"""Public functions: check, choose, run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._floor import checks
from .._floor.tracing import leaf, pinned
from . import op

INDEX = ("key_minus_query", "query_minus_key")


@leaf
def rel_attention_2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    *,
    scale: float | None = None,
    rel_scale: float | None = None,
    index: str = "key_minus_query",
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Compute attention over a 2D grid with decomposed relative position embeddings.

    ``out[q] = sum_k softmax_k(scale * query[q].key[k] + rel_scale * query[q].(rel_h[i(yq, yk)] + rel_w[i(xq, xk)]))
    value[k]`` for every query ``q = (yq, xq)`` over all keys ``k = (yk, xk)``.

    Args:
        query: (B, heads, Hq, Wq, d_k), float32, float16 or bfloat16 (float64: reference only).  Any strides.
        key: (B, heads, Hk, Wk, d_k), dtype of ``query``.
        value: (B, heads, Hk, Wk, d_v), dtype of ``query``.
        rel_h: (Hq+Hk-1, d_k), or (heads, Hq+Hk-1, d_k) for one table per head; dtype of ``query``.
            None: no term along the height.
        rel_w: (Wq+Wk-1, d_k) or (heads, Wq+Wk-1, d_k), likewise along the width.
        scale: factor of the content term; ``d_k**-0.5`` when None.  A number: NumPy's, a symbolic one (computed from
            a dynamic size), or a tensor without dimensions that needs no gradient, which is read on the host.
        rel_scale: factor of the relative term; ``scale`` when None (AA-Conv, BoTNet).  SAM, ViTDet, MViTv2: 1.0.
        index: row of a table that belongs to (query position q, key position k) along an axis with Lq and Lk
            positions.  ``"key_minus_query"``: k - q + Lq - 1 (AA-Conv, BoTNet, timm).  ``"query_minus_key"``:
            q - k + Lk - 1 (SAM, ViTDet, MViTv2).
        query_segments: (S, Hq, Wq), int32, on the device of ``query``; S divides B, and image b has the segments
            b mod S: the order of Swin's windows.  A query attends to the keys of its own segment alone.
        key_segments: (S, Hk, Wk), int32, likewise; both are given or neither.  A key of a negative segment is padding:
            no query attends to it.  The values of hidden keys must be finite, as 0 * NaN is NaN in the output.
        prefix_key: (B, heads, P, d_k), dtype of ``query``: further keys that every query attends to, whatever its
            segment, with logits of ``scale * query.key`` and no other term; class tokens, say.
        prefix_value: (B, heads, P, d_v), their values; both are given or neither.
        dropout_p: probability of dropping an attention weight, in [0, 1); the kept ones are divided by
            ``1 - dropout_p``.  Applied whenever it is positive: pass 0.0 in evaluation.  The mask is drawn from
            PyTorch's generator of the query's device.
        impl: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.

    Returns:
        (B, heads, Hq, Wq, d_v), dtype of ``query``, in the memory order of ``query``.

    Raises:
        TypeError: an argument is not a tensor, or not of a floating-point dtype.
        ValueError: shapes, dtypes or devices do not fit, or an option is out of range.
        RuntimeError: the named ``impl`` cannot run on these inputs.

    Gradients reach query, key, value, rel_h, rel_w, prefix_key and prefix_value; they are computed without atomics and
    are bitwise the same at every run and number of threads.  Nothing of size N x N is allocated (N = H*W): ``cpu``
    holds O(N) and ``triton`` O(N*(H+W)) while it runs; both save O(N) for backward.  A query whose logits are all
    -inf, or that has no key, yields zeros.  Under autocast the inputs are cast to the autocast dtype, with the rule and
    the consequences of ``scaled_dot_product_attention``: in float16 a bias of -1e9 is -inf.

    Source: Bello et al. 2019, "Attention Augmented Convolutional Networks", eq. 3-5.
    """
    return run_rel(
        impl, query, key, value, rel_h, rel_w, query_segments, key_segments, prefix_key, prefix_value, scale, rel_scale,
        index, dropout_p,
    )[0]  # fmt: skip


@leaf
def decomposed_bias_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias_h: Tensor | None = None,
    bias_w: Tensor | None = None,
    *,
    scale: float | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    dropout_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Compute attention whose logits carry a row term plus a column term.

    ``out[q] = sum_k softmax_k(scale * query[q].key[k] + bias_h[q, yk] + bias_w[q, xk]) value[k]``: the primitive below
    :func:`rel_attention_2d`, for any logits of that form (SAM, ViTDet, MViTv2, row and column masks).

    Args:
        query: (B, heads, Hq, Wq, d_k), float32, float16 or bfloat16 (float64: reference only).  Any strides.
        key: (B, heads, Hk, Wk, d_k), dtype of ``query``.
        value: (B, heads, Hk, Wk, d_v), dtype of ``query``.
        bias_h: (B, heads, Hq, Wq, Hk), dtype of ``query``, added for every key of row yk; unscaled.  None: no term.
            May be expanded (stride 0) along any axis.  -inf masks a row of keys.
        bias_w: (B, heads, Hq, Wq, Wk), likewise for the columns.
        scale, query_segments, key_segments, prefix_key, prefix_value, dropout_p, impl: as in :func:`rel_attention_2d`.

    Returns:
        (B, heads, Hq, Wq, d_v), dtype of ``query``, in the memory order of ``query``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`rel_attention_2d`.

    Gradients reach all tensors but the segments; determinism, masked queries and autocast as in
    :func:`rel_attention_2d`.  Memory O(N*(H+W)), which is the size of the two bias tensors.

    Source: Li et al. 2022, "MViTv2", eq. 4-5 (the decomposition).
    """
    return run_decomposed(
        impl, query, key, value, bias_h, bias_w, query_segments, key_segments, prefix_key, prefix_value, scale,
        dropout_p,
    )[0]  # fmt: skip


# --- checks: each gives the arguments of the operator -----------------------------------------------------------------


def _check_rel(
    query: Tensor, key: Tensor, value: Tensor, rel_h: Tensor | None, rel_w: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None,
    scale: object, rel_scale: object, index: str, dropout_p: object,
) -> tuple[Any, ...]:  # fmt: skip
    segments, scale, key_minus_query, dropout_p = check_attention(
        query, key, value, query_segments, key_segments, prefix_key, prefix_value, scale, index, dropout_p
    )
    _check_table("rel_h", rel_h, query, key, axis=2)
    _check_table("rel_w", rel_w, query, key, axis=3)
    rel_scale = scale if rel_scale is None else checks.number("rel_scale", rel_scale)
    return (
        *map(pinned, (query, key, value)), pinned(rel_h, 0), pinned(rel_w, 0), None, *segments, pinned(prefix_key),
        pinned(prefix_value), scale, rel_scale, key_minus_query, dropout_p,
    )  # fmt: skip


def _check_decomposed(
    query: Tensor, key: Tensor, value: Tensor, bias_h: Tensor | None, bias_w: Tensor | None,
    query_segments: Tensor | None, key_segments: Tensor | None, prefix_key: Tensor | None, prefix_value: Tensor | None,
    scale: object, dropout_p: object,
) -> tuple[Any, ...]:  # fmt: skip
    segments, scale, _, dropout_p = check_attention(
        query, key, value, query_segments, key_segments, prefix_key, prefix_value, scale, INDEX[0], dropout_p
    )
    _check_bias("bias_h", bias_h, query, key, axis=2)
    _check_bias("bias_w", bias_w, query, key, axis=3)
    return (
        *map(pinned, (query, key, value, bias_h, bias_w)), None, *segments, pinned(prefix_key), pinned(prefix_value),
        scale, 1.0, True, dropout_p,
    )  # fmt: skip


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, query_segments: Tensor | None, key_segments: Tensor | None,
    prefix_key: Tensor | None, prefix_value: Tensor | None, scale: object, index: str, dropout_p: object,
) -> tuple[tuple[Tensor | None, Tensor | None], float, bool, float]:  # fmt: skip
    """What all three functions share; the segments, the scale, ``key_minus_query`` and ``dropout_p``."""
    _check_grid("query", query, "(B, heads, Hq, Wq, d_k)")
    _check_grid("key", key, "(B, heads, Hk, Wk, d_k)")
    _check_grid("value", value, "(B, heads, Hk, Wk, d_v)")
    batch, heads, _, _, d_k = query.shape
    if d_k == 0:
        raise ValueError(f"query must have a depth d_k of at least 1, got shape {tuple(query.shape)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[0] != batch or tensor.shape[1] != heads:
            raise ValueError(
                f"{name} must have the batch and heads of query, {(batch, heads)}, got {tuple(tensor.shape[:2])}"
            )
    _, _, height, width, key_depth = key.shape
    if key_depth != d_k:
        raise ValueError(f"key must have the depth of query, d_k={d_k}, got {key_depth}")
    if value.shape[2] != height or value.shape[3] != width:
        raise ValueError(f"value must have the grid of key, (Hk, Wk)={(height, width)}, got {tuple(value.shape[2:4])}")
    dropout_p = checks.number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    checks.one_of("index", index, INDEX)
    segments = _check_segments(query, key, query_segments, key_segments)
    _check_prefix(query, value, prefix_key, prefix_value)
    scale = checks.number("scale", d_k**-0.5 if scale is None else scale)
    return segments, scale, index == INDEX[0], dropout_p


def _check_grid(name: str, tensor: Tensor, layout: str) -> None:
    checks.tensor(name, tensor)
    if tensor.dim() != 5:
        raise ValueError(f"{name} must have 5 dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_segments(
    query: Tensor, key: Tensor, query_segments: Tensor | None, key_segments: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The segments as the kernels take them: contiguous."""
    if query_segments is None and key_segments is None:
        return None, None
    query_segments = _given("query_segments", query_segments, "key_segments")
    key_segments = _given("key_segments", key_segments, "query_segments")
    _check_segments_of("query_segments", query_segments, query, "q")
    _check_segments_of("key_segments", key_segments, key, "k")
    sets, batch = query_segments.shape[0], query.shape[0]
    if key_segments.shape[0] != sets:
        raise ValueError(
            f"key_segments must have as many sets S as query_segments, {sets}, got {key_segments.shape[0]}"
        )
    if sets == 0 or batch % sets != 0:
        raise ValueError(f"query_segments must have a number of sets S that divides the batch of {batch}, got {sets}")
    return pinned(query_segments.contiguous(), 0), pinned(key_segments.contiguous(), 0)


def _check_segments_of(name: str, segments: Tensor, of: Tensor, letter: str) -> None:
    height, width = of.shape[2:4]
    if not isinstance(segments, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(segments).__name__}")
    if segments.dtype != torch.int32:
        raise TypeError(f"{name} must have dtype torch.int32, got {segments.dtype}")
    if segments.dim() != 3 or segments.shape[1:] != (height, width):
        raise ValueError(
            f"{name} must have shape (S, H{letter}, W{letter})=(S, {height}, {width}), got {tuple(segments.shape)}"
        )
    if segments.device != of.device:
        raise ValueError(f"{name} must be on the device of query, {of.device}, got {segments.device}")


def _check_prefix(query: Tensor, value: Tensor, prefix_key: Tensor | None, prefix_value: Tensor | None) -> None:
    if prefix_key is None and prefix_value is None:
        return
    prefix_key = _given("prefix_key", prefix_key, "prefix_value")
    prefix_value = _given("prefix_value", prefix_value, "prefix_key")
    _check_prefix_of("prefix_key", prefix_key, query, "k")
    _check_prefix_of("prefix_value", prefix_value, value, "v")
    if prefix_key.shape[2] != prefix_value.shape[2]:
        raise ValueError(
            f"prefix_value must have as many positions P as prefix_key, {prefix_key.shape[2]}, "
            f"got {prefix_value.shape[2]}"
        )


def _check_prefix_of(name: str, prefix: Tensor, of: Tensor, letter: str) -> None:
    checks.tensor(name, prefix)
    batch, heads, depth = of.shape[0], of.shape[1], of.shape[4]
    if prefix.dim() != 4 or (*prefix.shape[:2], prefix.shape[3]) != (batch, heads, depth):
        raise ValueError(
            f"{name} must have shape (B, heads, P, d_{letter})=({batch}, {heads}, P, {depth}), "
            f"got {tuple(prefix.shape)}"
        )


def _given(name: str, value: Tensor | None, other: str) -> Tensor:
    if value is None:
        raise ValueError(f"{name} must be given where {other} is, got None")
    return value


def _check_table(name: str, table: Tensor | None, query: Tensor, key: Tensor, axis: int) -> None:
    if table is None:
        return
    checks.tensor(name, table)
    heads, depth = query.shape[1], query.shape[4]
    length = max(query.shape[axis] + key.shape[axis] - 1, 0)
    if table.shape != (length, depth) and table.shape != (heads, length, depth):
        letter = "HW"[axis - 2]
        raise ValueError(
            f"{name} must have shape ({letter}q+{letter}k-1, d_k)=({length}, {depth}) or "
            f"(heads, {letter}q+{letter}k-1, d_k)=({heads}, {length}, {depth}), got {tuple(table.shape)}"
        )


def _check_bias(name: str, bias: Tensor | None, query: Tensor, key: Tensor, axis: int) -> None:
    if bias is None:
        return
    checks.tensor(name, bias)
    expected = (*query.shape[:4], key.shape[axis])
    if bias.shape != expected:
        letter = "HW"[axis - 2]
        raise ValueError(f"{name} must have shape (B, heads, Hq, Wq, {letter}k)={expected}, got {tuple(bias.shape)}")


run_rel = op.rel_attention_2d.public(_check_rel, names={"row_term": "rel_h", "col_term": "rel_w"})
run_decomposed = op.rel_attention_2d.public(
    _check_decomposed, op="decomposed_bias_attention", names={"row_term": "bias_h", "col_term": "bias_w"}
)
