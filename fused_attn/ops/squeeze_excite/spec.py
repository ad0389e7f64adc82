"""Samples, benchmark shapes and peers of ``squeeze_excite``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .._floor.declarations import OpSpec, Sample, Shape, unchanged
from . import op, reference
from .api import squeeze_excite
from .peers import PEERS

# --- layouts: a logical (B, C, H, W) map in some memory order ---------------------------------------------------------


def _contiguous(shape, dtype, device):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def _channels_last(shape, dtype, device):
    return _contiguous(shape, dtype, device).contiguous(memory_format=torch.channels_last)


def _spread(shape, dtype, device):
    """Every second element of every axis."""
    return _contiguous([2 * size for size in shape], dtype, device)[tuple(slice(1, None, 2) for _ in shape)]


def _turned(shape, dtype, device):
    """(C, B, W, H) in memory."""
    batch, channels, height, width = shape
    return _contiguous((channels, batch, width, height), dtype, device).permute(1, 0, 3, 2)


def _one_map(shape, dtype, device):
    """One map expanded over the batch: stride 0."""
    return _contiguous((1, *shape[1:]), dtype, device).expand(shape)


def _slice_of_channels(shape, dtype, device):
    """Half of the channels of a channels_last map."""
    batch, channels, height, width = shape
    return _channels_last((batch, 2 * channels, height, width), dtype, device)[:, channels:]


LAYOUTS = (_contiguous, _channels_last, _spread, _turned, _one_map, _slice_of_channels)


# --- calls ------------------------------------------------------------------------------------------------------------


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    size: tuple[int, int, int, int],
    hidden: int = 0,
    features: int | None = None,
    share: bool = False,
    biases: tuple[bool, bool] = (True, True),
    residual: bool = False,
    relu: bool = False,
    layout: Callable = _contiguous,
    residual_layout: Callable | None = None,
    weight_layout: str = "plain",
    convolutions: bool = False,
    one_layer: bool = False,
    hidden_activation: str = "relu",
    gate: str = "sigmoid",
    edit: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Arguments of ``squeeze_excite``.  ``features``: of the result; ``share``: precomputed instead."""
    batch, channels = size[:2]
    hidden = channels if one_layer else hidden

    def matrix(rows, columns):
        shape = (columns, rows) if weight_layout == "transposed" else (rows, columns)
        weight = _contiguous(shape, dtype, device) * (columns or 1) ** -0.5
        weight = weight.t() if weight_layout == "transposed" else weight
        return weight[:, :, None, None] if convolutions else weight

    inputs = {
        "x": layout(size, dtype, device),
        "fc1_weight": matrix(hidden, channels + (features or 0)),
        "fc1_bias": _contiguous((hidden,), dtype, device) if biases[0] else None,
    }
    if not one_layer:
        inputs["fc2_weight"] = matrix(channels, hidden)
        inputs["fc2_bias"] = _contiguous((channels,), dtype, device) if biases[1] else None
    if features is not None:
        inputs["result"] = _contiguous((batch, features), dtype, device)
    if share:
        inputs["result_share"] = _contiguous((batch, hidden), dtype, device)
    if residual:
        inputs["residual"] = (residual_layout or layout)(size, dtype, device)
    if relu:
        inputs["activation"] = "relu"
    if hidden_activation != "relu":
        inputs["hidden_activation"] = hidden_activation
    if gate != "sigmoid":
        inputs["gate"] = gate
    if edit is not None:
        edit(inputs)
    return inputs


SMALL: dict[str, Any] = {"size": (2, 6, 3, 4), "hidden": 3}
_BLOCK: dict[str, Any] = {"residual": True, "relu": True}
_EFFICIENTNET: dict[str, Any] = {"hidden_activation": "silu", "convolutions": True}
_HARD: dict[str, Any] = {"hidden_activation": "hardswish", "gate": "hardsigmoid", "convolutions": True}
_MOBILENET: dict[str, Any] = {"gate": "hardsigmoid", "convolutions": True}
#: Effective SE, as in timm's VoVNets.
_EFFECTIVE: dict[str, Any] = {"one_layer": True, "gate": "hardsigmoid", "convolutions": True}


