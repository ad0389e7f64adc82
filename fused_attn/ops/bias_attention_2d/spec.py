"""Samples, benchmark shapes and peers of ``bias_attention_2d``."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .._floor.declarations import OpSpec, Sample, convert
from ..rel_attention_2d import op
from ..rel_attention_2d.spec import (
    GEOMETRIES,
    PREFIX_CASES,
    SEGMENT_CASES,
    SMALL,
    describe,
    fuzz_extras,
    fuzz_geometry,
    geometry,
    make_attention,
    make_prefix,
    make_segments,
    operators,
)
from .api import bias_attention_2d


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: str = "",
    segments: str = "",
    prefix: int = 0,
    options: Mapping[str, Any] | None = None,
    **geometry: Any,
) -> dict[str, Any]:
    """Arguments of ``bias_attention_2d``; ``table`` says of what kind."""
    inputs = make_attention(dtype, device, **geometry)
    lengths = [max(q + k - 1, 0) for q, k in zip(geometry["query_grid"], geometry["key_grid"], strict=True)]
    shape = (geometry["heads"], *lengths)
    if table == "positions first":  # as Swin and MaxViT keep it: (positions, heads)
        bias_table = torch.randn(*lengths, geometry["heads"], dtype=torch.float64).permute(2, 0, 1)
    elif table == "expanded":
        bias_table = torch.randn(1, *lengths, dtype=torch.float64).expand(shape)
    else:
        bias_table = torch.randn(shape, dtype=torch.float64)
    if table == "masks":
        bias_table[:, ::2, ::3] = float("-inf")
    inputs["bias_table"] = bias_table.to(device, torch.float32 if table == "float32" else dtype)
    return {**inputs, **make_segments(segments, device, **geometry), **make_prefix(prefix, inputs), **(options or {})}


def _sample(name: str, small: bool = False, **settings: Any) -> Sample:
    return Sample(name, partial(make_inputs, **settings), small=small)


SAMPLES = (
    *(_sample(name, small=name == "small", **geometry) for name, geometry in GEOMETRIES.items()),
    _sample("key_minus_query", small=True, **SMALL, options={"index": "key_minus_query"}),
    _sample("key_minus_query, unequal grids", **geometry((6, 5), (4, 9), d_v=4), options={"index": "key_minus_query"}),
    _sample("table of positions by heads", small=True, **SMALL, table="positions first"),
    _sample("expanded table", **SMALL, table="expanded"),
    _sample("table of masks", **SMALL, table="masks"),
    _sample("windows 7x7", **geometry((7, 7), d_k=32, d_v=32, batch=4, heads=3), segments="halves"),
    _sample("windows 12x12", **geometry((12, 12), d_k=32, d_v=32), segments="padded"),
    _sample("scale 0.1", small=True, **SMALL, options={"scale": 0.1}),
    _sample("dropout", small=True, **SMALL, options={"dropout_p": 0.3}),
    _sample("dropout, width 8", **GEOMETRIES["width 8"], options={"dropout_p": 0.5}),
    _sample("dropout, width 32", **geometry((8, 32)), options={"dropout_p": 0.1}),
    *(
        _sample(f"{segments}, {name}", small=name == "small", **GEOMETRIES[name], segments=segments)
        for segments, name in SEGMENT_CASES
    ),
    *(
        _sample(f"prefix {count}, {name}", small=name == "small", **GEOMETRIES[name], prefix=count)
        for count, name in PREFIX_CASES
    ),
    _sample("segments, prefix, dropout", small=True, **SMALL, segments="padded", prefix=3, options={"dropout_p": 0.3}),
)


def fuzz(draw: random.Random) -> Sample:
    settings = {
        "table": draw.choice(("", "", "positions first", "expanded")),
        "options": {
            "index": draw.choice(("key_minus_query", "query_minus_key")),
            "dropout_p": draw.choice((0.0, 0.0, 0.25)),
        },
        **fuzz_extras(draw),
        **fuzz_geometry(draw),
    }
    return Sample(describe(settings), partial(make_inputs, **settings))


SPECS = (
    OpSpec(
        name="bias_attention_2d",
        function=bias_attention_2d,
        implementations=op.rel_attention_2d.implementations("query", "key", "value"),
        samples=SAMPLES,
        fuzz=fuzz,
        operators=partial(operators, ""),
        autocast=partial(convert, keep=("bias_table",)),
    ),
)
