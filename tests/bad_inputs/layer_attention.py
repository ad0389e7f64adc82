"""Invalid calls of layer_attention and weighted_layer_sum."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.layer_attention import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed


def _bad(make: Callable[..., dict[str, Any]], **changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(make, F32, CPU, **spec.SMALL), **changes)


def _at(layer: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda tensors: [change(tensor) if i == layer else tensor for i, tensor in enumerate(tensors)]


def _common_bad(make: Callable[..., dict[str, Any]], first: str) -> tuple[BadInput, ...]:
    bad = partial(_bad, make)
    return (
        BadInput(
            "values tensor", bad(values=torch.ones(3)), TypeError, r"values must be a list of tensors.* got Tensor"
        ),
        BadInput("values empty", bad(values=[]), ValueError, r"values must hold at least one layer, got none"),
        BadInput(
            "value none", bad(values=_at(1, lambda x: None)), TypeError, r"values\[1\] must be a tensor, got None"
        ),
        BadInput(
            "value integer", bad(values=_at(2, lambda x: x.long())), TypeError, r"values\[2\] must have a floating"
        ),
        BadInput(
            "value shape",
            bad(values=_at(2, lambda x: x[..., :2])),
            ValueError,
            r"values\[2\] must have the shape of values\[0\], \(2, 4, 2, 3\), got \(2, 4, 2, 2\)",
        ),
        BadInput(
            "value rank",
            bad(values=lambda values: [value[0, 0, 0] for value in values]),
            ValueError,
            r"values\[0\] must have shape \(B, C, \*spatial\), got \(3,\)",
        ),
        BadInput(
            "value dtype", bad(values=_at(1, Tensor.half)), ValueError, rf"values\[1\] must have the dtype of {first}"
        ),
        BadInput(
            "value device",
            bad(values=_at(1, lambda x: x.to("meta"))),
            ValueError,
            rf"values\[1\] must be on the device of {first}, cpu, got meta",
        ),
        BadInput("impl unknown", bad(impl="fast"), ValueError, r"impl must be one of 'auto', .* got 'fast'"),
        BadInput(
            "impl cannot run",
            lambda: {**make(torch.float64, CPU, **spec.SMALL), "impl": "cpu"},
            RuntimeError,
            r"impl='cpu' cannot run: .*(float64|not available)",
        ),
        BadInput(
            "triton cannot run",
            lambda: {**make(torch.float64, CPU, **spec.SMALL), "impl": "triton"},
            RuntimeError,
            r"impl='triton' cannot run: (it|the package) ",
        ),
    )


_ATTENTION = (
    *_common_bad(spec.make_attention_inputs, "query"),
    BadInput(
        "query none", _bad(spec.make_attention_inputs, query=None), TypeError, r"query must be a tensor, got NoneType"
    ),
    BadInput(
        "query rank",
        _bad(spec.make_attention_inputs, query=lambda x: x[0, 0]),
        ValueError,
        r"query must have shape \(B, G, d\)",
    ),
    BadInput(
        "query batch",
        _bad(spec.make_attention_inputs, query=lambda x: x[:1]),
        ValueError,
        r"query must have the batch .* 2, got",
    ),
    BadInput(
        "no depth",
        _bad(spec.make_attention_inputs, query=lambda x: x[..., :0]),
        ValueError,
        r"query must have a depth d of at",
    ),
    BadInput(
        "groups",
        _bad(spec.make_attention_inputs, query=lambda x: x.repeat(1, 2, 1)[:, :3]),
        ValueError,
        r"query must have a number of groups G that divides the C=4 channels, got 3",
    ),
    BadInput(
        "keys fewer",
        _bad(spec.make_attention_inputs, keys=lambda x: x[:2]),
        ValueError,
        r"keys must be as many as values, 3, got 2",
    ),
    BadInput(
        "keys none",
        _bad(spec.make_attention_inputs, keys=None),
        TypeError,
        r"keys must be a list of tensors.* got NoneType",
    ),
    BadInput(
        "key shape",
        _bad(spec.make_attention_inputs, keys=_at(1, lambda x: x[..., :2])),
        ValueError,
        r"keys\[1\] must have shape \(B, G, d\)=\(2, 2, 3\), got \(2, 2, 2\)",
    ),
    BadInput(
        "key dtype",
        _bad(spec.make_attention_inputs, keys=_at(0, Tensor.half)),
        ValueError,
        r"keys\[0\] must have the dtype of query",
    ),
    BadInput(
        "bias shape",
        _bad(spec.make_attention_inputs, bias=torch.ones(2, 2)),
        ValueError,
        r"bias must have shape \(L, G\)=\(3, 2\), got \(2, 2\)",
    ),
    BadInput(
        "bias dtype",
        _bad(spec.make_attention_inputs, bias=torch.ones(3, 2).half()),
        ValueError,
        r"bias must have the dtype of query",
    ),
    BadInput("bias number", _bad(spec.make_attention_inputs, bias=1.0), TypeError, r"bias must be a tensor, got float"),
    BadInput("scale text", _bad(spec.make_attention_inputs, scale="1"), TypeError, r"scale must be a number, got str"),
    BadInput(
        "activation",
        _bad(spec.make_attention_inputs, activation="relu"),
        ValueError,
        r"activation must be one of .* got 'relu'",
    ),
)
_SUM = (
    *_common_bad(spec.make_sum_inputs, "weights"),
    BadInput(
        "weights none", _bad(spec.make_sum_inputs, weights=None), TypeError, r"weights must be a tensor, got NoneType"
    ),
    BadInput(
        "weights shape",
        _bad(spec.make_sum_inputs, weights=lambda x: x[..., :2]),
        ValueError,
        r"weights must have shape \(B, G, L\)=\(2, G, 3\), got \(2, 2, 2\)",
    ),
    BadInput(
        "weights groups",
        _bad(spec.make_sum_inputs, weights=torch.ones(2, 3, 3)),
        ValueError,
        r"weights must have a number of groups G that divides the C=4 channels, got 3",
    ),
)
BAD_INPUTS = {"layer_attention": _ATTENTION, "weighted_layer_sum": _SUM}