def _plant(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def edit(inputs: dict[str, Any]) -> None:
        # One sample of two: the other one's results must stay finite and right.
        inputs[name][0, 0] = value

    return edit


def _at_kinks(inputs: dict[str, Any]) -> None:
    """The first layer gives the kinks of ReLU, hardswish and hardsigmoid, and the numbers next to those at +-3."""
    bias = inputs["fc1_bias"]
    three = torch.tensor(3.0, dtype=bias.dtype)
    below, above = (torch.nextafter(three, torch.tensor(limit).to(three)).item() for limit in (0.0, 4.0))
    values = (-above, -3.0, -below, 0.0, below, 3.0, above)
    inputs["fc1_weight"].zero_()
    bias.copy_(torch.tensor(values, dtype=bias.dtype))


def _over_range(inputs: dict[str, Any]) -> None:
    """The first layer gives numbers from -12 to 12."""
    inputs["fc1_weight"].zero_()
    inputs["fc1_bias"].copy_(torch.linspace(-12.0, 12.0, inputs["fc1_bias"].numel()))


def _strided_rows(inputs: dict[str, Any]) -> None:
    for name in ("result", "result_share"):
        if name in inputs:
            inputs[name] = inputs[name].repeat_interleave(2, 1)[:, ::2]


_CASES: dict[str, dict[str, Any]] = {
    "small": {**SMALL, "small": True},
    "residual": {**SMALL, "residual": True, "small": True},
    "relu": {**SMALL, "relu": True, "small": True},
    "residual and relu": {**SMALL, **_BLOCK, "small": True},
    "result": {**SMALL, "features": 5, "small": True},
    "result, residual and relu": {**SMALL, **_BLOCK, "features": 5},
    "result share": {**SMALL, **_BLOCK, "share": True, "small": True},
    "result without features": {**SMALL, "features": 0},
    "strided result": {**SMALL, "features": 5, "edit": _strided_rows},
    "strided result share": {**SMALL, "share": True, "edit": _strided_rows},
    "no biases": {**SMALL, **_BLOCK, "biases": (False, False), "small": True},
    "first bias only": {**SMALL, "biases": (True, False)},
    "second bias only": {**SMALL, "biases": (False, True)},
    "silu, convolutions": {**SMALL, **_EFFICIENTNET, "small": True},
    "gelu": {**SMALL, **_BLOCK, "hidden_activation": "gelu", "small": True},
    "hardswish and hardsigmoid": {**SMALL, **_HARD, "small": True},
    "one layer": {**SMALL, **_EFFECTIVE, "residual": True, "small": True},
    "one layer, result, residual and relu": {**SMALL, **_BLOCK, "one_layer": True, "features": 5},
    "one layer, result share, channels_last": {
        **SMALL, **_BLOCK, "one_layer": True, "share": True, "layout": _channels_last,
    },
    "channels_last": {**SMALL, **_BLOCK, "layout": _channels_last, "small": True},
    "channels_last, residual contiguous": {
        **SMALL, **_BLOCK, "layout": _channels_last, "residual_layout": _contiguous,
    },
    "contiguous, residual channels_last": {**SMALL, **_BLOCK, "residual_layout": _channels_last},
    "spread": {**SMALL, **_BLOCK, "layout": _spread},
    "turned": {**SMALL, **_BLOCK, "layout": _turned},
    "one map": {**SMALL, "layout": _one_map, "residual": True},
    "slice of channels": {**SMALL, "layout": _slice_of_channels},
    "transposed weights": {**SMALL, **_BLOCK, "features": 5, "weight_layout": "transposed"},
    "1x1 map": {"size": (3, 20, 1, 1), "hidden": 4, **_BLOCK},
    "1x1 map, channels_last": {"size": (3, 20, 1, 1), "hidden": 4, "layout": _channels_last},
    "one channel": {"size": (2, 1, 5, 5), "hidden": 4, **_BLOCK},
    "one channel, channels_last": {"size": (2, 1, 5, 5), "hidden": 4, "layout": _channels_last},
    "7x7": {"size": (3, 40, 7, 7), "hidden": 5, "features": 10, **_BLOCK},
    "7x7, channels_last": {"size": (3, 40, 7, 7), "hidden": 5, "features": 10, **_BLOCK, "layout": _channels_last},
    "14x14": {"size": (2, 24, 14, 14), "hidden": 3, **_BLOCK},
    "14x14, channels_last": {"size": (2, 24, 14, 14), "hidden": 3, **_BLOCK, "layout": _channels_last},
    "wide layers": {"size": (11, 130, 2, 2), "hidden": 70, "features": 33, **_BLOCK},
    "wide layers, channels_last": {"size": (11, 130, 2, 2), "hidden": 70, "layout": _channels_last},
    "wide layers, gelu and hardsigmoid": {
        "size": (11, 130, 2, 2), "hidden": 70, "features": 33, "hidden_activation": "gelu", "gate": "hardsigmoid",
    },
    "wide layers, silu": {"size": (11, 130, 2, 2), "hidden": 70, **_EFFICIENTNET, "layout": _channels_last},
    "wide layers, hardswish": {"size": (11, 130, 2, 2), "hidden": 70, **_HARD, "weight_layout": "transposed"},
    "one wide layer": {"size": (11, 130, 2, 2), **_EFFECTIVE},
    "kinks of relu": {**SMALL, "hidden": 7, "edit": _at_kinks},
    "kinks of hardswish": {**SMALL, "hidden": 7, "hidden_activation": "hardswish", "edit": _at_kinks},
    "kinks of hardsigmoid": {**_EFFECTIVE, "size": (2, 7, 3, 4), "edit": _at_kinks},
    "range of silu": {**SMALL, "hidden": 97, "hidden_activation": "silu", "edit": _over_range},
    "range of gelu": {**SMALL, "hidden": 97, "hidden_activation": "gelu", "edit": _over_range},
    "large map": {"size": (1, 3, 67, 61), "hidden": 2, **_BLOCK},
    "large map, channels_last": {"size": (1, 3, 67, 61), "hidden": 2, **_BLOCK, "layout": _channels_last},
    "many samples": {"size": (40, 8, 2, 3), "hidden": 2, "relu": True},
    "no samples": {**SMALL, **_BLOCK, "size": (0, 6, 3, 4), "features": 5},
    "no samples, one layer": {**SMALL, **_EFFECTIVE, "size": (0, 6, 3, 4)},
    "no samples, share": {**SMALL, "size": (0, 6, 3, 4), "share": True},
    "nan in x": {**SMALL, **_BLOCK, "edit": _plant("x", float("nan"))},
    "nan in x, hardsigmoid": {**SMALL, **_EFFECTIVE, "edit": _plant("x", float("nan"))},
    "inf in x": {**SMALL, "edit": _plant("x", float("inf"))},
    "nan in residual": {**SMALL, **_BLOCK, "edit": _plant("residual", float("nan"))},
}  # fmt: skip
SAMPLES = tuple(
    Sample(
        name, partial(make_inputs, **{k: v for k, v in case.items() if k != "small"}), small=case.get("small", False)
    )
    for name, case in _CASES.items()
)


# --- random calls for the shape fuzz ----------------------------------------------------------------------------------


def fuzz(draw: random.Random) -> Sample:
    """One random valid call; its name, the same text in every process, is its seed."""
    settings = {
        "size": (draw.randint(1, 9), draw.randint(1, 70), draw.randint(1, 17), draw.randint(1, 17)),
        "hidden": draw.randint(1, 20),
        "features": draw.choice((None, None, 1, 10, 37)),
        "biases": (draw.random() < 0.7, draw.random() < 0.7),
        "residual": draw.random() < 0.5,
        "relu": draw.random() < 0.5,
        "layout": draw.choice(LAYOUTS),
        "residual_layout": draw.choice(LAYOUTS),
        "weight_layout": draw.choice(("plain", "transposed")),
    }
    settings["share"] = settings["features"] is None and draw.random() < 0.3
    settings["convolutions"], settings["one_layer"] = draw.random() < 0.3, draw.random() < 0.2
    settings["gate"] = draw.choice(tuple(reference.GATES))
    if not settings["one_layer"]:
        settings["hidden_activation"] = draw.choice(tuple(reference.HIDDEN_ACTIVATIONS))
    name = str({key: getattr(value, "__name__", value) for key, value in settings.items()})
    return Sample(name, partial(make_inputs, **settings))


# --- benchmark shapes: most with residual and ReLU, as at the end of a block ------------------------------------------


def _off_the_kink(inputs: dict[str, Any]) -> None:
    """Change the residual where the argument of the ReLU is so near 0 that rounding decides its sign.

    One or two in tens of millions of random values are; the gradients of two correct results differ entirely there.
    """
    x, residual = inputs["x"], inputs["residual"]
    small = [inputs.get(name) for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "result")]
    scale = reference.scales(x.float(), *(None if tensor is None else tensor.float() for tensor in small))
    argument = torch.addcmul(residual.float(), x.float(), scale[:, :, None, None])
    residual += (argument.abs() < 1e-3).to(residual.dtype)


