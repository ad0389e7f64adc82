"""Samples, benchmark shapes and peers of ``attention_residual``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._floor.declarations import OpSpec, Sample, Shape, contiguous, drawn, expanded
from . import op
from .api import attention_residual
from .peers import PEERS

# --- layouts of a value (..., D) --------------------------------------------------------------------------------------


def _tokens_first(shape, dtype, device):
    """(T, B, D) in memory."""
    return contiguous((*shape[:-1][::-1], shape[-1]), dtype, device).permute(*range(len(shape) - 1)[::-1], -1)


def _padded_rows(shape, dtype, device):
    """Rows inside longer ones."""
    return contiguous((*shape[:-1], shape[-1] + 5), dtype, device)[..., 2:-3]


def _strided_rows(shape, dtype, device):
    """Every second number of a row: copied."""
    return contiguous((*shape[:-1], 2 * shape[-1]), dtype, device)[..., 1::2]


_LAYOUTS = (contiguous, _tokens_first, _padded_rows, _strided_rows)


# --- calls ------------------------------------------------------------------------------------------------------------


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    values: int,
    shape: tuple[int, ...],
    norm_weight: bool = True,
    layout: Callable[..., Tensor] = contiguous,
    layouts: tuple[Callable[..., Tensor], ...] | None = None,
    edit: Callable[[dict[str, Any]], None] | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of ``attention_residual``, with logits of standard deviation 1; ``edit`` changes them at the end."""
    inputs = {
        "values": [each(shape, dtype, device) for each in layouts or (layout,) * values],
        "query": (torch.randn(shape[-1:], dtype=torch.float64) * shape[-1] ** -0.5).to(device, dtype),
    }
    if norm_weight:
        inputs["norm_weight"] = contiguous(shape[-1:], dtype, device)
    if edit is not None:
        edit(inputs)
    return {**inputs, **(options or {})}


def _plant(value: float) -> Callable[[dict[str, Any]], None]:
    def edit(inputs: dict[str, Any]) -> None:
        # In one token: the others' results must stay finite and right.
        inputs["values"][1][0, 0, 0] = value

    return edit


def _large(inputs: dict[str, Any]) -> None:
    inputs["query"] *= 20.0


def _zero_value(inputs: dict[str, Any]) -> None:
    inputs["values"][0].zero_()


SMALL = {"values": 3, "shape": (2, 3, 5)}
_SMALL_NAMES = ("small", "one value", "no norm_weight")

SAMPLES = tuple(
    Sample(name, partial(make_inputs, **settings), small=name in _SMALL_NAMES)
    for name, settings in {
        "small": SMALL,
        "one value": {**SMALL, "values": 1},
        "no norm_weight": {**SMALL, "norm_weight": False},
        "many values": {**SMALL, "values": 33},
        "depth 1": {**SMALL, "shape": (2, 3, 1)},
        "depth 16": {**SMALL, "shape": (2, 3, 16)},
        "depth 77": {**SMALL, "shape": (3, 5, 77)},
        "depth 384": {"values": 5, "shape": (2, 7, 384)},
        "depth 1030": {"values": 9, "shape": (1, 3, 1030)},
        "depth 2600": {"values": 4, "shape": (1, 2, 2600)},
        "many tokens": {"values": 4, "shape": (3, 211, 20)},
        "one token": {**SMALL, "shape": (7,)},
        "two dimensions": {**SMALL, "shape": (6, 7)},
        "four dimensions": {**SMALL, "shape": (2, 3, 4, 7)},
        "tokens first": {**SMALL, "layout": _tokens_first},
        "padded rows": {**SMALL, "layout": _padded_rows},
        "strided rows": {**SMALL, "layout": _strided_rows},
        "expanded": {**SMALL, "layout": expanded},
        "mixed layouts": {**SMALL, "layouts": (contiguous, _tokens_first, _strided_rows)},
        "eps 1": {**SMALL, "options": {"eps": 1.0}},
        "large logits": {**SMALL, "edit": _large},
        "a value of zeros": {**SMALL, "edit": _zero_value},
        "nan": {**SMALL, "edit": _plant(float("nan"))},
        "no images": {**SMALL, "shape": (0, 3, 5)},
        "no tokens": {**SMALL, "shape": (2, 0, 5)},
    }.items()
)


def fuzz(draw: random.Random) -> Sample:
    values = draw.randint(1, 12)
    depth = draw.choice((1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 130, 384))
    settings = {
        "values": values,
        "shape": (draw.randint(1, 3), draw.randint(1, 40), depth),
        "norm_weight": draw.random() < 0.6,
        "layouts": tuple(draw.choice(_LAYOUTS) for _ in range(values)),
        "options": {"eps": draw.choice((1e-6, 1e-3))},
    }
    return drawn(make_inputs, settings)


# --- benchmark shapes -------------------------------------------------------------------------------------------------


def _shape(L: int, N: int, D: int, *, name: str = "") -> Shape:
    """A case by its sizes: L values of N tokens of D numbers."""
    numbers = N * D
    sizes = {"L": L, "N": N, "D": D}
    return Shape(
        name or ",".join(f"{key}={value}" for key, value in sizes.items()),
        partial(make_inputs, values=L, shape=(N, D)),
        flops_forward=6 * L * numbers,
        flops_backward=9 * L * numbers,
        bytes_forward=4 * (L + 1) * numbers,
        bytes_backward=4 * (2 * L + 1) * numbers,
        # The output, a gradient of each value, the gradient of the output, which is expanded and so copied, two
        # statistics of every value and token, and a partial sum of the query's gradient per 16 tokens.
        memory_limit=int(1.1 * 4 * ((L + 2) * numbers + 2 * L * N + numbers / 16)),
        sizes=sizes,
    )


SHAPES = (
    _shape(9, 1024, 1024, name="L 9, N 1024, D 1024"),
    _shape(9, 256, 7168, name="L 9, N 256, D 7168"),
    _shape(24, 1568, 384, name="L 24, N 1568, D 384"),
)
GPU_SHAPES = (_shape(9, 8192, 7168, name="L 9, N 8192, D 7168"),)
GROWTH = tuple(_shape(9, n, 384, name=f"N {n}, L 9, D 384") for n in (196, 784, 3136, 12544))


# --- spec -------------------------------------------------------------------------------------------------------------


def _operators(impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    return op.attention_residual.calls(impl, inputs["values"], inputs["query"], inputs.get("norm_weight"), 1e-6)


SPECS = (
    OpSpec(
        name="attention_residual",
        function=attention_residual,
        implementations=op.attention_residual.implementations("values", "query"),
        samples=SAMPLES,
        fuzz=fuzz,
        operators=_operators,
        shapes=SHAPES,
        gpu_shapes=GPU_SHAPES,
        growth=GROWTH,
        make_shape=_shape,
        peers=PEERS,
    ),
)
