"""Samples, benchmark shapes and peers of ``rel_attention_2d`` and ``decomposed_bias_attention``."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .._floor.declarations import OpSpec, Sample, Shape, contiguous, drawn, expanded, spread
from . import op
from .api import decomposed_bias_attention, rel_attention_2d
from .peers import BIAS_PEERS, REL_PEERS

Grid = tuple[int, int]


# --- layouts: a logical (B, heads, H, W, d) tensor in some memory order ---------------------------------------------


def channels_last(shape, dtype, device):
    """As the heads of a channels_last convolution lie: (B, H, W, heads, d) in memory."""
    batch, heads, height, width, depth = shape
    return contiguous((batch, height, width, heads, depth), dtype, device).permute(0, 3, 1, 2, 4)


def _channels_first(shape, dtype, device):
    """As the heads of a contiguous convolution lie: (B, heads, d, H, W) in memory."""
    batch, heads, height, width, depth = shape
    return contiguous((batch, heads, depth, height, width), dtype, device).permute(0, 1, 3, 4, 2)


def _heads_first(shape, dtype, device):
    batch, heads, height, width, depth = shape
    return contiguous((heads, batch, height, width, depth), dtype, device).transpose(0, 1)


def _inside(shape, dtype, device):
    """A slice of a larger convolution output, as split() gives it: queries, keys and values side by side."""
    batch, heads, height, width, depth = shape
    whole = contiguous((batch, 3 * heads * depth, height, width), dtype, device)
    return whole[:, heads * depth : 2 * heads * depth].unflatten(1, (heads, depth)).permute(0, 1, 3, 4, 2)


# --- calls ------------------------------------------------------------------------------------------------------------


def make_attention(dtype, device, *, batch, heads, query_grid, key_grid, d_k, d_v, layout=contiguous, key_layout=None):
    key_layout = key_layout or layout
    return {
        "query": layout((batch, heads, *query_grid, d_k), dtype, device),
        "key": key_layout((batch, heads, *key_grid, d_k), dtype, device),
        "value": key_layout((batch, heads, *key_grid, d_v), dtype, device),
    }


def make_segments(kind: str, device, *, batch, query_grid, key_grid, **_) -> dict[str, Any]:
    """Segments of a grid: ``"halves"``, another cut for every image; ``"padded"``, the same with keys that are padding
    and queries without a key; ``"one"``, a set of one segment for all; ``"empty"``, no query has a key.
    """
    if not kind:
        return {}
    sets = 1 if kind in ("one", "empty") else batch
    queries, keys = (torch.zeros(sets, *grid, dtype=torch.int32) for grid in (query_grid, key_grid))
    if kind == "empty":
        keys.fill_(1)
    for image in range(sets if kind in ("halves", "padded") else 0):
        for segments in (queries, keys):
            height, width = segments.shape[1:]
            segments[image, (height + image) // 2 :] += 1
            segments[image, :, (width + 1) // 2 :] += 2
        if kind == "padded":
            keys[image, -1:, image:] = -1
            keys[image][keys[image] == 2] = -7  # every key of a segment
            queries[image, :1, -1:] = -7
    return {"query_segments": queries.to(device), "key_segments": keys.to(device)}


def make_prefix(count: int, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``count`` prefix keys, in the second of two parts of memory; none for 0."""
    if not count:
        return {}
    key, value = inputs["key"], inputs["value"]

    def prefix(like, depth):
        return contiguous((*like.shape[:2], 2 * count, depth), like.dtype, like.device)[:, :, count:]

    return {"prefix_key": prefix(key, key.shape[4]), "prefix_value": prefix(value, value.shape[4])}


