"""Invalid calls of row_col_softmax and elementwise_attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_attn.ops.elementwise_attention import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed


def _bad(**changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(spec.make_inputs, F32, CPU, **spec.SMALL, heads=3), **changes)


def _dual(**changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(spec.make_inputs, F32, CPU, **spec.SMALL), **changes)


def _mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


_EVERY = ("x", "weight_row", "weight_col")
_BOTH = (
    BadInput("x rank", _bad(x=lambda x: x[0]), ValueError, r"x must have 4 dimensions .*\(2, 3, 4\)"),
    BadInput("x no tensor", _bad(x=[1.0]), TypeError, r"x must be a tensor, got list"),
    BadInput("x integer", _bad(x=lambda x: x.long()), TypeError, r"x must have a floating.* got torch.int64"),
    BadInput("x complex", _bad(x=lambda x: x.cfloat()), TypeError, r"x must have a floating.* got torch.complex64"),
    BadInput(
        "weight of another plane",
        _bad(weight_row=lambda w: w.transpose(2, 3)),
        ValueError,
        r"weight_row must have shape \(heads, C, H, W\)=\(heads, 2, 3, 4\), got \(3, 2, 4, 3\)",
    ),
    BadInput(
        "weight of other channels",
        _bad(weight_col=lambda w: w[:, :1]),
        ValueError,
        r"weight_col must have shape .*, got \(3, 1, 3, 4\)",
    ),
    BadInput("weight rank", _bad(weight_row=lambda w: w[0]), ValueError, r"weight_row must have shape .*\(2, 3, 4\)"),
    BadInput(
        "weight heads", _bad(weight_col=lambda w: w[:2]), ValueError, r"weight_col must have the heads .*3, got 2"
    ),
    BadInput("weight dtype", _bad(weight_col=lambda w: w.half()), ValueError, r"weight_col must have the dtype of x"),
    BadInput("weight device", _bad(weight_row=lambda w: w.to("meta")), ValueError, r"weight_row must be on the device"),
    BadInput("weight integer", _bad(weight_row=lambda w: w.int()), TypeError, r"weight_row must have a floating"),
    BadInput("impl unknown", _bad(impl="fast"), ValueError, r"impl must be one of 'auto', .* got 'fast'"),
    BadInput("impl of other ops", _bad(impl="cuda"), ValueError, r"impl must be one of .* got 'cuda'"),
    BadInput(
        "impl cannot run",
        _bad(**dict.fromkeys(_EVERY, Tensor.double), impl="cpu"),
        RuntimeError,
        r"impl='cpu' cannot run: .*(float64|not available)",
    ),
)
_SOFTMAX = (
    *_BOTH,
    BadInput("one weight", _bad(weight_col=None), ValueError, r"weight_col must be given together with weight_row"),
    BadInput("other weight", _bad(weight_row=None), ValueError, r"weight_row must be given together with weight_col"),
    BadInput(
        "row mask shape",
        _dual(row_mask=_mask(2, 4)),
        ValueError,
        r"row_mask must have shape \(B, H\)=\(2, 3\), got \(2, 4\)",
    ),
    BadInput(
        "column mask rank",
        _dual(col_mask=_mask(4)),
        ValueError,
        r"col_mask must have shape \(B, W\)=\(2, 4\), got \(4,\)",
    ),
    BadInput("mask no tensor", _dual(row_mask=[True]), TypeError, r"row_mask must be a tensor, got list"),
    BadInput(
        "mask of numbers",
        _dual(col_mask=torch.ones(2, 4)),
        TypeError,
        r"col_mask must have the dtype torch.bool, got .*32",
    ),
    BadInput(
        "mask device", _dual(row_mask=_mask(2, 3).to("meta")), ValueError, r"row_mask must be on the device of x, cpu"
    ),
    BadInput("temperature 0", _dual(temperature=0), ValueError, r"temperature must be positive and finite, got 0.0"),
    BadInput("temperature nan", _dual(temperature=float("nan")), ValueError, r"temperature must be positive .*got nan"),
    BadInput("temperature no number", _dual(temperature="1"), TypeError, r"temperature must be a number, got str"),
    BadInput("log no bool", _dual(log=1), TypeError, r"log must be a bool, got int"),
    *(
        BadInput(
            f"weights and {name}", _bad(**{name: value}), ValueError, rf"{name} must not be given together with weight"
        )
        for name, value in {
            "row_mask": _mask(2, 3),
            "col_mask": _mask(2, 4),
            "temperature": 0.5,
            "log": True,
        }.items()
    ),
)
_ATTENTION = (
    *_BOTH,
    BadInput("no weight", _bad(weight_col=None), TypeError, r"weight_col must be a tensor, got NoneType"),
    BadInput(
        "running shape", _bad(running_mean=torch.zeros(5)), ValueError, r"running_mean must .*=\(6,\), got \(5,\)"
    ),
    BadInput("running integer", _bad(running_var=torch.ones(6).int()), TypeError, r"running_var must have a floating"),
    BadInput("running device", _bad(running_var=torch.ones(6, device="meta")), ValueError, r"running_var must be on"),
    BadInput(
        "one running", _bad(running_var=None), ValueError, r"running_var must be given together with running_mean"
    ),
    BadInput(
        "none to evaluate with",
        _bad(running_mean=None, running_var=None, training=False),
        ValueError,
        r"running_mean must be a tensor when training is False, got None",
    ),
    BadInput("momentum", _bad(momentum=None), TypeError, r"momentum must be a number, got NoneType"),
    BadInput("eps", _bad(eps=torch.ones(2)), TypeError, r"eps must be a number or a tensor without dim"),
    BadInput(
        "one value per channel",
        _bad(**dict.fromkeys(_EVERY, lambda t: t[:1, :, :1, :1])),
        ValueError,
        r"Expected more than 1 value per channel when training: x .* got shape \(1, 2, 1, 1\)",
    ),
)
BAD_INPUTS = {"row_col_softmax": _SOFTMAX, "elementwise_attention": _ATTENTION}
