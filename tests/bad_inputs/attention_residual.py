"""Invalid calls of attention_residual."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.attention_residual import spec

from .calls import bad_call, bad_impl

_make = partial(spec.make_inputs, **spec.SMALL)
_bad = partial(bad_call, _make)


def _second(change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda values: [values[0], change(values[1]), *values[2:]]


_BAD = (
    *bad_impl(_make),
    _bad("values tensor", TypeError, r"values must be a list .* got Tensor; unbind", values=torch.ones(3, 4)),
    _bad("values empty", ValueError, r"values must hold at least one tensor, got none", values=[]),
    _bad("value none", TypeError, r"values\[1\] must be a tensor, got None", values=_second(lambda x: None)),
    _bad("value integer", TypeError, r"values\[1\] must have a floating", values=_second(Tensor.long)),
    _bad(
        "value shape",
        ValueError,
        r"values\[1\] must have the shape of values\[0\], \(2, 3, 5\), got \(2, 2, 5\)",
        values=_second(lambda x: x[:, :2]),
    ),
    _bad(
        "no depth",
        ValueError,
        r"values\[0\] must have shape \(\.\.\., D\) with D >= 1, got shape \(2, 3, 0\)",
        values=lambda values: [value[..., :0] for value in values],
    ),
    _bad("value dtype", ValueError, r"values\[1\] must have the dtype of values", values=_second(Tensor.half)),
    _bad(
        "value device",
        ValueError,
        r"values\[1\] must be on the device of values\[0\], cpu, got meta",
        values=_second(lambda x: x.to("meta")),
    ),
    _bad("query none", TypeError, r"query must be a tensor, got NoneType", query=None),
    _bad("query shape", ValueError, r"query must have shape \(D,\)=\(5,\), got \(4,\)", query=torch.ones(4)),
    _bad("query dtype", ValueError, r"query must have the dtype of values\[0\]", query=Tensor.double),
    _bad("norm_weight shape", ValueError, r"norm_weight must have shape \(D,\)", norm_weight=torch.ones(1, 5)),
    _bad("norm_weight integer", TypeError, r"norm_weight must have a floating", norm_weight=Tensor.long),
    _bad("eps negative", ValueError, r"eps must be at least 0, got -1e-06", eps=-1e-6),
    _bad("eps nan", ValueError, r"eps must be at least 0, got nan", eps=float("nan")),
    _bad("eps text", TypeError, r"eps must be a number, got str", eps="small"),
)
BAD_INPUTS = {"attention_residual": _BAD}