def make_rel_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    terms: str = "hw",
    tables: str = "shared",
    segments: str = "",
    prefix: int = 0,
    options: Mapping[str, Any] | None = None,
    **geometry: Any,
) -> dict[str, Any]:
    """Arguments of ``rel_attention_2d``; ``terms`` names the axes with a table, ``tables`` says of what kind."""
    inputs = make_attention(dtype, device, **geometry)
    heads, d_k = geometry["heads"], geometry["d_k"]
    for axis, letter in enumerate("hw"):
        if letter not in terms:
            continue
        length = max(geometry["query_grid"][axis] + geometry["key_grid"][axis] - 1, 0)
        shape = (heads, length, d_k) if tables in ("per head", "expanded") else (length, d_k)
        if tables == "expanded":
            table = torch.randn(1, length, d_k, dtype=torch.float64).to(device, dtype).expand(shape)
        elif tables == "transposed":
            table = torch.randn(d_k, length, dtype=torch.float64).to(device, dtype).t()
        else:
            table = torch.randn(shape, dtype=torch.float64).to(device, dtype)
        inputs[f"rel_{letter}"] = table
    return {**inputs, **make_segments(segments, device, **geometry), **make_prefix(prefix, inputs), **(options or {})}


def make_bias_inputs(
    dtype: torch.dtype,
    device: torch.device,
    *,
    terms: str = "hw",
    edit: Callable[[dict[str, Any]], None] | None = None,
    segments: str = "",
    prefix: int = 0,
    options: Mapping[str, Any] | None = None,
    **geometry: Any,
) -> dict[str, Any]:
    """Arguments of ``decomposed_bias_attention``; ``edit`` changes them afterwards."""
    inputs = make_attention(dtype, device, **geometry)
    for axis, letter in enumerate("hw"):
        if letter in terms:
            shape = (geometry["batch"], geometry["heads"], *geometry["query_grid"], geometry["key_grid"][axis])
            inputs[f"bias_{letter}"] = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    if edit is not None:
        edit(inputs)
    return {**inputs, **make_segments(segments, device, **geometry), **make_prefix(prefix, inputs), **(options or {})}


SMALL = {"batch": 2, "heads": 2, "query_grid": (3, 4), "key_grid": (3, 4), "d_k": 4, "d_v": 3}


def geometry(query_grid: Grid, key_grid: Grid | None = None, d_k=20, d_v=2, batch=1, heads=2, **layouts) -> dict:
    return {
        "batch": batch, "heads": heads, "query_grid": query_grid, "key_grid": key_grid or query_grid, "d_k": d_k,
        "d_v": d_v, **layouts,
    }  # fmt: skip


GEOMETRIES = {
    "small": SMALL,
    "1x1": geometry((1, 1), d_k=4),
    "one key": geometry((5, 3), (1, 1), d_k=4),
    "one query": geometry((1, 1), (6, 7)),
    "primes 13x7": geometry((13, 7), d_v=4),
    "query grid larger": geometry((8, 6), (4, 3), d_v=5),
    "key grid larger": geometry((4, 3), (13, 17), d_v=5),
    "width 2": geometry((17, 2)),
    "width 3": geometry((11, 3), d_v=8),
    "width 4": geometry((9, 4)),
    "width 8": geometry((8, 8), d_v=8, batch=2),
    "width 13": geometry((3, 13)),
    "width 16": geometry((16, 16), d_v=4),
    "width 17": geometry((5, 17)),
    "width 31": geometry((4, 31)),
    "width 32": geometry((32, 32), heads=1),
    "width 33": geometry((3, 33)),
    "width 130": geometry((3, 130), heads=1),
    "row 1x65": geometry((1, 65), d_k=7, d_v=1),
    "column 40x1": geometry((40, 1), d_k=7, d_v=1),
    "many rows": geometry((40, 24), heads=1, d_k=8),
    "deep 64": geometry((6, 10), d_k=64, d_v=64),
    "deep 40": geometry((5, 6), d_k=40, d_v=40, heads=1),
    "deep windows": geometry((14, 14), d_k=64, d_v=64, heads=1),
    "deep, several tiles": geometry((34, 36), d_k=16, d_v=16, heads=1),
    "deep 80": geometry((5, 5), d_k=80, d_v=80, heads=1),
    "deep 128": geometry((4, 4), d_k=128, d_v=16, heads=1),
    "deep values": geometry((3, 7), d_k=16, d_v=65),
    "odd depths": geometry((5, 6), d_k=1, d_v=1),
    "channels_last": geometry((6, 8), d_v=4, batch=2, layout=channels_last),
    "channels first": geometry((6, 8), d_v=4, batch=2, layout=_channels_first),
    "heads first": geometry((6, 8), d_v=4, batch=2, layout=_heads_first),
    "spread": geometry((3, 5), d_k=4, layout=spread),
    "slice of qkv": geometry((4, 5), d_k=4, d_v=4, batch=2, layout=_inside),
    "mixed layouts": geometry((4, 5), d_k=4, batch=2, layout=_channels_first, key_layout=channels_last),
    "expanded keys": geometry((4, 5), d_k=4, batch=3, key_layout=expanded),
    "no value depth": geometry((3, 4), d_k=4, d_v=0),
    "no heads": geometry((3, 4), d_k=4, heads=0),
    "no images": geometry((3, 4), d_k=4, batch=0),
    "no queries": geometry((0, 4), (3, 4), d_k=4),
    "no keys": geometry((3, 4), (3, 0), d_k=4),
}


