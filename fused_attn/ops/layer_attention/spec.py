"""Samples, benchmark shapes and peers of ``layer_attention`` and ``weighted_layer_sum``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .._floor.declarations import OpSpec, Sample, Shape, contiguous, convert, drawn, expanded, spread
from . import op
from .api import layer_attention, weighted_layer_sum
from .peers import ATTENTION_PEERS, SUM_PEERS

# --- layouts of a value (B, C, *spatial) ------------------------------------------------------------------------------


def _channels_last(shape, dtype, device):
    batch, channels, *spatial = shape
    return contiguous((batch, *spatial, channels), dtype, device).movedim(-1, 1)


def _part_of_batch(shape, dtype, device):
    """Every second image of a larger batch: dense images, not a dense batch."""
    return contiguous((2 * shape[0], *shape[1:]), dtype, device)[::2]


#: The last is neither memory order, so it is copied.
_LAYOUTS = (contiguous, _channels_last, _part_of_batch, spread)


# --- calls ------------------------------------------------------------------------------------------------------------


def _values(dtype, device, layers, batch, channels, spatial, layout=contiguous, layouts=None):
    layouts = layouts or (layout,) * layers
    return [each((batch, channels, *spatial), dtype, device) for each in layouts]


def make_attention_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    layers: int,
    batch: int,
    groups: int,
    depth: int,
    channels: int,
    spatial: tuple[int, ...],
    learned: bool = False,
    bias: bool = False,
    edit: Callable[[dict[str, Any]], None] | None = None,
    options: Mapping[str, Any] | None = None,
    **layouts: Any,
) -> dict[str, Any]:
    """Arguments of ``layer_attention``; ``edit`` changes them afterwards."""
    inputs = {
        "query": contiguous((groups, depth) if learned else (batch, groups, depth), dtype, device),
        "keys": [contiguous((batch, groups, depth), dtype, device) for _ in range(layers)],
        "values": _values(dtype, device, layers, batch, channels, spatial, **layouts),
    }
    if bias:
        inputs["bias"] = contiguous((layers, groups), dtype, device)
    if edit is not None:
        edit(inputs)
    return {**inputs, **(options or {})}


def make_sum_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    layers: int,
    batch: int,
    groups: int,
    channels: int,
    spatial: tuple[int, ...],
    depth: int = 0,
    **layouts: Any,
) -> dict[str, Any]:
    """Arguments of ``weighted_layer_sum``; ``depth`` is ignored."""
    return {
        "weights": contiguous((batch, groups, layers), dtype, device),
        "values": _values(dtype, device, layers, batch, channels, spatial, **layouts),
    }


SMALL = {"layers": 3, "batch": 2, "groups": 2, "depth": 3, "channels": 4, "spatial": (2, 3)}

_GEOMETRIES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "one layer": {**SMALL, "layers": 1},
    "many layers": {**SMALL, "layers": 33},
    "one group": {**SMALL, "groups": 1},
    "a group per channel": {**SMALL, "groups": 4},
    "depth 1": {**SMALL, "depth": 1},
    "pooled": {**SMALL, "channels": 64, "spatial": (), "groups": 1, "depth": 32, "layers": 9},
    "1x1": {**SMALL, "spatial": (1, 1)},
    "tokens": {**SMALL, "channels": 12, "spatial": (17,)},
    "volume": {**SMALL, "spatial": (2, 3, 5)},
    "primes": {**SMALL, "channels": 14, "spatial": (7, 11), "layers": 5},
    "a row in two parts": {**SMALL, "groups": 1, "channels": 3, "spatial": (83, 97), "batch": 1},
    "many layers, two blocks": {**SMALL, "layers": 13, "groups": 1, "channels": 3, "spatial": (40, 41), "batch": 1},
    "stage 3 of a small ResNet": {**SMALL, "channels": 64, "groups": 4, "depth": 16, "spatial": (14, 14), "layers": 6},
    "channels_last": {**SMALL, "channels": 48, "spatial": (5, 7), "layout": _channels_last},
    "channels_last, odd channels": {**SMALL, "channels": 38, "spatial": (5, 3), "layout": _channels_last},
    "channels_last, two blocks of channels": {**SMALL, "channels": 272, "spatial": (9, 9), "layout": _channels_last},
    "channels_last, two parts of the image": {**SMALL, "channels": 64, "spatial": (19, 17), "layout": _channels_last},
    "channels_last tokens": {**SMALL, "channels": 12, "spatial": (17,), "layout": _channels_last},
    "part of a batch": {**SMALL, "layout": _part_of_batch},
    "spread": {**SMALL, "layout": spread},
    "expanded": {**SMALL, "layout": expanded},
    "mixed layouts": {**SMALL, "layouts": (_channels_last, contiguous, spread)},
    "no images": {**SMALL, "batch": 0},
    "no positions": {**SMALL, "spatial": (0, 3)},
    "no channels": {**SMALL, "channels": 0},
}


def _plant(name: str, layer: int, value: float) -> Callable[[dict[str, Any]], None]:
    def edit(inputs: dict[str, Any]) -> None:
        # In one image of two: the other one's results must stay finite and right.
        inputs[name][layer][(0,) * inputs[name][layer].dim()] = value

    return edit


def _mask(inputs: dict[str, Any]) -> None:
    inputs["bias"][1] = float("-inf")


def _mask_least(inputs: dict[str, Any]) -> None:
    """Every layer for one group, one layer for the other."""
    least = torch.finfo(inputs["bias"].dtype).min
    inputs["bias"][:, 0] = inputs["bias"][0] = least


_SMALL_NAMES = ("small", "one layer", "channels_last tokens")

ATTENTION_SAMPLES = (
    *(Sample(name, partial(make_attention_inputs, **g), small=name in _SMALL_NAMES) for name, g in _GEOMETRIES.items()),
    Sample("sigmoid", partial(make_attention_inputs, **SMALL, options={"activation": "sigmoid"}), small=True),
    Sample("learned query", partial(make_attention_inputs, **SMALL, learned=True), small=True),
    Sample("bias", partial(make_attention_inputs, **SMALL, bias=True), small=True),
    Sample(
        "sigmoid, bias, learned query",
        partial(
            make_attention_inputs, **SMALL, learned=True, bias=True, options={"activation": "sigmoid", "scale": 0.3}
        ),
    ),
    Sample("a layer masked", partial(make_attention_inputs, **SMALL, bias=True, edit=_mask)),
    Sample("masked by the least finite number", partial(make_attention_inputs, **SMALL, bias=True, edit=_mask_least)),
    Sample("scale 0", partial(make_attention_inputs, **SMALL, options={"scale": 0.0})),
    Sample("large scores", partial(make_attention_inputs, **SMALL, options={"scale": 30.0})),
    Sample("nan in a value", partial(make_attention_inputs, **SMALL, edit=_plant("values", 1, float("nan")))),
    Sample("inf in a value", partial(make_attention_inputs, **SMALL, edit=_plant("values", 0, float("inf")))),
    Sample("nan in a key", partial(make_attention_inputs, **SMALL, edit=_plant("keys", 2, float("nan")))),
)
SUM_SAMPLES = tuple(
    Sample(name, partial(make_sum_inputs, **g), small=name in _SMALL_NAMES) for name, g in _GEOMETRIES.items()
)


# --- random calls for the shape fuzz ----------------------------------------------------------------------------------


def _fuzz_geometry(draw: random.Random) -> dict[str, Any]:
    groups = draw.randint(1, 5)
    layers = draw.randint(1, 9)
    spatial = draw.choice(((), (1,), (1, 1), (draw.randint(1, 40),), (draw.randint(1, 12), draw.randint(1, 20))))
    return {
        "layers": layers,
        "batch": draw.randint(1, 3),
        "groups": groups,
        "depth": draw.choice((1, 2, 3, 16, 33)),
        "channels": groups * draw.choice((1, 2, 3, 7, 16, 33)),
        "spatial": spatial,
        "layouts": tuple(draw.choice(_LAYOUTS) for _ in range(layers)),
    }


def fuzz_attention(draw: random.Random) -> Sample:
    settings = {
        **_fuzz_geometry(draw),
        "learned": draw.random() < 0.3,
        "bias": draw.random() < 0.3,
        "options": {"activation": draw.choice(("softmax", "sigmoid")), "scale": draw.choice((None, 0.5))},
    }
    return drawn(make_attention_inputs, settings)


def fuzz_sum(draw: random.Random) -> Sample:
    return drawn(make_sum_inputs, _fuzz_geometry(draw))


# --- benchmark shapes -------------------------------------------------------------------------------------------------


def _shape(
    L: int, B: int, C: int, H: int, W: int, G: int, *, make=make_attention_inputs, layout=contiguous, name: str = ""
) -> Shape:
    """A case by its sizes; the depth of a head is its number of channels, as in MRLA."""
    values = B * C * H * W
    sizes = {"L": L, "B": B, "C": C, "H": H, "W": W, "G": G}
    geometry = {"layers": L, "batch": B, "groups": G, "depth": C // G, "channels": C, "spatial": (H, W)}
    return Shape(
        name or ",".join(f"{key}={value}" for key, value in sizes.items()),
        partial(make, **geometry, layout=layout),
        flops_forward=2 * L * values,
        flops_backward=3 * L * values,
        bytes_forward=4 * (L + 1) * values,
        bytes_backward=4 * (2 * L + 1) * values,
        # The output, a gradient of each value, and the gradient of the output, expanded here and so copied once.
        memory_limit=int(1.1 * 4 * (L + 2) * values),
        sizes=sizes,
    )


def _growth(make) -> tuple[Shape, ...]:
    return tuple(_shape(6, 4, 256, n, n, 16, make=make, name=f"{n}x{n}, L 6, C 256, B 4") for n in (7, 14, 28, 56))


def _shapes(make) -> tuple[Shape, ...]:
    return (
        _shape(6, 32, 1024, 14, 14, 64, make=make, name="L 6, C 1024, 14x14"),
        _shape(6, 32, 1024, 14, 14, 64, make=make, layout=_channels_last, name="L 6, C 1024, 14x14, channels_last"),
        _shape(3, 32, 256, 56, 56, 16, make=make, name="L 3, C 256, 56x56"),
        _shape(23, 8, 1024, 14, 14, 64, make=make, name="L 23, C 1024, 14x14, B 8"),
    )


# --- specs ------------------------------------------------------------------------------------------------------------


def _attention_operators(impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    query, values = inputs["query"], inputs["values"]
    query = query.expand(values[0].shape[0], *query.shape) if query.dim() == 2 else query
    sigmoid = inputs.get("activation") == "sigmoid"
    return op.layer_attention.calls(impl, query, inputs["keys"], values, inputs.get("bias"), 0.3, sigmoid)


SPECS = (
    OpSpec(
        name="layer_attention",
        function=layer_attention,
        implementations=op.layer_attention.implementations("query"),
        autocast=partial(convert, keep=("bias",)),
        samples=ATTENTION_SAMPLES,
        fuzz=fuzz_attention,
        operators=_attention_operators,
        shapes=_shapes(make_attention_inputs),
        growth=_growth(make_attention_inputs),
        make_shape=_shape,
        peers=ATTENTION_PEERS,
    ),
    op.weighted_layer_sum.spec(
        weighted_layer_sum,
        samples=SUM_SAMPLES,
        fuzz=fuzz_sum,
        shapes=_shapes(make_sum_inputs)[:2],
        growth=_growth(make_sum_inputs),
        make_shape=partial(_shape, make=make_sum_inputs),
        peers=SUM_PEERS,
    ),
)
