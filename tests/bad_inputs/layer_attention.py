"""Invalid calls of layer_attention and weighted_layer_sum."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.layer_attention import spec
from fused_attn.testing.checks import BadInput

from .calls import bad_call, bad_impl

_make_attention = partial(spec.make_attention_inputs, **spec.SMALL)
_make_sum = partial(spec.make_sum_inputs, **spec.SMALL)
_attention, _sum = partial(bad_call, _make_attention), partial(bad_call, _make_sum)


def _at(layer: int, change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda tensors: [change(tensor) if i == layer else tensor for i, tensor in enumerate(tensors)]


def _common_bad(make: Callable[..., dict[str, Any]], first: str) -> tuple[BadInput, ...]:
    bad = partial(bad_call, make)
    return (
        *bad_impl(make),
        bad("values tensor", TypeError, r"values must be a list of tensors.* got Tensor", values=torch.ones(3)),
        bad("values empty", ValueError, r"values must hold at least one layer, got none", values=[]),
        bad("value none", TypeError, r"values\[1\] must be a tensor, got None", values=_at(1, lambda x: None)),
        bad("value integer", TypeError, r"values\[2\] must have a floating", values=_at(2, lambda x: x.long())),
        bad(
            "value shape",
            ValueError,
            r"values\[2\] must have the shape of values\[0\], \(2, 4, 2, 3\), got \(2, 4, 2, 2\)",
            values=_at(2, lambda x: x[..., :2]),
        ),
        bad(
            "value rank",
            ValueError,
            r"values\[0\] must have shape \(B, C, \*spatial\), got \(3,\)",
            values=lambda values: [value[0, 0, 0] for value in values],
        ),
        bad("value dtype", ValueError, rf"values\[1\] must have the dtype of {first}", values=_at(1, Tensor.half)),
        bad(
            "value device",
            ValueError,
            rf"values\[1\] must be on the device of {first}, cpu, got meta",
            values=_at(1, lambda x: x.to("meta")),
        ),
    )


_ATTENTION = (
    *_common_bad(_make_attention, "query"),
    _attention("query none", TypeError, r"query must be a tensor, got NoneType", query=None),
    _attention("query rank", ValueError, r"query must have shape \(B, G, d\)", query=lambda x: x[0, 0]),
    _attention("query batch", ValueError, r"query must have the batch .* 2, got", query=lambda x: x[:1]),
    _attention("no depth", ValueError, r"query must have a depth d of at", query=lambda x: x[..., :0]),
    _attention(
        "groups",
        ValueError,
        r"query must have a number of groups G that divides the C=4 channels, got 3",
        query=lambda x: x.repeat(1, 2, 1)[:, :3],
    ),
    _attention("keys fewer", ValueError, r"keys must be as many as values, 3, got 2", keys=lambda x: x[:2]),
    _attention("keys none", TypeError, r"keys must be a list of tensors.* got NoneType", keys=None),
    _attention(
        "key shape",
        ValueError,
        r"keys\[1\] must have shape \(B, G, d\)=\(2, 2, 3\), got \(2, 2, 2\)",
        keys=_at(1, lambda x: x[..., :2]),
    ),
    _attention("key dtype", ValueError, r"keys\[0\] must have the dtype of query", keys=_at(0, Tensor.half)),
    _attention(
        "bias shape", ValueError, r"bias must have shape \(L, G\)=\(3, 2\), got \(2, 2\)", bias=torch.ones(2, 2)
    ),
    _attention("bias dtype", ValueError, r"bias must have the dtype of query", bias=torch.ones(3, 2).half()),
    _attention("bias number", TypeError, r"bias must be a tensor, got float", bias=1.0),
    _attention("scale text", TypeError, r"scale must be a number, got str", scale="1"),
    _attention("activation", ValueError, r"activation must be one of .* got 'relu'", activation="relu"),
)
_SUM = (
    *_common_bad(_make_sum, "weights"),
    _sum("weights none", TypeError, r"weights must be a tensor, got NoneType", weights=None),
    _sum(
        "weights shape",
        ValueError,
        r"weights must have shape \(B, G, L\)=\(2, G, 3\), got \(2, 2, 2\)",
        weights=lambda x: x[..., :2],
    ),
    _sum(
        "weights groups",
        ValueError,
        r"weights must have a number of groups G that divides the C=4 channels, got 3",
        weights=torch.ones(2, 3, 3),
    ),
)
BAD_INPUTS = {"layer_attention": _ATTENTION, "weighted_layer_sum": _SUM}