def _shape(
    B: int,
    C: int,
    H: int,
    W: int,
    hidden: int,
    n: int = 0,
    *,
    layout: Callable = _contiguous,
    style: Mapping[str, Any] = _BLOCK,
    name: str = "",
) -> Shape:
    """A case by its sizes; ``n`` features of a result."""
    sizes = {"B": B, "C": C, "H": H, "W": W, "hidden": hidden, "n": n}
    if n == 0:
        del sizes["n"]
    second = 0 if style.get("one_layer") else hidden * C
    values, weights = B * C * H * W, hidden * (n + C + 1) + second + C
    flops = 2 * B * (hidden * (n + C) + second)
    residual, relu = style.get("residual", False), style.get("relu", False)
    return Shape(
        name or ",".join(f"{key}={value}" for key, value in sizes.items()),
        partial(
            make_inputs,
            size=(B, C, H, W),
            hidden=hidden,
            features=n or None,
            **style,
            layout=layout,
            edit=_off_the_kink if residual and relu else None,
        ),
        flops_forward=flops,
        flops_backward=2 * flops,
        # x and the residual in, out out; x, out and its gradient in, two gradients out.
        bytes_forward=4 * ((2 + residual) * values + weights),
        bytes_backward=4 * ((3 + residual + relu) * values + 2 * weights),
        # out, its gradient and two gradients, and the small layers with their packed copies.
        memory_limit=4 * (4 * values + 6 * weights + 8 * B * (C + hidden + n)) + 2**20,
        sizes=sizes,
    )


