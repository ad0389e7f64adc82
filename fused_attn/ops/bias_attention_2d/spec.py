"""Samples, benchmark shapes and peers of ``bias_attention_2d``."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .._floor.declarations import OpSpec, Sample, Shape, convert, drawn
from ..rel_attention_2d import op
from ..rel_attention_2d.spec import (
    GEOMETRIES,
    MANY_GEOMETRIES,
    MANY_SETTINGS,
    PREFIX_CASES,
    SEGMENT_CASES,
    SMALL,
    SMALL_GRIDS,
    channels_last,
    fuzz_extras,
    fuzz_geometry,
    geometry,
    make_attention,
    make_prefix,
    make_segments,
    operators,
)
from .api import bias_attention_2d
from .module import shift_segments
from .peers import PEERS


def make_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: str = "",
    segments: str = "",
    prefix: int = 0,
    windows: int = 0,
    options: Mapping[str, Any] | None = None,
    **geometry: Any,
) -> dict[str, Any]:
    """Arguments of ``bias_attention_2d``; ``table`` says of what kind, ``windows`` how many an image has along each
    axis, shifted by half of their size.
    """
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
    if windows:
        size = geometry["query_grid"]
        shifted = shift_segments((windows, windows), size, (size[0] // 2, size[1] // 2), device)
        inputs |= {"query_segments": shifted, "key_segments": shifted}
    return {**inputs, **make_segments(segments, device, **geometry), **make_prefix(prefix, inputs), **(options or {})}


def _sample(name: str, small: bool = False, **settings: Any) -> Sample:
    return Sample(name, partial(make_inputs, **settings), small=small)


SAMPLES = (
    *(_sample(name, small=name == "small", **geometry) for name, geometry in GEOMETRIES.items()),
    *(_sample(name, **settings) for name, settings in (MANY_GEOMETRIES | MANY_SETTINGS).items()),
    *(
        sample
        for name, many in SMALL_GRIDS.items()
        for sample in (
            _sample(f"{name}, key_minus_query", **many, options={"index": "key_minus_query"}),
            _sample(f"{name}, table of masks", **many, table="masks"),
        )
    ),
    # On the CPU: the biases of all heads are kept, those of a head, those of a head of an image.
    _sample("full vectors, many images", **geometry((4, 4), d_k=16, d_v=16, batch=1100, heads=1)),
    _sample("full vectors, large grid", **geometry((14, 14), d_k=16, d_v=16, batch=40, heads=2)),
    _sample(
        "full vectors, heads side by side", **geometry((14, 14), d_k=16, d_v=16, batch=9, heads=3, layout=channels_last)
    ),
    _sample("many pairs, shifted windows", **geometry((7, 7), d_k=32, d_v=32, batch=24, heads=3), windows=2),
    _sample("key_minus_query", small=True, **SMALL, options={"index": "key_minus_query"}),
    _sample("key_minus_query, unequal grids", **geometry((6, 5), (4, 9), d_v=4), options={"index": "key_minus_query"}),
    _sample("table of positions by heads", **SMALL, table="positions first"),
    _sample("expanded table", **SMALL, table="expanded"),
    _sample("table of masks", **SMALL, table="masks"),
    _sample("windows 7x7", **geometry((7, 7), d_k=32, d_v=32, batch=4, heads=3), segments="halves"),
    _sample("windows 12x12", **geometry((12, 12), d_k=32, d_v=32), segments="padded"),
    _sample("shifted windows 7x7", **geometry((7, 7), d_k=32, d_v=32, batch=8), windows=2),
    _sample("scale 0.1", **SMALL, options={"scale": 0.1}),
    _sample("dropout", **SMALL, options={"dropout_p": 0.3}),
    _sample("dropout, width 8", **GEOMETRIES["width 8"], options={"dropout_p": 0.5}),
    _sample("dropout, width 32", **geometry((8, 32)), options={"dropout_p": 0.1}),
    *(_sample(f"{segments}, {name}", **GEOMETRIES[name], segments=segments) for segments, name in SEGMENT_CASES),
    *(_sample(f"prefix {count}, {name}", **GEOMETRIES[name], prefix=count) for count, name in PREFIX_CASES),
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
    return drawn(make_inputs, settings)


# --- benchmark shapes -------------------------------------------------------------------------------------------------


def _shape(
    B: int, heads: int, H: int, W: int, d_k: int, d_v: int, sets: int = 0, *, name: str = "", memory_only: bool = False
) -> Shape:
    """A case by its sizes; the query and key grids are equal.

    Args:
        sets: of segments, a square number: those of so many shifted windows to an image; 0: none.
    """
    if math.isqrt(sets) ** 2 != sets:
        raise ValueError(f"sets must be a square number, got {sets}")
    grid, pairs, positions = (H, W), B * heads, H * W
    geometry = {"batch": B, "heads": heads, "query_grid": grid, "key_grid": grid, "d_k": d_k, "d_v": d_v}
    table = heads * (2 * H - 1) * (2 * W - 1)
    vectors = pairs * positions * (2 * d_k + d_v)
    sizes = {"B": B, "heads": heads, "H": H, "W": W, "d_k": d_k, "d_v": d_v} | ({"sets": sets} if sets else {})
    return Shape(
        name or ",".join(f"{key}={value}" for key, value in sizes.items()),
        partial(make_inputs, windows=math.isqrt(sets), **geometry),
        flops_forward=2 * pairs * positions**2 * (d_k + d_v),
        flops_backward=2 * pairs * positions**2 * (3 * d_k + 2 * d_v),
        bytes_forward=4 * (vectors + table + pairs * positions * d_v + 2 * sets * positions),
        bytes_backward=4 * (2 * vectors + 2 * table + 2 * pairs * positions * d_v + 2 * sets * positions),
        # As much as rel_attention_2d on the same grid.
        memory_limit=int(1.5 * 4 * (vectors + pairs * positions * d_v + pairs * positions * (H + W))),
        sizes=sizes,
        memory_only=memory_only,
    )


#: Two stages of Swin-T on 4 images, 12x12 windows (Swin at 384), and the global attention of CoAtNet-0.
SHAPES = (
    _shape(256, 3, 7, 7, 32, 32, 64, name="7x7 of 64 shifted windows, B 256, d 32 (Swin-T stage 1)"),
    _shape(16, 12, 7, 7, 32, 32, 4, name="7x7 of 4 shifted windows, B 16, d 32 (Swin-T stage 3)"),
    _shape(64, 4, 12, 12, 32, 32, name="12x12, B 64, d 32 (windows)"),
    _shape(8, 12, 14, 14, 32, 32, name="14x14, B 8, d 32 (CoAtNet)"),
)
GPU_SHAPES = (
    _shape(8192, 3, 7, 7, 32, 32, 64, name="7x7 of 64 shifted windows, B 8192, d 32 (Swin-T stage 1)"),
    _shape(512, 12, 7, 7, 32, 32, 4, name="7x7 of 4 shifted windows, B 512, d 32 (Swin-T stage 3)"),
    _shape(2048, 4, 12, 12, 32, 32, name="12x12, B 2048, d 32 (windows)"),
    _shape(128, 12, 14, 14, 32, 32, name="14x14, B 128, d 32 (CoAtNet)"),
)
# 96x96: the reference alone would need 30 GiB.
GROWTH = tuple(_shape(1, 8, n, n, 32, 32, name=f"{n}x{n}, B 1, d 32", memory_only=n > 64) for n in (16, 32, 64, 96))


SPECS = (
    OpSpec(
        name="bias_attention_2d",
        function=bias_attention_2d,
        implementations=op.rel_attention_2d.implementations("query", "key", "value"),
        samples=SAMPLES,
        fuzz=fuzz,
        operators=partial(operators, ""),
        shapes=SHAPES,
        growth=GROWTH,
        gpu_shapes=GPU_SHAPES,
        make_shape=_shape,
        peers=PEERS,
        autocast=partial(convert, keep=("bias_table",)),
    ),
)
