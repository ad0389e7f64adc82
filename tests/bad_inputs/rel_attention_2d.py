"""Invalid calls of rel_attention_2d and decomposed_bias_attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.rel_attention_2d import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed


def _bad(make: Callable[..., dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(make, F32, CPU, **spec.SMALL), **changes)


def _common_bad(make: Callable[..., dict[str, Any]]) -> tuple[BadInput, ...]:
    bad = partial(_bad, make)
    return (
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
            _bad(_no_terms, **dict.fromkeys(("query", "key", "value"), Tensor.double), impl="triton"),
            RuntimeError,
            r"impl='triton' cannot run: (it|the package) ",
        ),
        BadInput(
            "impl cannot run",
            _bad(_no_terms, **dict.fromkeys(("query", "key", "value"), Tensor.double), impl="cpu"),
            RuntimeError,
            r"impl='cpu' cannot run: .*(float64|not available)",
        ),
    )


def _no_terms(dtype, device, **geometry):
    return spec.make_rel_inputs(dtype, device, terms="", **geometry)


_REL = (
    *_common_bad(spec.make_rel_inputs),
    BadInput(
        "rel_scale", _bad(spec.make_rel_inputs, rel_scale=[1.0]), TypeError, r"rel_scale must be a number, got list"
    ),
    BadInput("index", _bad(spec.make_rel_inputs, index="q-k"), ValueError, r"index must be one of .*, got 'q-k'"),
    BadInput(
        "table length",
        _bad(spec.make_rel_inputs, rel_h=lambda x: x[1:]),
        ValueError,
        r"rel_h must have shape \(Hq\+Hk-1, d_k\)=\(5, 4\) or .*=\(2, 5, 4\), got \(4, 4\)",
    ),
    BadInput(
        "table depth",
        _bad(spec.make_rel_inputs, rel_w=lambda x: x[:, 1:]),
        ValueError,
        r"rel_w must have shape .*\(7, 3\)",
    ),
    BadInput(
        "table heads",
        _bad(spec.make_rel_inputs, rel_w=lambda x: x.expand(3, -1, -1)),
        ValueError,
        r"rel_w must have shape .*\(3,",
    ),
    BadInput(
        "table integer", _bad(spec.make_rel_inputs, rel_h=lambda x: x.int()), TypeError, r"rel_h must have a floating"
    ),
    BadInput(
        "table dtype",
        _bad(spec.make_rel_inputs, rel_h=lambda x: x.half()),
        ValueError,
        r"rel_h must have the dtype of query",
    ),
    BadInput(
        "table device",
        _bad(spec.make_rel_inputs, rel_w=lambda x: x.to("meta")),
        ValueError,
        r"rel_w must be on the device",
    ),
)
_BIAS = (
    *_common_bad(spec.make_bias_inputs),
    BadInput(
        "bias shape",
        _bad(spec.make_bias_inputs, bias_h=lambda x: x[..., :2]),
        ValueError,
        r"bias_h must have shape \(B, heads, Hq, Wq, Hk\)=\(2, 2, 3, 4, 3\), got \(2, 2, 3, 4, 2\)",
    ),
    BadInput(
        "bias batch",
        _bad(spec.make_bias_inputs, bias_w=lambda x: x[:1]),
        ValueError,
        r"bias_w must have .*\(1, 2, 3, 4, 4\)",
    ),
    BadInput(
        "bias grid",
        _bad(spec.make_bias_inputs, bias_h=lambda x: x.transpose(2, 3)),
        ValueError,
        r"bias_h must have .*got \(2, 2, 4, ",
    ),
    BadInput(
        "bias device",
        _bad(spec.make_bias_inputs, bias_h=lambda x: x.to("meta")),
        ValueError,
        r"bias_h must be on the device",
    ),
    BadInput("bias rank", _bad(spec.make_bias_inputs, bias_w=lambda x: x[0]), ValueError, r"bias_w must have shape"),
    BadInput(
        "bias integer",
        _bad(spec.make_bias_inputs, bias_w=lambda x: x.long()),
        TypeError,
        r"bias_w must have a floating",
    ),
    BadInput(
        "bias dtype", _bad(spec.make_bias_inputs, bias_w=lambda x: x.half()), ValueError, r"bias_w must have the dtype"
    ),
)
BAD_INPUTS = {"rel_attention_2d": _REL, "decomposed_bias_attention": _BIAS}