QUERY_MINUS_KEY = {"index": "query_minus_key"}

#: Pairs of a head and an image for several whole vectors of them, and a part of one: on the CPU, small grids of as many
#: pairs have kernels of their own.
MANY = geometry((3, 4), (4, 3), d_k=5, d_v=3, batch=23, heads=3)
#: Keys that all but fill vectors and depths that do, of fewer pairs: so have these.
FULL = geometry((4, 3), (3, 5), d_k=16, d_v=32, batch=6, heads=3)
SMALL_GRIDS = {"many pairs": MANY, "full vectors": FULL}
MANY_GEOMETRIES = {
    "many pairs": MANY,
    "many pairs, one key": geometry((2, 3), (1, 1), d_k=4, batch=70, heads=1),
    "many pairs, several blocks": geometry((17, 12), (11, 9), d_k=20, d_v=17, batch=3, heads=23),
    "many pairs, deep": geometry((7, 7), d_k=32, d_v=64, batch=11, heads=6),
    "full vectors": FULL,
    "full vectors, odd depths": geometry((4, 3), (3, 5), d_k=15, d_v=31, batch=6, heads=3),
    "full vectors, several blocks": geometry((16, 13), (10, 16), d_k=48, d_v=64, batch=4, heads=4),
    "full vectors, wide": geometry((2, 5), (2, 39), d_k=16, d_v=31, batch=2, heads=9),
    "full vectors, many pairs": geometry((8, 8), d_k=48, d_v=64, batch=16, heads=4),
    "full vectors, windows": geometry((7, 7), d_k=32, d_v=32, batch=24, heads=3, layout=channels_last),
}
for _name, _geometry in SMALL_GRIDS.items():
    MANY_GEOMETRIES |= {
        f"{_name}, channels_last": {**_geometry, "layout": channels_last},
        f"{_name}, channels first": {**_geometry, "layout": _channels_first},
        f"{_name}, spread": {**_geometry, "layout": spread},
        f"{_name}, expanded keys": {**_geometry, "layout": _inside, "key_layout": expanded},
    }
#: Further settings of samples of them.
MANY_SETTINGS = {
    f"{name}, {what}": {**geometry, **settings}
    for name, geometry in SMALL_GRIDS.items()
    for what, settings in (
        ("prefix 1", {"prefix": 1}),
        ("halves", {"segments": "halves"}),
        ("empty", {"segments": "empty"}),
        ("padded, prefix 1, dropout", {"segments": "padded", "prefix": 1, "options": {"dropout_p": 0.3}}),
        ("prefix alone", {"key_grid": (3, 0), "prefix": 16}),
    )
}

#: (segments, geometry) and (number of prefix keys, geometry) of samples.  The kernels of all functions are one: the
#: first few are samples of each, all are those of ``bias_attention_2d``.
SEGMENT_CASES = (
    ("padded", "small"),
    ("halves", "width 17"),
    ("padded", "deep, several tiles"),
    ("halves", "small"),
    ("one", "small"),
    ("empty", "small"),
    ("padded", "width 8"),
    ("halves", "key grid larger"),
    ("padded", "channels_last"),
    ("halves", "no keys"),
)
PREFIX_CASES = (
    (1, "small"),
    (33, "width 17"),
    (3, "deep, several tiles"),
    (5, "width 8"),
    (2, "deep windows"),
    (1, "no keys"),
    (2, "channels first"),
    (70, "1x1"),
)


def _rel_sample(name: str, small: bool = False, **settings: Any) -> Sample:
    return Sample(name, partial(make_rel_inputs, **settings), small=small)


