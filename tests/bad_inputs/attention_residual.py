"""Invalid calls of attention_residual."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.attention_residual import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed


def _bad(**changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(spec.make_inputs, F32, CPU, **spec.SMALL), **changes)


def _second(change: Callable[[Tensor], Any]) -> Callable[[list[Tensor]], list[Any]]:
    return lambda values: [values[0], change(values[1]), *values[2:]]


_BAD = (
    BadInput("values tensor", _bad(values=torch.ones(3, 4)), TypeError, r"values must be a list .* got Tensor; unbind"),
    BadInput("values empty", _bad(values=[]), ValueError, r"values must hold at least one tensor, got none"),
    BadInput("value none", _bad(values=_second(lambda x: None)), TypeError, r"values\[1\] must be a tensor, got None"),
    BadInput("value integer", _bad(values=_second(Tensor.long)), TypeError, r"values\[1\] must have a floating"),
    BadInput(
        "value shape",
        _bad(values=_second(lambda x: x[:, :2])),
        ValueError,
        r"values\[1\] must have the shape of values\[0\], \(2, 3, 5\), got \(2, 2, 5\)",
    ),
    BadInput(
        "no depth",
        _bad(values=lambda values: [value[..., :0] for value in values]),
        ValueError,
        r"values\[0\] must have shape \(\.\.\., D\) with D >= 1, got shape \(2, 3, 0\)",
    ),
    BadInput(
        "value dtype", _bad(values=_second(Tensor.half)), ValueError, r"values\[1\] must have the dtype of values"
    ),
    BadInput(
        "value device",
        _bad(values=_second(lambda x: x.to("meta"))),
        ValueError,
        r"values\[1\] must be on the device of values\[0\], cpu, got meta",
    ),
    BadInput("query none", _bad(query=None), TypeError, r"query must be a tensor, got NoneType"),
    BadInput("query shape", _bad(query=torch.ones(4)), ValueError, r"query must have shape \(D,\)=\(5,\), got \(4,\)"),
    BadInput("query dtype", _bad(query=Tensor.double), ValueError, r"query must have the dtype of values\[0\]"),
    BadInput(
        "norm_weight shape", _bad(norm_weight=torch.ones(1, 5)), ValueError, r"norm_weight must have shape \(D,\)"
    ),
    BadInput("norm_weight integer", _bad(norm_weight=Tensor.long), TypeError, r"norm_weight must have a floating"),
    BadInput("eps negative", _bad(eps=-1e-6), ValueError, r"eps must be at least 0, got -1e-06"),
    BadInput("eps nan", _bad(eps=float("nan")), ValueError, r"eps must be at least 0, got nan"),
    BadInput("eps text", _bad(eps="small"), TypeError, r"eps must be a number, got str"),
    BadInput("impl unknown", _bad(impl="fast"), ValueError, r"impl must be one of 'auto', .* got 'fast'"),
    BadInput(
        "impl cannot run",
        lambda: {**spec.make_inputs(torch.float64, CPU, **spec.SMALL), "impl": "cpu"},
        RuntimeError,
        r"impl='cpu' cannot run: .*(float64|not available)",
    ),
)
BAD_INPUTS = {"attention_residual": _BAD}
