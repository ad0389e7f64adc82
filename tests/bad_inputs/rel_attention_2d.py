"""Invalid calls of rel_attention_2d and decomposed_bias_attention; what bias_attention_2d refuses as well."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fused_attn.ops.rel_attention_2d import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed

SEGMENTS = {"query_segments": torch.zeros(2, 3, 4, dtype=torch.int32), "key_segments": torch.ones(2, 3, 4).int()}
PREFIX = {"prefix_key": torch.ones(2, 2, 5, 4), "prefix_value": torch.ones(2, 2, 5, 3)}


def bad_call(make: Callable[..., dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(make, F32, CPU, **spec.SMALL), **changes)


def _segments(make: Callable[..., dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    """Segments with some replaced."""
    return bad_call(make, **{name: changes.get(name, segments) for name, segments in SEGMENTS.items()})


def _prefix(make: Callable[..., dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    """Prefix keys and values with some replaced."""
    return bad_call(make, **{name: changes.get(name, prefix) for name, prefix in PREFIX.items()})


def _bad_segments(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    segments, (query, key) = partial(_segments, make), SEGMENTS.values()
    return (
        BadInput(
            "segments dtype",
            segments(query_segments=query.long()),
            TypeError,
            r"query_segments must have dtype torch.int32, got torch.int64",
        ),
        BadInput("segments bool", segments(key_segments=key.bool()), TypeError, r"key_segments must .* got torch.bool"),
        BadInput(
            "segments no tensor", segments(key_segments=[[0]]), TypeError, r"key_segments must be a tensor, got list"
        ),
        BadInput(
            "segments of queries alone",
            segments(key_segments=None),
            ValueError,
            r"key_segments must be given where query_segments is, got None",
        ),
        BadInput(
            "segments of keys alone",
            segments(query_segments=None),
            ValueError,
            r"query_segments must be given where key_segments is, got None",
        ),
        BadInput(
            "segments rank",
            segments(query_segments=query[0]),
            ValueError,
            r"query_segments must have shape \(S, Hq, Wq\)=\(S, 3, 4\), got \(3, 4\)",
        ),
        BadInput(
            "segments grid",
            segments(key_segments=key.mT),
            ValueError,
            r"key_segments must have shape \(S, Hk, Wk\)=\(S, 3, 4\), got \(2, 4, 3\)",
        ),
        BadInput(
            "segments sets",
            segments(key_segments=key[:1]),
            ValueError,
            r"key_segments must have as many sets S as query_segments, 2, got 1",
        ),
        BadInput(
            "segments batch",
            segments(query_segments=query.repeat(2, 1, 1)[:3], key_segments=key.repeat(2, 1, 1)[:3]),
            ValueError,
            r"query_segments must have a number of sets S that divides the batch of 2, got 3",
        ),
        BadInput(
            "no segments",
            segments(query_segments=query[:0], key_segments=key[:0]),
            ValueError,
            r"query_segments must have a number of sets S that divides the batch of 2, got 0",
        ),
        BadInput(
            "segments device",
            segments(key_segments=key.to("meta")),
            ValueError,
            r"key_segments must be on the device of query, cpu, got meta",
        ),
    )


def _bad_prefix(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    prefix, (key, value) = partial(_prefix, make), PREFIX.values()
    return (
        BadInput(
            "prefix key alone",
            prefix(prefix_value=None),
            ValueError,
            r"prefix_value must be given where prefix_key is, got None",
        ),
        BadInput(
            "prefix value alone",
            prefix(prefix_key=None),
            ValueError,
            r"prefix_key must be given where prefix_value is, got None",
        ),
        BadInput("prefix no tensor", prefix(prefix_key=[1.0]), TypeError, r"prefix_key must be a tensor, got list"),
        BadInput(
            "prefix integer", prefix(prefix_value=value.int()), TypeError, r"prefix_value must have a floating.* got"
        ),
        BadInput(
            "prefix key depth",
            prefix(prefix_key=key[..., :3]),
            ValueError,
            r"prefix_key must have shape \(B, heads, P, d_k\)=\(2, 2, P, 4\), got \(2, 2, 5, 3\)",
        ),
        BadInput(
            "prefix value depth",
            prefix(prefix_value=key),
            ValueError,
            r"prefix_value must have shape \(B, heads, P, d_v\)=\(2, 2, P, 3\), got \(2, 2, 5, 4\)",
        ),
        BadInput("prefix batch", prefix(prefix_key=key[:1]), ValueError, r"prefix_key must have .*got \(1, 2, 5, 4\)"),
        BadInput(
            "prefix heads", prefix(prefix_value=value[:, :1]), ValueError, r"prefix_value must .*got \(2, 1, 5, 3\)"
        ),
        BadInput("prefix rank", prefix(prefix_key=key[0]), ValueError, r"prefix_key must have .*got \(2, 5, 4\)"),
        BadInput(
            "prefix positions",
            prefix(prefix_value=value[:, :, 1:]),
            ValueError,
            r"prefix_value must have as many positions P as prefix_key, 5, got 4",
        ),
        BadInput("prefix dtype", prefix(prefix_key=key.half()), ValueError, r"prefix_key must have the dtype of query"),
        BadInput(
            "prefix device", prefix(prefix_value=value.to("meta")), ValueError, r"prefix_value must be on the device of"
        ),
    )


def common_bad(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    """What all functions refuse that share their checks; ``make`` makes valid calls of one of them."""
    bad = partial(bad_call, make)
    return (
        *_bad_segments(make),
        *_bad_prefix(make),
        BadInput("query rank", bad(query=lambda x: x[0]), ValueError, r"query must have 5 dimensions .*\(2, 3, 4, 4\)"),
        BadInput("key rank", bad(key=lambda x: x[0]), ValueError, r"key must have 5 dimensions"),
        BadInput("value rank", bad(value=lambda x: x[0]), ValueError, r"value must have 5 dimensions"),
        BadInput("query no tensor", bad(query=[1.0]), TypeError, r"query must be a tensor, got list"),
        BadInput("integer key", bad(key=lambda x: x.long()), TypeError, r"key must have a floating.* got torch\.int64"),
        BadInput(
            "batch", bad(key=lambda x: x[:1]), ValueError, r"key must have the batch and heads of query, \(2, 2\)"
        ),
        BadInput("heads", bad(value=lambda x: x[:, :1]), ValueError, r"value must have the batch and heads .*\(2, 1\)"),
        BadInput("depth", bad(key=lambda x: x[..., :3]), ValueError, r"key must have the depth of query, d_k=4, got 3"),
        BadInput(
            "no depth",
            bad(query=lambda x: x[..., :0], key=lambda x: x[..., :0]),
            ValueError,
            r"query must have a depth d_k of at least 1",
        ),
        BadInput("grid", bad(value=lambda x: x[:, :, :2]), ValueError, r"value must have the grid of key, .*\(2, 4\)"),
        BadInput(
            "dtype", bad(key=lambda x: x.double()), ValueError, r"key must have the dtype of query, torch.float32"
        ),
        BadInput("device", bad(value=lambda x: x.to("meta")), ValueError, r"value must be on the device of query, cpu"),
        BadInput("dropout 1", bad(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        BadInput("dropout negative", bad(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
        BadInput("dropout nan", bad(dropout_p=float("nan")), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
        BadInput("dropout text", bad(dropout_p="0.1"), TypeError, r"dropout_p must be a number, got str"),
        BadInput("scale text", bad(scale="1"), TypeError, r"scale must be a number, got str"),
        BadInput(
            "scale tensor", bad(scale=torch.ones((), requires_grad=True)), TypeError, r"scale .* that requires grad"
        ),
        BadInput("query none", bad(query=None), TypeError, r"query must be a tensor, got NoneType"),
        BadInput(
            "value transposed",
            bad(value=lambda x: x.transpose(2, 3)),
            ValueError,
            r"value must have the grid of key, \(Hk, Wk\)=\(3, 4\), got \(4, 3\)",
        ),
        BadInput(
            "complex query", bad(query=lambda x: x.cfloat()), TypeError, r"query must have .* got torch.complex64"
        ),
        BadInput("impl unknown", bad(impl="fast"), ValueError, r"impl must be one of 'auto', .* got 'fast'"),
        BadInput("impl of other ops", bad(impl="cuda"), ValueError, r"impl must be one of .* got 'cuda'"),
        BadInput(
            "triton cannot run",
            changed(partial(make, torch.float64, CPU, **spec.SMALL), impl="triton"),
            RuntimeError,
            r"impl='triton' cannot run: (it|the package) ",
        ),
        BadInput(
            "impl cannot run",
            changed(partial(make, torch.float64, CPU, **spec.SMALL), impl="cpu"),
            RuntimeError,
            r"impl='cpu' cannot run: .*(float64|not available)",
        ),
    )


_REL = (
    *common_bad(spec.make_rel_inputs),
    BadInput(
        "rel_scale", bad_call(spec.make_rel_inputs, rel_scale=[1.0]), TypeError, r"rel_scale must be a number, got list"
    ),
    BadInput("index", bad_call(spec.make_rel_inputs, index="q-k"), ValueError, r"index must be one of .*, got 'q-k'"),
    BadInput(
        "table length",
        bad_call(spec.make_rel_inputs, rel_h=lambda x: x[1:]),
        ValueError,
        r"rel_h must have shape \(Hq\+Hk-1, d_k\)=\(5, 4\) or .*=\(2, 5, 4\), got \(4, 4\)",
    ),
    BadInput(
        "table depth",
        bad_call(spec.make_rel_inputs, rel_w=lambda x: x[:, 1:]),
        ValueError,
        r"rel_w must have shape .*\(7, 3\)",
    ),
    BadInput(
        "table heads",
        bad_call(spec.make_rel_inputs, rel_w=lambda x: x.expand(3, -1, -1)),
        ValueError,
        r"rel_w must have shape .*\(3,",
    ),
    BadInput(
        "table integer",
        bad_call(spec.make_rel_inputs, rel_h=lambda x: x.int()),
        TypeError,
        r"rel_h must have a floating",
    ),
    BadInput(
        "table dtype",
        bad_call(spec.make_rel_inputs, rel_h=lambda x: x.half()),
        ValueError,
        r"rel_h must have the dtype of query",
    ),
    BadInput(
        "table device",
        bad_call(spec.make_rel_inputs, rel_w=lambda x: x.to("meta")),
        ValueError,
        r"rel_w must be on the device",
    ),
)
_BIAS = (
    *common_bad(spec.make_bias_inputs),
    BadInput(
        "bias shape",
        bad_call(spec.make_bias_inputs, bias_h=lambda x: x[..., :2]),
        ValueError,
        r"bias_h must have shape \(B, heads, Hq, Wq, Hk\)=\(2, 2, 3, 4, 3\), got \(2, 2, 3, 4, 2\)",
    ),
    BadInput(
        "bias batch",
        bad_call(spec.make_bias_inputs, bias_w=lambda x: x[:1]),
        ValueError,
        r"bias_w must have .*\(1, 2, 3, 4, 4\)",
    ),
    BadInput(
        "bias grid",
        bad_call(spec.make_bias_inputs, bias_h=lambda x: x.transpose(2, 3)),
        ValueError,
        r"bias_h must have .*got \(2, 2, 4, ",
    ),
    BadInput(
        "bias device",
        bad_call(spec.make_bias_inputs, bias_h=lambda x: x.to("meta")),
        ValueError,
        r"bias_h must be on the device",
    ),
    BadInput(
        "bias rank", bad_call(spec.make_bias_inputs, bias_w=lambda x: x[0]), ValueError, r"bias_w must have shape"
    ),
    BadInput(
        "bias integer",
        bad_call(spec.make_bias_inputs, bias_w=lambda x: x.long()),
        TypeError,
        r"bias_w must have a floating",
    ),
    BadInput(
        "bias dtype",
        bad_call(spec.make_bias_inputs, bias_w=lambda x: x.half()),
        ValueError,
        r"bias_w must have the dtype",
    ),
)
BAD_INPUTS = {"rel_attention_2d": _REL, "decomposed_bias_attention": _BIAS}