def _bias_sample(name: str, small: bool = False, **settings: Any) -> Sample:
    return Sample(name, partial(make_bias_inputs, **settings), small=small)


REL_SAMPLES = (
    *(_rel_sample(name, small=name == "small", **geometry) for name, geometry in GEOMETRIES.items()),
    *(_rel_sample(name, **settings) for name, settings in (MANY_GEOMETRIES | MANY_SETTINGS).items()),
    *(
        sample
        for name, many in SMALL_GRIDS.items()
        for sample in (
            _rel_sample(f"{name}, rows only, per-head tables", **many, terms="h", tables="per head"),
            _rel_sample(f"{name}, columns only, query_minus_key", **many, terms="w", options=QUERY_MINUS_KEY),
        )
    ),
    _rel_sample("no tables", small=True, **SMALL, terms=""),
    _rel_sample("rows only", small=True, **SMALL, terms="h"),
    _rel_sample("columns only", **SMALL, terms="w"),
    _rel_sample("per-head tables", small=True, **SMALL, tables="per head"),
    _rel_sample("expanded tables", **SMALL, tables="expanded"),
    _rel_sample("transposed tables", **SMALL, tables="transposed"),
    _rel_sample("query_minus_key", small=True, **SMALL, options=QUERY_MINUS_KEY),
    _rel_sample(
        "query_minus_key, unequal grids",
        **geometry((6, 5), (4, 9), d_v=4),
        tables="per head",
        options=QUERY_MINUS_KEY,
    ),
    _rel_sample("rel_scale 1", **SMALL, options={"rel_scale": 1.0}),
    _rel_sample("scale 0.1, rel_scale 0.7", small=True, **SMALL, options={"scale": 0.1, "rel_scale": 0.7}),
    _rel_sample("scale 0", **SMALL, options={"scale": 0.0, "rel_scale": 1.0}),
    _rel_sample("large logits", **geometry((7, 9), heads=1), options={"scale": 2.0}),
    _rel_sample("dropout", small=True, **SMALL, options={"dropout_p": 0.3}),
    _rel_sample("dropout, width 8", **GEOMETRIES["width 8"], options={"dropout_p": 0.5}),
    _rel_sample("dropout, width 32", **geometry((8, 32)), options={"dropout_p": 0.1}),
    *(
        _rel_sample(f"{segments}, {name}", **GEOMETRIES[name], segments=segments)
        for segments, name in SEGMENT_CASES[:3]
    ),
    *(_rel_sample(f"prefix {count}, {name}", **GEOMETRIES[name], prefix=count) for count, name in PREFIX_CASES[:3]),
    _rel_sample(
        "segments, prefix, dropout", small=True, **SMALL, segments="padded", prefix=3, options={"dropout_p": 0.3}
    ),
)


def _mask_rows(inputs: dict[str, Any]) -> None:
    """Mask key row 0 for every query, and every key for the queries of row 1."""
    inputs["bias_h"][..., 0] = float("-inf")
    inputs["bias_h"][:, :, 1] = float("-inf")


def _mask_columns(inputs: dict[str, Any]) -> None:
    inputs["bias_w"][..., 1:] = float("-inf")


def _mask_crossed(inputs: dict[str, Any]) -> None:
    """Neither term alone masks every key of the queries of column 0; both together do."""
    inputs["bias_h"][:, :, :, 0, 1:] = float("-inf")
    inputs["bias_h"][:, :, :, 1] = float("-inf")
    inputs["bias_w"][:, :, :, 0, :2] = float("-inf")
    inputs["bias_w"][:, :, 0, 2] = float("-inf")


def _mask_image(inputs: dict[str, Any]) -> None:
    """Mask every key of one whole image."""
    inputs["bias_h"][-1] = float("-inf")


def _mask_least(inputs: dict[str, Any]) -> None:
    """Masks of the least finite number: every key of some queries, through either term, some keys of the others."""
    least = torch.finfo(inputs["bias_h"].dtype).min
    inputs["bias_h"][:, :, 1] = least
    inputs["bias_w"][:, :, 2, 0] = least
    inputs["bias_h"][:, :, 2, 1:, 0] = least


