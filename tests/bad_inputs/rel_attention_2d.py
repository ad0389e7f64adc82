"""Invalid calls of rel_attention_2d and decomposed_bias_attention; what bias_attention_2d refuses as well."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fused_attn.ops.rel_attention_2d import spec
from fused_attn.testing.checks import BadInput

from .calls import bad_call, bad_impl

_make_rel = partial(spec.make_rel_inputs, **spec.SMALL)
_make_bias = partial(spec.make_bias_inputs, **spec.SMALL)
_rel, _bias = partial(bad_call, _make_rel), partial(bad_call, _make_bias)

SEGMENTS = {"query_segments": torch.zeros(2, 3, 4, dtype=torch.int32), "key_segments": torch.ones(2, 3, 4).int()}
PREFIX = {"prefix_key": torch.ones(2, 2, 5, 4), "prefix_value": torch.ones(2, 2, 5, 3)}


def _bad_segments(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    segments, (query, key) = partial(bad_call, make, **SEGMENTS), SEGMENTS.values()
    return (
        segments(
            "segments dtype",
            TypeError,
            r"query_segments must have dtype torch.int32, got torch.int64",
            query_segments=query.long(),
        ),
        segments("segments bool", TypeError, r"key_segments must .* got torch.bool", key_segments=key.bool()),
        segments("segments no tensor", TypeError, r"key_segments must be a tensor, got list", key_segments=[[0]]),
        segments(
            "segments of queries alone",
            ValueError,
            r"key_segments must be given where query_segments is, got None",
            key_segments=None,
        ),
        segments(
            "segments of keys alone",
            ValueError,
            r"query_segments must be given where key_segments is, got None",
            query_segments=None,
        ),
        segments(
            "segments rank",
            ValueError,
            r"query_segments must have shape \(S, Hq, Wq\)=\(S, 3, 4\), got \(3, 4\)",
            query_segments=query[0],
        ),
        segments(
            "segments grid",
            ValueError,
            r"key_segments must have shape \(S, Hk, Wk\)=\(S, 3, 4\), got \(2, 4, 3\)",
            key_segments=key.mT,
        ),
        segments(
            "segments sets",
            ValueError,
            r"key_segments must have as many sets S as query_segments, 2, got 1",
            key_segments=key[:1],
        ),
        segments(
            "segments batch",
            ValueError,
            r"query_segments must have a number of sets S that divides the batch of 2, got 3",
            query_segments=query.repeat(2, 1, 1)[:3],
            key_segments=key.repeat(2, 1, 1)[:3],
        ),
        segments(
            "no segments",
            ValueError,
            r"query_segments must have a number of sets S that divides the batch of 2, got 0",
            query_segments=query[:0],
            key_segments=key[:0],
        ),
        segments(
            "segments device",
            ValueError,
            r"key_segments must be on the device of query, cpu, got meta",
            key_segments=key.to("meta"),
        ),
    )


def _bad_prefix(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    prefix, (key, value) = partial(bad_call, make, **PREFIX), PREFIX.values()
    return (
        prefix(
            "prefix key alone",
            ValueError,
            r"prefix_value must be given where prefix_key is, got None",
            prefix_value=None,
        ),
        prefix(
            "prefix value alone",
            ValueError,
            r"prefix_key must be given where prefix_value is, got None",
            prefix_key=None,
        ),
        prefix("prefix no tensor", TypeError, r"prefix_key must be a tensor, got list", prefix_key=[1.0]),
        prefix("prefix integer", TypeError, r"prefix_value must have a floating.* got", prefix_value=value.int()),
        prefix(
            "prefix key depth",
            ValueError,
            r"prefix_key must have shape \(B, heads, P, d_k\)=\(2, 2, P, 4\), got \(2, 2, 5, 3\)",
            prefix_key=key[..., :3],
        ),
        prefix(
            "prefix value depth",
            ValueError,
            r"prefix_value must have shape \(B, heads, P, d_v\)=\(2, 2, P, 3\), got \(2, 2, 5, 4\)",
            prefix_value=key,
        ),
        prefix("prefix batch", ValueError, r"prefix_key must have .*got \(1, 2, 5, 4\)", prefix_key=key[:1]),
        prefix("prefix heads", ValueError, r"prefix_value must .*got \(2, 1, 5, 3\)", prefix_value=value[:, :1]),
        prefix("prefix rank", ValueError, r"prefix_key must have .*got \(2, 5, 4\)", prefix_key=key[0]),
        prefix(
            "prefix positions",
            ValueError,
            r"prefix_value must have as many positions P as prefix_key, 5, got 4",
            prefix_value=value[:, :, 1:],
        ),
        prefix("prefix dtype", ValueError, r"prefix_key must have the dtype of query", prefix_key=key.half()),
        prefix("prefix device", ValueError, r"prefix_value must be on the device of", prefix_value=value.to("meta")),
    )


def common_bad(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    """What all functions refuse that share their checks; ``make`` makes valid calls of one of them."""
    bad = partial(bad_call, make)
    return (
        *bad_impl(make),
        *_bad_segments(make),
        *_bad_prefix(make),
        bad("query rank", ValueError, r"query must have 5 dimensions .*\(2, 3, 4, 4\)", query=lambda x: x[0]),
        bad("key rank", ValueError, r"key must have 5 dimensions", key=lambda x: x[0]),
        bad("value rank", ValueError, r"value must have 5 dimensions", value=lambda x: x[0]),
        bad("query no tensor", TypeError, r"query must be a tensor, got list", query=[1.0]),
        bad("integer key", TypeError, r"key must have a floating.* got torch\.int64", key=lambda x: x.long()),
        bad("batch", ValueError, r"key must have the batch and heads of query, \(2, 2\)", key=lambda x: x[:1]),
        bad("heads", ValueError, r"value must have the batch and heads .*\(2, 1\)", value=lambda x: x[:, :1]),
        bad("depth", ValueError, r"key must have the depth of query, d_k=4, got 3", key=lambda x: x[..., :3]),
        bad(
            "no depth",
            ValueError,
            r"query must have a depth d_k of at least 1",
            query=lambda x: x[..., :0],
            key=lambda x: x[..., :0],
        ),
        bad("grid", ValueError, r"value must have the grid of key, .*\(2, 4\)", value=lambda x: x[:, :, :2]),
        bad("dtype", ValueError, r"key must have the dtype of query, torch.float32", key=lambda x: x.double()),
        bad("device", ValueError, r"value must be on the device of query, cpu", value=lambda x: x.to("meta")),
        bad("dropout 1", ValueError, r"dropout_p must be in \[0, 1\), got 1.0", dropout_p=1.0),
        bad("dropout negative", ValueError, r"dropout_p must be in \[0, 1\), got -0.1", dropout_p=-0.1),
        bad("dropout nan", ValueError, r"dropout_p must be in \[0, 1\), got nan", dropout_p=float("nan")),
        bad("dropout text", TypeError, r"dropout_p must be a number, got str", dropout_p="0.1"),
        bad("scale text", TypeError, r"scale must be a number, got str", scale="1"),
        bad("scale tensor", TypeError, r"scale .* that requires grad", scale=torch.ones((), requires_grad=True)),
        bad("query none", TypeError, r"query must be a tensor, got NoneType", query=None),
        bad(
            "value transposed",
            ValueError,
            r"value must have the grid of key, \(Hk, Wk\)=\(3, 4\), got \(4, 3\)",
            value=lambda x: x.transpose(2, 3),
        ),
        bad("complex query", TypeError, r"query must have .* got torch.complex64", query=lambda x: x.cfloat()),
    )


_REL = (
    *common_bad(_make_rel),
    _rel("rel_scale", TypeError, r"rel_scale must be a number, got list", rel_scale=[1.0]),
    _rel("index", ValueError, r"index must be one of .*, got 'q-k'", index="q-k"),
    _rel(
        "table length",
        ValueError,
        r"rel_h must have shape \(Hq\+Hk-1, d_k\)=\(5, 4\) or .*=\(2, 5, 4\), got \(4, 4\)",
        rel_h=lambda x: x[1:],
    ),
    _rel("table depth", ValueError, r"rel_w must have shape .*\(7, 3\)", rel_w=lambda x: x[:, 1:]),
    _rel("table heads", ValueError, r"rel_w must have shape .*\(3,", rel_w=lambda x: x.expand(3, -1, -1)),
    _rel("table integer", TypeError, r"rel_h must have a floating", rel_h=lambda x: x.int()),
    _rel("table dtype", ValueError, r"rel_h must have the dtype of query", rel_h=lambda x: x.half()),
    _rel("table device", ValueError, r"rel_w must be on the device", rel_w=lambda x: x.to("meta")),
)
_BIAS = (
    *common_bad(_make_bias),
    _bias(
        "bias shape",
        ValueError,
        r"bias_h must have shape \(B, heads, Hq, Wq, Hk\)=\(2, 2, 3, 4, 3\), got \(2, 2, 3, 4, 2\)",
        bias_h=lambda x: x[..., :2],
    ),
    _bias("bias batch", ValueError, r"bias_w must have .*\(1, 2, 3, 4, 4\)", bias_w=lambda x: x[:1]),
    _bias("bias grid", ValueError, r"bias_h must have .*got \(2, 2, 4, ", bias_h=lambda x: x.transpose(2, 3)),
    _bias("bias device", ValueError, r"bias_h must be on the device", bias_h=lambda x: x.to("meta")),
    _bias("bias rank", ValueError, r"bias_w must have shape", bias_w=lambda x: x[0]),
    _bias("bias integer", TypeError, r"bias_w must have a floating", bias_w=lambda x: x.long()),
    _bias("bias dtype", ValueError, r"bias_w must have the dtype", bias_w=lambda x: x.half()),
)
BAD_INPUTS = {"rel_attention_2d": _REL, "decomposed_bias_attention": _BIAS}
