"""Invalid calls of squeeze_excite."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fused_attn.ops.squeeze_excite import spec
from fused_attn.testing.checks import BadInput

from .calls import CPU, F32, changed


def _bad(**changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(spec.make_inputs, F32, CPU, **spec.SMALL, features=5, residual=True), **changes)


def _without_result(**changes: Any) -> Callable[[], dict[str, Any]]:
    return _bad(result=None, fc1_weight=lambda weight: weight[:, 5:], **changes)


def _one_layer(**changes: Any) -> Callable[[], dict[str, Any]]:
    return changed(partial(spec.make_inputs, F32, CPU, **spec.SMALL, one_layer=True), **changes)


_TENSORS = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "result", "residual")
_BAD = (
    BadInput("x no tensor", _bad(x=[1.0]), TypeError, r"x must be a tensor, got list"),
    BadInput("x none", _bad(x=None), TypeError, r"x must be a tensor, got NoneType"),
    BadInput("x integer", _bad(x=lambda x: x.long()), TypeError, r"x must have a floating-point dtype.*int64"),
    BadInput("x rank", _bad(x=lambda x: x[0]), ValueError, r"x must have shape \(B, C, H, W\), got \(6, 3, 4\)"),
    BadInput("x without positions", _bad(x=lambda x: x[:, :, :0]), ValueError, r"one position, got .*\(2, 6, 0, 4\)"),
    BadInput("x without channels", _bad(x=lambda x: x[:, :0]), ValueError, r"x must have at least one channel"),
    BadInput("fc1_weight none", _bad(fc1_weight=None), TypeError, r"fc1_weight must be a tensor, got NoneType"),
    BadInput(
        "fc1_weight of a larger convolution",
        _bad(fc1_weight=lambda w: w[:, :, None, None].repeat(1, 1, 3, 3)),
        ValueError,
        r"fc1_weight must have shape \(hidden, n \+ C\) or \(hidden, n \+ C, 1, 1\), got \(3, 11, 3, 3\)",
    ),
    BadInput(
        "fc1_weight rank",
        _bad(fc1_weight=lambda w: w[:, :, None]),
        ValueError,
        r"fc1_weight must have shape \(hidden, n \+ C\) or .*, got \(3, 11, 1\)",
    ),
    BadInput("no hidden channel", _bad(fc1_weight=lambda w: w[:0]), ValueError, r"fc1_weight must .* hidden channel"),
    BadInput(
        "result missing", _bad(result=None), ValueError, r"fc1_weight must have one column per channel, C=6.*got 11"
    ),
    BadInput(
        "result width",
        _bad(result=lambda r: r[:, 1:]),
        ValueError,
        r"fc1_weight must have n \+ C = 4 \+ 6 columns for a result of n=4 features, got 11",
    ),
    BadInput("result batch", _bad(result=lambda r: r[:1]), ValueError, r"result must have the batch of x, 2, got 1"),
    BadInput("result rank", _bad(result=lambda r: r[0]), ValueError, r"result must have shape \(B, n\), got \(5,\)"),
    BadInput("result labels", _bad(result=lambda r: r.long()), TypeError, r"result must have a floating.*torch.int64"),
    BadInput(
        "result where none is expected",
        _bad(fc1_weight=lambda w: w[:, 5:]),
        ValueError,
        r"fc1_weight must have n \+ C = 5 \+ 6 columns .* got 6",
    ),
    BadInput("result and share", _bad(result_share=torch.zeros(2, 3)), ValueError, r"result_share must be None where"),
    BadInput(
        "share shape",
        _without_result(result_share=torch.zeros(2, 4)),
        ValueError,
        r"result_share must have shape \(B, hidden\)=\(2, 3\), got \(2, 4\)",
    ),
    BadInput(
        "fc2_weight shape",
        _bad(fc2_weight=lambda w: w.t()),
        ValueError,
        r"fc2_weight must have shape \(C, hidden\)=\(6, 3\), got \(3, 6\)",
    ),
    BadInput(
        "fc2_weight shape, convolution",
        _bad(fc2_weight=lambda w: w.t()[:, :, None, None]),
        ValueError,
        r"fc2_weight must have shape \(C, hidden\)=\(6, 3\), got \(3, 6, 1, 1\)",
    ),
    BadInput(
        "fc2_weight rank",
        _bad(fc2_weight=lambda w: w[None]),
        ValueError,
        r"fc2_weight must have shape \(C, hidden\) or \(C, hidden, 1, 1\), got \(1, 6, 3\)",
    ),
    BadInput("fc2_weight list", _bad(fc2_weight=[1.0]), TypeError, r"fc2_weight must be a tensor, got list"),
    BadInput(
        "one layer of another width",
        _bad(fc2_weight=None, fc2_bias=None),
        ValueError,
        r"fc1_weight must have one row per channel, C=6, where fc2_weight is None, got 3",
    ),
    BadInput(
        "one layer, fc2_bias",
        _one_layer(fc2_bias=torch.zeros(6)),
        ValueError,
        r"fc2_bias must be None where fc2_weight is None",
    ),
    BadInput(
        "one layer, hidden_activation",
        _one_layer(hidden_activation="silu"),
        ValueError,
        r"hidden_activation must be left at 'relu' where fc2_weight is None.*, got 'silu'",
    ),
    BadInput(
        "hidden_activation",
        _bad(hidden_activation="elu"),
        ValueError,
        r"hidden_activation must be one of 'relu', 'silu', 'gelu', 'hardswish', got 'elu'",
    ),
    BadInput("hidden_activation none", _bad(hidden_activation=None), ValueError, r"hidden_activation .* got None"),
    BadInput("gate", _bad(gate="relu"), ValueError, r"gate must be one of 'sigmoid', 'hardsigmoid', got 'relu'"),
    BadInput("fc1_bias", _bad(fc1_bias=torch.zeros(4)), ValueError, r"fc1_bias must have shape \(hidden,\)=\(3,\)"),
    BadInput("fc2_bias", _bad(fc2_bias=torch.zeros(3)), ValueError, r"fc2_bias must have shape \(C,\)=\(6,\), got"),
    BadInput("fc1_bias rank", _bad(fc1_bias=lambda b: b[None]), ValueError, r"fc1_bias must have shape \(hidden,\)"),
    BadInput(
        "residual shape",
        _bad(residual=lambda r: r[:, :1]),
        ValueError,
        r"residual must have shape \(B, C, H, W\)=\(2, 6, 3, 4\), got \(2, 1, 3, 4\)",
    ),
    BadInput("residual rank", _bad(residual=lambda r: r[0]), ValueError, r"residual must have shape \(B, C, H, W\)"),
    BadInput("activation", _bad(activation="gelu"), ValueError, r"activation must be one of None, 'relu', got 'gelu'"),
    BadInput("dtype", _bad(fc2_weight=lambda w: w.half()), ValueError, r"fc2_weight must have the dtype of x, torch"),
    BadInput("residual dtype", _bad(residual=lambda r: r.double()), ValueError, r"residual must have the dtype of x"),
    BadInput("device", _bad(fc1_bias=lambda b: b.to("meta")), ValueError, r"fc1_bias must be on the device of x, cpu"),
    BadInput("impl unknown", _bad(impl="fast"), ValueError, r"impl must be one of 'auto', .* got 'fast'"),
    BadInput(
        "impl cannot run",
        _bad(**dict.fromkeys(_TENSORS, lambda tensor: tensor.double()), impl="cpu"),
        RuntimeError,
        r"impl='cpu' cannot run: .*(float64|not available)",
    ),
)
BAD_INPUTS = {"squeeze_excite": _BAD}
