"""Invalid calls of row_col_softmax and elementwise_attention."""

from functools import partial

import torch
from torch import Tensor

from fused_attn.ops.elementwise_attention import spec

from .calls import bad_call, bad_impl

_make = partial(spec.make_inputs, **spec.SMALL, heads=3)
_bad = partial(bad_call, _make)
_dual = partial(bad_call, partial(spec.make_inputs, **spec.SMALL))


def _mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


_EVERY = ("x", "weight_row", "weight_col")
_BOTH = (
    *bad_impl(_make),
    _bad("x rank", ValueError, r"x must have 4 dimensions .*\(2, 3, 4\)", x=lambda x: x[0]),
    _bad("x no tensor", TypeError, r"x must be a tensor, got list", x=[1.0]),
    _bad("x integer", TypeError, r"x must have a floating.* got torch.int64", x=lambda x: x.long()),
    _bad("x complex", TypeError, r"x must have a floating.* got torch.complex64", x=lambda x: x.cfloat()),
    _bad(
        "weight of another plane",
        ValueError,
        r"weight_row must have shape \(heads, C, H, W\)=\(heads, 2, 3, 4\), got \(3, 2, 4, 3\)",
        weight_row=lambda w: w.transpose(2, 3),
    ),
    _bad(
        "weight of other channels",
        ValueError,
        r"weight_col must have shape .*, got \(3, 1, 3, 4\)",
        weight_col=lambda w: w[:, :1],
    ),
    _bad("weight rank", ValueError, r"weight_row must have shape .*\(2, 3, 4\)", weight_row=lambda w: w[0]),
    _bad("weight heads", ValueError, r"weight_col must have the heads .*3, got 2", weight_col=lambda w: w[:2]),
    _bad("weight dtype", ValueError, r"weight_col must have the dtype of x", weight_col=lambda w: w.half()),
    _bad("weight device", ValueError, r"weight_row must be on the device", weight_row=lambda w: w.to("meta")),
    _bad("weight integer", TypeError, r"weight_row must have a floating", weight_row=lambda w: w.int()),
)
_SOFTMAX = (
    *_BOTH,
    _bad("one weight", ValueError, r"weight_col must be given together with weight_row", weight_col=None),
    _bad("other weight", ValueError, r"weight_row must be given together with weight_col", weight_row=None),
    _dual(
        "row mask shape", ValueError, r"row_mask must have shape \(B, H\)=\(2, 3\), got \(2, 4\)", row_mask=_mask(2, 4)
    ),
    _dual("column mask rank", ValueError, r"col_mask must have shape \(B, W\)=\(2, 4\), got \(4,\)", col_mask=_mask(4)),
    _dual("mask no tensor", TypeError, r"row_mask must be a tensor, got list", row_mask=[True]),
    _dual(
        "mask of numbers", TypeError, r"col_mask must have the dtype torch.bool, got .*32", col_mask=torch.ones(2, 4)
    ),
    _dual("mask device", ValueError, r"row_mask must be on the device of x, cpu", row_mask=_mask(2, 3).to("meta")),
    _dual("temperature 0", ValueError, r"temperature must be positive and finite, got 0.0", temperature=0),
    _dual("temperature nan", ValueError, r"temperature must be positive .*got nan", temperature=float("nan")),
    _dual("temperature no number", TypeError, r"temperature must be a number, got str", temperature="1"),
    _dual("log no bool", TypeError, r"log must be a bool, got int", log=1),
    *(
        _bad(f"weights and {name}", ValueError, rf"{name} must not be given together with weight", **{name: value})
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
    _bad("no weight", TypeError, r"weight_col must be a tensor, got NoneType", weight_col=None),
    _bad("running shape", ValueError, r"running_mean must .*=\(6,\), got \(5,\)", running_mean=torch.zeros(5)),
    _bad("running integer", TypeError, r"running_var must have a floating", running_var=torch.ones(6).int()),
    _bad("running device", ValueError, r"running_var must be on", running_var=torch.ones(6, device="meta")),
    _bad("one running", ValueError, r"running_var must be given together with running_mean", running_var=None),
    _bad(
        "none to evaluate with",
        ValueError,
        r"running_mean must be a tensor when training is False, got None",
        running_mean=None,
        running_var=None,
        training=False,
    ),
    _bad("momentum", TypeError, r"momentum must be a number, got NoneType", momentum=None),
    _bad("eps", TypeError, r"eps must be a number or a tensor without dim", eps=torch.ones(2)),
    _bad(
        "one value per channel",
        ValueError,
        r"Expected more than 1 value per channel when training: x .* got shape \(1, 2, 1, 1\)",
        **dict.fromkeys(_EVERY, lambda t: t[:1, :, :1, :1]),
    ),
)
BAD_INPUTS = {"row_col_softmax": _SOFTMAX, "elementwise_attention": _ATTENTION}