#: ResNet-50's four stages on 224x224 images, then the case of the paper: stage 3 of SE-R-ResNet-50 on CIFAR-100.  The
#: gate alone: blocks of EfficientNet-B0, MobileNetV3-Large and FBNetV3-B, a stage of VoVNet-39 with Effective SE.
_STAGES = ((32, 256, 56, 32), (64, 512, 28, 64), (128, 512, 14, 64), (128, 1024, 14, 128), (128, 2048, 7, 256))
SHAPES = (
    *(
        _shape(B, C, n, n, hidden, layout=layout, name=f"{n}x{n}, B {B}, C {C}{suffix}")
        for B, C, n, hidden in _STAGES
        for layout, suffix in ((_contiguous, ""), (_channels_last, ", channels_last"))
    ),
    _shape(128, 1024, 8, 8, 128, 100, name="8x8, B 128, C 1024, result of 100"),
    *(
        _shape(B, C, n, n, hidden, layout=layout, style=style, name=f"{n}x{n}, B {B}, C {C}, {kind}{suffix}")
        for B, C, n, hidden, style, kind in (
            (64, 240, 28, 10, _EFFICIENTNET, "SiLU"),
            (64, 512, 28, 512, _EFFECTIVE, "one layer"),
        )
        for layout, suffix in ((_contiguous, ""), (_channels_last, ", channels_last"))
    ),
    _shape(64, 672, 14, 14, 168, style=_MOBILENET, name="14x14, B 64, C 672, ReLU and hard sigmoid"),
    _shape(64, 360, 14, 14, 32, style=_HARD, name="14x14, B 64, C 360, hard-swish and hard sigmoid"),
)
GPU_SHAPES = tuple(
    _shape(B, C, n, n, hidden, layout=layout, name=f"{n}x{n}, B {B}, C {C}, GPU{suffix}")
    for B, C, n, hidden in ((128, 256, 56, 32), (128, 512, 28, 64), (256, 1024, 14, 128), (256, 2048, 7, 256))
    for layout, suffix in ((_contiguous, ""), (_channels_last, ", channels_last"))
)
GROWTH = tuple(_shape(8, 64, n, n, 8, name=f"{n}x{n}, B 8, C 64") for n in (14, 28, 56, 112))


# --- spec -------------------------------------------------------------------------------------------------------------


def _operators(impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    names = ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "result", "result_share", "residual")
    relu, hidden_activation = inputs.get("activation") == "relu", inputs.get("hidden_activation", "relu")
    return op.squeeze_excite.calls(
        impl, *map(inputs.get, names), relu, hidden_activation, inputs.get("gate", "sigmoid")
    )


SPECS = (
    OpSpec(
        name="squeeze_excite",
        function=squeeze_excite,
        implementations=op.squeeze_excite.implementations("x"),
        autocast=unchanged,
        samples=SAMPLES,
        fuzz=fuzz,
        operators=_operators,
        shapes=SHAPES,
        growth=GROWTH,
        gpu_shapes=GPU_SHAPES,
        make_shape=_shape,
        peers=PEERS,
    ),
)