def _mask_mixed(inputs: dict[str, Any]) -> None:
    """Every key of some queries masked, by numbers beside which logits round away, the least finite one or -inf."""
    least = torch.finfo(inputs["bias_h"].dtype).min
    inputs["bias_h"][:, :, 1] = max(least, -1e9)
    inputs["bias_h"][:, :, 1, :, 1:] = least
    inputs["bias_w"][:, :, 2] = least
    inputs["bias_w"][:, :, 2, :, 1:] = float("-inf")


def _expand(inputs: dict[str, Any]) -> None:
    for name in ("bias_h", "bias_w"):
        inputs[name] = inputs[name][:, :1, :1, :1].expand(inputs[name].shape)


def _expand_keys(inputs: dict[str, Any]) -> None:
    for name in ("bias_h", "bias_w"):
        inputs[name] = inputs[name][..., :1].expand(inputs[name].shape)


def _spread_bias(inputs: dict[str, Any]) -> None:
    for name in ("bias_h", "bias_w"):
        inputs[name] = inputs[name].transpose(2, 4).repeat_interleave(2, 3)[:, :, :, ::2].transpose(2, 4)


def _plant(name: str, value: float, position: int = 0) -> Callable[[dict[str, Any]], None]:
    def edit(inputs: dict[str, Any]) -> None:
        # One image of two: the other one's results must stay finite and right.
        inputs[name][0, 0, position, position, 0] = value

    return edit


def _disagree(inputs: dict[str, Any]) -> None:
    """Every logit of one query is -inf: it has no key, padding of vectors included."""
    inputs["key"].abs_().neg_()
    inputs["query"][0, 0, 0, 0] = float("inf")


BIAS_SAMPLES = (
    *(_bias_sample(name, small=name == "small", **geometry) for name, geometry in GEOMETRIES.items()),
    *(_bias_sample(name, **settings) for name, settings in (MANY_GEOMETRIES | MANY_SETTINGS).items()),
    *(
        _bias_sample(f"{name}, {what}", **many, **settings)
        for name, many in SMALL_GRIDS.items()
        for what, settings in (
            ("no bias", {"terms": ""}),
            ("rows only", {"terms": "h"}),
            ("strided bias", {"edit": _spread_bias}),
            ("masked by both terms", {"edit": _mask_crossed}),
            ("masked by several numbers", {"edit": _mask_mixed}),
            ("nan in query", {"edit": _plant("query", float("nan"))}),
            ("inf in the last value", {"edit": _plant("value", float("inf"), -1)}),
            ("inf in a query that no key agrees with", {"edit": _disagree}),
        )
    ),
    _bias_sample("no bias", **SMALL, terms=""),
    _bias_sample("rows only", small=True, **SMALL, terms="h"),
    _bias_sample("columns only", **SMALL, terms="w"),
    _bias_sample("expanded bias", **SMALL, edit=_expand),
    _bias_sample("masked rows", **SMALL, edit=_mask_rows),
    _bias_sample("masked rows, width 8", **GEOMETRIES["width 8"], edit=_mask_rows),
    _bias_sample("masked rows, width 32", **geometry((8, 32)), edit=_mask_rows),
    _bias_sample("bias expanded over keys", **SMALL, edit=_expand_keys),
    _bias_sample("strided bias", **SMALL, edit=_spread_bias),
    _bias_sample("masked columns", **SMALL, edit=_mask_columns),
    _bias_sample("masked by both terms", small=True, **SMALL, edit=_mask_crossed),
    _bias_sample("masked image", **SMALL, edit=_mask_image),
    _bias_sample("masked by the least finite number", **SMALL, edit=_mask_least),
    _bias_sample("masked by the least finite number, width 8", **GEOMETRIES["width 8"], edit=_mask_least),
    _bias_sample("masked by several numbers", **SMALL, edit=_mask_mixed),
    _bias_sample(
        "masked, expanded, dropped",
        **SMALL,
        edit=lambda inputs: (_mask_columns(inputs), _expand(inputs)),
        options={"dropout_p": 0.5},
    ),
    _bias_sample("nan in query", **SMALL, edit=_plant("query", float("nan"))),
    _bias_sample("nan in key", **SMALL, edit=_plant("key", float("nan"))),
    _bias_sample("inf in value", **SMALL, edit=_plant("value", float("inf"))),
    _bias_sample("inf in the last value", **SMALL, edit=_plant("value", float("inf"), -1)),
    _bias_sample("inf in bias_h", **SMALL, edit=_plant("bias_h", float("inf"))),
    _bias_sample("dropout", small=True, **SMALL, options={"dropout_p": 0.3}),
    *(
        _bias_sample(f"{segments}, {name}", **GEOMETRIES[name], segments=segments)
        for segments, name in SEGMENT_CASES[:3]
    ),
    *(_bias_sample(f"prefix {count}, {name}", **GEOMETRIES[name], prefix=count) for count, name in PREFIX_CASES[:3]),
    _bias_sample(
        "segments, prefix, dropout", small=True, **SMALL, segments="padded", prefix=3, options={"dropout_p": 0.3}
    ),
)


