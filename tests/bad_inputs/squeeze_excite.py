"""Invalid calls of squeeze_excite."""

from functools import partial

import torch

from fused_attn.ops.squeeze_excite import spec

from .calls import bad_call, bad_impl

_make = partial(spec.make_inputs, **spec.SMALL, features=5, residual=True)
_bad = partial(bad_call, _make)
_without_result = partial(_bad, result=None, fc1_weight=lambda weight: weight[:, 5:])
_one_layer = partial(bad_call, partial(spec.make_inputs, **spec.SMALL, one_layer=True))
_BAD = (
    *bad_impl(_make),
    _bad("x no tensor", TypeError, r"x must be a tensor, got list", x=[1.0]),
    _bad("x none", TypeError, r"x must be a tensor, got NoneType", x=None),
    _bad("x integer", TypeError, r"x must have a floating-point dtype.*int64", x=lambda x: x.long()),
    _bad("x rank", ValueError, r"x must have shape \(B, C, H, W\), got \(6, 3, 4\)", x=lambda x: x[0]),
    _bad("x without positions", ValueError, r"one position, got .*\(2, 6, 0, 4\)", x=lambda x: x[:, :, :0]),
    _bad("x without channels", ValueError, r"x must have at least one channel", x=lambda x: x[:, :0]),
    _bad("fc1_weight none", TypeError, r"fc1_weight must be a tensor, got NoneType", fc1_weight=None),
    _bad(
        "fc1_weight of a larger convolution",
        ValueError,
        r"fc1_weight must have shape \(hidden, n \+ C\) or \(hidden, n \+ C, 1, 1\), got \(3, 11, 3, 3\)",
        fc1_weight=lambda w: w[:, :, None, None].repeat(1, 1, 3, 3),
    ),
    _bad(
        "fc1_weight rank",
        ValueError,
        r"fc1_weight must have shape \(hidden, n \+ C\) or .*, got \(3, 11, 1\)",
        fc1_weight=lambda w: w[:, :, None],
    ),
    _bad("no hidden channel", ValueError, r"fc1_weight must .* hidden channel", fc1_weight=lambda w: w[:0]),
    _bad("result missing", ValueError, r"fc1_weight must have one column per channel, C=6.*got 11", result=None),
    _bad(
        "result width",
        ValueError,
        r"fc1_weight must have n \+ C = 4 \+ 6 columns for a result of n=4 features, got 11",
        result=lambda r: r[:, 1:],
    ),
    _bad("result batch", ValueError, r"result must have the batch of x, 2, got 1", result=lambda r: r[:1]),
    _bad("result rank", ValueError, r"result must have shape \(B, n\), got \(5,\)", result=lambda r: r[0]),
    _bad("result labels", TypeError, r"result must have a floating.*torch.int64", result=lambda r: r.long()),
    _bad(
        "result where none is expected",
        ValueError,
        r"fc1_weight must have n \+ C = 5 \+ 6 columns .* got 6",
        fc1_weight=lambda w: w[:, 5:],
    ),
    _bad("result and share", ValueError, r"result_share must be None where", result_share=torch.zeros(2, 3)),
    _without_result(
        "share shape",
        ValueError,
        r"result_share must have shape \(B, hidden\)=\(2, 3\), got \(2, 4\)",
        result_share=torch.zeros(2, 4),
    ),
    _bad(
        "fc2_weight shape",
        ValueError,
        r"fc2_weight must have shape \(C, hidden\)=\(6, 3\), got \(3, 6\)",
        fc2_weight=lambda w: w.t(),
    ),
    _bad(
        "fc2_weight shape, convolution",
        ValueError,
        r"fc2_weight must have shape \(C, hidden\)=\(6, 3\), got \(3, 6, 1, 1\)",
        fc2_weight=lambda w: w.t()[:, :, None, None],
    ),
    _bad(
        "fc2_weight rank",
        ValueError,
        r"fc2_weight must have shape \(C, hidden\) or \(C, hidden, 1, 1\), got \(1, 6, 3\)",
        fc2_weight=lambda w: w[None],
    ),
    _bad("fc2_weight list", TypeError, r"fc2_weight must be a tensor, got list", fc2_weight=[1.0]),
    _bad(
        "one layer of another width",
        ValueError,
        r"fc1_weight must have one row per channel, C=6, where fc2_weight is None, got 3",
        fc2_weight=None,
        fc2_bias=None,
    ),
    _one_layer(
        "one layer, fc2_bias", ValueError, r"fc2_bias must be None where fc2_weight is None", fc2_bias=torch.zeros(6)
    ),
    _one_layer(
        "one layer, hidden_activation",
        ValueError,
        r"hidden_activation must be left at 'relu' where fc2_weight is None.*, got 'silu'",
        hidden_activation="silu",
    ),
    _bad(
        "hidden_activation",
        ValueError,
        r"hidden_activation must be one of 'relu', 'silu', 'gelu', 'hardswish', got 'elu'",
        hidden_activation="elu",
    ),
    _bad("hidden_activation none", ValueError, r"hidden_activation .* got None", hidden_activation=None),
    _bad("gate", ValueError, r"gate must be one of 'sigmoid', 'hardsigmoid', got 'relu'", gate="relu"),
    _bad("fc1_bias", ValueError, r"fc1_bias must have shape \(hidden,\)=\(3,\)", fc1_bias=torch.zeros(4)),
    _bad("fc2_bias", ValueError, r"fc2_bias must have shape \(C,\)=\(6,\), got", fc2_bias=torch.zeros(3)),
    _bad("fc1_bias rank", ValueError, r"fc1_bias must have shape \(hidden,\)", fc1_bias=lambda b: b[None]),
    _bad(
        "residual shape",
        ValueError,
        r"residual must have shape \(B, C, H, W\)=\(2, 6, 3, 4\), got \(2, 1, 3, 4\)",
        residual=lambda r: r[:, :1],
    ),
    _bad("residual rank", ValueError, r"residual must have shape \(B, C, H, W\)", residual=lambda r: r[0]),
    _bad("activation", ValueError, r"activation must be one of None, 'relu', got 'gelu'", activation="gelu"),
    _bad("dtype", ValueError, r"fc2_weight must have the dtype of x, torch", fc2_weight=lambda w: w.half()),
    _bad("residual dtype", ValueError, r"residual must have the dtype of x", residual=lambda r: r.double()),
    _bad("device", ValueError, r"fc1_bias must be on the device of x, cpu", fc1_bias=lambda b: b.to("meta")),
)
BAD_INPUTS = {"squeeze_excite": _BAD}