# --- random calls for the shape fuzz ----------------------------------------------------------------------------------


def fuzz_geometry(draw: random.Random) -> dict[str, Any]:
    query_grid = (draw.randint(1, 12), draw.randint(1, 36))
    key_grid = query_grid if draw.random() < 0.5 else (draw.randint(1, 12), draw.randint(1, 36))
    layouts = (contiguous, channels_last, _channels_first, _heads_first, spread)
    return geometry(
        query_grid,
        key_grid,
        d_k=draw.choice((1, 2, 3, 8, 16, 20, 24, 33, 40, 64)),
        d_v=draw.choice((1, 2, 3, 4, 5, 8, 20, 33, 40, 64)),
        batch=draw.randint(1, 2),
        heads=draw.randint(1, 3),
        layout=draw.choice(layouts),
        key_layout=draw.choice(layouts),
    )


def fuzz_extras(draw: random.Random) -> dict[str, Any]:
    return {"segments": draw.choice(("", "", "halves", "padded")), "prefix": draw.choice((0, 0, 1, 3, 20))}


def fuzz_rel(draw: random.Random) -> Sample:
    settings = {
        "terms": draw.choice(("hw", "hw", "h", "w", "")),
        "tables": draw.choice(("shared", "per head", "expanded", "transposed")),
        "options": {
            "index": draw.choice(("key_minus_query", "query_minus_key")),
            "rel_scale": draw.choice((None, 1.0)),
            "dropout_p": draw.choice((0.0, 0.0, 0.25)),
        },
        **fuzz_extras(draw),
        **fuzz_geometry(draw),
    }
    return drawn(make_rel_inputs, settings)


def fuzz_bias(draw: random.Random) -> Sample:
    settings = {
        "terms": draw.choice(("hw", "hw", "h", "w", "")),
        "options": {"dropout_p": draw.choice((0.0, 0.0, 0.25))},
        **fuzz_extras(draw),
        **fuzz_geometry(draw),
    }
    return drawn(make_bias_inputs, settings)


# --- benchmark shapes -------------------------------------------------------------------------------------------------


def _shape(
    B: int,
    heads: int,
    H: int,
    W: int,
    d_k: int,
    d_v: int,
    *,
    make=make_rel_inputs,
    name: str = "",
    memory_only: bool = False,
) -> Shape:
    """A case by its sizes; the query and key grids are equal."""
    grid, pairs, positions = (H, W), B * heads, H * W
    geometry = {"batch": B, "heads": heads, "query_grid": grid, "key_grid": grid, "d_k": d_k, "d_v": d_v}
    logits = pairs * positions * (H + W)
    tables = 2 * (H + W - 1) * d_k if make is make_rel_inputs else logits
    table_flops = 2 * logits * d_k if make is make_rel_inputs else 0
    vectors = pairs * positions * (2 * d_k + d_v)
    sizes = {"B": B, "heads": heads, "H": H, "W": W, "d_k": d_k, "d_v": d_v}
    return Shape(
        name or ",".join(f"{key}={value}" for key, value in sizes.items()),
        partial(make, **geometry),
        flops_forward=2 * pairs * positions**2 * (d_k + d_v) + table_flops,
        flops_backward=2 * pairs * positions**2 * (3 * d_k + 2 * d_v) + 3 * table_flops,
        bytes_forward=4 * (vectors + tables + pairs * positions * d_v),
        bytes_backward=4 * (2 * vectors + 2 * tables + 2 * pairs * positions * d_v),
        # Finished logits have a gradient of their size, which the caller asked for.
        memory_limit=int(
            1.5 * 4 * (vectors + pairs * positions * d_v + logits * (1 if make is make_rel_inputs else 2))
        ),
        sizes=sizes,
        memory_only=memory_only,
    )


def _growth(make) -> tuple[Shape, ...]:
    # 96x96: the reference alone would need 30 GiB.
    return tuple(
        _shape(1, 8, n, n, 20, 2, make=make, name=f"{n}x{n}, B 1, d_k 20, d_v 2", memory_only=n > 64)
        for n in (16, 32, 64, 96)
    )


#: The three stages of AA-WRN on 32x32 images, and SAM's global attention.
REL_SHAPES = (
    _shape(8, 8, 32, 32, 20, 2, name="32x32, d_k 20, d_v 2"),
    _shape(8, 8, 16, 16, 20, 4, name="16x16, d_k 20, d_v 4"),
    _shape(8, 8, 8, 8, 20, 8, name="8x8, d_k 20, d_v 8"),
    _shape(1, 12, 64, 64, 64, 64, name="64x64, d 64 (SAM)"),
)
REL_GPU_SHAPES = (
    _shape(128, 8, 32, 32, 20, 2, name="32x32, B 128, d_k 20, d_v 2"),
    _shape(128, 8, 16, 16, 20, 4, name="16x16, B 128, d_k 20, d_v 4"),
    _shape(128, 8, 8, 8, 20, 8, name="8x8, B 128, d_k 20, d_v 8"),
    _shape(8, 12, 64, 64, 64, 64, name="64x64, B 8, d 64 (SAM)"),
)
#: SAM and ViTDet on 1024x1024 images: global attention, and 25 windows.
BIAS_SHAPES = (
    _shape(1, 12, 64, 64, 64, 64, make=make_bias_inputs, name="64x64, d 64 (SAM)"),
    _shape(25, 12, 14, 14, 64, 64, make=make_bias_inputs, name="14x14, d 64 (SAM windows)"),
)
BIAS_GPU_SHAPES = (
    _shape(8, 12, 64, 64, 64, 64, make=make_bias_inputs, name="64x64, B 8, d 64 (SAM)"),
    _shape(200, 12, 14, 14, 64, 64, make=make_bias_inputs, name="14x14, B 200, d 64 (SAM windows)"),
)


# --- specs ------------------------------------------------------------------------------------------------------------


def operators(prefix: str, impl: str, inputs: Mapping[str, Any]) -> tuple[tuple[Any, tuple], ...]:
    terms = (inputs["query"], inputs["key"], inputs["value"], inputs.get(f"{prefix}_h"), inputs.get(f"{prefix}_w"))
    names = ("bias_table", "query_segments", "key_segments", "prefix_key", "prefix_value")
    dropout_p = inputs.get("dropout_p", 0.0)
    seed = torch.tensor([1234567890123], device=terms[0].device) if dropout_p else None
    key_minus_query = inputs.get("index", "key_minus_query") == "key_minus_query"
    return op.rel_attention_2d.calls(impl, *terms, *map(inputs.get, names), 0.3, 0.7, key_minus_query, dropout_p, seed)


SPECS = (
    OpSpec(
        name="rel_attention_2d",
        function=rel_attention_2d,
        implementations=op.rel_attention_2d.implementations("query", "key", "value"),
        samples=REL_SAMPLES,
        fuzz=fuzz_rel,
        operators=partial(operators, "rel"),
        shapes=REL_SHAPES,
        growth=_growth(make_rel_inputs),
        gpu_shapes=REL_GPU_SHAPES,
        make_shape=partial(_shape, make=make_rel_inputs),
        peers=REL_PEERS,
    ),
    OpSpec(
        name="decomposed_bias_attention",
        function=decomposed_bias_attention,
        implementations=op.rel_attention_2d.implementations("query", "key", "value"),
        samples=BIAS_SAMPLES,
        fuzz=fuzz_bias,
        operators=partial(operators, "bias"),
        shapes=BIAS_SHAPES,
        growth=_growth(make_bias_inputs),
        gpu_shapes=BIAS_GPU_SHAPES,
        make_shape=partial(_shape, make=make_bias_inputs),
        peers=BIAS_PEERS,
    ),
)
